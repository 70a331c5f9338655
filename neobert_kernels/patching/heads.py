"""Forwards of head models that read the encoder's packed output.

Each function here makes a maker: called with a head model's class, it returns the forward that
`patch` puts on an instance. Results are those of the class's own forward on real tokens; at
padding, logits are zero (spans: the lowest number, so that no span can lie there), and labels there
are ignored. An adapter says how its family turns hidden states into logits; what is shared is here.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neobert_kernels as nk
from neobert_kernels import _check
from neobert_kernels.patching import invariant
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.blocks import at, own_forward
from neobert_kernels.patching.family import (
    OPTIONS,
    HeadCall,
    Options,
    Packed,
    as_output,
    hidden_states,
    in_place_of,
)

IGNORE_INDEX = -100

Maker = Callable[[type], Callable]
Score = Callable[[Any, Tensor], Tensor]
Pool = Callable[[Any, Packed], Tensor]
Loss = Callable[[Any, Tensor, Tensor, Any], Tensor]


def mean_pooled(x: Packed) -> Tensor:
    return nk.mean_pool(x.x, x.batch.cu_seqlens)


def first_pooled(x: Packed) -> Tensor:
    return nk.first_pool(x.x, x.batch.cu_seqlens)


def pooled(self: Any, packed: Packed) -> Tensor:
    """What the base model's pooler made."""
    if packed.pooled is None:
        raise _check.error("model", "a base model with a pooler", type(self).__name__)
    return packed.pooled


def _base(self: Any) -> nn.Module:
    return getattr(self, self.base_model_prefix)


def _call_base(self: Any, inputs: dict[str, Any], head: HeadCall) -> Packed:
    """Through ``__call__``, so that hooks on the base model run."""
    packed = _base(self)(**inputs, _head=head)
    if not isinstance(packed, Packed):  # a part was unpatched or replaced by itself
        rule = "its encoder to be patched as the head is (unpatch and patch the whole model)"
        raise _check.error("model", rule, "a plain one")
    return packed


def _each(self: Any, packed: Packed, fn: Callable[[Packed], Tensor]) -> Tensor:
    """``fn`` of the batch, or document by document where others must not change the bits."""
    if not getattr(self, OPTIONS).batch_invariant or invariant.together(self, packed.x):
        return fn(packed)
    parts = [fn(each) for each in packed.documents()]
    return torch.cat(parts) if parts else fn(packed)


def _output(
    self: Any,
    kind: str,
    packed: Packed,
    return_dict: bool | None,
    **values: Any,
) -> Any:
    values["hidden_states"] = hidden_states(self, packed)
    return as_output(kind, values, self.config, return_dict)


def _lay_out(self: Any, packed: Packed, x: Tensor) -> Tensor:
    return packed.batch.layout(getattr(self, OPTIONS).packed_output)(x)


def _labels(name: str, labels: Tensor, packed: Batch, like: Tensor) -> Tensor:
    """Token labels ``[B, S]`` (packed: ``[1, T]``) as ``[T]``."""
    _check.tensor(name, labels, ndim=2)
    packing = packed.packing
    rows = (1, len(packed.positions))
    if packing is not None:
        rows = (packing.batch_size, packing.padded_length)
    _check.shape(name, labels, rows)
    return packed.pack(labels.to(like.device))


def cross_entropy(logits: Tensor, labels: Tensor, items: Any = None) -> Tensor:
    """Mean over the labels that count, or their sum over ``items``; in float32 at least."""
    _check_labels(labels, logits.shape[-1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if items is None:
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum") / items


def _check_labels(labels: Tensor, classes: int) -> None:
    _check.within("labels", labels, classes, IGNORE_INDEX)


# --- masked LM


def masked_lm(
    hidden: Score,
    decoder: Callable[[Any], Any],
    by_items: bool = False,
    zero_if_empty: bool = False,
    loss_function: bool = False,
    sparse: Callable[[Any], int | None] = lambda self: None,
) -> Maker:
    """Masked LM.

    Args:
        hidden: ``(model, [N, C])`` to what the decoder reads.
        decoder: The Linear over the vocabulary.
        by_items: Whether the family's loss is divided by the Trainer's ``num_items_in_batch``.
        zero_if_empty: Whether a batch without any label has loss 0; else NaN, as torch's mean.
        loss_function: Whether the class calls ``self.loss_function``, which users can replace.
        sparse: ``(model)`` to the label at which the class, given labels, returns no logits: they
            are ``[N, V]`` then, at the N other tokens. None: it returns them at every token.
    """

    @functools.cache
    def maker(cls: type) -> Callable:
        def forward(self: Any, inputs: dict[str, Any]) -> Any:
            """The class's forward; while training with labels, without logits (see `patch`).

            ``labelled_rows``: int64 indices of all labelled tokens of packed input, where the
            caller's collator knows them.
            """
            options = getattr(self, OPTIONS)
            labels = inputs.pop("labels", None)
            rows = inputs.pop("labelled_rows", None)
            return_dict = inputs.pop("return_dict", None)
            items = inputs.pop("num_items_in_batch", None)
            if not by_items:
                items = None
            own_loss = loss_function and "_loss_function" in vars(self)
            if labels is not None and not (own_loss or _wants_logits(self, options, decoder(self))):
                total, packed = _loss_only(self, inputs, labels, rows, items, options)
                return _output(self, "MaskedLMOutput", packed, return_dict, loss=total)
            left_out = None if labels is None else sparse(self)

            def kept(batch: Batch) -> Tensor:
                assert labels is not None
                assert left_out is not None
                return _labelled(labels, batch, (left_out,)).nonzero().squeeze(1)

            late = getattr(self, OPTIONS).batch_invariant  # rows are chosen from whole documents
            call = HeadCall(kept) if left_out is not None and not late else HeadCall()
            packed = _call_base(self, inputs, call)
            logits = _each(self, packed, lambda each: decoder(self)(hidden(self, each.x)))
            if left_out is not None and late:
                packed = packed._replace(rows=kept(packed.batch))
                logits = at(packed.rows, logits)
            loss = None
            if labels is not None:
                labels = at(packed.rows, _labels("labels", labels, packed.batch, logits))
                if zero_if_empty and items is None:
                    items = (labels != IGNORE_INDEX).sum().clamp(min=1)
                if own_loss:
                    loss = _own_loss(self, logits, labels, items)
                else:
                    loss = cross_entropy(logits, labels, items)
            if packed.rows is None:
                logits = _lay_out(self, packed, logits)
            return _output(self, "MaskedLMOutput", packed, return_dict, loss=loss, logits=logits)

        def _loss_only(
            self: Any,
            inputs: dict[str, Any],
            labels: Tensor,
            known: Tensor | None,
            items: Any,
            options: Options,
        ) -> tuple[Tensor, Packed]:
            left_out = sparse(self)
            unlabelled = (IGNORE_INDEX,) if left_out is None else (IGNORE_INDEX, left_out)

            def rows_of(batch: Batch) -> Tensor:
                if known is not None:
                    return _known_rows(known, labels, batch, unlabelled)
                return _labelled(labels, batch, unlabelled).nonzero().squeeze(1)

            packed = _call_base(self, inputs, HeadCall(rows_of, options.labelled_rows_only))
            x, rows = packed.x, packed.rows
            assert rows is not None
            own = _labels("labels", labels, packed.batch, x).index_select(0, rows)
            out = decoder(self)
            total = nk.linear_cross_entropy(
                hidden(self, x), out.weight, own, out.bias, reduction="sum", rows=len(own)
            )
            if items is None:
                items = max(len(own), 1) if zero_if_empty else len(own)
            return total / items, packed

        return in_place_of(cls, forward)

    return maker


def _known_rows(rows: Tensor, labels: Tensor, batch: Batch, unlabelled: tuple[int, ...]) -> Tensor:
    """``labelled_rows`` of a packed call: nothing has to be read back from the device then."""
    if batch.packing is not None:
        raise _check.error("labelled_rows", "None unless the input is packed", tuple(rows.shape))
    _check.tensor("labelled_rows", rows, ndim=1)
    _check.dtype("labelled_rows", rows, (torch.int64,))
    _check.device("labelled_rows", rows, batch.positions.device)
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        wanted = _labelled(labels, batch, unlabelled).nonzero().squeeze(1)
        if not torch.equal(rows.sort().values, wanted):
            rule = f"the indices of all labelled tokens ({len(wanted)})"
            raise _check.error("labelled_rows", rule, f"{len(rows)} others")
    return rows


def _labelled(labels: Tensor, batch: Batch, unlabelled: tuple[int, ...]) -> Tensor:
    """Whether each token's label is none of ``unlabelled``: ``[T]`` bool."""
    own = _labels("labels", labels, batch, batch.positions)
    labelled = torch.ones_like(own, dtype=torch.bool)
    for index in unlabelled:
        labelled &= own != index
    return labelled


def _wants_logits(self: Any, options: Options, decoder: Any) -> bool:
    # A decoder that is more than its weight and bias (LoRA, pruning, a hook) has to be called.
    hooked = decoder._forward_hooks or decoder._forward_pre_hooks
    plain = type(decoder) is nn.Linear and not hooked and not own_forward(decoder)
    if options.mlm_logits is False and not plain:
        rule = "True or None where the decoder is more than a plain Linear"
        raise _check.error("mlm_logits", rule, False)
    if options.mlm_logits is not None:
        return options.mlm_logits
    return not (self.training and plain)


def _own_loss(self: Any, logits: Tensor, labels: Tensor, items: Any) -> Tensor:
    options = {} if items is None else {"num_items_in_batch": items}
    vocabulary = self.config.vocab_size
    return self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **options)


# --- sequences: one prediction per document


def classification_loss(self: Any, logits: Tensor, labels: Tensor, items: Any = None) -> Tensor:
    """By ``config.problem_type``, which is set at the first call as transformers sets it."""
    config = self.config
    labels = labels.to(logits.device)
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.int64, torch.int32):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"
    if config.problem_type == "regression":
        if logits.numel() != labels.numel():  # torch would broadcast
            raise _check.error("labels", f"{logits.numel()} values", labels.numel())
        return F.mse_loss(logits.flatten(), labels.flatten())
    if config.problem_type == "single_label_classification":
        _check_labels(labels, config.num_labels)
        return F.cross_entropy(logits.view(-1, config.num_labels), labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels)


def sequence_classification(classify: Pool, loss_of: Loss = classification_loss) -> Maker:
    """Sequence classification; ``classify(model, packed)`` gives logits ``[B, num_labels]``."""

    @functools.cache
    def maker(cls: type) -> Callable:
        def forward(self: Any, inputs: dict[str, Any]) -> Any:
            """The class's forward on packed output; packed input gives one row per document."""
            labels, return_dict = inputs.pop("labels", None), inputs.pop("return_dict", None)
            items = inputs.pop("num_items_in_batch", None)
            packed = _call_base(self, inputs, HeadCall())
            logits = _each(self, packed, lambda each: classify(self, each))
            loss = None
            if labels is not None:
                _check.tensor("labels", labels, least_ndim=1)
                if len(labels) != len(logits):
                    raise _check.error("labels", f"one per document ({len(logits)})", len(labels))
                loss = loss_of(self, logits, labels, items)
            kind = "SequenceClassifierOutput"
            return _output(self, kind, packed, return_dict, loss=loss, logits=logits)

        return in_place_of(cls, forward)

    return maker


def multiple_choice(classify: Pool) -> Maker:
    """Multiple choice over ``[B, choices, S]``; ``classify`` gives ``[B * choices, 1]``."""

    @functools.cache
    def maker(cls: type) -> Callable:
        def forward(self: Any, inputs: dict[str, Any]) -> Any:
            """The class's forward, every choice packed."""
            labels, return_dict = inputs.pop("labels", None), inputs.pop("return_dict", None)
            name = "inputs_embeds" if inputs.get("input_ids") is None else "input_ids"
            tokens: Any = inputs.get(name)
            _check.tensor(name, tokens, ndim=4 if name == "inputs_embeds" else 3)
            choices = tokens.shape[1]
            flat = {
                key: value.flatten(0, 1) if isinstance(value, Tensor) and value.ndim > 2 else value
                for key, value in inputs.items()
            }
            packed = _call_base(self, flat, HeadCall())
            logits = _each(self, packed, lambda each: classify(self, each)).view(-1, choices)
            loss = None
            if labels is not None:
                _check_labels(labels, choices)
                loss = F.cross_entropy(logits, labels.to(logits.device))
            kind = "MultipleChoiceModelOutput"
            return _output(self, kind, packed, return_dict, loss=loss, logits=logits)

        return in_place_of(cls, forward)

    return maker


# --- tokens: one prediction per token


def token_loss(self: Any, logits: Tensor, labels: Tensor, items: Any = None) -> Tensor:
    _check_labels(labels, logits.shape[-1])
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)


def token_classification(score: Score, loss_of: Loss = token_loss) -> Maker:
    """Token classification; ``score(model, [T, C])`` gives ``[T, num_labels]``."""

    @functools.cache
    def maker(cls: type) -> Callable:
        def forward(self: Any, inputs: dict[str, Any]) -> Any:
            """The class's forward at real tokens."""
            labels, return_dict = inputs.pop("labels", None), inputs.pop("return_dict", None)
            items = inputs.pop("num_items_in_batch", None)
            packed = _call_base(self, inputs, HeadCall())
            logits = _each(self, packed, lambda each: score(self, each.x))
            loss = None
            if labels is not None:
                labels = _labels("labels", labels, packed.batch, logits)
                loss = loss_of(self, logits, labels, items)
            logits = _lay_out(self, packed, logits)
            kind = "TokenClassifierOutput"
            return _output(self, kind, packed, return_dict, loss=loss, logits=logits)

        return in_place_of(cls, forward)

    return maker


def question_answering(score: Score, loss_function: bool = False) -> Maker:
    """Extractive question answering; ``score(model, [T, C])`` gives ``[T, 2]``.

    Where the class calls ``self.loss_function``, which users can replace, so does this.
    """

    @functools.cache
    def maker(cls: type) -> Callable:
        def forward(self: Any, inputs: dict[str, Any]) -> Any:
            """The class's forward at real tokens; a span never begins or ends at padding."""
            return_dict = inputs.pop("return_dict", None)
            items = inputs.pop("num_items_in_batch", None)
            targets = [inputs.pop(f"{end}_positions", None) for end in ("start", "end")]
            packed = _call_base(self, inputs, HeadCall())
            answered = all(t is not None for t in targets)
            if answered and packed.batch.packing is None:
                raise _check.error("start_positions", "None when packed", tuple(targets[0].shape))
            logits = _each(self, packed, lambda each: score(self, each.x))
            lowest = torch.finfo(logits.dtype).min
            spans = [packed.batch.unpack(end, lowest) for end in logits.unbind(-1)]
            targets = [_at_tokens(target, packed.batch, logits) for target in targets]
            loss = None
            if answered and loss_function:
                options = {} if items is None else {"num_items_in_batch": items}
                loss = self.loss_function(*spans, *targets, **options)
            elif answered:
                loss = _span_loss(spans, targets)
            if getattr(self, OPTIONS).packed_output:
                spans = [packed.batch.pack(span)[None] for span in spans]
            kind = "QuestionAnsweringModelOutput"
            start, end = spans
            return _output(
                self, kind, packed, return_dict, loss=loss, start_logits=start, end_logits=end
            )

        return in_place_of(cls, forward)

    return maker


def _at_tokens(target: Any, batch: Batch, like: Tensor) -> Any:
    """Targets that lie at padding moved outside the row, where they do not count."""
    if target is None or batch.packing is None:
        return target
    real = batch.unpack(torch.ones(len(like), dtype=torch.bool, device=like.device))
    row = target.to(like.device).flatten()
    outside = real.shape[1]
    inside = real.gather(1, row.clamp(0, max(outside - 1, 0))[:, None])[:, 0]
    return torch.where(inside | (row >= outside) | (row < 0), row, outside)


def _span_loss(spans: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Mean of the two cross-entropies; a position outside the row does not count."""
    outside = spans[0].shape[1]
    losses = [
        F.cross_entropy(
            logits, target.to(logits.device).flatten().clamp(0, outside), ignore_index=outside
        )
        for logits, target in zip(spans, targets, strict=True)
    ]
    return (losses[0] + losses[1]) / 2

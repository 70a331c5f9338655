"""What `patch` has to know about an encoder family, and the forward that all base models share.

An adapter is one module with a ``FAMILY``: how to check a model, how to embed packed tokens, how to
run the layers over them, and which of its heads read packed output (see ``heads``).
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neobert_kernels import _check
from neobert_kernels.patching import graphs, invariant
from neobert_kernels.patching.batch import Batch, read_batch, refuse_ignored, setting
from neobert_kernels.patching.blocks import MARK, View
from neobert_kernels.patching.frozen import PREPARED, Preparer, freeze, refuse_other_use
from neobert_kernels.patching.stacks import Stack

# The attribute of a patched module that holds its options; `unpatch` deletes it.
OPTIONS = "_neobert_kernels_options"


@dataclass(frozen=True)
class Options:
    """The keyword arguments of `patch`, explained there."""

    packed_output: bool = False
    mlm_logits: bool | None = None
    labelled_rows_only: bool = False
    inference: bool = False
    batch_invariant: bool = False
    cuda_graphs: bool = False


class Packed(NamedTuple):
    """A base model's output before it is laid out as the caller sent the input.

    Attributes:
        x: ``[T, C]`` last hidden state, or ``[N, C]`` at the rows that were asked for.
        batch: Boundaries and the way back.
        states: Hidden states ``[T, C]``, or None.
        pooled: ``[B, C]``, or None.
        rows: ``[N]`` int64, the rows of ``x`` that a head asked for; None: all.
    """

    x: Tensor
    batch: Batch
    states: list[Tensor] | None
    pooled: Tensor | None = None
    rows: Tensor | None = None

    def documents(self) -> Iterator["Packed"]:
        """Each document by itself, in memory of its own."""
        for i, (own, where) in enumerate(self.batch.documents()):
            pooled = None if self.pooled is None else self.pooled[i : i + 1].clone()
            yield Packed(self.x[where].clone(), own, None, pooled)


@dataclass(frozen=True, eq=False)
class Family:
    """One encoder family.

    Attributes:
        name: As in `PatchReport.families`.
        operators: Names of the operators used.
        check: Raises ValueError unless every part of a base model is understood.
        layers: ``(name, layer)`` of every block of a base model.
        layer_forward: A block on packed tokens, marked with `replacement`.
        view: ``(base, layer, preparer)`` to what ``layer_forward`` reads in a frozen model.
        stack: ``(base)`` to the weights of a frozen model's layers, where few tokens need no more.
        what: What is fused in a block, for the report.
        embed: ``(base, batch, tokens, extras)`` to ``[T, C]``.
        run: ``(base, x, batch, states, rows)`` to ``[T, C]``: all layers and the final norm.
            Appends to ``states`` unless it is None; computes only ``rows`` of the last layer's
            output unless they are None.
        output: Name of the base model's class in ``transformers.modeling_outputs``.
        longest: The most tokens a document may have, or None where nothing limits them.
        extras: Names of inputs ``[B, S]`` besides ids, mask and positions.
        pool: ``(base, x, batch)`` to the pooler's output or None; None if there is no pooler.
        windows: ``(base)`` to the radii of its local attention.
        first_position: Position of a document's first token.
        positions: ``(base, input_ids, batch)`` to positions ``[T]`` where the caller gives none;
            None: counted from ``first_position``.
        heads: Class name of a head model to the maker of its forward.
        check_head: Raises ValueError unless a head model's parts are understood; None where the
            class says enough.
    """

    name: str
    operators: tuple[str, ...]
    check: Callable[[Any], None]
    layers: Callable[[Any], Iterable[tuple[str, nn.Module]]]
    layer_forward: Callable
    view: Callable[[Any, Any, Preparer], View]
    stack: Callable[[Any], Stack]
    what: str
    embed: Callable[[Any, Batch, Tensor, dict[str, Tensor]], Tensor]
    run: Callable[[Any, Tensor, Batch, list[Tensor] | None, Tensor | None], Tensor]
    output: str
    longest: Callable[[Any], int | None]
    extras: tuple[str, ...] = ()
    pool: Callable[[Any, Tensor, Batch], Tensor | None] | None = None
    windows: Callable[[Any], set[int]] = lambda base: set()
    first_position: Callable[[Any], int] | None = None
    positions: Callable[[Any, Tensor, Batch], Tensor] | None = None
    heads: Mapping[str, Callable[[type], Callable]] = field(default_factory=dict)
    check_head: Callable[[Any], None] | None = None


def replacement(fn: Callable) -> Callable:
    """Mark ``fn`` as ours, so that `unpatch` finds it on a module, also on a deep copy.

    Pickle stores a bound method as its name: under this one a stored module is a plain one.
    """
    fn.__dict__[MARK] = fn
    fn.__name__ = "forward"
    return fn


def replacement_on(module: nn.Module) -> Callable | None:
    """Our function behind a module's own ``forward``, also within a wrapper (accelerate's)."""
    forward = module.__dict__.get("forward")
    forward = getattr(forward, "__func__", forward)
    while forward is not None:
        found = getattr(forward, MARK, None)
        if found is not None:
            return found
        forward = getattr(forward, "__wrapped__", None)
    return None


def in_place_of(cls: type, fn: Callable) -> Callable:
    """``fn(self, inputs)`` as a forward with the signature of ``cls.forward``.

    The signature matters: the Trainer drops data columns that it does not name, and callers pass
    arguments by position. ``inputs`` holds the arguments by name; a variable keyword is merged in.
    On an unpatched module, inside a wrapper that outlived the patch, it is ``cls.forward``.
    """
    signature = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    kinds = [p for p in signature.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    names = tuple(p.name for p in kinds)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, OPTIONS, None) is None:
            return cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        if len(args) > len(names):
            raise TypeError(f"forward takes {len(names)} positional arguments, got {len(args)}")
        for name, value in zip(names, args, strict=False):
            if name in kwargs:
                raise TypeError(f"forward got two values for {name!r}")
            kwargs[name] = value
        return fn(self, kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = fn.__doc__
    return replacement(forward)


@functools.cache
def frozen_layer_forward(layer_forward: Callable) -> Callable:
    """A block that reads its parts from the layer's view.

    A compiler has the layer itself: it lays out weights by its own lights, and sees later changes.
    """

    @replacement
    def forward(self: Any, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return layer_forward(self, *args)
        return layer_forward(self.__dict__[PREPARED], *args)

    return forward


@functools.cache
def base_forward(cls: type, family: Family) -> Callable:
    """The forward of a base model of class ``cls``."""

    def forward(self: Any, inputs: dict[str, Any]) -> Any:
        """The class's forward, on real tokens only; also takes packed input (see `read_batch`)."""
        head = inputs.pop("_head", None)
        return_dict = inputs.pop("return_dict", None)
        packed = encode(self, family, inputs, head)
        if head is not None:
            return packed
        lay_out = packed.batch.layout(getattr(self, OPTIONS).packed_output)
        output: dict[str, Any] = {
            "last_hidden_state": lay_out(packed.x),
            "hidden_states": hidden_states(self, packed),
        }
        if family.pool is not None:
            output["pooler_output"] = packed.pooled
        return as_output(family.output, output, self.config, return_dict)

    return in_place_of(cls, forward)


@dataclass(frozen=True)
class HeadCall:
    """Passed from a patched head to its base, which then returns `Packed`.

    Attributes:
        rows: ``(batch)`` to the rows ``[N]`` int64 that the head reads; None: all.
        in_last_layer: Whether the last layer already computes only those.
    """

    rows: Callable[[Batch], Tensor] | None = None
    in_last_layer: bool = False


def encode(base: Any, family: Family, inputs: dict[str, Any], head: HeadCall | None) -> Packed:
    """Check the arguments of a base model's forward, pack, embed, run the layers."""
    input_ids, embeds = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
    attention_mask = inputs.pop("attention_mask", None)
    position_ids = inputs.pop("position_ids", None)
    if (input_ids is None) == (embeds is None):
        got = "neither" if input_ids is None else "both"
        raise _check.error("input_ids", "either input_ids or inputs_embeds", got)
    if embeds is None:
        tokens = input_ids
        _check.tensor("input_ids", tokens, ndim=2)
        _check.dtype("input_ids", tokens, (torch.int64, torch.int32))
    else:
        tokens = embeds
        _check.tensor("inputs_embeds", tokens, ndim=3)
        _check.dtype("inputs_embeds", tokens)
        _check.shape("inputs_embeds", tokens, (*tokens.shape[:2], base.config.hidden_size))
    if getattr(base, OPTIONS).inference:
        refuse_other_use(base, embeds)
        if not torch.compiler.is_compiling():
            if base.__dict__[PREPARED] is None:  # a copy
                freeze(
                    base,
                    family.layers,
                    family.view,
                    family.stack,
                    invariant=getattr(base, OPTIONS).batch_invariant,
                )
            base.__dict__[PREPARED].check(base)
    keep = setting(inputs, "output_hidden_states", base.config)
    if setting(inputs, "output_attentions", base.config):
        rule = "False in a patched model (fused attention never forms the weights; unpatch first)"
        raise _check.error("output_attentions", rule, True)
    first = 0 if family.first_position is None else family.first_position(base)
    batch = read_batch(tokens, attention_mask, position_ids, inputs, family.longest(base), first)
    if position_ids is None and family.positions is not None and embeds is None:
        batch = batch.with_positions(family.positions(base, tokens, batch))
    extras = {name: inputs.pop(name, None) for name in family.extras}
    refuse_ignored(inputs)
    present = {
        name: batch.pack(_row_or_rows(name, value, tokens))
        for name, value in extras.items()
        if value is not None
    }
    own = batch.pack(tokens)
    options = getattr(base, OPTIONS)
    run = _run
    if options.batch_invariant:
        if invariant.together(base, own):
            batch = batch.with_longest(longest_document(base, family))
        else:
            run = _run_each
    if options.cuda_graphs and graphs.takes(_graphs(base, family), base, own, keep):
        if run is _run_each:
            rule = "layers that keep a row's bits with cuda_graphs=True beside batch_invariant"
            raise _check.error("model", rule, invariant.why_apart(base) or own.device)
        run = _replay
    rows = None if head is None or head.rows is None else head.rows(batch)
    # Hidden states are wanted at every token, and so are documents that run by themselves.
    early = rows is not None and head is not None and head.in_last_layer and not keep
    early = early and run is _run
    packed = run(base, family, own, batch, present, keep, rows if early else None)
    if rows is None:
        return packed
    x = packed.x if early else packed.x.index_select(0, rows)
    return Packed(x, batch, packed.states, rows=rows)


def _run(
    base: Any,
    family: Family,
    tokens: Tensor,
    batch: Batch,
    extras: dict[str, Tensor],
    keep: bool,
    rows: Tensor | None,
) -> Packed:
    """All layers over packed tokens, then the pooler unless only ``rows`` come out."""
    states: list[Tensor] | None = [] if keep else None
    x = family.embed(base, batch, tokens, extras)
    direct = getattr(base.__dict__.get(PREPARED), "direct", None)
    found = None if direct is None or keep else direct.run(x, batch, whole=rows is None)
    if found is None:
        x = family.run(base, x, batch, states, rows)
    else:
        x = found if rows is None else found.index_select(0, rows)
    pool = family.pool if rows is None else None
    return Packed(x, batch, states, None if pool is None else pool(base, x, batch))


def _run_each(
    base: Any,
    family: Family,
    tokens: Tensor,
    batch: Batch,
    extras: dict[str, Tensor],
    keep: bool,
    rows: Tensor | None,
) -> Packed:
    """`_run` document by document: the same calls for a text, whatever else is in the batch.

    Which bits a matrix product gives depends on how many rows it has and on where they start.
    """
    parts = []
    for own, where in batch.documents():
        these = {name: value[where] for name, value in extras.items()}
        parts.append(_run(base, family, tokens[where].clone(), own, these, keep, None))
    if not parts:
        return _run(base, family, tokens, batch, extras, keep, None)
    states = None
    if keep:
        kept = [part.states for part in parts if part.states is not None]
        states = [torch.cat(each) for each in zip(*kept, strict=True)]
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Packed(
        torch.cat([part.x for part in parts]), batch, states, torch.cat(pooled) if pooled else None
    )


def longest_document(base: Any, family: Family) -> int:
    """One length that stands for the longest document of every batch: attention launches alike."""
    return family.longest(base) or graphs.LONGEST


def new_graphs(base: Any, family: Family) -> graphs.Graphs:
    if getattr(base, OPTIONS).batch_invariant:
        return graphs.Graphs(base, [longest_document(base, family)])
    return graphs.Graphs(base, graphs.edges(family.windows(base)))


def _graphs(base: Any, family: Family) -> graphs.Graphs:
    own = base.__dict__[graphs.GRAPHS]
    if own is None:  # a copy
        own = base.__dict__[graphs.GRAPHS] = new_graphs(base, family)
    return own


def _replay(
    base: Any,
    family: Family,
    tokens: Tensor,
    batch: Batch,
    extras: dict[str, Tensor],
    keep: bool,
    rows: Tensor | None,
) -> Packed:
    """`_run` through a graph of the batch's bucket."""

    def forward(tokens: Tensor, batch: Batch, extras: dict[str, Tensor]) -> graphs.Outputs:
        found = _run(base, family, tokens, batch, extras, False, None)
        return found.x, found.pooled

    x, pooled = _graphs(base, family).run(forward, tokens, batch, extras)
    return Packed(x, batch, None, pooled)


def _row_or_rows(name: str, value: Any, tokens: Tensor) -> Tensor:
    """``[B, S]`` from ``[B, S]`` or, as unpatched models take it too, ``[1, S]``."""
    _check.tensor(name, value, ndim=2)
    rows, length = tokens.shape[:2]
    _check.shape(name, value, (1 if len(value) == 1 else rows, length))
    return value.expand(rows, length)


def hidden_states(base: Any, packed: Packed) -> tuple[Tensor, ...] | None:
    """Hidden states in the layout that the caller expects; None if they were not asked for."""
    if packed.states is None:
        return None
    return tuple(map(packed.batch.layout(getattr(base, OPTIONS).packed_output), packed.states))


def as_output(kind: str, values: dict[str, Any], config: Any, return_dict: bool | None) -> Any:
    """``values`` as the named class of ``transformers.modeling_outputs``, or as a tuple."""
    from transformers import modeling_outputs

    output = getattr(modeling_outputs, kind)(**values)
    use_dict = config.return_dict if return_dict is None else return_dict
    return output if use_dict else output.to_tuple()

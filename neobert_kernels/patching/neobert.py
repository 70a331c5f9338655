"""NeoBERT: rotary positions, pre-norm, SwiGLU; q, k and v packed head by head."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import neobert_kernels as nk
from neobert_kernels.patching import heads
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.blocks import (
    Context,
    View,
    at,
    expect,
    in_pairs,
    rms_norm,
    rotated,
    run_pre_norm,
    word_vectors,
)
from neobert_kernels.patching.family import Family, Packed, replacement
from neobert_kernels.patching.frozen import PREPARED, Preparer, pair_order
from neobert_kernels.patching.stacks import Layer, Norm, Stack, agreed, linear

OPERATORS = (
    "add_rms_norm", "first_pool", "linear_cross_entropy", "qkv_attention", "rms_norm",
    "rope_table", "swiglu",
)  # fmt: skip


def check(base: Any) -> None:
    """Raise ValueError unless every part is one that the functions below understand."""
    from neobert.model import NeoBERTFeedForward, NeoBERTLayer, NeoBERTRMSNorm

    for name, layer in layers(base):
        expect(layer, NeoBERTLayer, name, called=True)
        expect(layer.ffn, NeoBERTFeedForward, f"{name}.ffn")
        expect(layer.attention_norm, NeoBERTRMSNorm, f"{name}.attention_norm")
        expect(layer.ffn_norm, NeoBERTRMSNorm, f"{name}.ffn_norm")
    expect(base.layer_norm, NeoBERTRMSNorm, "layer_norm")


def layers(base: Any) -> Iterator[tuple[str, nn.Module]]:
    for i, layer in enumerate(base.transformer_encoder):
        yield f"transformer_encoder.{i}", layer


def embed(base: Any, batch: Batch, tokens: Tensor, extras: dict[str, Tensor]) -> Tensor:
    return word_vectors(base.encoder, tokens)


@replacement
def layer_forward(
    self: Any, x: Tensor, delta: Tensor | None, context: Context, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One block on packed tokens: ``x`` and ``delta``, both ``[T, C]``, to the next pair."""
    assert context.cos is not None
    norm = self.attention_norm
    u, x = rms_norm(norm.weight, norm.eps, x, delta)
    qkv = self.qkv(u).unflatten(-1, (-1, 3, 2 * context.cos.shape[-1]))
    mixed = nk.qkv_attention(
        qkv,
        context.cu_seqlens,
        context.max_seqlen,
        cos=context.cos,
        sin=context.sin,
        interleaved=in_pairs(self, True),
    )
    norm = self.ffn_norm
    u, x = rms_norm(norm.weight, norm.eps, at(rows, x), self.wo(at(rows, mixed.flatten(1))))
    return x, self.ffn.w3(nk.swiglu(self.ffn.w12(u)))


def view(base: Any, layer: Any, prepare: Preparer) -> View:
    """The layer as `layer_forward` reads it in a frozen model."""
    heads = base.config.num_attention_heads
    head_size = base.config.hidden_size // heads
    order = None if prepare.interleaved else _halves_first(heads, head_size)
    qkv = prepare.together([layer.qkv], order)
    view: View = prepare.part(
        layer,
        "wo",
        qkv=layer.qkv if qkv is None else qkv,
        interleaved=qkv is None or prepare.interleaved,
        ffn=prepare.part(layer.ffn, "w12", "w3"),
    )
    return view


def _halves_first(heads: int, size: int) -> Tensor:
    """Rows of ``qkv``, head by head q, k and v, with the pairs of q and k half-split."""
    turned = torch.cat(
        [pair_order(2, size, to_interleaved=False), torch.arange(2 * size, 3 * size)]
    )
    return (torch.arange(heads)[:, None] * 3 * size + turned).flatten()


def stack(base: Any) -> Stack:
    return stack_with(base, lambda: base.config.rope_theta)


def stack_with(base: Any, theta: Callable[[], float]) -> Stack:
    """A frozen model's layers by their weights; ``theta()`` is RoPE's."""
    views = [layer.__dict__[PREPARED] for _, layer in layers(base)]
    heads = base.config.num_attention_heads
    return Stack(
        layers=[
            Layer(
                before=Norm.rms(view.attention_norm, view.attention_norm.eps),
                qkv=linear(view.qkv),
                out=linear(view.wo),
                between=Norm.rms(view.ffn_norm, view.ffn_norm.eps),
                expand=linear(view.ffn.w12),
                activation="swiglu",
                contract=linear(view.ffn.w3),
                theta=theta(),
            )
            for view in views
        ],
        after=Norm.rms(base.layer_norm, base.layer_norm.eps),
        post_norm=False,
        split=lambda qkv: qkv.unflatten(-1, (heads, 3, -1)).unbind(2),
        settings=theta,
        interleaved=agreed(view.interleaved for view in views),
    )


def run(
    base: Any, x: Tensor, batch: Batch, states: list[Tensor] | None, rows: Tensor | None
) -> Tensor:
    head_size = base.config.hidden_size // base.config.num_attention_heads
    context = rotated(batch, head_size, base.config.rope_theta)
    norm = base.layer_norm
    return run_pre_norm(
        base.transformer_encoder,
        x,
        states,
        rows,
        context=lambda layer: context,
        final_norm=lambda x, delta: rms_norm(norm.weight, norm.eps, x, delta),
    )


def classify(self: Any, packed: Packed) -> Tensor:
    return self._classify(heads.first_pooled(packed))


def token_loss(self: Any, logits: Tensor, labels: Tensor, items: Any) -> Tensor:
    from neobert.heads import cross_entropy

    return cross_entropy(logits, labels, items)


FAMILY = Family(
    name="neobert",
    operators=OPERATORS,
    check=check,
    layers=layers,
    layer_forward=layer_forward,
    view=view,
    stack=stack,
    what="packed RoPE-attention, SwiGLU, norms fused with their residual",
    embed=embed,
    run=run,
    output="BaseModelOutput",
    longest=lambda base: base.config.max_length,
    heads={
        "NeoBERTForMaskedLM": heads.masked_lm(
            lambda self, x: x, lambda self: self.decoder, by_items=True, zero_if_empty=True
        ),
        "NeoBERTForSequenceClassification": heads.sequence_classification(
            classify, lambda self, logits, labels, items: self._loss(logits, labels, items)
        ),
        "NeoBERTForTokenClassification": heads.token_classification(
            lambda self, x: self._classify(x), token_loss
        ),
        "NeoBERTForQuestionAnswering": heads.question_answering(lambda self, x: self.qa_outputs(x)),
    },
)

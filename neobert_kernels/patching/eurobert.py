"""EuroBERT: RoPE, pre-norm RMSNorm, SwiGLU, grouped key and value heads."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

import neobert_kernels as nk
from neobert_kernels import _check
from neobert_kernels.patching import heads
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.blocks import (
    Context,
    at,
    expect,
    rms_norm,
    run_pre_norm,
    word_vectors,
)
from neobert_kernels.patching.family import Family, Packed, replacement
from neobert_kernels.patching.rotary import (
    attend,
    check_block,
    check_rope,
    described,
    feed_forward,
    stack_with,
    table,
    used_layers,
    view,
)
from neobert_kernels.patching.stacks import Norm, Stack

OPERATORS = (
    "add_rms_norm", "attention", "first_pool", "linear_cross_entropy", "mean_pool", "rms_norm",
    "rope_table", "silu_mul",
)  # fmt: skip


def check(base: Any) -> None:
    """Raise ValueError unless every part is one that the functions below understand."""
    from transformers.models.eurobert import modeling_eurobert as modeling

    check_rope(base, modeling, "EuroBert")
    for name, layer in layers(base):
        expect(layer, modeling.EuroBertDecoderLayer, name, called=True)
        check_block(layer, name, modeling, "EuroBert")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            expect(getattr(layer, norm), modeling.EuroBertRMSNorm, f"{name}.{norm}")
    expect(base.norm, modeling.EuroBertRMSNorm, "norm")


def layers(base: Any) -> Iterator[tuple[str, nn.Module]]:
    for i, layer in enumerate(used_layers(base)):
        yield f"layers.{i}", layer


def embed(base: Any, batch: Batch, tokens: Tensor, extras: dict[str, Tensor]) -> Tensor:
    return word_vectors(base.embed_tokens, tokens)


def _norm(norm: Any, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    return rms_norm(norm.weight, norm.variance_epsilon, x, delta)


@replacement
def layer_forward(
    self: Any, x: Tensor, delta: Tensor | None, context: Context, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One block on packed tokens: ``x`` and ``delta``, both ``[T, C]``, to the next pair."""
    u, x = _norm(self.input_layernorm, x, delta)
    delta = self.self_attn.o_proj(at(rows, attend(self.self_attn, u, context)))
    u, x = _norm(self.post_attention_layernorm, at(rows, x), delta)
    return x, feed_forward(self.mlp, u)


def stack(base: Any) -> Stack:
    """A frozen model's layers by their weights."""

    def norm(module: Any) -> Norm:
        return Norm.rms(module, module.variance_epsilon)

    found = [
        described(base, layer, norm(layer.input_layernorm), norm(layer.post_attention_layernorm))
        for layer in used_layers(base)
    ]
    return stack_with(base, found, norm(base.norm), post_norm=False)


def run(
    base: Any, x: Tensor, batch: Batch, states: list[Tensor] | None, rows: Tensor | None
) -> Tensor:
    context = table(base, batch)
    return run_pre_norm(
        used_layers(base),
        x,
        states,
        rows,
        context=lambda layer: context,
        final_norm=lambda x, delta: _norm(base.norm, x, delta),
    )


def classify(self: Any, packed: Packed) -> Tensor:
    """One row of logits a document, by the head's pooling; "late" is the mean of token logits."""
    pooling = self.classifier_pooling
    if pooling == "late":
        logits = _classify(self, packed.x)
        return nk.mean_pool(logits, packed.batch.cu_seqlens)
    if pooling not in ("bos", "mean"):
        raise _check.error("classifier_pooling", "'bos', 'mean' or 'late'", repr(pooling))
    pool = heads.first_pooled if pooling == "bos" else heads.mean_pooled
    return _classify(self, pool(packed))


def _classify(self: Any, x: Tensor) -> Tensor:
    return self.classifier(self.activation(self.dense(x)))


FAMILY = Family(
    name="eurobert",
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
    longest=lambda base: None,
    heads={
        "EuroBertForMaskedLM": heads.masked_lm(
            lambda self, x: x, lambda self: self.lm_head, by_items=True, loss_function=True
        ),
        "EuroBertForSequenceClassification": heads.sequence_classification(classify),
        "EuroBertForTokenClassification": heads.token_classification(
            lambda self, x: self.classifier(x)
        ),
    },
)

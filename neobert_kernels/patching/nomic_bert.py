"""NomicBERT: BERT's embeddings without positions, RoPE, post-norm, SwiGLU."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from neobert_kernels.patching import bert, heads
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.blocks import (
    Context,
    at,
    expect,
    layer_norm,
    look_up,
    run_post_norm,
    word_vectors,
)
from neobert_kernels.patching.family import Family, replacement
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
    "add_layer_norm", "attention", "first_pool", "linear_cross_entropy", "rope_table", "silu_mul",
)  # fmt: skip


def check(base: Any) -> None:
    """Raise ValueError unless every part is one that the functions below understand."""
    from transformers.models.nomic_bert import modeling_nomic_bert as modeling

    expect(base.embeddings, modeling.NomicBertEmbeddings, "embeddings")
    expect(base.embeddings.LayerNorm, nn.LayerNorm, "embeddings.LayerNorm")
    check_rope(base, modeling, "NomicBert")
    for name, layer in layers(base):
        expect(layer, modeling.NomicBertLayer, name, called=True)
        check_block(layer, name, modeling, "NomicBert")
        for norm in ("post_attention_layernorm", "post_mlp_layernorm"):
            expect(getattr(layer, norm), nn.LayerNorm, f"{name}.{norm}")


def layers(base: Any) -> Iterator[tuple[str, nn.Module]]:
    for i, layer in enumerate(used_layers(base)):
        yield f"layers.{i}", layer


def embed(base: Any, batch: Batch, tokens: Tensor, extras: dict[str, Tensor]) -> Tensor:
    """Word and token-type vectors summed and normalized, ``[T, C]``."""
    embeddings = base.embeddings
    x = word_vectors(embeddings.word_embeddings, tokens)
    types = extras.get("token_type_ids")
    if types is None:
        types = torch.zeros_like(batch.positions)
    kinds = look_up(embeddings.token_type_embeddings, types, "token_type_ids")
    y, _ = layer_norm(embeddings.LayerNorm, x, kinds)
    return embeddings.dropout(y)


@replacement
def layer_forward(self: Any, x: Tensor, context: Context, rows: Tensor | None) -> Tensor:
    """One block on packed tokens, ``[T, C]`` to ``[T, C]``, or to ``rows`` of it."""
    mixed = attend(self.self_attn, x, context)
    delta = self.post_attention_dropout(self.self_attn.o_proj(at(rows, mixed)))
    x, _ = layer_norm(self.post_attention_layernorm, at(rows, x), delta)
    delta = self.post_mlp_dropout(feed_forward(self.mlp, x))
    return layer_norm(self.post_mlp_layernorm, x, delta)[0]


def stack(base: Any) -> Stack:
    """A frozen model's layers by their weights."""
    found, norm = [], None  # the embeddings are normalized
    for layer in used_layers(base):
        between = Norm.layer(layer.post_attention_layernorm)
        found.append(described(base, layer, norm, between))
        norm = Norm.layer(layer.post_mlp_layernorm)
    assert norm is not None
    return stack_with(base, found, norm, post_norm=True)


def run(
    base: Any, x: Tensor, batch: Batch, states: list[Tensor] | None, rows: Tensor | None
) -> Tensor:
    return run_post_norm(used_layers(base), x, states, rows, table(base, batch))


FAMILY = Family(
    name="nomic_bert",
    operators=OPERATORS,
    check=check,
    layers=layers,
    layer_forward=layer_forward,
    view=view,
    stack=stack,
    what="packed RoPE-attention, SwiGLU, norms fused with their residual",
    embed=embed,
    run=run,
    output="BaseModelOutputWithPooling",
    longest=lambda base: None,
    extras=("token_type_ids",),
    pool=bert.pool,
    check_head=lambda head: bert.check_predictions(
        head, "transformers.models.nomic_bert.modeling_nomic_bert", "NomicBert"
    ),
    heads={
        "NomicBertForMaskedLM": heads.masked_lm(
            lambda self, x: self.cls.predictions.transform(x),
            lambda self: self.cls.predictions.decoder,
        ),
        "NomicBertForSequenceClassification": heads.sequence_classification(bert.classify_pooled),
        "NomicBertForTokenClassification": heads.token_classification(bert.dropped_classifier),
    },
)

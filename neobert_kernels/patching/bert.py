"""BERT and what has its shape: learned positions, post-norm, full attention, GELU.

Class names are those of transformers' ``modeling_bert``; ``roberta`` builds on the same blocks.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import neobert_kernels as nk
from neobert_kernels import _check
from neobert_kernels.patching import heads
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.blocks import (
    Context,
    View,
    at,
    expect,
    heads_of,
    is_gelu,
    is_watched,
    layer_norm,
    look_up,
    projected,
    refuse_attention_dropout,
    run_post_norm,
    word_vectors,
)
from neobert_kernels.patching.family import Family, Packed, replacement
from neobert_kernels.patching.frozen import PREPARED, Preparer
from neobert_kernels.patching.stacks import Layer, Norm, NotPlainError, Stack, agreed, linear

OPERATORS = ("add_layer_norm", "attention", "first_pool", "linear_cross_entropy")

QKV = ("query", "key", "value")
MODELING = "transformers.models.bert.modeling_bert"


def check_like_bert(base: Any, module: str, prefix: str) -> None:
    """Raise ValueError unless every part is one that the functions below understand."""
    modeling = importlib.import_module(module)

    def part(name: str) -> type:
        return getattr(modeling, prefix + name)

    if base.config.is_decoder or base.config.add_cross_attention:
        raise _check.error("model", "an encoder (is_decoder=False)", "a decoder")
    expect(base.embeddings, part("Embeddings"), "embeddings")
    expect(base.embeddings.LayerNorm, nn.LayerNorm, "embeddings.LayerNorm")
    expect(base.encoder, part("Encoder"), "encoder")
    for i, layer in enumerate(base.encoder.layer):
        name = f"encoder.layer.{i}"
        expect(layer, part("Layer"), name, called=True)
        expect(layer.attention, part("Attention"), f"{name}.attention")
        expect(layer.attention.self, part("SelfAttention"), f"{name}.attention.self")
        expect(layer.attention.output, part("SelfOutput"), f"{name}.attention.output")
        expect(layer.output, part("Output"), f"{name}.output")
        for block in (layer.attention.output, layer.output):
            expect(block.LayerNorm, nn.LayerNorm, f"{name} LayerNorm")


def check_predictions(head: Any, module: str, prefix: str) -> None:
    """A masked-LM head's ``cls``, of which only the parts are called."""
    if hasattr(head, "cls"):
        modeling = importlib.import_module(module)
        expect(head.cls, getattr(modeling, f"{prefix}OnlyMLMHead"), "cls")
        expect(
            head.cls.predictions, getattr(modeling, f"{prefix}LMPredictionHead"), "cls.predictions"
        )


def layers(base: Any) -> Iterator[tuple[str, nn.Module]]:
    for i, layer in enumerate(base.encoder.layer):
        yield f"encoder.layer.{i}", layer


def embed(base: Any, batch: Batch, tokens: Tensor, extras: dict[str, Tensor]) -> Tensor:
    """Word, position and token-type vectors summed and normalized, ``[T, C]``."""
    embeddings = base.embeddings
    x = word_vectors(embeddings.word_embeddings, tokens)
    types = extras.get("token_type_ids")
    if types is None:
        types = torch.zeros_like(batch.positions)
    x = x + look_up(embeddings.token_type_embeddings, types, "token_type_ids")
    positions = look_up(embeddings.position_embeddings, batch.positions, "position_ids")
    return embeddings.dropout(layer_norm(embeddings.LayerNorm, positions, x)[0])


@replacement
def layer_forward(self: Any, x: Tensor, context: Context, rows: Tensor | None) -> Tensor:
    """One block on packed tokens, ``[T, C]`` to ``[T, C]``, or to ``rows`` of it."""
    attention = self.attention.self
    refuse_attention_dropout(self.training, attention.dropout.p)
    q, k, v = projected(attention, QKV, attention.attention_head_size, x)
    mixed = nk.attention(q, k, v, context.cu_seqlens, context.max_seqlen, scale=attention.scaling)
    x = _residual_norm(self.attention.output, at(rows, mixed.flatten(1)), at(rows, x))
    return _residual_norm(self.output, _expanded(self.intermediate, x), x)


def _expanded(intermediate: Any, x: Tensor) -> Tensor:
    """``intermediate(x)``; GELU goes where its argument was if nobody else can see that.

    The argument is the largest tensor of a block, and a CPU pays for memory that it never used.
    """
    if isinstance(intermediate, View):
        return intermediate.dense(x)
    parts = intermediate, intermediate.dense, intermediate.intermediate_act_fn
    gelu = is_gelu(intermediate.intermediate_act_fn)
    if not gelu or torch.is_grad_enabled() or any(is_watched(part) for part in parts):
        return intermediate(x)
    return torch.ops.aten.gelu_(intermediate.dense(x))


def view(base: Any, layer: Any, prepare: Preparer) -> View:
    """The layer as `layer_forward` reads it in a frozen model."""
    attention, self_ = layer.attention, layer.attention.self
    qkv = prepare.together([getattr(self_, name) for name in QKV])
    parts = {"qkv": qkv, "counts": [self_.num_attention_heads] * 3}
    return View(
        layer,
        {
            "attention": View(
                attention,
                {"self": View(self_, parts), "output": prepare.part(attention.output, "dense")},
            ),
            "intermediate": prepare.with_gelu(layer.intermediate, "dense", "intermediate_act_fn"),
            "output": prepare.part(layer.output, "dense"),
        },
    )


def stack(base: Any) -> Stack:
    """A frozen model's layers by their weights."""
    found, norm = [], None  # the embeddings are normalized
    for layer in base.encoder.layer:
        view = layer.__dict__[PREPARED]
        wide = layer.intermediate
        if not is_gelu(wide.intermediate_act_fn):
            raise NotPlainError
        found.append(
            Layer(
                before=norm,
                qkv=linear(view.attention.self.qkv),
                out=linear(layer.attention.output.dense),
                between=Norm.layer(layer.attention.output.LayerNorm),
                expand=linear(wide.dense),
                activation="gelu",
                contract=linear(layer.output.dense),
            )
        )
        norm = Norm.layer(layer.output.LayerNorm)
    assert norm is not None
    attention = base.encoder.layer[0].attention.self
    size = attention.attention_head_size
    return Stack(
        layers=found,
        after=norm,
        post_norm=True,
        split=lambda qkv: heads_of(qkv, size).chunk(3, 1),
        settings=lambda: attention.attention_head_size,
        scale=agreed(layer.attention.self.scaling for layer in base.encoder.layer),
    )


def _residual_norm(block: Any, x: Tensor, residual: Tensor) -> Tensor:
    return layer_norm(block.LayerNorm, residual, block.dropout(block.dense(x)))[0]


def run(
    base: Any, x: Tensor, batch: Batch, states: list[Tensor] | None, rows: Tensor | None
) -> Tensor:
    context = Context(batch.cu_seqlens, batch.max_seqlen)
    return run_post_norm(base.encoder.layer, x, states, rows, context)


def pool(base: Any, x: Tensor, batch: Batch) -> Tensor | None:
    if base.pooler is None:
        return None
    return base.pooler(nk.first_pool(x, batch.cu_seqlens)[:, None])


def dropped_classifier(self: Any, x: Tensor) -> Tensor:
    return self.classifier(self.dropout(x))


def classify_pooled(self: Any, packed: Packed) -> Tensor:
    return dropped_classifier(self, heads.pooled(self, packed))


FAMILY = Family(
    name="bert",
    operators=OPERATORS,
    check=lambda base: check_like_bert(base, MODELING, "Bert"),
    layers=layers,
    layer_forward=layer_forward,
    view=view,
    stack=stack,
    what="packed attention, norms fused with their residual",
    embed=embed,
    run=run,
    output="BaseModelOutputWithPoolingAndCrossAttentions",
    longest=lambda base: base.config.max_position_embeddings,
    extras=("token_type_ids",),
    pool=pool,
    check_head=lambda head: check_predictions(head, MODELING, "Bert"),
    heads={
        "BertForMaskedLM": heads.masked_lm(
            lambda self, x: self.cls.predictions.transform(x),
            lambda self: self.cls.predictions.decoder,
        ),
        "BertForSequenceClassification": heads.sequence_classification(classify_pooled),
        "BertForMultipleChoice": heads.multiple_choice(classify_pooled),
        "BertForTokenClassification": heads.token_classification(dropped_classifier),
        "BertForQuestionAnswering": heads.question_answering(lambda self, x: self.qa_outputs(x)),
    },
)

"""ModernBERT, Ettin, mmBERT: rotary positions, pre-norm, GeGLU, windows in most layers."""

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
    in_pairs,
    layer_norm,
    refuse_attention_dropout,
    rotated,
    run_pre_norm,
    word_vectors,
)
from neobert_kernels.patching.family import Family, Packed, replacement
from neobert_kernels.patching.frozen import PREPARED, Preparer
from neobert_kernels.patching.stacks import Layer, Norm, Stack, agreed, linear

OPERATORS = (
    "add_layer_norm", "first_pool", "geglu", "layer_norm", "linear_cross_entropy", "mean_pool",
    "qkv_attention", "rope_table",
)  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"


def check(base: Any) -> None:
    """Raise ValueError unless every part is one that the functions below understand."""
    from transformers.activations import GELUActivation
    from transformers.models.modernbert import modeling_modernbert as modeling

    expect(base.embeddings, modeling.ModernBertEmbeddings, "embeddings")
    expect(base.embeddings.norm, nn.LayerNorm, "embeddings.norm")
    for name, layer in layers(base):
        expect(layer, modeling.ModernBertEncoderLayer, name, called=True)
        expect(layer.attn, modeling.ModernBertAttention, f"{name}.attn")
        expect(layer.mlp, modeling.ModernBertMLP, f"{name}.mlp")
        expect(layer.mlp.act, GELUActivation, f"{name}.mlp.act")
        without = type(layer.attn_norm) is nn.Identity  # the first layer reads the embeddings' norm
        expect(layer.attn_norm, nn.Identity if without else nn.LayerNorm, f"{name}.attn_norm")
        expect(layer.mlp_norm, nn.LayerNorm, f"{name}.mlp_norm")
        _check_window(name, layer, base.config)
    expect(base.final_norm, nn.LayerNorm, "final_norm")
    expect(base.rotary_emb, modeling.ModernBertRotaryEmbedding, "rotary_emb")
    for kind in _kinds(base):
        _check_angles(base, kind)


def _check_window(name: str, layer: Any, config: Any) -> None:
    """Unpatched, the mask comes from ``config`` or from the layer, as the attention's name says."""
    reaches = {SLIDING: config.sliding_window + 1, FULL: None}
    if layer.attention_type not in reaches:
        rule = f"{name}.attention_type to be {SLIDING!r} or {FULL!r}"
        raise _check.error("model", rule, repr(layer.attention_type))
    reach = reaches[layer.attention_type]
    if layer.attn.sliding_window != reach:
        rule = f"{name}.attn.sliding_window to be {reach}, as its config says"
        raise _check.error("model", rule, layer.attn.sliding_window)


def _check_angles(base: Any, kind: str) -> None:
    """The table comes from ``config``, unpatched it comes from buffers: they have to agree."""
    rope_type = base.rotary_emb.rope_type[kind]
    if rope_type != "default":
        raise _check.error("model", f"default RoPE in {kind}", f"rope_type {rope_type!r}")
    frequencies = getattr(base.rotary_emb, f"{kind}_inv_freq").float()
    size, theta = base.layers[0].attn.head_dim, _theta(base, kind)
    expected = theta ** (torch.arange(0, size, 2, device=frequencies.device) / -size)
    # Wide enough for buffers that went through float16 with the rest of the model.
    if frequencies.shape != expected.shape or not torch.allclose(
        frequencies, expected, rtol=0.01, atol=6e-8
    ):
        rule = f"rotary_emb.{kind}_inv_freq to be that of the config's rope_theta ({theta})"
        raise _check.error("model", rule, "other frequencies")


def _kinds(base: Any) -> list[str]:
    return sorted({layer.attention_type for layer in base.layers})


def _theta(base: Any, kind: str) -> float:
    return base.config.rope_parameters[kind]["rope_theta"]


def layers(base: Any) -> Iterator[tuple[str, Any]]:
    for i, layer in enumerate(base.layers):
        yield f"layers.{i}", layer


def embed(base: Any, batch: Batch, tokens: Tensor, extras: dict[str, Tensor]) -> Tensor:
    embeddings = base.embeddings
    x = word_vectors(embeddings.tok_embeddings, tokens)
    return embeddings.drop(layer_norm(embeddings.norm, x, None)[0])


@replacement
def layer_forward(
    self: Any, x: Tensor, delta: Tensor | None, context: Context, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One block on packed tokens: ``x`` and ``delta``, both ``[T, C]``, to the next pair."""
    attn, mlp = self.attn, self.mlp
    refuse_attention_dropout(self.training, attn.attention_dropout)
    if isinstance(self.attn_norm, nn.Identity):
        u = x = x if delta is None else x + delta
    else:
        u, x = layer_norm(self.attn_norm, x, delta)
    qkv = attn.Wqkv(u).unflatten(-1, (3, -1, attn.head_dim)).transpose(1, 2)
    # The module keeps the radius + 1, which is what flash attention's interface in transformers
    # expects; our window is the radius.
    window = None if attn.sliding_window is None else attn.sliding_window - 1
    mixed = nk.qkv_attention(
        qkv,
        context.cu_seqlens,
        context.max_seqlen,
        cos=context.cos,
        sin=context.sin,
        interleaved=in_pairs(attn, False),
        window=window,
    )
    delta = attn.out_drop(attn.Wo(at(rows, mixed.flatten(1))))
    u, x = layer_norm(self.mlp_norm, at(rows, x), delta)
    return x, mlp.Wo(mlp.drop(nk.geglu(mlp.Wi(u))))


def view(base: Any, layer: Any, prepare: Preparer) -> View:
    """The layer as `layer_forward` reads it in a frozen model."""
    attn = layer.attn
    heads = [base.config.num_attention_heads] * 3
    qkv = prepare.turned([attn.Wqkv], heads, attn.head_dim, interleaved=False)
    attention = prepare.part(
        attn,
        "Wo",
        Wqkv=attn.Wqkv if qkv is None else qkv,
        interleaved=qkv is not None and prepare.interleaved,
    )
    return View(layer, {"attn": attention, "mlp": prepare.part(layer.mlp, "Wi", "Wo")})


def stack(base: Any) -> Stack:
    """A frozen model's layers by their weights."""
    found = []
    for layer in base.layers:
        view = layer.__dict__[PREPARED]
        plain = isinstance(layer.attn_norm, nn.Identity)
        reach = layer.attn.sliding_window
        found.append(
            Layer(
                before=None if plain else Norm.layer(layer.attn_norm),
                qkv=linear(view.attn.Wqkv),
                out=linear(layer.attn.Wo),
                between=Norm.layer(layer.mlp_norm),
                expand=linear(layer.mlp.Wi),
                activation="geglu",
                contract=linear(layer.mlp.Wo),
                window=None if reach is None else reach - 1,
                theta=_theta(base, layer.attention_type),
            )
        )
    heads = base.config.num_attention_heads
    return Stack(
        layers=found,
        after=Norm.layer(base.final_norm),
        post_norm=False,
        split=lambda qkv: qkv.unflatten(-1, (3, heads, -1)).unbind(1),
        settings=lambda: [_theta(base, kind) for kind in (SLIDING, FULL)],
        interleaved=agreed(layer.__dict__[PREPARED].attn.interleaved for layer in base.layers),
    )


def run(
    base: Any, x: Tensor, batch: Batch, states: list[Tensor] | None, rows: Tensor | None
) -> Tensor:
    thetas = {kind: _theta(base, kind) for kind in _kinds(base)}
    size = base.config.hidden_size // base.config.num_attention_heads
    # One for each theta: mmBERT and Ettin have the same in both kinds of layers.
    contexts = {theta: rotated(batch, size, theta) for theta in set(thetas.values())}

    return run_pre_norm(
        base.layers,
        x,
        states,
        rows,
        context=lambda layer: contexts[thetas[layer.attention_type]],
        final_norm=lambda x, delta: layer_norm(base.final_norm, x, delta),
    )


def score(self: Any, x: Tensor) -> Tensor:
    return self.classifier(self.drop(self.head(x)))


def classify(self: Any, packed: Packed) -> Tensor:
    pools = {"cls": heads.first_pooled, "mean": heads.mean_pooled}
    pooling = self.config.classifier_pooling
    if pooling not in pools:
        raise _check.error("config.classifier_pooling", "'cls' or 'mean'", repr(pooling))
    return score(self, pools[pooling](packed))


FAMILY = Family(
    name="modernbert",
    operators=OPERATORS,
    check=check,
    layers=layers,
    layer_forward=layer_forward,
    view=view,
    stack=stack,
    what="packed RoPE-attention with windows, GeGLU, norms fused with their residual",
    embed=embed,
    run=run,
    output="BaseModelOutput",
    longest=lambda base: None,
    windows=lambda base: {base.config.sliding_window},
    heads={
        "ModernBertForMaskedLM": heads.masked_lm(
            lambda self, x: self.head(x),
            lambda self: self.decoder,
            by_items=True,
            loss_function=True,
            sparse=lambda self: self.sparse_pred_ignore_index if self.sparse_prediction else None,
        ),
        "ModernBertForSequenceClassification": heads.sequence_classification(classify),
        "ModernBertForMultipleChoice": heads.multiple_choice(classify),
        "ModernBertForTokenClassification": heads.token_classification(score),
        "ModernBertForQuestionAnswering": heads.question_answering(score, loss_function=True),
    },
)

"""Blocks that NomicBERT and EuroBERT share: RoPE, and one Linear for each of q, k, v, gate and up.

The two families' modules have the same parts under the same names, each in classes of its own.
"""

from types import ModuleType
from typing import Any

from torch import Tensor

import neobert_kernels as nk
from neobert_kernels import _check
from neobert_kernels.ops.swiglu import silu_mul_over
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.blocks import (
    Context,
    View,
    expect,
    heads_of,
    in_pairs,
    is_watched,
    projected,
    refuse_attention_dropout,
    rotated,
)
from neobert_kernels.patching.frozen import PREPARED, Preparer
from neobert_kernels.patching.stacks import Layer, Norm, Stack, agreed, linear

QKV = ("q_proj", "k_proj", "v_proj")


def used_layers(base: Any) -> list[Any]:
    """The layers that the unpatched model runs."""
    return list(base.layers)[: base.config.num_hidden_layers]


def check_rope(base: Any, modeling: ModuleType, prefix: str) -> None:
    expect(base.rotary_emb, getattr(modeling, f"{prefix}RotaryEmbedding"), "rotary_emb")
    if base.rotary_emb.rope_type != "default":
        rule = "the rope type 'default' (the unpatched model runs the others)"
        raise _check.error("model", rule, repr(base.rotary_emb.rope_type))


def check_block(layer: Any, name: str, modeling: ModuleType, prefix: str) -> None:
    """Raise ValueError unless `attend` and `feed_forward` compute what the layer does."""
    expect(layer.self_attn, getattr(modeling, f"{prefix}Attention"), f"{name}.self_attn")
    expect(layer.mlp, getattr(modeling, f"{prefix}MLP"), f"{name}.mlp")
    activation = modeling.ACT2FN["silu"]
    if type(layer.mlp.act_fn) is not type(activation):
        rule = f"hidden_act 'silu' in {name} (the unpatched model runs the others)"
        raise _check.error("model", rule, repr(layer.mlp.config.hidden_act))
    expect(layer.mlp.act_fn, type(activation), f"{name}.mlp.act_fn")


def table(base: Any, batch: Batch) -> Context:
    return rotated(batch, base.config.head_dim, base.config.rope_parameters["rope_theta"])


def attend(attention: Any, x: Tensor, context: Context) -> Tensor:
    """RoPE-attention before its output projection: ``[T, C]`` to ``[T, H * D]``."""
    refuse_attention_dropout(attention.training, attention.attention_dropout)
    q, k, v = projected(attention, QKV, attention.head_dim, x)
    mixed = nk.attention(
        q,
        k,
        v,
        context.cu_seqlens,
        context.max_seqlen,
        cos=context.cos,
        sin=context.sin,
        interleaved=in_pairs(attention, False),
        scale=attention.scaling,
    )
    return mixed.flatten(1)


def feed_forward(mlp: Any, x: Tensor) -> Tensor:
    if isinstance(mlp, View) and mlp.gate_up is not None:
        return mlp.down_proj(nk.swiglu(mlp.gate_up(x)))
    multiply = nk.silu_mul if is_watched(mlp.gate_proj) else silu_mul_over
    return mlp.down_proj(multiply(mlp.gate_proj(x), mlp.up_proj(x)))


def described(base: Any, layer: Any, before: Norm | None, between: Norm) -> Layer:
    """A frozen model's layer by its weights, between its norms."""
    view = layer.__dict__[PREPARED]
    return Layer(
        before=before,
        qkv=linear(view.self_attn.qkv),
        out=linear(layer.self_attn.o_proj),
        between=between,
        expand=linear(view.mlp.gate_up),
        activation="swiglu",
        contract=linear(layer.mlp.down_proj),
        theta=base.config.rope_parameters["rope_theta"],
    )


def stack_with(base: Any, found: list[Layer], after: Norm, post_norm: bool) -> Stack:
    attention = used_layers(base)[0].self_attn
    views = [layer.__dict__[PREPARED].self_attn for layer in used_layers(base)]
    counts, size = views[0].counts, attention.head_dim
    return Stack(
        layers=found,
        after=after,
        post_norm=post_norm,
        split=lambda qkv: heads_of(qkv, size).split(counts, 1),
        settings=lambda: (base.config.rope_parameters["rope_theta"], len(used_layers(base))),
        interleaved=agreed(view.interleaved for view in views),
        scale=agreed(layer.self_attn.scaling for layer in used_layers(base)),
    )


def view(base: Any, layer: Any, prepare: Preparer) -> View:
    """The layer as `attend` and `feed_forward` read it in a frozen model."""
    attention, mlp = layer.self_attn, layer.mlp
    size = attention.head_dim
    linears = [getattr(attention, name) for name in QKV]
    heads = base.config.num_attention_heads
    shared = getattr(base.config, "num_key_value_heads", None) or heads
    counts = [heads, shared, shared]
    qkv = prepare.turned(linears, counts, size, interleaved=False)
    return View(
        layer,
        {
            "self_attn": prepare.part(
                attention,
                "o_proj",
                qkv=qkv,
                counts=counts,
                interleaved=qkv is not None and prepare.interleaved,
            ),
            "mlp": prepare.part(
                mlp, "down_proj", gate_up=prepare.together([mlp.gate_proj, mlp.up_proj])
            ),
        },
    )

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
    expect,
    heads_of,
    is_watched,
    refuse_attention_dropout,
    rotated,
)


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
    q, k, v = (
        heads_of(project(x), attention.head_dim)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = nk.attention(
        q,
        k,
        v,
        context.cu_seqlens,
        context.max_seqlen,
        cos=context.cos,
        sin=context.sin,
        scale=attention.scaling,
    )
    return mixed.flatten(1)


def feed_forward(mlp: Any, x: Tensor) -> Tensor:
    multiply = nk.silu_mul if is_watched(mlp.gate_proj) else silu_mul_over
    return mlp.down_proj(multiply(mlp.gate_proj(x), mlp.up_proj(x)))

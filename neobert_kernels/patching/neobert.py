"""NeoBERT: rotary positions, pre-norm, SwiGLU; q, k and v packed head by head.

Between layers the residual stream travels as two tensors, ``x`` and the ``delta`` still to be
added, so that each addition is fused with the norm that follows it, across layers too.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

import neobert_kernels as nk
from neobert_kernels import _check
from neobert_kernels.patching import Replacement, expect, replacement
from neobert_kernels.patching.batch import read_batch, refuse_attentions, setting

OPERATORS = ("add_rms_norm", "qkv_attention", "rms_norm", "rope_table", "swiglu")


def check(base: Any) -> None:
    """Raise ValueError unless every part is one that the forwards below understand."""
    from neobert.model import NeoBERTLayer, NeoBERTRMSNorm

    for i, layer in enumerate(base.transformer_encoder):
        name = f"transformer_encoder.{i}"
        expect(layer, NeoBERTLayer, name)
        expect(layer.attention_norm, NeoBERTRMSNorm, f"{name}.attention_norm")
        expect(layer.ffn_norm, NeoBERTRMSNorm, f"{name}.ffn_norm")
    expect(base.layer_norm, NeoBERTRMSNorm, "layer_norm")


def replacements(name: str, base: Any) -> Iterator[Replacement]:
    yield Replacement(name, base, model_forward, "packs once, unpacks once")
    prefix = f"{name}." if name else ""
    for i, layer in enumerate(base.transformer_encoder):
        what = "packed RoPE-attention, SwiGLU, norms fused with their residual"
        yield Replacement(f"{prefix}transformer_encoder.{i}", layer, layer_forward, what)


def _norm(norm: Any, delta: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + delta), x + delta)``."""
    if delta is None:
        return nk.rms_norm(x, norm.weight, norm.eps), x
    return nk.add_rms_norm(delta, x, norm.weight, norm.eps)


@replacement
def layer_forward(
    self: Any,
    x: Tensor,
    delta: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> tuple[Tensor, Tensor]:
    """One block on packed tokens: ``x`` and ``delta``, both ``[T, C]``, to the next pair."""
    u, x = _norm(self.attention_norm, delta, x)
    qkv = self.qkv(u).unflatten(-1, (self.heads, 3, self.head_size))
    context = nk.qkv_attention(qkv, cu_seqlens, max_seqlen, cos=cos, sin=sin, interleaved=True)
    u, x = _norm(self.ffn_norm, self.wo(context.flatten(1)), x)
    return x, self.ffn.w3(nk.swiglu(self.ffn.w12(u)))


@replacement
def model_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """``NeoBERTModel.forward`` on real tokens only; also takes packed input (see `read_batch`)."""
    from transformers.modeling_outputs import BaseModelOutput

    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise _check.error("input_ids", "either input_ids or inputs_embeds", got)
    refuse_attentions(kwargs, self.config)
    tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
    _check.tensor("input_ids", tokens, ndim=2 if inputs_embeds is None else 3)
    keep_all = setting(kwargs, "output_hidden_states", self.config)
    return_dict = kwargs.get("return_dict")
    batch = read_batch(tokens, attention_mask, position_ids, kwargs, self.config.max_length)

    x = batch.pack(tokens)
    x = self.encoder(x) if inputs_embeds is None else x
    head_size = self.config.hidden_size // self.config.num_attention_heads
    cos, sin = nk.rope_table(batch.positions, head_size, self.config.rope_theta)
    states, delta = [x], None
    for layer in self.transformer_encoder:
        x, delta = layer(x, delta, cos, sin, batch.cu_seqlens, batch.max_seqlen)
        if keep_all:
            states.append(x + delta)
    y, _ = _norm(self.layer_norm, delta, x)
    states[-1] = y  # as in the unpatched model, the last state is the final norm's output
    output = BaseModelOutput(
        last_hidden_state=batch.unpack(y),
        hidden_states=tuple(map(batch.unpack, states)) if keep_all else None,
    )
    use_dict = self.config.return_dict if return_dict is None else return_dict
    return output if use_dict else output.to_tuple()

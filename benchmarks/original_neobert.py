"""NeoBERT as it was published, as a baseline: a dense mask, SwiGLU and RMSNorm step by step.

Written from the description of the release: padding becomes a ``[B, H, S, S]`` mask in the model's
dtype, which rules fast attention kernels out; q and k turn as complex numbers. Source: Le Breton,
Fournier, El Mezouar and Chandar 2025, arXiv:2502.19587; chandar-lab/NeoBERT.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def original_forward(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A forward over the weights of our unpatched ``model``."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    config = model.config
    H, D = config.num_attention_heads, config.dim_head
    layers = range(config.num_hidden_layers)
    eps = config.norm_eps
    rates = config.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)

    def norm(x: Tensor, name: str) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return scaled.to(x.dtype) * weights[name]

    def turn(x: Tensor, turns: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2).to(x.dtype)

    @torch.inference_mode()
    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        B, S = ids.shape
        x = F.embedding(ids, weights["encoder.weight"])
        dense = torch.where(mask == 0, float("-inf"), 0.0).to(x.dtype)
        dense = dense[:, None, None, :].repeat(1, H, S, 1)
        angles = torch.outer(torch.arange(S, dtype=torch.float32), rates).to(ids.device)
        turns = torch.polar(torch.ones_like(angles), angles)
        for i in layers:
            layer = f"transformer_encoder.{i}."
            u = F.linear(norm(x, layer + "attention_norm.weight"), weights[layer + "qkv.weight"])
            q, k, v = u.view(B, S, H, 3 * D).chunk(3, -1)
            q, k, v = (t.transpose(1, 2) for t in (turn(q, turns), turn(k, turns), v))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
            attended = attended.transpose(1, 2).reshape(B, S, H * D)
            x = x + F.linear(attended, weights[layer + "wo.weight"])
            both = F.linear(norm(x, layer + "ffn_norm.weight"), weights[layer + "ffn.w12.weight"])
            gate, value = both.chunk(2, -1)
            x = x + F.linear(F.silu(gate) * value, weights[layer + "ffn.w3.weight"])
        return norm(x, "layer_norm.weight")

    return forward

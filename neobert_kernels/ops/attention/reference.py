"""What attention means, in plain PyTorch: the CPU path and, in float64, the kernels' oracle."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from neobert_kernels.ops.rope import rope_reference


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would multiply in half precision, which no kernel does."""

    @functools.wraps(function)
    def call(first: Tensor, *rest: Any, **options: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest, **options)

    return call


@_without_autocast
def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """The contract of `attention` in plain PyTorch: the CPU path and, in float64, the oracle.

    Neighbouring documents of one length share a call, so sort a batch by length to make it quick.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, dtype = q.to(wide), k.to(wide), v.to(wide), q.dtype
    if cos is not None and sin is not None:
        q, k = rope_reference(q, cos, sin, interleaved), rope_reference(k, cos, sin, interleaved)
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    outputs = []
    for start, documents, length in _runs(cu_seqlens.tolist()):
        rows = slice(start, start + documents * length)
        qs, ks, vs = (x[rows].unflatten(0, (documents, length)).transpose(1, 2) for x in (q, k, v))
        mask = None
        if window is not None and window < length - 1:
            i = torch.arange(length, device=q.device)
            mask = (i[:, None] - i).abs() <= window
        out = scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    if not outputs:  # empty, and yet it depends on all three
        return (q * (k.sum() + v.sum())).to(dtype)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(dtype)


def _runs(bounds: list[int]) -> list[tuple[int, int, int]]:
    """``(first token, documents, length)`` of each run of neighbours of one length; no empties."""
    runs: list[tuple[int, int, int]] = []
    for low, high in itertools.pairwise(bounds):
        length = high - low
        if runs and runs[-1][2] == length:
            start, documents, _ = runs[-1]
            runs[-1] = (start, documents + 1, length)
        elif length:
            runs.append((low, 1, length))
    return runs


def qkv_attention_reference(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options: Any
) -> Tensor:
    """The contract of `qkv_attention`: `attention_reference` on the three slices."""
    q, k, v = qkv.unbind(2)
    return attention_reference(q, k, v, cu_seqlens, max_seqlen, **options)


@_without_autocast
def attention_reference_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients written out, because autograd does not record below an operator boundary.

    With ``dp = dout v^T`` and ``delta_i = sum_j p_ij dp_ij``: ``ds = p * (dp - delta)``,
    ``dq = scale ds k``, ``dk = scale ds^T q``, ``dv = p^T dout``; then q and k turn back.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    turned = [x.to(wide) for x in (q, k)]
    if cos is not None and sin is not None:
        turned = [rope_reference(x, cos, sin, interleaved) for x in turned]
    shared = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(shared, dim=1) for x in (turned[1], v.to(wide)))
    grads = [torch.zeros_like(x) for x in (turned[0], keys, values)]
    for start, documents, length in _runs(cu_seqlens.tolist()):
        rows = slice(start, start + documents * length)
        qs, ks, vs, douts = (
            x[rows].unflatten(0, (documents, length)).transpose(1, 2)
            for x in (turned[0], keys, values, dout.to(wide))
        )
        scores = qs @ ks.transpose(-1, -2) * scale
        if window is not None:
            i = torch.arange(length, device=q.device)
            scores = scores.masked_fill((i[:, None] - i).abs() > window, -torch.inf)
        p = scores.softmax(-1)
        dp = douts @ vs.transpose(-1, -2)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        found = (ds @ ks, ds.transpose(-1, -2) @ qs, p.transpose(-1, -2) @ douts)
        for grad, x in zip(grads, found, strict=True):
            grad[rows] = x.transpose(1, 2).flatten(0, 1)
    dq, dk, dv = grads
    dk, dv = (x.unflatten(1, (-1, shared)).sum(2) for x in (dk, dv))
    if cos is not None and sin is not None:
        dq, dk = (rope_reference(x, cos, -sin, interleaved) for x in (dq, dk))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)

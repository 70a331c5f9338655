"""Bidirectional attention over packed documents, with RoPE as part of the operator.

For the tokens i, j of one document: ``p[i, j] = softmax_j(scale * <rope(q_i), rope(k_j)>)`` over
all j, or those with ``|i - j| <= window``, and ``out_i = sum_j p[i, j] * v_j``. No token sees
another document. Scores, softmax and sums are float32; the output is rounded once.

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; grouped heads: arXiv:2305.13245.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from neobert_kernels import _check, _runtime
from neobert_kernels.ops.rope import check_table, rope_reference


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
    if not outputs:
        return (q * 0.0).to(dtype)
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


def _opaque_forward(
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
) -> Tensor:
    out = attention_reference(
        q, k, v, cu_seqlens, max_seqlen, cos=cos, sin=sin, interleaved=interleaved, window=window,
        scale=scale,
    )  # fmt: skip
    return out.contiguous()


def _opaque_backward(
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


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, Tensor? cos, Tensor? sin,"
    " bool interleaved, int? window, float scale"
)
_forward = _runtime.register(
    f"attention({_ARGUMENTS}) -> Tensor", _opaque_forward, lambda q, *_: _contiguous_like(q)
)
_backward = _runtime.register(
    f"attention_backward(Tensor dout, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _opaque_backward,
    lambda dout, q, k, v, *_: tuple(_contiguous_like(x) for x in (q, k, v)),
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, cos: Tensor | None, sin: Tensor | None, *options: Any) -> Tensor:  # fmt: skip # noqa: E501
        ctx.save_for_backward(q, k, v, cu_seqlens, cos, sin)
        ctx.options = (max_seqlen, options)
        return _forward(q, k, v, cu_seqlens, max_seqlen, cos, sin, *options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        q, k, v, cu_seqlens, cos, sin = ctx.saved_tensors
        max_seqlen, options = ctx.options
        grads = _backward(dout, q, k, v, cu_seqlens, max_seqlen, cos, sin, *options)
        return (*grads, *(None,) * 7)


def _check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cos: Tensor | None,
    sin: Tensor | None,
    window: int | None,
    scale: float | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check.tensor(name, x, ndim=3)
        _check.dtype(name, x, _check.DTYPES if name == "q" else (q.dtype,))
        _check.device(name, x, q.device)
    tokens, heads, dim = q.shape
    if not dim or not heads:
        raise _check.error("q", "at least one head of at least one channel", tuple(q.shape))
    if k.shape[0] != tokens or k.shape[2] != dim or not k.shape[1] or heads % k.shape[1]:
        rule = f"shape ({tokens}, a divisor of {heads}, {dim})"
        raise _check.error("k", rule, tuple(k.shape))
    _check.shape("v", v, k.shape)
    _check.cu_seqlens(cu_seqlens, tokens, q.device)
    if (cos is None) != (sin is None):
        raise _check.error("sin" if sin is None else "cos", "both of cos and sin, or neither", None)
    if cos is not None and sin is not None:
        check_table(cos, sin, tokens, dim, q.device)
    if window is not None and (not isinstance(window, int) or window < 0):
        raise _check.error("window", "None or a radius of at least 0", window)
    if scale is not None:
        _check.positive("scale", scale)
    if torch.compiler.is_compiling():
        return
    if not isinstance(max_seqlen, int) or isinstance(max_seqlen, bool) or max_seqlen < 0:
        raise _check.error("max_seqlen", "an int of at least 0", max_seqlen)
    if cu_seqlens.device.type == "cpu" and len(cu_seqlens) > 1:
        longest = int(cu_seqlens.diff().max())
        if max_seqlen < longest:
            raise _check.error(
                "max_seqlen", f"at least the longest document ({longest})", max_seqlen
            )


def attention(
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
    """Attend within each packed document, in both directions.

    Args:
        q: ``[T, H, D]``; float32, float16 or bfloat16; any strides.
        k, v: ``[T, G, D]`` with G a divisor of H: each key/value head serves ``H / G`` neighbours.
        cu_seqlens: ``[B + 1]`` int32 document boundaries, from 0 to T.
        max_seqlen: At least the longest document, a Python int.
        cos, sin: ``[T, D / 2]`` float32 from `rope_table`: q and k are rotated first.
        interleaved: RoPE pairs are ``(2i, 2i + 1)`` instead of ``(i, i + D / 2)``.
        window: Tokens further apart than this do not attend; None means no limit.
        scale: Of the scores; ``D ** -0.5`` by default.

    Returns:
        ``[T, H, D]`` in ``q.dtype``.

    Raises:
        ValueError: A shape, dtype, device or (on CPU) boundary breaks the rules above.
    """
    _check_arguments(q, k, v, cu_seqlens, max_seqlen, cos, sin, window, scale)
    if torch.compiler.is_compiling():  # document lengths are data: the compiler must not look
        scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
        return _Attention.apply(
            q, k, v, cu_seqlens, max_seqlen, cos, sin, interleaved, window, scale
        )
    return attention_reference(
        q, k, v, cu_seqlens, max_seqlen, cos=cos, sin=sin, interleaved=interleaved, window=window,
        scale=scale,
    )  # fmt: skip


def qkv_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options: Any) -> Tensor:
    """`attention` on one projection that holds queries, keys and values.

    Args:
        qkv: ``[T, H, 3, D]`` with any strides: NeoBERT's per-head packing as it is, and
            ``[T, 3, H, D]`` as its ``transpose(1, 2)``. Its gradient is one packed tensor.
        cu_seqlens, max_seqlen, options: As `attention`.

    Returns:
        ``[T, H, D]`` in ``qkv.dtype``.

    Raises:
        ValueError: ``qkv`` is not four-dimensional with three slices, or as `attention`.
    """
    _check.tensor("qkv", qkv, ndim=4)
    if qkv.shape[2] != 3:
        raise _check.error("qkv", "shape (T, H, 3, D)", tuple(qkv.shape))
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, cu_seqlens, max_seqlen, **options)


_runtime.operator(attention, attention_reference)
_runtime.operator(qkv_attention, qkv_attention_reference)

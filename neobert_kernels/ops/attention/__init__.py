"""Bidirectional attention over packed documents, with RoPE as part of the operator.

For the tokens i, j of one document: ``p[i, j] = softmax_j(scale * <rope(q_i), rope(k_j)>)`` over
all j, or those with ``|i - j| <= window``, and ``out_i = sum_j p[i, j] * v_j``. No token sees
another document. Scores, softmax and sums are float32; the output is rounded once.

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; grouped heads: arXiv:2305.13245.
"""

import math
from typing import Any

import torch
from torch import Tensor

from neobert_kernels import _check, _eager, _runtime
from neobert_kernels.ops.attention import launch, peers
from neobert_kernels.ops.attention.reference import (
    attention_reference,
    attention_reference_backward,
    qkv_attention_reference,
)
from neobert_kernels.ops.attention.tiles import MAX_HEAD_SIZE
from neobert_kernels.ops.rope import check_table

__all__ = [
    "attention",
    "attention_reference",
    "qkv_attention",
    "qkv_attention_reference",
]


def _lse(q: Tensor) -> Tensor:
    """The place for each row's statistic; the reference keeps none."""
    T, H, _ = q.shape
    return q.new_empty((H, T) if _runtime.use_kernel(q) else (0,), dtype=torch.float32)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _packed_like(qkv: Tensor) -> Tensor:
    """A gradient with the strides of ``qkv`` where these are dense, channels neighbours."""
    grad = torch.empty_like(qkv)
    return grad if grad.stride(-1) == 1 else _contiguous_like(qkv)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, window: int | None, scale: float | None,
) -> Tensor:  # fmt: skip
    return attention_reference(
        q, k, v, cu_seqlens, max_seqlen, cos=cos, sin=sin, interleaved=interleaved, window=window,
        scale=scale,
    )  # fmt: skip


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, window: int | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if _runtime.use_kernel(q):
        return launch.forward(q, k, v, cu_seqlens, max_seqlen, cos, sin, interleaved, window, scale)
    out = _reference(q, k, v, cu_seqlens, max_seqlen, cos, sin, interleaved, window, scale)
    return out.contiguous(), _lse(q)


def _launch_backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if not _runtime.use_kernel(q):
        return attention_reference_backward(dout, q, k, v, *rest)
    grads = _contiguous_like(q), _contiguous_like(k), _contiguous_like(v)
    launch.backward(dout, out, lse, grads, q, k, v, *rest)
    return grads


def _launch_qkv_forward(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return _launch_forward(q, k, v, *rest)


def _launch_qkv_backward(dout: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    dqkv = _packed_like(qkv)
    dq, dk, dv = dqkv.unbind(2)
    if _runtime.use_kernel(qkv):
        launch.backward(dout, out, lse, (dq, dk, dv), *qkv.unbind(2), *rest)
    else:
        q, k, v = qkv.unbind(2)
        grads = attention_reference_backward(dout, q, k, v, *rest)
        for slot, grad in zip((dq, dk, dv), grads, strict=True):
            slot.copy_(grad)
    return dqkv


_OPTIONS = (
    "Tensor cu_seqlens, SymInt max_seqlen, Tensor? cos, Tensor? sin, bool interleaved, int? window,"
    " float scale"
)
_SAVED = "Tensor dout, Tensor out, Tensor lse"
_forward = _runtime.register(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _launch_forward,
    lambda q, *_: (_contiguous_like(q), _lse(q)),
)
_backward = _runtime.register(
    f"attention_backward({_SAVED}, Tensor q, Tensor k, Tensor v, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    lambda dout, out, lse, q, k, v, *_: tuple(map(_contiguous_like, (q, k, v))),
)
_qkv_forward = _runtime.register(
    f"qkv_attention(Tensor qkv, {_OPTIONS}) -> (Tensor, Tensor)",
    _launch_qkv_forward,
    lambda qkv, *_: (_contiguous_like(qkv[:, :, 0]), _lse(qkv[:, :, 0])),
)
_qkv_backward = _runtime.register(
    f"qkv_attention_backward({_SAVED}, Tensor qkv, {_OPTIONS}) -> Tensor",
    _launch_qkv_backward,
    lambda dout, out, lse, qkv, *_: _packed_like(qkv),
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, cos: Tensor | None, sin: Tensor | None, *options: Any) -> Tensor:  # fmt: skip # noqa: E501
        out, lse = _forward(q, k, v, cu_seqlens, max_seqlen, cos, sin, *options)
        ctx.save_for_backward(out, lse, q, k, v, cu_seqlens, cos, sin)
        ctx.options = (max_seqlen, options)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        *saved, cu_seqlens, cos, sin = ctx.saved_tensors
        max_seqlen, options = ctx.options
        grads = _backward(dout, *saved, cu_seqlens, max_seqlen, cos, sin, *options)
        return (*grads, *(None,) * 7)


class _QKVAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, cos: Tensor | None, sin: Tensor | None, *options: Any) -> Tensor:  # fmt: skip # noqa: E501
        out, lse = _qkv_forward(qkv, cu_seqlens, max_seqlen, cos, sin, *options)
        ctx.save_for_backward(out, lse, qkv, cu_seqlens, cos, sin)
        ctx.options = (max_seqlen, options)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        *saved, cu_seqlens, cos, sin = ctx.saved_tensors
        max_seqlen, options = ctx.options
        dqkv = _qkv_backward(dout, *saved, cu_seqlens, max_seqlen, cos, sin, *options)
        return (dqkv, *(None,) * 7)


_apply = _runtime.differentiable(_Attention, _forward, first=True)
_launch_apart = _runtime.launcher(_forward)  # what `_qkv_forward` starts, for parts that are there


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
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


def _check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    window: int | None,
    scale: float | None,
    kernel: bool,
) -> None:
    tokens, _, dim = q.shape
    _check.cu_seqlens(cu_seqlens, tokens, q.device)
    if (cos is None) != (sin is None):
        raise _check.error("sin" if sin is None else "cos", "both of cos and sin, or neither", None)
    if cos is not None and sin is not None:
        check_table(cos, sin, tokens, dim, q.device)
    if kernel and (dim % 8 or dim > MAX_HEAD_SIZE):
        rule = f"a head size that is a multiple of 8, at most {MAX_HEAD_SIZE}, where kernels run"
        raise _check.error("q", rule, dim)
    whole = isinstance(window, int) and not isinstance(window, bool)
    if window is not None and not (whole and window >= 0):
        raise _check.error("window", "None or a radius of at least 0", window)
    _check.flag("interleaved", interleaved)
    if scale is not None:
        _check.positive("scale", scale)
    _check_lengths(cu_seqlens, max_seqlen)


def _check_lengths(cu_seqlens: Tensor, max_seqlen: int) -> None:
    """``max_seqlen`` must cover the documents, which are read on a CPU."""
    if torch.compiler.is_compiling():
        return
    if not isinstance(max_seqlen, int) or isinstance(max_seqlen, bool) or max_seqlen < 0:
        raise _check.error("max_seqlen", "an int of at least 0", max_seqlen)
    if len(cu_seqlens) > 1 and _check.readable(cu_seqlens):
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
    implementation: str | None = None,
) -> Tensor:
    """Attend within each packed document, in both directions.

    Args:
        q: ``[T, H, D]``; float32, float16 or bfloat16; any strides. Where a kernel runs, D is a
            multiple of 8, at most 128; the reference takes any D.
        k, v: ``[T, G, D]`` with G a divisor of H: each key/value head serves ``H / G`` neighbours.
        cu_seqlens: ``[B + 1]`` int32 document boundaries, from 0 to T.
        max_seqlen: At least the longest document, a Python int.
        cos, sin: ``[T, D / 2]`` float32 from `rope_table`: q and k are rotated first.
        interleaved: RoPE pairs are ``(2i, 2i + 1)`` instead of ``(i, i + D / 2)``.
        window: Tokens further apart than this do not attend; None means no limit.
        scale: Of the scores; ``D ** -0.5`` by default.
        implementation: A peer instead of ours: "sdpa_flash", "sdpa_cudnn", "sdpa_efficient",
            "sdpa_math", "torch_varlen", "flash_attn" or "flash_attn_deterministic". None is what
            the environment variable ``NEOBERT_ATTENTION`` names, and without it ours, which
            "neobert_kernels" is always. See `neobert_kernels.ops.attention.peers`.

    Returns:
        ``[T, H, D]`` in ``q.dtype``.

    Raises:
        ValueError: A shape, dtype, device or (on CPU, not under torch.compile) boundary breaks the
            rules above, or a peer is unknown, missing or unable to do this.
    """
    peer = peers.asked(implementation)
    arguments = (q, k, v, cu_seqlens, max_seqlen, cos, sin, interleaved, window, scale)
    _check_heads(q, k, v)
    kernel = peer is None and _runtime.use_kernel(q)
    _check_arguments(*arguments, kernel)
    if peer is not None:
        return peers.attend(peer, *arguments)
    # Document lengths are data: a compiler must not look, so it too calls the operator.
    if torch.compiler.is_compiling() or kernel:
        scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
        return _apply(q, k, v, cu_seqlens, max_seqlen, cos, sin, interleaved, window, scale)
    return _reference(*arguments)


def qkv_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    window: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`attention` on one projection that holds queries, keys and values.

    Args:
        qkv: ``[T, H, 3, D]`` with any strides: NeoBERT's per-head packing as it is, and
            ``[T, 3, H, D]`` as its ``transpose(1, 2)``. Its gradient is one packed tensor, which
            the backward writes in place: no slice of it is copied.
        cu_seqlens, max_seqlen, cos, sin, interleaved, window, scale, implementation: As
            `attention`.

    Returns:
        ``[T, H, D]`` in ``qkv.dtype``.

    Raises:
        ValueError: ``qkv`` is not four-dimensional with three slices, or as `attention`.
    """
    _check.tensor("qkv", qkv, ndim=4)
    if qkv.shape[2] != 3:
        raise _check.error("qkv", "shape (T, H, 3, D)", tuple(qkv.shape))
    _check.dtype("q", qkv)  # under the name that `attention` has for it
    if not qkv.shape[3] or not qkv.shape[1]:
        rule = "at least one head of at least one channel"
        raise _check.error("q", rule, tuple(qkv[:, :, 0].shape))
    peer = peers.asked(implementation)
    q, k, v = qkv.unbind(2)
    arguments = (q, k, v, cu_seqlens, max_seqlen, cos, sin, interleaved, window, scale)
    kernel = peer is None and _runtime.use_kernel(qkv)
    _check_arguments(*arguments, kernel)
    if peer is not None:
        return peers.attend(peer, *arguments)
    if torch.compiler.is_compiling() or kernel:
        scale = 1.0 / math.sqrt(qkv.shape[-1]) if scale is None else scale
        rest = (cu_seqlens, max_seqlen, cos, sin, interleaved, window, scale)
        if qkv.stride(-1) != 1:
            qkv = qkv.contiguous()
        elif _eager.unobserved((qkv, *rest)):
            return _launch_apart(q, k, v, *rest)[0]
        return _QKVAttention.apply(qkv, *rest)
    return _reference(*arguments)


_runtime.operator(attention, attention_reference, launch.KERNELS, launch.launches, peers.asked)
_runtime.operator(
    qkv_attention, qkv_attention_reference, launch.KERNELS, launch.launches, peers.asked
)

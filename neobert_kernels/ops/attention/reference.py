"""What attention means, in plain PyTorch: the CPU path and, in float64, the kernels' oracle."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

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
        q, k = _turned(q, cos, sin, interleaved), _turned(k, cos, sin, interleaved)
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    runs = _runs(cu_seqlens.tolist())
    if not runs:  # empty, and yet it depends on all three
        return (q * (k.sum() + v.sum())).to(dtype)
    # A split has one backward; slices would each write a gradient of all tokens.
    parts = zip(*(x.split([b * n for b, n in runs]) for x in (q, k, v)), strict=True)
    masks = None if window is None else _short_mask(q, runs, window)
    outputs = []
    for (documents, length), part in zip(runs, parts, strict=True):
        qs, ks, vs = (x.unflatten(0, (documents, length)) for x in part)
        if window is None or window >= length - 1:
            out = _attend(qs, ks, vs, None, scale)
        elif masks is not None and length <= len(masks):
            out = _attend(qs, ks, vs, masks[:length, :length], scale)
        else:
            out = _banded(qs, ks, vs, window, scale)
        outputs.append(out.flatten(0, 1))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`rope_reference`; neighbouring pairs as complex numbers, in one pass instead of seven."""
    if not interleaved:
        return rope_reference(x, cos, sin)
    steps = (*x.stride()[:-1], x.storage_offset())
    if x.stride(-1) != 1 or any(step % 2 for step in steps):  # a complex number has no view then
        x = x.clone(memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    angles = torch.complex(cos.to(x.dtype), sin.to(x.dtype))
    return torch.view_as_real(pairs * angles[:, None]).flatten(-2)


def _runs(bounds: list[int]) -> list[tuple[int, int]]:
    """``(documents, length)`` of each run of neighbours of one length, in order; no empties."""
    lengths = (high - low for low, high in itertools.pairwise(bounds))
    return [(len(list(run)), n) for n, run in itertools.groupby(filter(None, lengths))]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """``[B, queries, H, D]`` over ``[B, keys, H, D]``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


class _Block(NamedTuple):
    """Some queries of a document, and the keys that hold all within their reach."""

    queries: slice
    keys: slice
    mask: Tensor  # [queries, keys], added to the scores: -inf where a key is out of reach


SMALLEST_PIECE = 64  # shorter blocks leave the matrix products too little work


def _piece(window: int) -> int:
    """Keys are cut into pieces of this length; a window reaches no further than one of them."""
    return max(window, SMALLEST_PIECE)


def _short_mask(like: Tensor, runs: list[tuple[int, int]], window: int) -> Tensor | None:
    """A mask for the longest document that is quicker without blocks: its corner fits the others.

    Measured with windows 16, 64 and 128: blocks win from about 400, 400 and 550 tokens on.
    """
    lengths = [n for _, n in runs if window < n - 1 and n <= max(384, 4 * _piece(window))]
    if not lengths:
        return None
    i = torch.arange(max(lengths), device=like.device)
    mask = torch.zeros(len(i), len(i), dtype=like.dtype, device=like.device)
    return mask.masked_fill_((i[:, None] - i).abs() > window, -torch.inf)


def _blocks(like: Tensor, length: int, window: int) -> Iterator[_Block]:
    """A document in blocks of two pieces, each beside a piece of keys to its left and right.

    So work and memory grow with ``length * window``, not with the square of the length. Masks have
    the dtype and device of ``like``.
    """
    piece = _piece(window)
    left = piece if length > 2 * piece else 0
    i = torch.arange(min(2 * piece, length), device=like.device)
    j = torch.arange(-left, min(3 * piece, length), device=like.device)
    far = (i[:, None] - j).abs() > window
    masks = torch.zeros(far.shape, dtype=like.dtype, device=like.device)
    masks.masked_fill_(far, -torch.inf)
    for first in range(0, length, 2 * piece):
        queries = slice(first, min(first + 2 * piece, length))
        keys = slice(max(first - piece, 0), min(first + 3 * piece, length))
        skipped = left + keys.start - first
        mask = masks[: queries.stop - first, skipped : skipped + keys.stop - keys.start]
        yield _Block(queries, keys, mask)


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """Attention within a window on ``[B, length, H, D]``, block by block."""
    length, piece = q.shape[1], _piece(window)
    pieces = [x.split(piece, dim=1) for x in (k, v)]
    queries = q.split(2 * piece, dim=1)
    outputs = []
    for own, block in zip(queries, _blocks(q, length, window), strict=True):
        near = slice(block.keys.start // piece, -(-block.keys.stop // piece))
        keys, values = (torch.cat(x[near], dim=1) for x in pieces)
        outputs.append(_attend(own, keys, values, block.mask, scale))
    return torch.cat(outputs, dim=1)


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
    first = 0
    for documents, length in _runs(cu_seqlens.tolist()):
        rows = slice(first, first + documents * length)
        first = rows.stop
        qs, ks, vs, douts, *slots = (
            x[rows].unflatten(0, (documents, length)).transpose(1, 2)
            for x in (turned[0], keys, values, dout.to(wide), *grads)
        )
        everything = slice(0, length)
        blocks: Iterable[tuple[slice, slice, Tensor | None]] = [(everything, everything, None)]
        if window is not None and window < length - 1:
            blocks = _blocks(qs, length, window)
        for queries, near, mask in blocks:
            inputs = qs[:, :, queries], ks[:, :, near], vs[:, :, near], douts[:, :, queries]
            found = _block_backward(*inputs, mask, scale)
            for slot, where, grad in zip(slots, (queries, near, near), found, strict=True):
                slot[:, :, where] += grad
    dq, dk, dv = grads
    dk, dv = (x.unflatten(1, (-1, shared)).sum(2) for x in (dk, dv))
    if cos is not None and sin is not None:
        dq, dk = (rope_reference(x, cos, -sin, interleaved) for x in (dq, dk))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _block_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    p = scores.softmax(-1)
    dp = dout @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dout

"""Inputs and meanings that the tests of attention share."""

import itertools

import pytest
import torch
from parity import assert_parity, assert_within_budget, outputs_and_gradients

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels.ops.attention import tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
runs_kernel = pytest.mark.skipif(
    DEVICE.type != "cuda" and not _runtime.INTERPRET, reason="no kernel runs on the CPU"
)


def small_tiles(turn_inside):
    """Tiles of which a short document needs several; a vector of boundaries that is too short."""
    tile = tiles.Tile(outer=32, inner=16, warps=4, stages=1)
    return tiles.Tiles(tile, tile, tile, turn_inside, turn_inside, search=4)


def bounds(lengths, device=DEVICE):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def make(lengths, dtype=torch.float32, heads=2, groups=None, dim=16):
    shapes = [(sum(lengths), h, dim) for h in (heads, groups or heads, groups or heads)]
    qkv = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
    return qkv, bounds(lengths), max(lengths, default=0)


def table(lengths, dim=16):
    positions = [torch.arange(n, device=DEVICE) for n in lengths]
    return nk.rope_table(torch.cat(positions), dim)


def rotate(x, cos, sin, interleaved):
    """Each pair as a complex number, turned."""
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    half = x.shape[-1] // 2
    index = torch.arange(x.shape[-1], device=x.device)
    a, b = (index[::2], index[1::2]) if interleaved else (index[:half], index[half:])
    turned = torch.empty_like(x)
    turned[..., a] = x[..., a] * cos - x[..., b] * sin
    turned[..., b] = x[..., a] * sin + x[..., b] * cos
    return turned


def dense(q, k, v, lengths, cos=None, sin=None, interleaved=False, window=None, scale=None):
    """The meaning: one [T, T] mask of who sees whom."""
    T, H, D = q.shape
    if cos is not None:
        q, k = rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    document = torch.tensor([b for b, n in enumerate(lengths) for _ in range(n)], device=q.device)
    i = torch.arange(T, device=q.device)
    sees = document[:, None] == document
    if window is not None:
        sees = sees & ((i[:, None] - i).abs() <= window)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (D**-0.5 if scale is None else scale)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v)


def on_the_cpu(meaning, qkv, grad, dtype):
    """What the meaning gives there: with a single head, a GPU's deterministic ``index_put`` writes
    the gradient of `rotate` to wrong rows (torch 2.11)."""
    return outputs_and_gradients(meaning, [x.cpu().to(dtype) for x in qkv], [g.cpu() for g in grad])


def compare(lengths, dtype, heads=2, groups=None, dim=16, rope=False, together=False, **options):
    """Output and every gradient, against the dense mask in float64 and against the reference."""
    qkv, cu_seqlens, longest = make(lengths, dtype, heads, groups, dim)
    if rope:
        options["cos"], options["sin"] = table(lengths, dim)

    def op(*qkv):
        return nk.attention(*qkv, cu_seqlens, longest, **options)

    on_cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}

    def meaning(*qkv):
        return dense(*qkv, lengths, **on_cpu)

    grad = [torch.randn_like(qkv[0])]
    actual = [x.cpu() for x in outputs_and_gradients(op, qkv, grad)]
    exact, rounded = (on_the_cpu(meaning, qkv, grad, wide) for wide in (torch.double, torch.float))
    if together:
        parts = ([x.flatten() for x in values] for values in (actual, rounded, exact))
        return assert_within_budget(*map(torch.cat, parts))
    for i, (a, r, e) in enumerate(zip(actual, rounded, exact, strict=True)):
        assert_within_budget(a, r.to(dtype), e, f"value {i}")
    if not _runtime.INTERPRET:  # the reference itself is held against the meaning on a CPU
        reference = nk.attention_reference
        assert_parity(op, lambda *qkv: reference(*qkv, cu_seqlens, longest, **options), qkv)

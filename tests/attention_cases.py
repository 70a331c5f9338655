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


def ulps(q, k, v, grad, scale=None):
    """The floor of attention's budget, in units in the last place of the largest value.

    What a kernel keeps of a row is rounded to float32, and the plain meaning keeps none of it: the
    logarithm of the weights' sum, of the size of a score, whose error is one of every weight
    relative to itself; and the output's product with its gradient, from which a gradient of a
    score, of the size of the values' products with it, may cancel.
    """
    if q.dtype != torch.float32:
        return 2  # float32 is far finer
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    kept = (torch.einsum("ihd,jhd->hij", scale * a, b) for a, b in ((q, k), (grad, v)))
    return 2 + sum(float(x.abs().max()) for x in kept)


def on_the_cpu(meaning, qkv, grad, dtype):
    """What the meaning gives there: with a single head, a GPU's deterministic ``index_put`` writes
    the gradient of `rotate` to wrong rows (torch 2.11)."""
    return outputs_and_gradients(meaning, [x.cpu().to(dtype) for x in qkv], [g.cpu() for g in grad])


def compare(lengths, dtype, heads=2, groups=None, dim=16, rope=False, **options):
    """Output and every gradient, against the dense mask in float64 and against the reference.

    In float32 one budget for all of them: a gradient of q or k is what remains of larger terms,
    and in a tiny batch that may be exact, or all rounding, by luck.
    """
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
    floor = ulps(*qkv, *grad, options.get("scale"))
    if dtype == torch.float32:
        parts = ([x.flatten() for x in values] for values in (actual, rounded, exact))
        assert_within_budget(*map(torch.cat, parts), ulps=floor)
    else:
        for i, (a, r, e) in enumerate(zip(actual, rounded, exact, strict=True)):
            assert_within_budget(a, r.to(dtype), e, f"value {i}", floor)
    if not _runtime.INTERPRET:  # the reference itself is held against the meaning on a CPU
        reference = nk.attention_reference
        assert_parity(op, lambda *qkv: reference(*qkv, cu_seqlens, longest, **options), qkv, floor)

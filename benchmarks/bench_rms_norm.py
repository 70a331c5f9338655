"""rms_norm and add_rms_norm against eager PyTorch and torch.compile; share of the copy rate."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import assert_parity
from timing import interleaved, over, rotated
from torch import Tensor
from torch.nn import functional as F

import neobert_kernels as nk
from neobert_kernels import _runtime

EPS = 1e-5


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def eager_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return F.rms_norm(h, weight.shape, weight, EPS), h


OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], int]] = {
    "rms_norm": (nk.rms_norm, nk.rms_norm_reference, eager_rms_norm, 1),
    "add_rms_norm": (nk.add_rms_norm, nk.add_rms_norm_reference, eager_add_rms_norm, 2),
}


@pytest.mark.parametrize("width", [768, 1024])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", OPS)
def test_rms_norm(
    name: str,
    training: bool,
    width: int,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    ours, reference, eager, arguments = OPS[name]
    gpu = device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    rows = 64 if quick else 16384 if gpu else 2048

    def make() -> list[Tensor]:
        parts = [torch.randn(rows, width, device=device, dtype=dtype) for _ in range(arguments)]
        parts.append(torch.randn(width, device=device, dtype=dtype))
        return [part.requires_grad_(training) for part in parts]

    assert_parity(ours, reference, [t.detach() for t in make()])
    sets = rotated(make, device)
    variants = {"ours": ours, "eager": eager}
    if shutil.which("c++") or gpu:
        torch.compiler.reset()
        variants["compile"] = torch.compile(eager)
    gradient = torch.randn(rows, width, device=device, dtype=dtype) if training else None

    timings = once(
        lambda: interleaved(
            {key: over(sets, function, gradient) for key, function in variants.items()},
            rounds=3 if quick else 30,
            device=device,
        )
    )
    tensors = {"rms_norm": (2, 5), "add_rms_norm": (4, 9)}[name][training]
    moved = tensors * rows * width * dtype.itemsize
    record(
        name,
        f"{'forward and backward' if training else 'forward'}, {rows} x {width}, "
        f"{str(dtype).removeprefix('torch.')}, {device}",
        implementation=_runtime.implementation(name, device),
        ours_bytes_per_s=moved / timings["ours"].median_s,
        **{
            f"ratio_to_{key}": timings[key].median_s / timings["ours"].median_s
            for key in timings
            if key != "ours"
        },
        **{k: v for key, timing in timings.items() for k, v in timing.values(key).items()},
    )

"""rope on one packed projection against eager PyTorch, torch.compile and liger-kernel."""

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import assert_parity
from timing import interleaved, over, rotated
from torch import Tensor

import neobert_kernels as nk
from neobert_kernels import _runtime

H, D = 12, 64


def liger(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Half-split only, on ``[B, H, S, D]``, q and k together: k gets one head, the least."""
    module: Any = importlib.import_module("liger_kernel.ops.rope")
    q, k = x.transpose(0, 1)[None], x[:, :1].transpose(0, 1)[None]
    tables = (torch.cat([table, table], dim=-1)[None].to(x.dtype) for table in (cos, sin))
    return module.LigerRopeFunction.apply(q, k, *tables)[0][0].transpose(0, 1)


@pytest.mark.parametrize("layout", ["half-split", "interleaved"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
def test_rope(
    layout: str,
    training: bool,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    gpu = device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    T = 64 if quick else 16384 if gpu else 2048
    pairs = layout == "interleaved"
    cos, sin = nk.rope_table(torch.arange(T, device=device), D)

    def make() -> list[Tensor]:
        qkv = torch.randn(T, H, 3, D, device=device, dtype=dtype)
        return [qkv[:, :, 0].detach().requires_grad_(training)]

    assert_parity(
        lambda x: nk.rope(x, cos, sin, pairs),
        lambda x: nk.rope_reference(x, cos, sin, pairs),
        [x.detach() for x in make()],
    )
    variants: dict[str, Callable[..., Tensor]] = {"ours": nk.rope, "eager": nk.rope_reference}
    if shutil.which("c++") or gpu:
        torch.compiler.reset()
        variants["compile"] = torch.compile(nk.rope_reference)
    absent = {}
    if gpu and not pairs and importlib.util.find_spec("liger_kernel"):
        variants["liger"] = liger
    else:
        absent["liger_absent"] = "needs a GPU, half-split pairs and an installed liger-kernel"
    sets = rotated(make, device)
    gradient = torch.randn(T, H, D, device=device, dtype=dtype) if training else None

    def with_table(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x, cos, sin, pairs)

    timings = once(
        lambda: interleaved(
            {
                name: over(sets, with_table(function), gradient)
                for name, function in variants.items()
            },
            rounds=3 if quick else 30,
            device=device,
        )
    )
    moved = (2 * T * H * D * dtype.itemsize + T * D * 4) * (2 if training else 1)
    record(
        "rope",
        f"{'forward and backward' if training else 'forward'}, {layout}, {T} x {H} x {D}, "
        f"{str(dtype).removeprefix('torch.')}, {device}",
        implementation=_runtime.implementation("rope", device),
        ours_bytes_per_s=moved / timings["ours"].median_s,
        **{
            f"ratio_to_{name}": timings[name].median_s / timings["ours"].median_s
            for name in timings
            if name != "ours"
        },
        **absent,
        **{k: v for name, timing in timings.items() for k, v in timing.values(name).items()},
    )

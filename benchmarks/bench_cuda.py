"""The CUDA extension against the Triton kernels behind it: host and device time of a forward.

Both are called at the operator, under one dispatcher and without a gradient, so the rest of a call
is the same. Where no GPU is, what remains of the extension is timed: its host code, on no rows and
so without a launch, beside an operator in Python that only allocates the same results.
"""

import functools
from collections.abc import Callable
from typing import Any

import extension
import pytest
import torch
from operator_cases import FULL, TINY, Maker, sample
from timing import columns, host_time, interleaved, over, rotated
from torch import Tensor

from neobert_kernels import _cuda_build, cuda

NORM = (1e-5,)
# Public name: schema, and what follows the tensors of `operator_cases` in a call of it.
CALLS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "add_rms_norm": ("add_rms_norm", NORM),
    "add_layer_norm": ("add_layer_norm", NORM),
    "rope": ("rope", (True, False)),
    "swiglu": ("gated_unit", (False,)),
    "geglu": ("gated_unit", (True,)),
    "mean_pool": ("pool", (True, False)),
}


def tensors(name: str, size: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    return [a for a in sample(name, "", size, device, dtype).args if isinstance(a, Tensor)]


@functools.cache
def on_cpu() -> extension.Extension:
    return extension.on_cpu()


@pytest.mark.parametrize("size", [TINY, FULL])
@pytest.mark.parametrize("name", CALLS)
def test_extension(
    name: str,
    size: str,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    if device == "cpu" or (quick and size == FULL):
        pytest.skip("needs a GPU" if device == "cpu" else "--quick runs the small ones")
    if cuda.find() is None:
        pytest.skip(cuda.NOT_BUILT)
    cuda.use(*cuda.OPERATORS)
    schema, rest = CALLS[name]
    make = functools.partial(tensors, name, size, device, torch.bfloat16)
    ours, triton = (
        getattr(torch.ops.neobert, f"{schema}{which}").default for which in ("", "_triton")
    )
    before = cuda.taken()
    for a, b in zip(_outputs(ours(*make(), *rest)), _outputs(triton(*make(), *rest)), strict=True):
        torch.testing.assert_close(a, b)
    assert cuda.taken() == before + 1
    sets = rotated(make, device)
    variants = {
        "ours": over(sets, lambda *args: ours(*args, *rest)),
        "triton": over(sets, lambda *args: triton(*args, *rest)),
    }
    timings = once(lambda: interleaved(variants, rounds=3 if quick else 30, device=device))
    host = host_time(variants, calls=20 if quick else 200, rounds=3 if quick else 30)
    record(
        "extension",
        f"{name}, {size}, bfloat16, {device}",
        ratio=timings["triton"].median_s / timings["ours"].median_s,
        host_ratio=host["triton"].median_s / host["ours"].median_s,
        **columns(timings),
        **{f"{which}_host_s": timing.median_s for which, timing in host.items()},
    )
    cuda.use()


@pytest.mark.parametrize("name", [n for n in CALLS if n != "mean_pool"])
def test_host_code(
    name: str, quick: bool, device: str, once: Callable[..., Any], record: Callable[..., None]
) -> None:
    """On no rows nothing is launched; pooling without a document goes to Triton."""
    if device == "cuda":
        pytest.skip("the launch is there to be timed with")
    try:
        _cuda_build.cxx()
    except _cuda_build.BuildError as error:
        pytest.skip(str(error))
    schema, rest = CALLS[name]
    maker = Maker(FULL, device, torch.bfloat16)
    made = tensors(name, TINY, device, torch.bfloat16)
    args = [a[:0] if a.ndim > 1 else maker.normal(*a.shape) for a in made]
    built = on_cpu()
    built.use(*cuda.OPERATORS)
    ours = getattr(built.ops, schema).default
    outputs = _outputs(ours(*args, *rest))
    python = _allocating(f"{schema}_{name}", built.ops, schema, [o.shape for o in outputs])
    variants = {
        "ours": lambda number: ours(*args, *rest),
        "python": lambda number: python(*args, *rest),
    }
    host = once(lambda: host_time(variants, calls=2000, rounds=3 if quick else 30))
    record(
        "extension_host_code",
        f"{name}, no rows, {device}",
        ratio=host["python"].median_s / host["ours"].median_s,
        **columns(host),
    )


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _allocating(name: str, ops: Any, schema: str, shapes: list[torch.Size]) -> Any:
    """An operator of the same schema, in Python, that returns new tensors and computes nothing."""
    signature = str(getattr(ops, schema).default._schema)
    torch.library.define(f"neobert_bench::{name}", signature[signature.index("(") :])

    def allocate(x: Tensor, *rest: Any) -> Any:
        made = tuple(x.new_empty(shape) for shape in shapes)
        return made if len(made) > 1 else made[0]

    torch.library.impl(f"neobert_bench::{name}", "cpu", allocate)
    return getattr(torch.ops.neobert_bench, name).default

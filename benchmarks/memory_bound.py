"""A memory-bound operator against eager PyTorch, torch.compile and liger-kernel, in one run.

Every byte is counted once, whatever an implementation really moves, and the ceiling is a copy that
is timed in the same rounds. The time of a call on one row is the host's: a GPU takes less.
"""

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from parity import assert_parity
from timing import Variant, columns, host_time, interleaved, over, ratios, rotated
from torch import Tensor

from neobert_kernels import _runtime

Function = Callable[..., Any]
GPU_ROWS = (512, 4096, 16384, 65536)
# So much is copied at once that no cache holds it.
COPIED_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}


@dataclass(frozen=True)
class Subject:
    """What is compared: functions of the tensors that ``make`` and then ``fixed`` return.

    Only those of ``make`` get gradients. The forward, and forward and backward, read and write
    ``moved`` elements per row, and each direction ``fixed_bytes`` of the other tensors.
    liger-kernel takes what ``for_liger`` makes of ours.
    """

    name: str
    ours: Function
    reference: Function
    eager: Function
    make: Callable[[int, str, torch.dtype], list[Tensor]]
    moved: tuple[int, int]
    fixed: Callable[[int, str], list[Tensor]] = lambda rows, device: []
    fixed_bytes: int = 0
    liger: Function | str = "no such operator"
    for_liger: Callable[[list[Tensor]], list[Tensor]] = list


def rows_of(quick: bool, device: str) -> Sequence[int]:
    """Rows to measure at."""
    if quick:
        return (64,)
    return GPU_ROWS if device == "cuda" else (2048,)


def compare(
    subject: Subject,
    case: str,
    rows: int,
    training: bool,
    *,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    """Parity, then the times of all; one result, filed as ``case``."""
    gpu = device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    small = subject.make(min(rows, 64), device, dtype)
    fixed = subject.fixed(len(small[0]), device)
    assert_parity(_with(subject.ours, fixed), _with(subject.reference, fixed), small)
    functions = {"ours": subject.ours, "eager": subject.eager}
    if gpu or (not quick and shutil.which("c++")):
        torch.compiler.reset()
        functions["compile"] = torch.compile(subject.eager)
    missing = absent(subject, gpu)
    if callable(subject.liger) and not missing:
        theirs = _with(subject.liger, fixed)(*subject.for_liger(small))
        agree(theirs, _with(subject.reference, fixed)(*small))
        functions["liger"] = subject.liger

    def inputs(name: str, rows: int) -> list[list[Tensor]]:
        """Every variant's own, because some of liger-kernel's backwards write over them."""

        def make() -> list[Tensor]:
            tensors = subject.make(rows, device, dtype)
            if name == "liger":
                tensors = subject.for_liger(tensors)
            return [t.requires_grad_(training) for t in tensors]

        return rotated(make, device)

    def variant(name: str, rows: int) -> Variant:
        sets = inputs(name, rows)
        function = _with(functions[name], subject.fixed(rows, device))
        if not training:
            return over(sets, function)
        with torch.no_grad():
            outs = function(*sets[0])
        outs = outs if isinstance(outs, tuple) else (outs,)
        return over(sets, function, [[torch.randn_like(out) for out in outs] for _ in sets])

    variants = {name: variant(name, rows) for name in functions}
    size = 1 << 20 if quick else COPIED_BYTES[device]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    variants["copy"] = lambda _: target.copy_(source)
    timings = once(lambda: interleaved(variants, rounds=3 if quick else 30, device=device))
    copied = 2 * size / timings.pop("copy").median_s
    moved = subject.moved[training] * dtype.itemsize + subject.fixed_bytes * (1 + training)
    bytes_per_s = {name: moved * rows / timing.median_s for name, timing in timings.items()}
    host = {}
    if not training:
        calls = {name: variant(name, 1) for name in functions}
        host = host_time(calls, calls=20 if quick else 200, rounds=3 if quick else 30)
    record(
        subject.name,
        f"{'forward and backward' if training else 'forward'}, {case}, "
        f"{str(dtype).removeprefix('torch.')}, {device}",
        implementation=_runtime.implementation(subject.name, device),
        copy_bytes_per_s=copied,
        ours_share_of_copy=bytes_per_s["ours"] / copied,
        **{f"{name}_bytes_per_s": value for name, value in bytes_per_s.items()},
        **ratios(timings),
        **({"liger_absent": missing} if missing else {}),
        **columns(timings),
        **columns({f"{name}_one_row": timing for name, timing in host.items()}),
    )


def absent(subject: Subject, gpu: bool) -> str:
    """Why liger-kernel is not compared; empty where it is."""
    if isinstance(subject.liger, str):
        return subject.liger
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return "" if gpu else "needs a GPU"


def liger(name: str, *options: Any) -> Function:
    """liger-kernel's functional form, imported when it is called first."""

    def call(*tensors: Tensor) -> Any:
        functional: Any = importlib.import_module("liger_kernel.transformers.functional")
        return getattr(functional, f"liger_{name}")(*tensors, *options)

    return call


def agree(actual: Any, expected: Any) -> None:
    """A rival computes the same, but for its rounding or a tanh in place of an erf."""
    for a, e in zip(
        *(x if isinstance(x, tuple) else (x,) for x in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=0.02, atol=0.05)


def normal(
    matrices: int, vectors: int, width: int
) -> Callable[[int, str, torch.dtype], list[Tensor]]:
    """A `Subject.make` of normal numbers: so many ``[rows, width]``, then so many ``[width]``."""

    def make(rows: int, device: str, dtype: torch.dtype) -> list[Tensor]:
        shapes = [(rows, width)] * matrices + [(width,)] * vectors
        return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]

    return make


def _with(function: Function, fixed: list[Tensor]) -> Function:
    return (lambda *tensors: function(*tensors, *fixed)) if fixed else function

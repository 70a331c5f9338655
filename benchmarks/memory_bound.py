"""A memory-bound operator against eager PyTorch, torch.compile and liger-kernel, in one run.

Bytes are those of `neobert.floors`, each counted once whatever an implementation really moves, and
the ceiling is a copy that is timed in the same rounds. The time of a call on one row is the host's:
a GPU takes less.
"""

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ceilings import Ceilings
from parity import assert_parity
from timing import Variant, columns, host_time, interleaved, over, ratios, rotated
from torch import Tensor

from neobert.floors import Cost, operators
from neobert_kernels import _runtime

Function = Callable[..., Any]
GPU_ROWS = (512, 4096, 16384, 65536)
FIRST_ROWS = 16384  # the most telling of them: a batch of NeoBERT


@dataclass(frozen=True)
class Subject:
    """What is compared: functions of the tensors that ``make`` and then ``fixed`` return.

    Only those of ``make`` get gradients. ``cost`` is of so many rows of elements of so many bytes,
    for the forward and for the backward. liger-kernel takes what ``for_liger`` makes of ours.
    """

    name: str
    ours: Function
    reference: Function
    eager: Function
    make: Callable[[int, str, torch.dtype], list[Tensor]]
    cost: Callable[[int, int], tuple[Cost, Cost]]
    fixed: Callable[[int, str], list[Tensor]] = lambda rows, device: []
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
    ceilings = Ceilings(device, dtype, quick)
    timings = once(
        lambda: interleaved(variants | ceilings.variants, rounds=3 if quick else 30, device=device)
    )
    forward, backward = subject.cost(rows, dtype.itemsize)
    cost = forward.plus(backward) if training else forward
    host = {}
    if not training:
        calls = {name: variant(name, 1) for name in functions}
        host = host_time(calls, calls=20 if quick else 200, rounds=3 if quick else 30)
    record(
        subject.name,
        f"{'forward and backward' if training else 'forward'}, {case}, "
        f"{str(dtype).removeprefix('torch.')}, {device}",
        implementation=_runtime.implementation(subject.name, device),
        **ceilings.against(cost, timings),
        **ratios(timings),
        **({"liger_absent": missing} if missing else {}),
        **columns(timings),
        **{f"{name}_host_s": timing.median_s for name, timing in host.items()},
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


def norm_costs(width: int, **style: bool) -> Callable[[int, int], tuple[Cost, Cost]]:
    """A `Subject.cost` of a norm."""
    return lambda rows, e: (
        operators.norm(rows, width, e, **style),
        operators.norm_backward(rows, width, e, **style),
    )


def _with(function: Function, fixed: list[Tensor]) -> Function:
    return (lambda *tensors: function(*tensors, *fixed)) if fixed else function

"""Kernels that CUDA's driver starts again and again, and nobody reads their arguments in between.

Triton's launcher asks for the device and the stream, reads every argument and calls its hooks at
each launch, which takes the host longer than the driver takes. A `Launch` is what that ends in, a
call of ``cuLaunchKernelEx``, made out once. The driver reads grid, stream and arguments through
addresses (CUDA driver API, execution control), so an argument that changes is a ctypes object that
any number of launches share: a cell, written once for all of them.

In which order a binary takes its arguments is Triton's affair. So nothing is bound unless the
kernel's own PTX declares what would be handed over.
"""

import ctypes
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from neobert_kernels._triton import triton

Pointer, Int, Float = ctypes.c_uint64, ctypes.c_int32, ctypes.c_float
_NUMBERS = {"i32": Int, "fp32": Float}
_BYTES = {"64": 8, "32": 4}
# What Triton's launcher does for a kernel besides calling `cuLaunchKernelEx`.
_MORE = (
    "global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl",
    "tensordesc_meta",
)  # fmt: skip
_NO_SCRATCH: tuple[list[int], ...] = ([], [8], [8, 8])


class Config(ctypes.Structure):
    """``CUlaunchConfig``, without attributes."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "threads", "rows", "planes", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("number_of_attributes", ctypes.c_uint),
    )


class Launch(NamedTuple):
    """Arguments of ``cuLaunchKernelEx``.

    Attributes:
        call: Addresses of a `Config`, of the function, and of the arguments' addresses.
        kept: The kernel and the objects at the addresses, which must not go before them.
    """

    call: tuple[int, int, int]
    kept: tuple[Any, ...]


@functools.cache
def library() -> Callable[..., int] | None:
    """``cuLaunchKernelEx``; None on a machine without a driver."""
    try:
        start = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    return declared(start)


def declared(start: Any) -> Callable[..., int]:
    """``start`` with the types of ``cuLaunchKernelEx``."""
    start.argtypes = [ctypes.c_void_p] * 4
    start.restype = ctypes.c_int
    return start


def unseen() -> bool:
    """Whether no hook of Triton, a profiler's, is to see launches."""
    runtime = triton.knobs.runtime
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    return not any(getattr(hook, "calls", hook) for hook in hooks)


def stream() -> int:
    """The current GPU's current one."""
    active = triton.runtime.driver.active
    return active.get_current_stream(active.get_current_device())


class Scaled(Protocol):
    """What says how many programs a number of rows takes."""

    def programs(self, rows: int) -> int: ...


class Queue:
    """One thread's launches, which share the stream and the number of rows.

    Attributes:
        rows: A cell.
    """

    def __init__(self) -> None:
        self.rows = Int()
        self.stream = 0
        self._configs: dict[tuple[Any, ...], tuple[Config, Scaled]] = {}

    def bind(
        self,
        compiled: Any,
        grid: Sequence[int],
        arguments: Iterable[Any],
        scaled: Scaled | None = None,
    ) -> Launch | None:
        """A launch of what Triton compiled and loaded; None where it takes more than arguments.

        Args:
            compiled: Triton's ``CompiledKernel``, which has been started before; None: none.
            arguments: In the order of the kernel's parameters: tensors, numbers, None for what is
                missing, or cells. The compile-time values at the end may be left out.
            scaled: What the grid's first number follows from; it is hashable. None: it stays, and
                so does the stream.
        """
        if compiled is None or any(getattr(compiled.metadata, name, None) for name in _MORE):
            return None
        if getattr(compiled.metadata, "num_ctas", 1) != 1 or not compiled.function:
            return None
        cells = _cells(compiled.src.signature.values(), arguments)
        if cells is None:
            return None
        sizes, taken = [ctypes.sizeof(cell) for cell in cells], parameters(compiled.asm["ptx"])
        scratch = taken[len(sizes) :]  # the addresses of such memory, of which there is none
        if taken[: len(sizes)] != sizes or scratch not in _NO_SCRATCH:
            return None
        cells += [Pointer(0) for _ in scratch]
        addresses = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        config = self._config(compiled, grid, scaled)
        call = ctypes.addressof(config), compiled.function, ctypes.addressof(addresses)
        return Launch(call, (compiled, config, addresses, *cells))

    def _config(self, compiled: Any, grid: Sequence[int], scaled: Scaled | None) -> Config:
        """A scaled one is kept, for all launches that scale alike."""
        threads = compiled.metadata.num_warps * compiled.metadata.target.warp_size
        numbers = *grid[1:], threads, compiled.metadata.shared, scaled
        found = None if scaled is None else self._configs.get(numbers)
        if found is not None:
            return found[0]
        config = Config(*grid, threads, 1, 1, compiled.metadata.shared, self.stream)
        if scaled is not None:
            self._configs[numbers] = config, scaled
        return config

    def turn_to(self, stream: int, rows: int) -> None:
        """Whither everything scaled goes, and on how many rows."""
        if (stream, rows) != (self.stream, self.rows.value):
            self.stream = -1  # no stream: whatever interrupts this, the next call does it again
            self.rows.value = rows
            for config, scaled in self._configs.values():
                config.stream, config.x = stream, scaled.programs(rows)
            self.stream = stream


def starter() -> Callable[..., int]:
    """`library`, where something was bound: called as ``(*launch.call, None)`` it starts a launch
    on the current GPU and returns 0, or else the code of a `RefusedError`."""
    start = library()
    assert start is not None, "nothing is bound without a driver"
    return start


class RefusedError(RuntimeError):
    """The driver did not start a launch.

    Args:
        code: What it returned.
    """

    def __init__(self, code: int) -> None:
        rule = "success of cuLaunchKernelEx"
        got = f"its error {code}, which may be of earlier work on this GPU"
        super().__init__(f"launch: expected {rule}, got {got}")


def _cells(kinds: Iterable[str], arguments: Iterable[Any]) -> list[Any] | None:
    """What a kernel reads; None where one is of a type that it is not handed."""
    cells: list[Any] = []
    for kind, argument in zip(kinds, arguments, strict=False):
        if kind == "constexpr":  # also what is missing, and numbers that Triton compiled in
            continue
        cell = Pointer if kind.startswith("*") else _NUMBERS.get(kind)
        if cell is None:
            return None
        if not isinstance(argument, cell):
            argument = cell(argument.data_ptr() if isinstance(argument, Tensor) else argument)
        cells.append(argument)
    return cells


@functools.lru_cache(256)
def parameters(ptx: str) -> list[int]:
    """Bytes of each that a kernel declares, in order; 0 for one that is no number."""
    head = ptx[ptx.index(".entry") :].partition(")")[0]
    found = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.([a-z])(\d+)", head)
    return [_BYTES.get(bits, 0) if kind in "usbf" else 0 for kind, bits in found]

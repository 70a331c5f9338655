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
from typing import Any, NamedTuple

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
        call: Addresses of a `Config`, of the function, and of where ``arguments`` are.
        arguments: The objects at the addresses, which must not go before them.
    """

    call: tuple[int, int, int]
    arguments: tuple[Any, ...]


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


class Queue:
    """One thread's launches, which share their grids and the stream."""

    def __init__(self) -> None:
        self.configs: dict[tuple[int, ...], Config] = {}
        self.stream = 0

    def bind(self, compiled: Any, grid: Sequence[int], arguments: Iterable[Any]) -> Launch | None:
        """A launch of what Triton compiled and loaded; None where it takes more than arguments.

        Args:
            compiled: Triton's ``CompiledKernel``, which has been started before; None: none.
            arguments: In the order of the kernel's parameters: tensors, numbers, None for what is
                missing, or cells. The compile-time values at the end may be left out.
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
        threads = compiled.metadata.num_warps * compiled.metadata.target.warp_size
        config = self._config(*grid, threads, 1, 1, compiled.metadata.shared)
        call = ctypes.addressof(config), compiled.function, ctypes.addressof(addresses)
        return Launch(call, (config, addresses, *cells))

    def _config(self, *numbers: int) -> Config:
        found = self.configs.get(numbers)
        if found is None:
            found = self.configs[numbers] = Config(*numbers, self.stream)
        return found

    def run(self, launches: Iterable[Launch], stream: int) -> None:
        """Start them on a stream of the current GPU.

        Raises:
            RuntimeError: CUDA does not take one of them.
        """
        if stream != self.stream:
            self.stream = stream
            for config in self.configs.values():
                config.stream = stream
        start = library()
        assert start is not None, "nothing was bound without a driver"
        for call, _ in launches:
            if code := start(*call, None):
                rule = "success of cuLaunchKernelEx"
                raise RuntimeError(f"launch: expected {rule}, got its error {code}")


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

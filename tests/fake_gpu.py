"""A GPU that is not there: kernels compile for it, and launches are written down.

Both ways of a launch end here, Triton's launcher and CUDA's driver. Tensors stay on the CPU. Triton
keeps kernels by device: this one's number is nobody else's.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

from neobert_kernels import _driver
from neobert_kernels.patching import launches as programs

NUMBER = 1000


class Call(NamedTuple):
    """One launch.

    Attributes:
        name: Of the kernel.
        binary: A number that two kernels share only if they are one.
        block: Threads, and bytes of shared memory.
        kinds: Triton's types of the arguments.
        arguments: Without compile-time values. Through Triton's launcher they are tensors and
            numbers, through the driver addresses and numbers.
        stream: On which it runs.
        by_driver: Which of the two.
    """

    name: str
    binary: int
    grid: tuple[int, ...]
    block: tuple[int, int]
    kinds: tuple[str, ...]
    arguments: tuple[Any, ...]
    stream: int
    by_driver: bool

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The arguments as a kernel has them: addresses, and numbers of 32 bits."""

        def of(kind: str, argument: Any) -> Any:
            if hasattr(argument, "data_ptr"):
                return argument.data_ptr()
            return ctypes.c_float(argument).value if kind == "fp32" else argument

        return tuple(map(of, self.kinds, self.arguments))


@dataclass
class Launches:
    """What reached the driver, unless ``keep`` is false; ``stream`` is the current one."""

    keep: bool = True
    stream: int = 0
    calls: list[Call] = field(default_factory=list)


_listening: list[Launches] = []
_binaries: list[Any] = [None]  # launchers by their function's number; 0 is none


@contextmanager
def fake_gpu(generation: int = 90) -> Iterator[Launches]:
    """Triton's driver while the block runs."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    launches = Launches()
    _listening.append(launches)

    class Utils:
        def load_binary(self, *_: Any) -> tuple[Any, ...]:
            number = len(_binaries) - 1  # of the launcher that Triton has just made
            return object(), number, 32, 0, 1024  # module, function, registers, spills, threads

        def unload_module(self, module: Any) -> None:
            pass

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 227 << 10}

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.number = len(_binaries)
            self.kinds = tuple(source.signature.values())
            self.name, self.block = metadata.name, (32 * metadata.num_warps, metadata.shared)
            _binaries.append(self)

        def write_down(self, grid: tuple[int, ...], arguments: Any, *rest: Any) -> None:
            kinds = tuple(kind for kind in self.kinds if kind != "constexpr")
            call = Call(self.name, self.number, grid, self.block, kinds, tuple(arguments), *rest)
            _listening[-1].calls.append(call)  # Triton keeps kernels for longer than a block runs

        def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
            if not _listening[-1].keep:
                return
            # Stream, function, metadata twice and two hooks stand before the arguments.
            pairs = zip(self.kinds, rest[6:], strict=True)
            self.write_down(
                (x, y, z), [a for kind, a in pairs if kind != "constexpr"], rest[0], False
            )

    class Driver(DriverBase):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = Utils(), Launcher

        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_device(self) -> int:
            return NUMBER

        def get_current_stream(self, device: int) -> int:
            return launches.stream

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", generation, 32)

        def map_python_to_cpp_type(self, kind: str) -> str:
            raise NotImplementedError

        def get_active_torch_device(self) -> Any:
            raise NotImplementedError

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    def library() -> Any:
        return _driver.declared(record if launches.keep else nothing)

    with (
        mock.patch.object(driver, "_active", Driver()),  # its reset would look for a real one
        mock.patch.object(_driver, "library", library),
        mock.patch.object(programs, "PROOFS", 0),  # nothing computes bits that could be compared
    ):
        try:
            yield launches
        finally:
            _listening.pop()


def _launch_kernel(config: int, function: int, parameters: int, extra: int | None) -> int:
    """As ``cuLaunchKernelEx``: reads each argument through its address, by the type that it has."""
    how, binary, numbers = _driver.Config.from_address(config), _binaries[function], []
    for index, kind in enumerate(kind for kind in binary.kinds if kind != "constexpr"):
        address = ctypes.c_uint64.from_address(parameters + 8 * index).value
        cell: Any = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}.get(kind, ctypes.c_uint64)
        numbers.append(cell.from_address(address).value)
    assert (how.threads, how.rows, how.planes, how.shared) == (
        binary.block[0],
        1,
        1,
        binary.block[1],
    )
    assert (how.attributes, how.number_of_attributes, extra) == (None, 0, None)
    binary.write_down((how.x, how.y, how.z), numbers, how.stream or 0, True)
    return 0


record = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(_launch_kernel)
# Reads nothing and returns 0, the rounding mode, in no time.
nothing = ctypes.CDLL(None).fegetround

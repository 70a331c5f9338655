"""A GPU that is not there, for Triton: kernels compile for it, and launches are written down.

Tensors stay on the CPU. Triton keeps kernels by device: this one's number is nobody else's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

NUMBER = 1000


class Call(NamedTuple):
    """One launch; ``binary`` is a number that two kernels share only if they are one."""

    binary: int
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


@dataclass
class Launches:
    """What reached the driver, unless ``keep`` is false."""

    keep: bool = True
    calls: list[Call] = field(default_factory=list)


_listening: list[Launches] = []


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
            return object(), 1, 32, 0, 1024  # module, function, registers, spills, threads

        def unload_module(self, module: Any) -> None:
            pass

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 227 << 10}

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            pass

        def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
            # Stream, function, metadata twice and two hooks stand before the arguments.
            listening = _listening[-1]  # Triton keeps kernels for longer than a block runs
            if listening.keep:
                listening.calls.append(Call(id(self), (x, y, z), rest[6:]))

    class Driver(DriverBase):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = Utils(), Launcher

        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_device(self) -> int:
            return NUMBER

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", generation, 32)

        def map_python_to_cpp_type(self, kind: str) -> str:
            raise NotImplementedError

        def get_active_torch_device(self) -> Any:
            raise NotImplementedError

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    with mock.patch.object(driver, "_active", Driver()):  # its reset would look for a real one
        try:
            yield launches
        finally:
            _listening.pop()

"""Triton where it is installed, and a stand-in that lets the modules import where it is not.

On macOS and Windows there is no Triton: the operators run their references there, and the kernels
are never touched, so the stand-in only has to survive decoration.
"""

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:
    AVAILABLE = False

    class _Language:
        constexpr = "constexpr"

    class _Triton:
        @staticmethod
        def jit(fn: Callable | None = None, **_: Any) -> Any:
            return fn if fn is not None else lambda inner: inner

    triton, tl = _Triton(), _Language()

__all__ = ["AVAILABLE", "tl", "triton"]

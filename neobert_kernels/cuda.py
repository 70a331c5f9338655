"""The optional CUDA extension: the same operators from C++, for less host time a call.

`build` compiles it, `use` chooses it, `status` says in one line what there is. ``NEOBERT_CUDA_OPS``
chooses for a process, at its first call on a GPU: ``1`` all operators, ``0`` none, or names with
commas. Where nothing is chosen, those run that a committed result shows ahead of Triton: so far
none. A chosen operator runs the extension for the inputs that its kernels take (docs/cuda.md) and
Triton for the others.

The extension registers the schemas that `_runtime.register` defined. Python's launchers stand
behind it, in the dispatcher's table and under the names ``<schema>_triton``.
"""

import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from neobert_kernels import _check, _cuda_build, _runtime

# Public names and the schemas behind them, in the order of the bits in csrc/extension.cpp.
OPERATORS = {
    "add_rms_norm": ("add_rms_norm",),
    "add_layer_norm": ("add_layer_norm",),
    "rope": ("rope", "rope_into", "rope_pair"),
    "swiglu": ("gated_unit",),
    "geglu": ("gated_unit",),
    "mean_pool": ("pool",),
}
AHEAD_OF_TRITON: frozenset[str] = frozenset()  # by a file in benchmarks/results; none is measured
SWITCH = "NEOBERT_CUDA_OPS"
NOT_BUILT = "not built (neobert doctor --build)"


class LoadError(RuntimeError):
    """Why the extension cannot be used, in one line."""


@dataclass
class _State:
    library: Any = None
    chosen: frozenset[str] = field(default_factory=frozenset)
    decided: bool = False
    problem: str = ""  # why the last choice could not be had


_state = _State()
_lock = threading.RLock()


def build(sms: tuple[int, ...] = _cuda_build.SMS) -> Path:
    """Compile the extension into the user's cache, where this and later processes find it.

    Needs nvcc and a C++ compiler, no GPU, and about a minute. A process that has loaded an older
    build keeps it.

    Args:
        sms: GPU generations, 90 for compute capability 9.0.

    Raises:
        RuntimeError: Something is missing or does not compile.
    """
    return _cuda_build.build(_cached(), sms)


def find() -> Path | None:
    """The library that would be loaded: of these sources in the cache, else the installed one."""
    for path in (_cached(), _cuda_build.PACKAGE / _cuda_build.NAME):
        if path.exists():
            return path
    return None


def _cached() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "neobert-kernels" / _cuda_build.fingerprint() / _cuda_build.NAME


def requested() -> frozenset[str]:
    """What ``NEOBERT_CUDA_OPS`` chooses, or the default.

    Raises:
        ValueError: It has a value of another form.
    """
    value = os.environ.get(SWITCH, "")
    if not value:
        return AHEAD_OF_TRITON
    if value in ("0", "1"):
        return frozenset(OPERATORS if value == "1" else ())
    names = frozenset(name.strip() for name in value.split(","))
    if not names <= set(OPERATORS):
        raise _check.error(SWITCH, f"0, 1 or names of {', '.join(OPERATORS)}", repr(value))
    return names


def use(*names: str) -> None:
    """Run these operators in the extension, and all others in Triton; none switches it off.

    Args:
        names: Keys of `OPERATORS`, for every thread of this process and from now on.

    Raises:
        ValueError: A name is unknown.
        RuntimeError: The extension is absent or refused; `status` says why.
    """
    for name in names:
        if name not in OPERATORS:
            raise _check.error("names", f"names of {', '.join(OPERATORS)}", repr(name))
    with _lock:
        _state.decided = True
        _choose(frozenset(names))


def chosen() -> frozenset[str]:
    """The operators that run in the extension; the first call of a process decides."""
    if not _state.decided:
        _decide()
    return _state.chosen


def decided() -> bool:
    """Whether a call on a GPU, `use` or `status` has settled what runs."""
    return _state.decided


def idle() -> bool:
    """Whether it is settled that the extension runs nothing."""
    return _state.decided and not _state.chosen


def _decide() -> None:
    with _lock:
        if _state.decided:
            return
        names = requested()
        _state.decided = True
        try:
            _choose(names)
        except (LoadError, _cuda_build.BuildError) as error:
            if os.environ.get(SWITCH):  # it was asked for: not without a word
                warnings.warn(f"CUDA extension: {error}; Triton runs", stacklevel=2)


def _choose(names: frozenset[str]) -> None:
    _state.problem = ""
    if names and _state.library is None:
        try:
            path = _checked()
            _register_alternatives()  # before the library can hand a call on
            _state.library = _load(path)
        except (LoadError, _cuda_build.BuildError) as error:
            _state.problem = str(error)
            raise
    if _state.library is not None:
        _state.library.neobert_cuda_choose(bits(names))
    _state.chosen = names


def bits(names: Collection[str]) -> int:
    """The choice as the library takes it."""
    return sum(1 << i for i, name in enumerate(OPERATORS) if name in names)


def _checked() -> Path:
    """The library, if it is ours, of these sources and for this machine."""
    path = find()
    if path is None:
        raise LoadError(NOT_BUILT)
    _check_file(path)
    if torch.version.cuda is None:
        raise LoadError(f"not loaded: torch {torch.__version__} has no CUDA")
    if not torch.cuda.is_available():
        raise LoadError("not loaded: no GPU that torch can use")
    return path


def _check_file(path: Path) -> tuple[int, ...]:
    """GPU generations of a built library, which is only read: loading the wrong one can crash."""
    about = _cuda_build.about(path)
    if about is None:
        raise LoadError(f"refused: {path} is not a whole build of csrc/; build it again")
    source, sms = about
    if source != _cuda_build.fingerprint():
        raise LoadError(f"refused: {path} was built from other sources; build it again")
    if not _cuda_build.is_intact(path):
        raise LoadError(f"refused: {path} is damaged; build it again")
    return sms


@functools.cache
def _register_alternatives() -> None:
    _runtime.load_operators()
    _runtime.register_alternatives()


def _load(path: Path) -> Any:
    """Load a checked library, which registers its operators, and return it."""
    try:
        library = ctypes.CDLL(str(path))
        library.neobert_cuda_refused.restype = ctypes.c_char_p
        library.neobert_cuda_choose.argtypes = [ctypes.c_uint32]
        library.neobert_cuda_choose.restype = None
        library.neobert_cuda_taken.restype = ctypes.c_uint64
        refused = library.neobert_cuda_refused()
    except (OSError, AttributeError) as error:
        raise LoadError(f"refused: {_one_line(error)}") from None
    if refused is not None:
        raise LoadError(f"refused: {refused.decode()}")
    return library


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def taken() -> int:
    """Calls that the extension's kernels have taken since it was loaded; 0 where it is not."""
    return 0 if _state.library is None else _state.library.neobert_cuda_taken()


def status() -> str:
    """One line: what there is, whether it runs, and if not why. Loads only what is chosen."""
    try:
        if not _state.decided and requested():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it says comes back from here
                chosen()
        if _state.chosen:
            return f"runs {', '.join(name for name in OPERATORS if name in _state.chosen)}"
        if _state.problem:
            return _state.problem
        if os.environ.get(SWITCH) == "0":
            return f"off ({SWITCH}=0)"
        path = find()
        if path is None:
            return NOT_BUILT
        built = ", ".join(f"sm_{sm}" for sm in _check_file(path))
        return f"built for {built}, not chosen ({SWITCH}=1): nothing shows it ahead of Triton"
    except (LoadError, _cuda_build.BuildError, ValueError) as error:
        return str(error)

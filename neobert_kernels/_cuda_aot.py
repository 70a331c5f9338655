"""Reads the machine code in a built CUDA extension, as `aot` reads that of the Triton kernels.

Source: CUDA binary utilities, cuobjdump; Itanium C++ ABI, section 3.4 (what is taken out of names).
"""

import ctypes
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from neobert_kernels import _check, _cuda_build, aot, cuda

_FUNCTION = re.compile(r"^\s*Function\s*:?\s*(\w+):?\s*$", re.MULTILINE)
_NAME = re.compile(r"(\w+_kernel)(?:<(.*)>)?\(")
_TYPES = {"float": "fp32", "neobert::Half": "fp16", "neobert::BFloat": "bf16"}
# Accesses to document boundaries and to a document's norm: made once by a block.
_NARROW_ONCE = {"mean_kernel": 2, "part_kernel": 6, "finish_kernel": 3}


def reports(path: Path, sms: Iterable[int] | None = None) -> Iterator[aot.Report]:
    """One report for each kernel and GPU generation, of those that the library has.

    Args:
        path: The library, which is not loaded.
        sms: GPU generations; those that it was built for where None.

    Raises:
        ValueError: ``path`` is no build of ``csrc/``, or a generation is not in it.
    """
    about = _cuda_build.about(path)
    if about is None:
        raise _check.error("extension", "a build of csrc/", path)
    for sm in about[1] if sms is None else sms:
        if sm not in about[1]:
            raise _check.error("sm", f"one of {', '.join(map(str, about[1]))}", sm)
        resources = _by_function(aot._run("cuobjdump", "-res-usage", "-arch", f"sm_{sm}", path))
        listings = _by_function(aot._run("cuobjdump", "-sass", "-arch", f"sm_{sm}", path))
        for function, usage in resources.items():
            kernel, case = _readable(function)
            if kernel == "empty_kernel":  # only asked whether it could run
                continue
            amount = {what: int(n) for what, n in re.findall(r"(\w+):(\d+)", usage)}
            code = (name for _, name in aot._INSTRUCTION.findall(listings[function]))
            counted: dict[str, Any] = aot._count(code)
            yield aot.Report(
                operator="extension",
                kernel=kernel,
                case=case,
                sm=sm,
                shared_limit=aot.SHARED_LIMITS[sm],
                owes_width=True,
                narrow_once=_NARROW_ONCE.get(kernel, 0),
                supported=True,
                registers=amount["REG"],
                spilled_bytes=amount["STACK"] + amount["LOCAL"],
                shared_bytes=amount["SHARED"],
                **counted,
            )


def built() -> Path:
    """The extension of these sources, compiled now where it is not there.

    Raises:
        ValueError: Something to compile it with is missing, or it does not compile.
    """
    path = cuda.find()
    about = None if path is None else _cuda_build.about(path)
    if path is not None and about is not None and about[0] == _cuda_build.fingerprint():
        return path
    try:
        return cuda.build()
    except _cuda_build.BuildError as error:
        raise ValueError(str(error)) from None


def _by_function(text: str) -> dict[str, str]:
    """What a listing says behind the name of each function."""
    _, *parts = _FUNCTION.split(text)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _readable(function: str) -> tuple[str, str]:
    """``add_norm_kernel`` and ``bf16, fp32, 3, true, false`` from a linker's name."""
    demangle = getattr(ctypes.CDLL("libstdc++.so.6"), "__cxa_demangle")
    demangle.restype = ctypes.c_char_p
    name = demangle(function.encode(), None, None, None)
    found = _NAME.search(name.decode() if name else function)
    if found is None:
        return function, ""
    arguments = (found[2] or "").split(", ")
    return found[1], ", ".join(_TYPES.get(a, a) for a in arguments)

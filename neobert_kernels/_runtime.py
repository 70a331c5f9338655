"""How an operator is registered, which implementation runs, and how a kernel is launched."""

import functools
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neobert_kernels import _check, _eager, _triton

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# Explicit, because Triton 3.10 flips the default: the bits of a kernel must not depend on it.
FP_FUSION = {"enable_fp_fusion": True}

TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Launch:
    """One compiled form of a kernel: what `neobert_kernels.aot` builds without a GPU.

    ``signature`` gives every argument a Triton type; ``aligned`` names the pointers and integers
    that are divisible by 16. ``memory_bound`` kernels owe 16-byte global accesses, except for
    ``narrow_once`` of them, which a program makes once behind its loop; ``matrix`` kernels owe
    tensor-core instructions, those of a warp group unless it is for ``few_rows``, and what ``tma``
    and ``warp_specialized`` ask for must be in the code, because the compiler drops it without a
    word. A ``supported`` launch must not spill. ``maxnreg`` bounds the registers of a thread; None
    leaves them to the assembler.
    """

    kernel: Any
    name: str
    case: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    maxnreg: int | None = None
    aligned: tuple[str, ...] = ()
    memory_bound: bool = True
    narrow_once: int = 0
    matrix: bool = False
    few_rows: bool = False
    tma: bool = False
    warp_specialized: bool = False
    supported: bool = True


@dataclass(frozen=True)
class Operator:
    """A public function, its contract, and its kernels (none while it has only a reference).

    ``peer()`` is the name of what the environment asks for instead, or None.
    """

    name: str
    public: Callable
    reference: Callable
    kernels: tuple[Any, ...] = ()
    launches: Callable[[int], Iterator[Launch]] | None = None
    peer: Callable[[], str | None] = lambda: None


OPERATORS: dict[str, Operator] = {}


def operator(
    public: Callable,
    reference: Callable,
    kernels: tuple[Any, ...] = (),
    launches: Callable[[int], Iterator[Launch]] | None = None,
    peer: Callable[[], str | None] = lambda: None,
) -> None:
    """Enter a public function into `OPERATORS`, where doctor, aot and the tests find it."""
    name = public.__name__
    OPERATORS[name] = Operator(name, public, reference, kernels, launches, peer)


def load_operators() -> dict[str, Operator]:
    """Import every module under ``neobert_kernels.ops``; return all operators by name."""
    package = importlib.import_module("neobert_kernels.ops")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    return dict(sorted(OPERATORS.items()))


def implementation(name: str, device: torch.device | str = "cpu") -> str:
    """What runs for operator ``name``: "triton", "cuda", "triton-interpreter" or "reference".

    "cuda" is the extension, where it is chosen (docs/cuda.md). For attention it may be the name of
    a peer, where ``NEOBERT_ATTENTION`` asks for one.
    """
    if name not in OPERATORS and name not in load_operators():
        raise _check.error("name", f"an operator ({', '.join(sorted(OPERATORS))})", repr(name))
    peer = OPERATORS[name].peer()
    if peer is not None:
        return peer
    if not OPERATORS[name].kernels or not _triton.AVAILABLE:
        return "reference"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise _check.error("device", "a device of PyTorch, as cpu or cuda", repr(device)) from None
    if kind == "cuda":
        return "cuda" if extension_runs(name) else "triton"
    return "triton-interpreter" if INTERPRET else "reference"


def register(schema: str, launch: Callable, fake: Callable, extension: bool = False) -> Any:
    """Define ``neobert::<schema>``, attach its launcher and shape function, return its handle.

    With ``extension`` the CUDA extension may take its place on GPUs. The handle is not
    differentiable: call it from an ``autograd.Function``.
    """
    name = schema.partition("(")[0]
    on_gpu = _on_its_gpu(launch)
    torch.library.define(f"neobert::{name}", schema.removeprefix(name))
    torch.library.impl(f"neobert::{name}", "cpu", launch)
    if extension:
        # Behind the key "cuda", which the extension takes when it is loaded.
        behind = _extension_first(name, on_gpu)
        torch.library.impl(f"neobert::{name}", "CompositeExplicitAutograd", behind)
        _EXTENDED[name] = (schema.removeprefix(name), launch)
    else:
        torch.library.impl(f"neobert::{name}", "cuda", on_gpu)
    torch.library.register_fake(f"neobert::{name}", fake)
    handle = getattr(torch.ops.neobert, name).default
    _LAUNCHERS[handle] = on_gpu, extension
    return handle


_LAUNCHERS: dict[Any, tuple[Callable, bool]] = {}  # by handle; whether the extension may run it
_EXTENDED: dict[str, tuple[str, Callable]] = {}


def launcher(handle: Any) -> Callable:
    """The Python function behind a handle from `register`, on the GPU of its first tensor."""
    return _LAUNCHERS[handle][0]


def differentiable(function: Any, handle: Any, first: bool = False) -> Callable:
    """What a public function calls: ``function.apply``, or less where nobody would see it.

    Entering an ``autograd.Function`` and the dispatcher takes longer than all else that a small
    call does. Plain tensors of which no gradient is recorded go to the launcher itself, or, where
    the extension may take them, to the dispatcher, which hands them on without Python.

    Args:
        function: An ``autograd.Function`` whose forward calls ``handle`` with its arguments.
        handle: From `register`.
        first: Whether ``function`` returns only the first result of ``handle``.
    """
    launch, extended = _LAUNCHERS[handle]

    def call(*args: Any) -> Any:
        if not _eager.unobserved(args):
            return function.apply(*args)
        results = (handle if extended and extension_may_run(args[0]) else launch)(*args)
        return results[0] if first else results

    return call


def extension_may_run(x: Tensor) -> bool:
    return x.is_cuda and not _extension().idle()


def _extension_first(name: str, launch: Callable) -> Callable:
    """``launch``, but for the first call on a GPU, which decides whether the extension runs."""

    @functools.wraps(launch)
    def call(*args: Any) -> Any:
        if not _extension().decided():
            _extension().chosen()
            return getattr(torch.ops.neobert, name)(*args)
        return launch(*args)

    return call


@functools.cache
def _extension() -> Any:
    return importlib.import_module("neobert_kernels.cuda")


def extension_runs(operator: str) -> bool:
    """Whether the CUDA extension runs public function ``operator`` on a GPU."""
    return operator in _extension().chosen()


def extended() -> dict[str, str]:
    """Names and signatures of the schemas that the CUDA extension may implement."""
    return {name: schema for name, (schema, _) in _EXTENDED.items()}


def register_alternatives() -> None:
    """Define ``<schema>_triton`` for each: where the extension sends what it does not take."""
    for name, (schema, launch) in _EXTENDED.items():
        torch.library.define(f"neobert::{name}_triton", schema)
        torch.library.impl(f"neobert::{name}_triton", "cuda", _on_its_gpu(launch))


def _on_its_gpu(launch: Callable) -> Callable:
    """``launch`` on the GPU of its first tensor: Triton launches on the current one."""

    @functools.wraps(launch)
    def call(x: Tensor, *rest: Any) -> Any:
        index = x.get_device()  # -1 on a CPU
        if index < 0 or index == torch.cuda.current_device():
            return launch(x, *rest)
        with torch.cuda.device(index):
            return launch(x, *rest)

    return call


def use_kernel(x: Tensor) -> bool:
    """True for CUDA tensors, and for every tensor while Triton's interpreter is on."""
    if not (x.is_cuda or INTERPRET):
        return False
    if not _triton.AVAILABLE:
        raise RuntimeError(
            "triton: expected an installed package for tensors on "
            f"{x.device}, got none (pip install triton)"
        )
    return True


@functools.cache
def _sm_count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def generation(x: Tensor) -> int:
    """90 on a GPU of compute capability 9.0; 80 in the interpreter."""
    return _capability(x.device.index) if x.is_cuda else 80


def resident_programs(x: Tensor, per_sm: int) -> int:
    """Programs that a GPU runs at once at ``per_sm`` a multiprocessor; 4 in the interpreter."""
    return _sm_count(x.device.index) * per_sm if x.is_cuda else 4


def neighbouring(x: Tensor) -> Tensor:
    """``x`` itself where its channels are neighbours in memory, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """``x`` as ``[rows, C]`` with neighbouring channels; a copy only where no view exists."""
    if x.ndim == 2:
        return neighbouring(x)
    return neighbouring(x.reshape(-1, x.shape[-1]))


def signature(kernel: Any, dtype: torch.dtype, **types: str) -> dict[str, str]:
    """Triton types of a kernel's arguments by our naming rules.

    ``*_ptr`` points to ``dtype``, constexprs are constexprs, the rest is i32; ``types`` overrides.
    """
    element = TRITON_TYPES[dtype]

    def of(parameter: Any) -> str:
        if parameter.is_constexpr:
            return "constexpr"
        name = parameter.name
        return types.get(name) or (f"*{element}" if name.endswith("_ptr") else "i32")

    return {p.name: of(p) for p in kernel.params}

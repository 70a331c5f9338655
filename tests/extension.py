"""The CUDA extension as the tests see it: on a GPU, or its sources built for a CPU."""

import fcntl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neobert_kernels import _cuda_build, _runtime, cuda
from neobert_kernels.ops.layer_norm import add_layer_norm_reference
from neobert_kernels.ops.pooling import first_pool_reference, mean_pool_reference
from neobert_kernels.ops.rms_norm import add_rms_norm_reference
from neobert_kernels.ops.rope import rope_reference
from neobert_kernels.ops.swiglu import geglu_reference, swiglu_reference

ROOT = Path(__file__).resolve().parents[1]
ON_CPU = "neobert_on_host"  # the namespace of the operators there


@dataclass
class Extension:
    """Operators by schema name, and the calls that went to ``<schema>_triton`` (on a CPU)."""

    ops: Any
    device: torch.device
    taken: Callable[[], int]
    use: Callable[..., None]
    handed_on: list[str]


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return rope_reference(x, cos, -sin if inverse else sin, interleaved)


def rope_into(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor) -> None:
    out.copy_(rope_reference(x, cos, sin, interleaved))


def rope_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    both = rope_reference(torch.cat([q, k], dim=1), cos, sin, interleaved)
    return torch.cat([both[..., ::2], both[..., 1::2]], dim=-1) if interleaved else both


def pool(x: Tensor, cu_seqlens: Tensor, mean: bool, normalize: bool) -> tuple[Tensor, ...]:
    reference = mean_pool_reference if mean else first_pool_reference
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = reference(x, cu_seqlens, normalize)
    unit = reference(wide, cu_seqlens, normalize)[
        : len(y) if normalize and x.dtype in HALVES else 0
    ]
    return y, unit, reference(wide, cu_seqlens).norm(dim=-1)[: len(y) if normalize else 0]


HALVES = (torch.float16, torch.bfloat16)
# Of every schema that the extension implements: what it computes.
REFERENCES: dict[str, Callable] = {
    "add_rms_norm": add_rms_norm_reference,
    "add_layer_norm": add_layer_norm_reference,
    "gated_unit": lambda x, gelu: (geglu_reference if gelu else swiglu_reference)(x),
    "rope": rope,
    "rope_into": rope_into,
    "rope_pair": rope_pair,
    "pool": pool,
}


def on_cpu() -> Extension:
    """Load it, once in a process. What it hands on goes to the references."""
    _runtime.load_operators()
    handed_on: list[str] = []

    def noted(name: str) -> Callable:
        def call(*args: Any) -> Any:
            handed_on.append(name)
            result = REFERENCES[name](*args)
            return result.contiguous() if isinstance(result, Tensor) else result

        return call

    for name, schema in _runtime.extended().items():
        torch.library.define(f"{ON_CPU}::{name}", schema)
        torch.library.define(f"{ON_CPU}::{name}_triton", schema)
        torch.library.impl(f"{ON_CPU}::{name}_triton", "cpu", noted(name))
    library = cuda._load(_built())

    def use(*names: str) -> None:
        library.neobert_cuda_choose(cuda.bits(names))

    ops = getattr(torch.ops, ON_CPU)
    return Extension(ops, torch.device("cpu"), library.neobert_cuda_taken, use, handed_on)


def on_gpu() -> Extension:
    return Extension(torch.ops.neobert, torch.device("cuda"), cuda.taken, cuda.use, [])


def _built() -> Path:
    """Once for all workers and runs: it takes seconds."""
    path = ROOT / "build" / ON_CPU / _cuda_build.fingerprint() / _cuda_build.NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return path if path.exists() else _cuda_build.build_for_cpu(path)

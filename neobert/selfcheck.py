"""A quick check of every operator on one device against its reference in float64.

The rule is that of the tests: an operator may be twice as far from float64 as its reference in
the same dtype, plus a rounding floor. Where the reference itself runs, that holds by definition, so
a plain limit on the relative error stands beside it: it finds a broken matrix library or a bad GPU.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neobert_kernels import _runtime
from neobert_kernels._runtime import Operator
from neobert_kernels.ops.attention import peers
from neobert_kernels.ops.rope import rope_table_reference

FLOOR_ULPS = 2
# Largest error over largest value, far above rounding in sums as short as these samples'.
LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

T, C, H, D, V = 23, 64, 4, 16, 50
LENGTHS = (1, 14, 8)


@dataclass(frozen=True)
class Check:
    """One operator in one dtype: its largest error over what it may have (at most 1 is good)."""

    operator: str
    implementation: str
    dtype: str
    relative_error: float | None
    share_of_budget: float | None
    passed: bool
    message: str = ""


@dataclass(frozen=True)
class Sample:
    """Arguments for one call; gradients are checked for the positions in `leaves`."""

    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    leaves: tuple[int, ...] = (0,)


def run_checks(device: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[Check]:
    """Check every registered operator on ``device``."""
    return [
        check(operator, device, dtype)
        for operator in _runtime.load_operators().values()
        for dtype in dtypes
    ]


def check(operator: Operator, device: str, dtype: torch.dtype = torch.float32) -> Check:
    """Run one operator; an operator without a sample, or one that raises, does not pass."""
    ran = _runtime.implementation(operator.name, device)

    def result(error: float | None, share: float | None, passed: bool, message: str = "") -> Check:
        name = str(dtype).removeprefix("torch.")
        return Check(operator.name, ran, name, error, share, passed, message)

    if operator.name not in SAMPLES:
        return result(None, None, False, "no sample to check it with")
    try:
        relative, share = _measure(operator, device, dtype)
    except Exception as error:  # whatever a driver or compiler raises is the finding
        return result(None, None, False, " ".join(f"{type(error).__name__}: {error}".split())[:300])
    # Written so that NaN fails.
    passed = share <= 1 and relative <= LIMITS[dtype]
    return result(relative, share, passed, "" if passed else "too far from float64")


def attention_peers(device: str) -> dict[str, str]:
    """Every peer of attention, and why it does not run on ``device``; empty where it does."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x = torch.ones(32, 2, 64, dtype=dtype, device=device)
    bounds = torch.tensor([0, 16, 32], dtype=torch.int32, device=device)

    def reason(name: str) -> str:
        absent = peers.missing(name, device)
        if absent:
            return absent
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, which say less than its error
                peers.attend(name, x, x, x, bounds, 16)
        except Exception as error:  # whatever a driver or package raises is the reason
            return " ".join(str(error).split())[:100]
        return ""

    return {name: reason(name) for name in peers.PEERS}


def _measure(operator: Operator, device: str, dtype: torch.dtype) -> tuple[float, float]:
    sample = SAMPLES[operator.name](torch.Generator().manual_seed(0))
    here = _converted(sample, dtype, device)
    exact = _outputs(
        ORACLES.get(operator.name, operator.reference), _converted(sample, torch.float64)
    )
    rounded = _outputs(operator.reference, here)
    actual = _outputs(operator.public, here)
    relative = share = 0.0
    for a, r, e in zip(actual, rounded, exact, strict=True):
        size = e.abs().max()
        error = (a.cpu().double() - e).abs().max()
        floor = FLOOR_ULPS * torch.finfo(a.dtype).eps * size
        budget = 2 * (r.cpu().double() - e).abs().max() + floor
        # max(nan, x) depends on the order in Python; a tensor's maximum keeps NaN.
        relative = float(torch.tensor(relative).maximum(error / size.clamp(min=1e-30)))
        share = float(torch.tensor(share).maximum(error / budget.clamp(min=1e-30)))
    return relative, share


def _converted(sample: Sample, dtype: torch.dtype, device: str = "cpu") -> Sample:
    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # RoPE tables are float32 by contract; only the oracle takes them wider.
        keep = value.dtype == torch.float32 and dtype != torch.float64
        target = value.dtype if keep or not value.is_floating_point() else dtype
        return value.to(device, target)

    return Sample(
        tuple(map(convert, sample.args)),
        {name: convert(value) for name, value in sample.options.items()},
        sample.leaves,
    )


def _outputs(function: Callable[..., Any], sample: Sample) -> list[Tensor]:
    """Outputs, then gradients of their sum weighted by fixed numbers."""
    args = list(sample.args)
    leaves = []
    for i in sample.leaves:
        args[i] = args[i].detach().requires_grad_()
        leaves.append(args[i])
    out = function(*args, **sample.options)
    outputs = list(out) if isinstance(out, tuple) else [out]
    if not leaves:
        return outputs
    total = sum(
        (o.double() * torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape)).sum()
        for o in outputs
    )
    assert isinstance(total, Tensor)
    return [o.detach() for o in outputs] + list(torch.autograd.grad(total, leaves))


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Float64 numbers that float32, float16 and bfloat16 hold exactly, so all start from one."""
    return torch.randn(shape, generator=generator).bfloat16().double()


def _cu_seqlens() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).int()


def _tables() -> tuple[Tensor, Tensor]:
    return rope_table_reference(torch.arange(T), D)


def _wide_rope_table(positions: Tensor, dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """`rope_table_reference` rounds to float32 by contract; this one does not."""
    rates = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = positions.double()[:, None] * rates
    return angle.cos(), angle.sin()


def _attention(generator: torch.Generator) -> Sample:
    q, k, v = (_normal(generator, T, H, D) for _ in range(3))
    cos, sin = _tables()
    return Sample(
        (q, k, v, _cu_seqlens(), max(LENGTHS)), {"cos": cos, "sin": sin}, leaves=(0, 1, 2)
    )


def _qkv_attention(generator: torch.Generator) -> Sample:
    cos, sin = _tables()
    packed = _normal(generator, T, H, 3, D)
    return Sample((packed, _cu_seqlens(), max(LENGTHS)), {"cos": cos, "sin": sin})


def _fused_linear(generator: torch.Generator) -> Sample:
    """With all parts, and outputs that end inside a block."""
    x, weight, bias, residual, norm_weight, norm_bias = (
        _normal(generator, *shape) for shape in ((T, C), (V, C), (V,), (T, C), (C,), (C,))
    )
    norm = {"norm": "layer_norm", "norm_weight": norm_weight, "norm_bias": norm_bias}
    options = {"residual": residual, **norm, "activation": "swiglu"}
    return Sample((x, weight, bias), options, leaves=())


def _labels(generator: torch.Generator) -> Tensor:
    labels = torch.randint(V, (T,), generator=generator)
    labels[::3] = -100
    return labels


ORACLES: dict[str, Callable[..., Any]] = {"rope_table": _wide_rope_table}

SAMPLES: dict[str, Callable[[torch.Generator], Sample]] = {
    "rms_norm": lambda g: Sample((_normal(g, T, C), _normal(g, C)), leaves=(0, 1)),
    "add_rms_norm": lambda g: Sample(
        (_normal(g, T, C), _normal(g, T, C), _normal(g, C)), leaves=(0, 1, 2)
    ),
    "layer_norm": lambda g: Sample(
        (_normal(g, T, C), _normal(g, C), _normal(g, C)), leaves=(0, 1, 2)
    ),
    "add_layer_norm": lambda g: Sample(
        (_normal(g, T, C), _normal(g, T, C), _normal(g, C), _normal(g, C)), leaves=(0, 1, 2, 3)
    ),
    "swiglu": lambda g: Sample((_normal(g, T, 2 * C),)),
    "geglu": lambda g: Sample((_normal(g, T, 2 * C),)),
    "silu_mul": lambda g: Sample((_normal(g, T, C), _normal(g, T, C)), leaves=(0, 1)),
    "gelu_mul": lambda g: Sample((_normal(g, T, C), _normal(g, T, C)), leaves=(0, 1)),
    "rope_table": lambda g: Sample((torch.arange(T), D), leaves=()),
    "rope": lambda g: Sample((_normal(g, T, H, D), *_tables())),
    "attention": _attention,
    "qkv_attention": _qkv_attention,
    "batch_invariant_linear": lambda g: Sample(
        (_normal(g, T, C), _normal(g, V, C), _normal(g, V)), leaves=()
    ),
    "fused_linear": _fused_linear,
    "linear_cross_entropy": lambda g: Sample(
        (_normal(g, T, C), _normal(g, V, C), _labels(g)), leaves=(0, 1)
    ),
    "mean_pool": lambda g: Sample((_normal(g, T, C), _cu_seqlens())),
    "first_pool": lambda g: Sample((_normal(g, T, C), _cu_seqlens())),
    "info_nce": lambda g: Sample((_normal(g, 6, C), _normal(g, 6, C), 8.0), leaves=(0, 1)),
}

"""Argument checks of the public functions: an error names the argument, the rule and the value.

Checks that would have to read values off a GPU are made on CPU tensors only: no call may cost a
device synchronisation. What every call of a layer passes, tests all its rules in one expression;
which of them is broken is found out afterwards.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32_MAX = torch.finfo(torch.float32).max


def error(name: str, rule: str, value: object) -> ValueError:
    return ValueError(f"{name}: expected {rule}, got {value}")


def tensor(name: str, value: Any, *, ndim: int | None = None, least_ndim: int = 0) -> None:
    if not isinstance(value, Tensor):
        raise error(name, "a torch.Tensor", type(value).__name__)
    if ndim is not None and value.ndim != ndim:
        raise error(name, f"{ndim} dimensions", f"shape {tuple(value.shape)}")
    if value.ndim < least_ndim:
        raise error(name, f"at least {least_ndim} dimension(s)", f"shape {tuple(value.shape)}")


def dtype(name: str, value: Tensor, allowed: Sequence[torch.dtype] = DTYPES) -> None:
    if value.dtype not in allowed:
        rule = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise error(name, f"dtype {rule}", str(value.dtype).removeprefix("torch."))


def readable(value: Tensor) -> bool:
    """Whether values may be looked at: on a CPU, and not by a compiler."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def exactly(
    name: str, value: Any, size: tuple[int, ...], kind: torch.dtype, where: torch.device
) -> None:
    """A tensor of one shape, dtype and device."""
    if (
        isinstance(value, Tensor)
        and value.dtype == kind
        and value.shape == size
        and value.device == where
    ):
        return
    tensor(name, value)
    dtype(name, value, (kind,))
    shape(name, value, size)
    device(name, value, where)


def shape(name: str, value: Tensor, expected: Sequence[int]) -> None:
    if tuple(value.shape) != tuple(expected):
        raise error(name, f"shape {tuple(expected)}", tuple(value.shape))


def device(name: str, value: Tensor, expected: torch.device) -> None:
    if value.device != expected:
        raise error(name, f"device {expected}", value.device)


def like(name: str, value: Any, other_name: str, other: Tensor) -> None:
    """``value`` must have the shape, dtype and device of ``other``."""
    if (
        isinstance(value, Tensor)
        and value.shape == other.shape
        and value.dtype == other.dtype
        and value.device == other.device
    ):
        return
    tensor(name, value)
    for what in ("shape", "dtype", "device"):
        mine, theirs = getattr(value, what), getattr(other, what)
        if mine != theirs:
            raise error(name, f"the {what} of {other_name} ({plain(theirs)})", plain(mine))


def output(name: str, value: Tensor, source_name: str, source: Tensor) -> None:
    """``value`` receives a result of ``source``, of one shape and dtype; it may be that view.

    Otherwise no element may share memory with another, of either.
    """
    if torch.compiler.is_compiling() or not value.numel():
        return
    dims = _by_stride(value)
    reach = 0
    for stride, size in reversed(dims):
        if stride <= reach:
            rule = "elements that share no memory (no expanded or overlapping view)"
            raise error(name, rule, f"shape {tuple(value.shape)} with strides {value.stride()}")
        reach += stride * (size - 1)
    apart = value.data_ptr() - source.data_ptr()
    same = dims == _by_stride(source)
    if same and apart == 0:
        return
    last = sum(stride * (size - 1) for stride, size in _by_stride(source))
    if not -reach - 1 < apart / value.element_size() < last + 1:
        return
    steps, rest = divmod(apart, value.element_size())
    if rest or not same or _meet(steps, dims):
        rule = f"{source_name} itself, or memory that it does not share with {source_name}"
        raise error(name, rule, "a view that overlaps it")


def apart(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """``value`` receives a result while ``other`` is read: their memory may not even interlock."""
    if torch.compiler.is_compiling() or not value.numel() or not other.numel():
        return
    (start, end), (first, last) = _span(value), _span(other)
    if start < last and first < end:
        raise error(name, f"memory apart from that of {other_name}", "a view that overlaps it")


def _span(value: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the one behind its last."""
    last = sum(stride * (size - 1) for stride, size in _by_stride(value))
    return value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()


def _by_stride(value: Tensor) -> list[tuple[int, int]]:
    """Strides and sizes of the dimensions that move, the farthest first."""
    pairs = zip(value.stride(), value.shape, strict=True)
    return sorted((pair for pair in pairs if pair[1] > 1), reverse=True)


def _meet(apart: int, dims: Sequence[tuple[int, int]]) -> bool:
    """Whether two views of ``dims``, ``apart`` elements from each other, share one.

    A dimension's stride is farther than all smaller dimensions reach, so two steps can be right.
    """
    if not dims:
        return apart == 0
    (stride, size), *smaller = dims
    near = apart // stride
    return any(
        abs(step) < size and _meet(apart - step * stride, smaller) for step in (near, near + 1)
    )


def channels(name: str, value: Any, weight_name: str, weight: Any, most: int) -> None:
    """``value [..., C]`` in a supported dtype with a matching ``weight [C]`` on its device."""
    rows(name, value)
    C = value.shape[-1]
    if not 1 <= C <= most:
        raise error(name, f"1 to {most} channels", C)
    vector(weight_name, weight, C, value.device)


def rows(name: str, value: Any) -> None:
    """``[..., C]`` in a supported dtype."""
    if not (isinstance(value, Tensor) and value.ndim and value.dtype in DTYPES):
        tensor(name, value, least_ndim=1)
        dtype(name, value)


def vector(name: str, value: Any, size: int, where: torch.device) -> None:
    if (
        isinstance(value, Tensor)
        and value.dtype in DTYPES
        and value.shape == (size,)
        and value.device == where
    ):
        return
    tensor(name, value)
    dtype(name, value)
    shape(name, value, (size,))
    device(name, value, where)


def product(x: Any, weight: Any, bias: Any) -> None:
    """The arguments of a Linear layer: ``x [..., K]``, ``weight [N, K]``, ``bias [N]`` or None."""
    tensor("x", x, least_ndim=1)
    dtype("x", x)
    if not x.shape[-1]:
        raise error("x", "at least one channel", 0)
    tensor("weight", weight, ndim=2)
    dtype("weight", weight, (x.dtype,))
    device("weight", weight, x.device)
    if weight.shape[1] != x.shape[-1] or not weight.shape[0]:
        raise error("weight", f"shape (N, {x.shape[-1]})", tuple(weight.shape))
    if bias is not None:
        vector("bias", bias, weight.shape[0], x.device)
        dtype("bias", bias, (x.dtype,))


def no_gradient(**tensors: Tensor | None) -> None:
    """For operators without a backward."""
    if torch.is_grad_enabled():
        for name, value in tensors.items():
            if value is not None and value.requires_grad:
                rule = "no gradient to record (it has none: torch.no_grad(), or F.linear)"
                raise error(name, rule, "one that requires it")


def positive(name: str, value: float, *, zero: bool = False) -> None:
    if type(value) is float and 0.0 < value <= FLOAT32_MAX:
        return
    number(name, value)
    if not (value >= 0 if zero else value > 0) or value > FLOAT32_MAX:
        rule = "a finite number, at least 0" if zero else "a finite number over 0"
        raise error(name, rule, value)


def number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise error(name, "a number", type(value).__name__)


def between(name: str, value: float, low: float, high: float) -> None:
    number(name, value)
    if not low <= value <= high:
        raise error(name, f"a number from {low:g} to {high:g}", value)


def label(name: str, value: Any) -> None:
    """An int that an int64 tensor of labels can hold."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise error(name, "an int", repr(value))
    if not -(2**63) <= value < 2**63:
        raise error(name, "an int of 64 bits", value)


def within(name: str, value: Tensor, size: int, ignored: int | None = None) -> None:
    """Indices into ``size`` things, or ``ignored``; looked at on a CPU only."""
    if not readable(value):
        return
    outside = (value < 0) | (value >= size)
    if ignored is not None:
        outside &= value != ignored
    if outside.any():
        rule = f"values in 0..{size - 1}" + ("" if ignored is None else f" or {ignored}")
        raise error(name, rule, int(value[outside][0]))


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise error(name, "True or False", repr(value))


def cu_seqlens(value: Any, tokens: int, where: torch.device, name: str = "cu_seqlens") -> None:
    """Document boundaries ``[B + 1]``: int32, from 0 to ``tokens``, never falling."""
    if not (
        isinstance(value, Tensor)
        and value.dtype == torch.int32
        and value.ndim == 1
        and value.device == where
    ):
        tensor(name, value, ndim=1)
        dtype(name, value, (torch.int32,))
        device(name, value, where)
    if value.shape[0] < 1:
        raise error(name, "at least one element", "none")
    if not readable(value):
        return
    bounds = value.tolist()
    if bounds[0] != 0:
        raise error(name, "a first element of 0", bounds[0])
    if bounds[-1] != tokens:
        raise error(name, f"a last element equal to the number of tokens ({tokens})", bounds[-1])
    for i, (low, high) in enumerate(itertools.pairwise(bounds)):
        if high < low:
            raise error(name, "values that never fall", f"{low} then {high} at index {i}")


def documents(
    bounds: Any, longest: int, tokens: int, where: torch.device, names: tuple[str, str]
) -> None:
    """A packed layout under the caller's two names: boundaries, and the longest length."""
    cu_seqlens(bounds, tokens, where, names[0])
    if len(bounds) < 2 or not readable(bounds):
        return
    least = int(bounds.diff().max())
    if longest < least:
        raise error(names[1], f"at least the longest document ({least})", longest)


def plain(value: Any) -> object:
    if isinstance(value, torch.Size):
        return tuple(value)
    return str(value).removeprefix("torch.")

"""Whether a call of an operator is seen by nobody but its launcher."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, profiler

_TENSORS = frozenset({Tensor, nn.Parameter})
# Exactly these: a subclass of Tensor has a dispatch of its own, a number of numpy or a symbolic one
# is for the dispatcher to convert.
_PLAIN = _TENSORS | {int, float, bool, type(None)}
# Modes that PyTorch keeps on stacks: fake tensors, devices as a context, traces, transforms.
_OBSERVERS = (
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
    "_are_functorch_transforms_active",
    "_get_tracing_state",
)
_KNOWN = (
    all(hasattr(torch._C, name) for name in _OBSERVERS)
    and hasattr(forward_ad, "_current_level")
    and hasattr(profiler, "_is_profiler_enabled")
)
_len_dispatch, _len_function, _transforms, _trace = (
    getattr(torch._C, name, bool) for name in _OBSERVERS
)


def in_a_mode() -> bool:
    """Whether a mode, a trace or a transform is to see every operator."""
    if not _KNOWN or _len_dispatch() or _len_function():
        return True
    return bool(_transforms()) or _trace() is not None


def unobserved(args: tuple[Any, ...]) -> bool:
    """Whether plain tensors meet no compiler, trace, transform, mode, profiler or gradient.

    They are private, but old: where a build lacks one, every call is observed.
    """
    if torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, args)) or in_a_mode():
        return False
    if profiler._is_profiler_enabled or forward_ad._current_level >= 0:
        return False
    return not torch.is_grad_enabled() or not any(
        arg.requires_grad for arg in args if type(arg) in _TENSORS
    )

"""Frozen models without a module's call: all launches of the layers are made out once.

What a module's call costs the host, and Triton's launcher, is more than most batches cost the
device. A family says by a `Stack` what its layers are made of, and `launches` starts that over
buffers which all layers share.

On few tokens a layer is five launches. A forward over a short text reads every weight once and
computes next to nothing, so its time is that of its launches. There norms, with the additions
before them, and activations are part of `fused_linear`: the product before attention, attention,
the product behind it, and the feed-forward's two.

What calls modules, hooks or wrappers, is noticed at each call, and then the layers run one by one
as they are. How much all this gains on a GPU is not measured.
"""

import operator
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from neobert_kernels import _check, _runtime
from neobert_kernels._eager import in_a_mode
from neobert_kernels.ops.attention import peers
from neobert_kernels.ops.attention.tiles import MAX_HEAD_SIZE
from neobert_kernels.ops.fused_linear import launch as fused
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.blocks import MARK, has_hooks
from neobert_kernels.patching.launches import Launches, of_many
from neobert_kernels.patching.stacks import Linear, Norm, NotPlainError, Stack

DIRECT = "NEOBERT_DIRECT"  # 0: layers always run one by one
FEW_TOKENS = "NEOBERT_FEW_TOKENS"  # 0: they run as many do
MOST_TOKENS = 64  # four blocks of rows, which read the same weights. Unmeasured.

TRAINING = operator.itemgetter("training")


def wanted(switch: str) -> bool:
    """Whether the environment leaves it on.

    Raises:
        ValueError: The variable is neither 0 nor 1.
    """
    value = os.environ.get(switch, "")
    if value not in ("", "0", "1"):
        raise _check.error(switch, "0 or 1", repr(value))
    return value != "0"


# Attributes of modules from which a layer's numbers come, besides its weights.
NUMBERS = ("eps", "variance_epsilon", "scaling", "sliding_window", "attention_type", "act")
# Of classes that compute what a layer's own forward is known for; families check the others.
_LIBRARIES = ("neobert.", "transformers.", "transformers_modules.", "xformers.")
_TORCH: dict[type, Any] = {
    cls: cls.forward
    for cls in (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity, nn.ModuleList)
}


def _plain(module: Any) -> bool:
    """Whether a module of a layer does what its library's does, or what we put on it."""
    own = module.__dict__.get("forward")
    own = getattr(own, "__func__", own)
    # A wrapper around ours has its mark, too.
    if own not in (None, type(module).forward) and getattr(own, MARK, None) is not own:
        return False
    if type(module) in _TORCH:
        return type(module).forward is _TORCH[type(module)]
    return type(module).__module__.startswith(_LIBRARIES)


class _Seen:
    """What a stack was made from. Looked at in every call, so in few steps of the interpreter.

    Args:
        base: The model.
        modules: Of its layers, which are not called.
        weights: Of the stack.
        settings: As `Stack` has them.
    """

    def __init__(
        self,
        base: nn.Module,
        modules: list[nn.Module],
        weights: list[Tensor],
        settings: Callable[[], Any],
    ) -> None:
        everything = [m for m in base.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self.children = [module._modules for module in everything if module._modules]
        self.parameters = [module._parameters for module in everything if module._parameters]
        self.numbers = [
            (module.__dict__, name)
            for module in everything
            for name in NUMBERS
            if name in module.__dict__
        ]
        self.weights, self.settings, self.modules = weights, settings, modules
        self.classes: list[Any] = list(set(map(type, modules)))
        self.attributes = [module.__dict__ for module in modules]
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.was = self._now()

    def _now(self) -> tuple[Any, ...]:
        return (
            list(map(dict, self.children)),
            list(map(type, self.modules)),
            [cls.forward for cls in self.classes],
            [own.get("forward") for own in self.attributes],
            list(map(id, chain.from_iterable(map(dict.values, self.parameters)))),
            list(map(Tensor.data_ptr, self.weights)),
            list(map(Tensor.size, self.weights)),
            list(map(Tensor.stride, self.weights)),
            [weight.dtype for weight in self.weights],
            [own.get(name) for own, name in self.numbers],
            self.settings(),
        )

    def current(self) -> bool:
        """Whether modules, weights and numbers are those that there were, where they were."""
        return self._now() == self.was

    def watched(self) -> bool:
        """Whether somebody is to see a module's call, or it would not do what it does here."""
        return (
            nn.modules.module._has_any_global_hook()
            or (any(self.hooks) and any(map(has_hooks, self.modules)))
            or True in map(TRAINING, self.attributes)
        )


class _Plan(NamedTuple):
    """How a model runs as it was when it was last looked at; without launches layer by layer."""

    seen: _Seen
    few: Launches | None = None
    many: Launches | None = None


class Direct:
    """Runs the layers of one frozen base model.

    Args:
        base: The model.
        layers: Its layers now.
        describe: Makes their stack; raises `NotPlainError` where it has none.
    """

    def __init__(
        self,
        base: nn.Module,
        layers: Callable[[Any], Iterable[tuple[str, nn.Module]]],
        describe: Callable[[Any], Stack],
    ) -> None:
        self.base, self.layers, self.describe = base, layers, describe
        self.fuses = wanted(FEW_TOKENS)
        self.plan = self._look()

    def _look(self) -> _Plan:
        """Read the layers as they are now."""
        modules = [module for _, layer in self.layers(self.base) for module in layer.modules()]
        few = many = stack = None
        weights: list[Tensor] = []
        settings: Callable[[], Any] = tuple  # nothing
        with suppress(NotPlainError):
            if modules and all(map(_plain, modules)):
                stack = self.describe(self.base)
                weights, settings = _weights(stack), stack.settings
        if stack is not None and _fits(stack, weights):
            like = stack.after.weight
            if self.fuses and fused.takes(len(like), like.element_size()):
                few = Launches(stack, few=True)
            if of_many(stack):
                many = Launches(stack, few=False)
        return _Plan(_Seen(self.base, modules, weights, settings), few, many)

    def run(self, x: Tensor, batch: Batch, whole: bool = True) -> Tensor | None:
        """All layers and the norm behind them, ``[T, C]`` to ``[T, C]``; None: not here.

        ``whole=False``: of many tokens the last layer is to compute some only, which it does here
        not.
        """
        if torch.compiler.is_compiling() or not len(x):
            return None
        if type(x) is not Tensor or not _runtime.use_kernel(x) or in_a_mode():
            return None
        if peers.asked() is not None or _differentiates(x):
            return None
        if {batch.cu_seqlens.device, batch.positions.device} != {x.device}:
            return None  # the layers say what is wrong
        plan = self.plan  # of this thread, whatever others find out meanwhile
        if not plan.seen.current():
            plan = self.plan = self._look()
        found = plan.few if len(x) <= MOST_TOKENS else None
        if found is None and whole and not _runtime.extension_may_run(x):
            found = plan.many
        if found is None or plan.seen.watched():
            return None
        if x.dtype != found.like.dtype or x.device != found.like.device:
            return None
        index = x.get_device()
        if index < 0 or index == torch.cuda.current_device():
            return found.run(x, batch)
        with torch.cuda.device(index):  # Triton launches on the current one
            return found.run(x, batch)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model has one of its own."""

    def __reduce__(self) -> tuple:
        return type(None), ()


def _differentiates(x: Tensor) -> bool:
    """Whether somebody wants derivatives with respect to the embeddings."""
    return (torch.is_grad_enabled() and x.requires_grad) or forward_ad._current_level >= 0


def _weights(stack: Stack) -> list[Tensor]:
    """Each once; NotPlainError where one is no plain tensor in memory."""
    parts: list[Any] = [stack.after]
    for layer in stack.layers:
        parts += [part for part in layer if isinstance(part, (Norm, Linear))]
    tensors = {id(x): x for part in parts for x in part if isinstance(x, Tensor)}
    if any(type(x) not in (Tensor, nn.Parameter) for x in tensors.values()):
        raise NotPlainError
    return list(tensors.values())


def _fits(stack: Stack, weights: list[Tensor]) -> bool:
    """Whether the kernels take these widths, one for all layers, in one dtype on one device."""
    first, like = stack.layers[0], stack.after.weight
    N, C = first.qkv.weight.shape
    q, k, v = stack.split(torch.empty((1, N), device="meta"))
    size, inner = q.shape[2], first.contract.weight.shape[1]
    wide = inner * (2 if first.activation in fused.GATED else 1)
    linears = {"qkv": (N, C), "out": (C, q.shape[1] * size), "expand": (wide, C)}
    linears["contract"] = (C, inner)
    norms = [stack.after, *(n for each in stack.layers for n in (each.before, each.between) if n)]
    return (
        size % 8 == 0
        and size <= MAX_HEAD_SIZE
        and q.shape[1] % k.shape[1] == 0
        and k.shape == v.shape
        and all(
            getattr(each, name).weight.shape == shape
            and (getattr(each, name).bias is None or len(getattr(each, name).bias) == shape[0])
            for each in stack.layers
            for name, shape in linears.items()
        )
        and all(each.activation == first.activation for each in stack.layers)
        and all(
            vector.shape == (C,)
            for n in norms
            for vector in (n.weight, n.bias)
            if vector is not None
        )
        and all(w.dtype == like.dtype and w.device == like.device for w in weights)
        and all(w.is_contiguous() for w in weights)
    )

"""Frozen models on few tokens: a layer is five launches, and no module is called.

A forward over a short text reads every weight once and computes next to nothing, so its time is
that of its launches, on the host and on the device. Here the norms, with the additions before them,
and the activations are part of `fused_linear`: the product before attention, attention, the product
behind it, and the feed-forward's two. Everything but the weights is the same in every layer: the
sizes, the buffers, attention's arguments. So each launch is looked up once for a number of rows and
repeated with the next layer's weights.

A family says by a `Stack` what its layers are made of. What calls modules, hooks or wrappers, is
noticed at each call, and then the layers run one by one as they are; so they do always where a
model was patched with ``NEOBERT_FEW_TOKENS=0`` in the environment. How much this gains on a GPU is
not measured.
"""

import operator
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import neobert_kernels as nk
from neobert_kernels import _check, _launch, _runtime
from neobert_kernels._eager import in_a_mode
from neobert_kernels.ops.attention import launch as attention
from neobert_kernels.ops.attention import peers
from neobert_kernels.ops.attention.tiles import MAX_HEAD_SIZE
from neobert_kernels.ops.fused_linear import launch as fused
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.blocks import MARK, has_hooks, rotated

SWITCH = "NEOBERT_FEW_TOKENS"
MOST_TOKENS = 64  # four blocks of rows, which read the same weights. Unmeasured.

TRAINING = operator.itemgetter("training")

Split = Callable[[Tensor], Sequence[Tensor]]


class Norm(NamedTuple):
    """A norm by its weights.

    Attributes:
        kind: As `fused_linear` takes it.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float

    @classmethod
    def layer(cls, module: Any) -> "Norm":
        return cls("layer_norm", _own(module, "weight"), _own(module, "bias"), module.eps)

    @classmethod
    def rms(cls, module: Any, eps: float) -> "Norm":
        return cls("rms_norm", _own(module, "weight"), None, eps)

    def add(self, x: Tensor, delta: Tensor) -> Tensor:
        if self.kind == "layer_norm":
            return nk.add_layer_norm(delta, x, self.weight, self.bias, self.eps)[0]
        return nk.add_rms_norm(delta, x, self.weight, self.eps)[0]


class Linear(NamedTuple):
    weight: Tensor
    bias: Tensor | None


class Layer(NamedTuple):
    """A layer's parts in the order in which they run.

    Attributes:
        before: The norm of its input; None: there is none, or the layer before has made it.
        activation: As `fused_linear` takes it, behind ``expand``.
        theta: Of RoPE, or None.
    """

    before: Norm | None
    qkv: Linear
    out: Linear
    between: Norm
    expand: Linear
    activation: str
    contract: Linear
    window: int | None = None
    theta: float | None = None


class Stack(NamedTuple):
    """All layers of a base model.

    Attributes:
        after: The norm of the last layer's output.
        post_norm: Whether what a norm returns is what is added to later; else its argument is.
        split: ``[T, N]`` of ``qkv`` to q, k and v ``[T, heads, D]``, as views.
        interleaved: RoPE's pairs are neighbours.
        settings: What of the model's config all this was read from, as it is now.
        scale: Of the scores; None: the usual one.
    """

    layers: list[Layer]
    after: Norm
    post_norm: bool
    split: Split
    settings: Callable[[], Any]
    interleaved: bool = False
    scale: float | None = None


def wanted() -> bool:
    """Whether the environment leaves them here.

    Raises:
        ValueError: The variable is neither 0 nor 1.
    """
    value = os.environ.get(SWITCH, "")
    if value not in ("", "0", "1"):
        raise _check.error(SWITCH, "0 or 1", repr(value))
    return value != "0"


def agreed(values: Iterable[Any]) -> Any:
    """What all layers have alike; NotPlainError where they have not."""
    first, *others = values
    if any(other != first for other in others):
        raise NotPlainError
    return first


class NotPlainError(Exception):
    """A layer has a part that is more than its weights."""


def _own(module: Any, name: str) -> Any:
    """A parameter; NotPlainError where it is computed from others."""
    if name not in module._parameters:
        raise NotPlainError
    return module._parameters[name]


def linear(part: Any) -> Linear:
    """The weights of a Linear layer or of a prepared product.

    Raises:
        NotPlainError: It is called for more than its product.
    """
    if isinstance(part, nn.Module):
        if type(part) is not nn.Linear:
            raise NotPlainError
        return Linear(_own(part, "weight"), _own(part, "bias"))
    if part is None or part.packed:
        raise NotPlainError
    return Linear(part.weight, part.bias)


# Attributes of modules from which a layer's numbers come, besides its weights.
NUMBERS = ("eps", "variance_epsilon", "scaling", "sliding_window", "attention_type", "act")
# Of classes that compute what a layer's own forward is known for; families check the others.
_LIBRARIES = ("neobert.", "transformers.", "transformers_modules.", "xformers.")
_TORCH = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity, nn.ModuleList)


def _plain(module: Any) -> bool:
    """Whether a module of a layer does what its library's does, or what we put on it."""
    own = module.__dict__.get("forward")
    own = getattr(own, "__func__", own)
    # A wrapper around ours has its mark, too.
    if own not in (None, type(module).forward) and getattr(own, MARK, None) is not own:
        return False
    return type(module) in _TORCH or type(module).__module__.startswith(_LIBRARIES)


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
        self.attributes = [module.__dict__ for module in modules]
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.was = self._now()

    def _now(self) -> tuple[Any, ...]:
        return (
            list(map(dict, self.children)),
            list(map(type, self.modules)),
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
    """How a model runs as it was when it was last looked at; without a stack layer by layer."""

    stack: Stack | None
    steps: list["_Step"]
    seen: _Seen


class FewTokens:
    """Runs the layers of one frozen base model on at most `MOST_TOKENS` tokens.

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
        self.plan = self._look()

    def _look(self) -> _Plan:
        """Read the layers as they are now."""
        modules = [module for _, layer in self.layers(self.base) for module in layer.modules()]
        stack: Stack | None = None
        weights: list[Tensor] = []
        settings: Callable[[], Any] = tuple  # nothing
        with suppress(NotPlainError):
            if modules and all(map(_plain, modules)):
                stack = self.describe(self.base)
                weights, settings = _weights(stack), stack.settings
                stack = stack if _fits(stack, weights) else None
        seen = _Seen(self.base, modules, weights, settings)
        return _Plan(stack, [] if stack is None else _steps(stack), seen)

    def run(self, x: Tensor, batch: Batch) -> Tensor | None:
        """All layers and the norm behind them, ``[T, C]`` to ``[T, C]``; None: not here."""
        if torch.compiler.is_compiling() or not 0 < len(x) <= MOST_TOKENS:
            return None
        if type(x) is not Tensor or not _runtime.use_kernel(x) or in_a_mode():
            return None
        if peers.asked() is not None:
            return None
        plan = self.plan  # of this thread, whatever others find out meanwhile
        if not plan.seen.current():
            plan = self.plan = self._look()
        if plan.stack is None or plan.seen.watched():
            return None
        like = plan.stack.after.weight
        if x.dtype != like.dtype or x.device != like.device:
            return None
        index = x.get_device()
        if index < 0 or index == torch.cuda.current_device():
            return _run(plan.stack, plan.steps, x, batch)
        with torch.cuda.device(index):  # Triton launches on the current one
            return _run(plan.stack, plan.steps, x, batch)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model has one of its own."""

    def __reduce__(self) -> tuple:
        return type(None), ()


def _run(stack: Stack, steps: list["_Step"], x: Tensor, batch: Batch) -> Tensor:
    if not x.is_contiguous() or x.data_ptr() % _launch.ALIGNMENT:
        x = x.clone(memory_format=torch.contiguous_format)
    buffers = _Buffers(x, stack.layers[0])
    attend = _attention(stack, buffers, batch)
    delta = None
    for step in steps:
        x, delta = step(x, delta, buffers, attend[step.kind])
    assert delta is not None
    return stack.after.add(x, delta)


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
        and fused.takes(C, like.element_size())
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


class _Buffers:
    """What the layers of a forward write to, one after the other."""

    def __init__(self, x: Tensor, layer: Layer) -> None:
        T = len(x)
        gated = 2 if layer.activation in fused.GATED else 1
        self.qkv = x.new_empty((T, len(layer.qkv.weight)))
        self.mixed = x.new_empty((T, layer.out.weight.shape[1]))
        self.expanded = x.new_empty((T, len(layer.expand.weight) // gated))
        self.delta, self.next_delta = torch.empty_like(x), torch.empty_like(x)
        self.x, self.next_x = torch.empty_like(x), torch.empty_like(x)


Kind = tuple[int | None, float | None]  # of attention: its window and RoPE's theta


def _attention(stack: Stack, buffers: _Buffers, batch: Batch) -> dict[Kind, Callable[[], None]]:
    """What starts attention over the buffers, of every kind."""
    q, k, v = stack.split(buffers.qkv)
    T, H, D = q.shape
    out, lse = buffers.mixed.view(T, H, D), q.new_empty((H, T), dtype=torch.float32)
    scale = D**-0.5 if stack.scale is None else stack.scale
    kinds = {(layer.window, layer.theta) for layer in stack.layers}
    tables = {
        theta: rotated(batch, D, theta) if theta is not None else None
        for theta in {theta for _, theta in kinds}
    }
    found = {}
    for window, theta in kinds:
        table = tables[theta]
        cos, sin = (None, None) if table is None else (table.cos, table.sin)
        found[window, theta] = attention.repeated(
            out, lse, q, k, v, batch.cu_seqlens, min(batch.max_seqlen, T), cos, sin,
            stack.interleaved, window, scale,
        )  # fmt: skip
    return found


class _Step:
    """One layer's launches."""

    def __init__(self, layer: Layer, post_norm: bool) -> None:
        self.kind: Kind = (layer.window, layer.theta)
        self.post_norm = post_norm
        self.qkv = _repeated(layer.qkv, layer.before)
        self.out = _repeated(layer.out)
        self.expand = _repeated(layer.expand, layer.between, layer.activation)
        self.contract = _repeated(layer.contract)

    def __call__(
        self, x: Tensor, delta: Tensor | None, to: _Buffers, attend: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        """The layer's ``x`` and ``delta`` to those of the next, whose norm adds them."""
        if delta is None:  # the first layer: its input is what is added to later
            self.qkv(x, None, to.qkv, None, None)
        else:
            self.qkv(x, delta, to.qkv, *self._kept(to.x))
            x = to.x
        attend()
        self.out(to.mixed, None, to.delta, None, None)
        self.expand(x, to.delta, to.expanded, *self._kept(to.next_x))
        self.contract(to.expanded, None, to.next_delta, None, None)
        return to.next_x, to.next_delta

    def _kept(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Where the sum and its norm go: one of them is what is added to later."""
        return (None, x) if self.post_norm else (x, None)


def _repeated(
    linear: Linear, norm: Norm | None = None, activation: str | None = None
) -> fused.Repeated:
    if norm is None:
        return fused.Repeated(*linear, activation=activation)
    return fused.Repeated(
        *linear, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps,
        centered=norm.kind == "layer_norm", activation=activation,
    )  # fmt: skip


def _steps(stack: Stack) -> list[_Step]:
    return [_Step(layer, stack.post_norm) for layer in stack.layers]

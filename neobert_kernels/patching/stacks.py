"""What the layers of an encoder are made of: products, norms, an activation, attention's numbers.

A family says it by a `Stack`, which is read from modules that do no more than their products and
norms. How they run is in `launches`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

import neobert_kernels as nk

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

"""`patch(model, inference=True)`: matrix products from weights that were prepared once.

A block of a frozen model reads its parts from a `View` of the layer, in which products of several
Linear layers over the same input are one `Product`: q, k and v, or gate and up. RoPE's rows of such
a product are put into the order that turns faster on the device, with the same result: scores are
sums over a head's channels, which q and k bring in the same order.

On a CPU in float32 oneDNN multiplies, from weights as it lays them out, where it was measured ahead
of ``F.linear``. With AVX512 that is BERT's wide product, whose GELU it applies while the result is
in cache; that layout alone gains nothing. With AVX2 alone it is every product, and there GELU takes
longer inside than in a pass of its own. The operators are PyTorch's, which TorchInductor emits for
frozen models, but private: where a build lacks them, `onednn_available` is False and all products
go through ``F.linear``.

The model's modules and parameters stay as they are. `Frozen.check` looks once per forward whether
they still are what the products were made of.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import neobert_kernels as nk
from neobert_kernels import _check, _runtime
from neobert_kernels.patching import direct
from neobert_kernels.patching.blocks import View, has_hooks, is_gelu, is_watched, own_forward
from neobert_kernels.patching.direct import Direct
from neobert_kernels.patching.stacks import Stack

# Attribute of a frozen base model (its `Frozen`) and of its layers (their `View`).
PREPARED = "_neobert_kernels_prepared"

ROWS = 1024  # tokens of a batch, for which oneDNN lays weights out; other counts work as well
MOST_ROWS = 1 << 16  # that it is told; it refuses sizes of billions

LayersOf = Callable[[Any], Iterable[tuple[str, nn.Module]]]


def onednn_available() -> bool:
    """Whether this build of PyTorch has oneDNN's Linear with prepacked weights."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    found = all(hasattr(torch.ops.mkldnn, name) for name in names)
    on = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return bool(on and found)


def onednn_ahead() -> bool:
    """Whether oneDNN's products from prepacked weights are ahead of ``F.linear`` by themselves."""
    return onednn_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


class Product:
    """``x`` times the weights of one or several Linear layers, one behind the other.

    Args:
        linears: Of one width, dtype and device.
        order: ``[outputs]`` int64: the row of the stacked weights that each output is made of;
            None keeps their order.
        gelu: Whether the exact (erf) GELU follows.
        packed: Whether oneDNN multiplies, if the weights are float32 on a CPU.
        rows: Tokens that a call usually brings.
        fixed: Whether a row has the same bits in every batch.
        unused: Modules whose call the product stands for, beside its layers'.

    Attributes:
        nbytes: Memory that the product holds beside the layers' own weights.
    """

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        order: Tensor | None = None,
        gelu: bool = False,
        packed: bool = False,
        rows: int = ROWS,
        fixed: bool = False,
        unused: Sequence[nn.Module] = (),
    ) -> None:
        self.linears, self.order, self.gelu = tuple(linears), order, gelu
        self.unused = tuple(unused)
        self.multiply = nk.batch_invariant_linear if fixed else F.linear
        self.sources = [
            (linear, name, p, p._version, (p.data_ptr(), p.shape, p.stride()))
            for linear in self.linears
            for name, p in linear._parameters.items()
            if p is not None
        ]
        weight = self._stacked([linear.weight.detach() for linear in self.linears])
        self.bias = None
        if any(linear.bias is not None for linear in self.linears):
            self.bias = self._stacked(
                [
                    w.new_zeros(len(w)) if linear.bias is None else linear.bias.detach()
                    for linear, w in ((each, each.weight.detach()) for each in self.linears)
                ]
            )
        self.nbytes = sum(x.nbytes for x in (weight, self.bias) if x is not None)
        self.packed = packed and weight.is_cpu and weight.dtype == torch.float32
        self.weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, min(rows, MOST_ROWS))
            if self.packed
            else weight
        )
        self.gelu_inside = gelu and self.packed and not onednn_ahead()
        # Behind "gelu" "none" asks for erf; the other one is "tanh".
        self.epilogue: tuple[str, list, str] = ("gelu" if self.gelu_inside else "none", [], "none")

    def _stacked(self, parts: list[Tensor]) -> Tensor:
        # A copy also of a single one: memory that the caller goes on writing is not ours.
        stacked = torch.cat(parts)
        return stacked if self.order is None else stacked[self.order.to(stacked.device)]

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            multiply = torch.ops.mkldnn._linear_pointwise
            y = multiply(x, self.weight, self.bias, *self.epilogue)
        else:
            y = self.multiply(x, self.weight, self.bias)
        return torch.ops.aten.gelu_(y) if self.gelu and not self.gelu_inside else y

    def stale(self) -> tuple[nn.Module, str] | None:
        """A module and what of it changed since the product was made."""
        for linear, name, parameter, version, place in self.sources:
            now = linear._parameters.get(name)
            if now is not parameter or now._version != version:
                return linear, name
            if (now.data_ptr(), now.shape, now.stride()) != place:
                return linear, name
        for linear in self.linears:
            if type(linear) is not nn.Linear:
                return linear, "the class"
        for module in (*self.linears, *self.unused):
            if module._forward_hooks or module._forward_pre_hooks or own_forward(module):
                return module, "hooks or the forward"
        return None

    def release(self) -> None:
        """Give up the layers' own weights; the model can then neither be unpatched nor saved."""
        for linear in self.linears:
            linear.to("meta")
        self.sources, self.linears, self.unused = [], (), ()


class Preparer:
    """Makes the products of one model.

    Args:
        kernels: Whether kernels run between the products.

    Attributes:
        products: All that were made.
        interleaved: Whether RoPE pairs are neighbours in prepared projections.
        fuses_gelu: Whether oneDNN multiplies where GELU follows.
        packs: Whether it multiplies everywhere.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, rows: int, kernels: bool, fixed: bool
    ) -> None:
        self.rows, self.fixed = rows, fixed
        self.products: list[Product] = []
        # Measured on a CPU: neighbours turn as complex numbers, in one pass, not several. A GPU
        # parts them in registers; halves it reads as they are.
        self.interleaved = device.type == "cpu"
        plain = device.type == "cpu" and dtype == torch.float32 and not kernels
        self.fuses_gelu = plain and onednn_available()
        self.packs = plain and onednn_ahead()

    def _product(self, linears: Sequence[nn.Linear], **options: Any) -> Product:
        options = {"packed": self.packs, "rows": self.rows, "fixed": self.fixed} | options
        self.products.append(Product(linears, **options))
        return self.products[-1]

    def part(self, module: nn.Module, *names: str, **parts: Any) -> Any:
        """A part of a layer, which is not called itself, as its block reads it.

        Args:
            names: Of Linear layers that are multiplied one by one.
            parts: What else stands in place of its attributes.
        """
        alone = {name: self.together([getattr(module, name)]) for name in names}
        parts |= {name: product for name, product in alone.items() if product is not None}
        return View(module, parts) if parts else module

    def with_gelu(self, module: Any, linear: str, activation: str) -> Any:
        """A part with a Linear layer and an activation, as its block reads it.

        Where that is the exact GELU and nobody sees the module's own call, a view whose ``linear``
        is the product with GELU behind it.
        """
        first, second = getattr(module, linear), getattr(module, activation)
        if not (self.fuses_gelu and _plain(first) and is_gelu(second)):
            return module
        if is_watched(module) or is_watched(second):
            return module
        unused = [module, second]
        return View(module, {linear: self._product([first], gelu=True, packed=True, unused=unused)})

    def together(self, linears: Sequence[Any], order: Tensor | None = None) -> Product | None:
        """Layers over one input as one product.

        None where one is more than a plain Linear, or nothing but a copy would come of it.
        """
        if not all(map(_plain, linears)):
            return None
        if len(linears) == 1 and order is None and not self.packs:
            return None
        if len({(x.in_features, x.weight.dtype, x.weight.device) for x in linears}) > 1:
            return None
        return self._product(linears, order=order)

    def turned(
        self, linears: Sequence[Any], counts: Sequence[int], size: int, interleaved: bool
    ) -> Product | None:
        """Projections to q, k and v, ``counts`` heads of ``size`` each, with `interleaved` pairs.

        Args:
            interleaved: Whether the layers' own pairs are neighbours.
        """
        if interleaved == self.interleaved:
            order = None
        else:
            turned = pair_order(counts[0] + counts[1], size, self.interleaved)
            order = torch.cat([turned, torch.arange(counts[2] * size) + len(turned)])
        return self.together(linears, order)


def _plain(linear: Any) -> bool:
    own = own_forward(linear) or has_hooks(linear) or nn.modules.module._has_any_global_hook()
    if type(linear) is not nn.Linear or own:
        return False
    # Of quantized tensors and other subclasses only their own Linear knows what they do.
    kept = (x for x in linear._parameters.values() if x is not None)
    return all(type(x) in (Tensor, nn.Parameter) for x in kept)


def pair_order(heads: int, size: int, to_interleaved: bool) -> Tensor:
    """``[heads * size]``: rows of a projection for the other layout of RoPE's pairs.

    Half-split row ``i + j * size / 2`` and interleaved row ``2 * i + j`` are member j of pair i.
    """
    half = torch.arange(size).view(2, size // 2)
    own = half.t().flatten() if to_interleaved else half.flatten().view(-1, 2).t().flatten()
    return (torch.arange(heads)[:, None] * size + own).flatten()


class Frozen:
    """What a base model keeps beside its modules while it is frozen.

    Args:
        layers_of: Its layers now.

    Attributes:
        products: Made once from its weights.
        layers: Those that it has, by ``id``.
        views: Of these and of their parts.
        nbytes: Memory of the weights' second copies.
        released: Whether the second copies are the only ones.
        direct: What runs the layers without their modules, or None.
    """

    def __init__(self, products: list[Product], layers_of: LayersOf) -> None:
        self.products, self.layers_of = products, layers_of
        self.layers: dict[int, nn.Module] = {}
        self.views: list[View] = []
        self.released = False
        self.direct: Direct | None = None

    @property
    def nbytes(self) -> int:
        return sum(product.nbytes for product in self.products)

    def check(self, base: nn.Module) -> None:
        """Raise ValueError where weights are not what the products were made of.

        Or where forward-mode derivatives are wanted of oneDNN, which leaves them out.
        """
        if forward_ad._current_level >= 0 and any(product.packed for product in self.products):
            rule = "no forward-mode derivatives with inference=True (unpatch)"
            raise _check.error("model", rule, "a call that asks for them")
        rule = "the weights that inference=True prepared (unpatch, change, patch again)"
        if any(id(layer) not in self.layers for _, layer in self.layers_of(base)):
            raise _check.error("model", rule, "other layers")
        if not all(view.current() for view in self.views):
            raise _check.error("model", rule, "another module in a layer")
        for product in self.products:
            found = product.stale()
            if found is not None:
                module, what = found
                name = next((n for n, m in base.named_modules() if m is module), "a layer")
                raise _check.error("model", rule, f"{what} of {name} changed")

    def release(self) -> None:
        for product in self.products:
            product.release()
        self.released = True

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model has its products made again, by its first forward."""
        if self.released:
            raise _check.error("model", "one that kept its weights, to be copied", "a frozen one")

    def __reduce__(self) -> tuple:
        return type(None), ()  # a stored model is a plain one


def refuse_other_use(base: Any, embeds: Tensor | None) -> None:
    """A model for inference neither trains nor makes a graph, and has one dtype."""
    rule = "evaluation mode with inference=True (model.eval(), or unpatch)"
    if base.training:
        raise _check.error("model", rule, "training mode")
    if torch.is_grad_enabled():
        wanted = embeds is not None and embeds.requires_grad
        if wanted or any(p.requires_grad for p in base.parameters()):
            rule = "torch.no_grad() or torch.inference_mode() with inference=True (or unpatch)"
            raise _check.error("model", rule, "a call with gradients")
    device = next(base.parameters()).device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        rule = "no autocast with inference=True (cast the model, then patch it)"
        raise _check.error("model", rule, f"autocast to {torch.get_autocast_dtype(device)}")


def freeze(
    base: Any,
    layers_of: LayersOf,
    view_of: Callable[[Any, Any, Preparer], View],
    stack_of: Callable[[Any], Stack],
    rows: int = ROWS,
    keep: bool = True,
    invariant: bool = False,
) -> Frozen:
    """Prepare the weights of every layer; ``keep=False``: in place of the layers' own.

    ``invariant``: rows have the same bits in every batch, where kernels run.
    """
    first = next(base.parameters())
    kernels = _runtime.use_kernel(first)
    prepare = Preparer(first.device, first.dtype, rows, kernels, fixed=invariant and kernels)
    frozen = Frozen(prepare.products, layers_of)
    for _, layer in layers_of(base):
        made = len(prepare.products)
        layer.__dict__[PREPARED] = view = view_of(base, layer, prepare)
        frozen.layers[id(layer)] = layer
        frozen.views += view.all()
        if not keep:  # layer by layer: at no time are there two copies of the model
            for product in prepare.products[made:]:
                product.release()
    frozen.released = not keep
    if not invariant and direct.wanted(direct.DIRECT):  # these products have bits of their own
        frozen.direct = Direct(base, layers_of, stack_of)
    base.__dict__[PREPARED] = frozen
    return frozen

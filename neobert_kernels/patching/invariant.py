"""`patch(model, batch_invariant=True)` where kernels run: the whole batch at once, row by row.

Every operator gives a document the same bits anywhere in any batch: norms, gated units and RoPE
work row by row, attention and pooling count from a document's own start. Matrix products would not,
so each Linear layer gets a forward whose product is `batch_invariant_linear`; and attention, which
picks its tiles by the longest document, is told one length for every batch. So one forward runs
over all documents, and a graph may pad them. Where that cannot be known of a model, or a gradient
is recorded, or no kernel runs, documents run one by one.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels.ops.attention import peers
from neobert_kernels.patching.blocks import has_hooks, own_forward

INVARIANT = "_neobert_kernels_invariant"

# What a family has checked, or a head that we know; a Linear layer of theirs is torch's.
_CHECKED = ("neobert.", "transformers.", "transformers_modules.", "xformers.")
_TORCH = (
    nn.Identity, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.GELU, nn.SiLU, nn.ReLU,
    nn.Tanh, nn.ModuleList, nn.ModuleDict, nn.Sequential,
)  # fmt: skip


def linear_forward(self: Any, x: Tensor) -> Tensor:
    """A Linear layer's forward; a row has bits of its own where a kernel runs without gradients."""
    weight, bias = self.weight, self.bias
    if torch.compiler.is_compiling() or not _runtime.use_kernel(x) or _recorded(x, weight, bias):
        return F.linear(x, weight, bias)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return nk.batch_invariant_linear(x, weight, bias)


def _recorded(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that can get `linear_forward`: torch's own, called as torch made them."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not own_forward(module):
            yield name, module


class Rows:
    """Whether all that a model computes is computed row by row, looked at again when it changes.

    Attributes:
        reason: Why it is not, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parents = [(m, dict(m._modules)) for m in model.modules() if m._modules]
        self.hooks = [
            hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)
        ]
        found = (_unknown(name, module) for name, module in model.named_modules())
        self.reason = next(filter(None, found), None)

    def current(self) -> bool:
        return all(module._modules == seen for module, seen in self.parents)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model is looked at by itself."""

    def __reduce__(self) -> tuple:
        return type(None), ()


def _unknown(name: str, module: nn.Module) -> str | None:
    if type(module) is nn.Linear:
        known = "forward" in module.__dict__ and not own_forward(module)
    else:
        known = type(module).__module__.startswith(_CHECKED) or type(module) in _TORCH
        known = known and not own_forward(module)
    return None if known else f"{name or 'the model'}, a {type(module).__name__} of its own"


def why_apart(model: nn.Module) -> str | None:
    """Why documents have to run one by one in ``model`` even without gradients, or None."""
    if peers.asked() is not None:
        return "a peer's attention"
    rows = model.__dict__.get(INVARIANT)
    if rows is None or not rows.current():
        rows = model.__dict__[INVARIANT] = Rows(model)
    if any(rows.hooks):
        for name, module in model.named_modules():
            if has_hooks(module):
                return f"a hook on {name or 'the model'}"
    return rows.reason


def together(model: nn.Module, x: Tensor) -> bool:
    """Whether a batch with rows or ids ``x`` runs through ``model`` at once.

    A compiler, training mode, gradients and a CPU without a kernel take documents one by one.
    """
    if torch.compiler.is_compiling() or model.training or not _runtime.use_kernel(x):
        return False
    if torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for p in model.parameters())
    ):
        return False
    return why_apart(model) is None

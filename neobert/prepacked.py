"""Linear layers for a CPU that only encodes: weights in oneDNN's order, GELU inside the product.

``F.linear`` hands its weight to a GEMM that copies it into blocks on every call, and GELU reads and
writes the widest activation once more. Here the weight is laid out once, and GELU is applied where
the product is still in cache.

The operators are PyTorch's own, the ones TorchInductor emits for frozen models, but private: where
a version or a build lacks them, `available` is False and the model stays as it is.
"""

from typing import Any

import torch
from torch import Tensor, nn


def available() -> bool:
    """Whether this build of PyTorch has oneDNN's Linear with prepacked weights."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )


class PrepackedLinear(nn.Module):
    """A float32 `nn.Linear` on the CPU, for inference; it does not keep the original weight.

    Args:
        linear: The layer to replace.
        rows: Tokens that a call usually brings: the layout suits them, other counts work as well.

    Attributes:
        gelu: Whether the exact (erf) GELU follows the product.
    """

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # No buffer: an opaque tensor can be neither saved nor moved.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.gelu = False

    def forward(self, x: Tensor) -> Tensor:
        # "none" asks for erf; the other GELU is "tanh".
        after, kind = ("gelu", "none") if self.gelu else ("none", "")
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, after, [], kind)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, gelu={self.gelu}"


def prepack(model: nn.Module, rows: int) -> None:
    """Replace every Linear layer inside ``model`` for good; a BERT's exact GELU moves into its own.

    Layer by layer, each giving up its weight: the model needs no more memory than before.

    Args:
        model: A float32 model on the CPU that will only encode.
        rows: Tokens of a batch.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PrepackedLinear(child, rows))
        dense = getattr(module, "dense", None)
        activation = getattr(module, "intermediate_act_fn", None)
        if isinstance(dense, PrepackedLinear) and _is_gelu(activation):
            dense.gelu = True
            module.intermediate_act_fn = nn.Identity()


def _is_gelu(activation: Any) -> bool:
    """Whether this is transformers' exact GELU, by its function and not by its name."""
    from transformers.activations import GELUActivation

    exact = isinstance(activation, GELUActivation) and activation.act is nn.functional.gelu
    return exact or (type(activation) is nn.GELU and activation.approximate == "none")

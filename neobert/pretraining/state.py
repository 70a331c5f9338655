"""What a checkpoint has to hold of a model and its optimizer, whole on every rank's disk or none.

Sharded tensors are gathered when they are saved and dealt again when they are loaded, so that a run
goes on with any number of ranks, sharded or not.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

RNG = "rng."  # the generators' states, beside the optimizer's tensors
_COPIED = ("exp_avg", "exp_avg_sq", "step")


def model_tensors(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Copies on the CPU that training does not change; every rank calls it, those without ``keep``
    get nothing."""
    found = ((name, _copy(tensor, keep)) for name, tensor in model.state_dict().items())
    return {name: tensor for name, tensor in found if tensor is not None}


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool
) -> dict[str, Tensor]:
    """AdamW's state as ``<parameter>.<name>``, and the random generators' states."""
    found = {
        f"{name}.{key}": tensor
        for name, parameter in model.named_parameters()
        for key in _COPIED
        if (value := optimizer.state[parameter].get(key)) is not None
        if (tensor := _copy(value, keep)) is not None
    }
    found[f"{RNG}cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        found[f"{RNG}cuda"] = torch.cuda.get_rng_state()
    return found if keep else {}


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave."""
    for name, parameter in model.named_parameters():
        state: dict[str, Any] = optimizer.state[parameter]
        for key, value in _of(name, tensors):
            if key != "step":
                value = _dealt(value, parameter)
            elif _fused(optimizer):
                value = value.to(parameter.device, copy=True)
            state[key] = value
    torch.set_rng_state(tensors[f"{RNG}cpu"])
    if torch.cuda.is_available() and f"{RNG}cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"{RNG}cuda"])


def _of(name: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key in _COPIED:
        if (value := tensors.get(f"{name}.{key}")) is not None:
            yield key, value


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _copy(tensor: Tensor, keep: bool) -> Tensor | None:
    tensor = whole(tensor.detach())
    return tensor.to("cpu", copy=True).contiguous() if keep else None


def _dealt(value: Tensor, like: Tensor) -> Tensor:
    """``value`` on the device of ``like``, and sharded as it is."""
    value = value.to(like.device, copy=True)  # not a view of the file
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value

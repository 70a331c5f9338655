"""AdamW with the paper's settings; norms and biases do not decay.

The published code decays everything, and by 0.01: ``decay: all``, ``weight_decay: 0.01``.

Source: Le Breton, Fournier, El Mezouar and Chandar 2025, arXiv:2502.19587, section 3.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neobert.pretraining.rules import at_least, error, one_of

DECAYS = ("weights", "all")
# Where torch has AdamW as one kernel; other devices take its loop over tensors.
FUSED = frozenset({"cpu", "cuda", "mps", "xpu"})


@dataclass(frozen=True)
class Optimizer:
    """The defaults are the paper's.

    Attributes:
        beta1, beta2: Decay of the means of gradient and squared gradient.
        eps: Added to the root of the latter.
        weight_decay: Of matrices and embeddings, times the learning rate.
        decay: "weights", or "all" for norms and biases too.
        clip: Largest norm of the whole gradient; 0 does not clip.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: str = "weights"
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= (beta := getattr(self, name)) < 1:
                raise error(f"optimizer.{name}", "a number from 0 to under 1", beta)
        if not 0 < self.eps < math.inf:
            raise error("optimizer.eps", "a finite number over 0", self.eps)
        at_least("optimizer.weight_decay", self.weight_decay, 0)
        at_least("optimizer.clip", self.clip, 0)
        one_of("optimizer.decay", self.decay, DECAYS)


def parameter_groups(model: nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    """Trainable parameters by whether they decay; a tied weight comes once.

    Matrices and embeddings decay; norms and biases, which are vectors, do not.

    Returns:
        Groups with ``params`` in the model's order, ``weight_decay`` and ``name``; no empty one.
    """
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = settings.decay == "all" or parameter.ndim > 1
            (decayed if decays else kept).append(parameter)
    groups = [
        {"name": "decay", "params": decayed, "weight_decay": settings.weight_decay},
        {"name": "no decay", "params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, fused where the device has it.

    Its learning rate is 0: `set_lr` before every step has the schedule's.
    """
    groups = parameter_groups(model, settings)
    if not groups:
        raise error("model", "a parameter to train", "none")
    parameters = [p for group in groups for p in group["params"]]
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=all(p.device.type in FUSED and p.is_floating_point() for p in parameters),
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step, in all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr

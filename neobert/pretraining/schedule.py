"""Learning rates: warm-up, decay to a share of the peak, then constant, by the step alone.

    s < warmup:              (s + 1) / warmup
    warmup <= s < end:       decay_to + (1 - decay_to) * shape((s - warmup) / (end - warmup))
    s >= end:                decay_to

with end = decay_at * steps and shape(p) = (1 + cos(pi p)) / 2 ("paper") or 1 - p ("linear").
"constant" stays at the peak after its warm-up. Nothing has to be kept in a checkpoint.

Source: Le Breton, Fournier, El Mezouar and Chandar 2025, arXiv:2502.19587, section 3.
"""

import math
from dataclasses import dataclass

from neobert.pretraining.rules import at_least, error, one_of

KINDS = ("paper", "linear", "constant")


@dataclass(frozen=True)
class Schedule:
    """The defaults are the paper's stage 1.

    Attributes:
        kind: "paper": cosine; "linear"; "constant".
        lr: Peak learning rate.
        warmup: Steps of linear warm-up; the last of them has the peak.
        steps: Optimizer steps of the run.
        decay_to: Share of the peak that the decay ends at.
        decay_at: Share of the steps at which it has ended.
    """

    kind: str = "paper"
    lr: float = 6e-4
    warmup: int = 2000
    steps: int = 1_000_000
    decay_to: float = 0.1
    decay_at: float = 0.9

    def __post_init__(self) -> None:
        one_of("schedule.kind", self.kind, KINDS)
        if not 0 < self.lr < math.inf:
            raise error("schedule.lr", "a finite number over 0", self.lr)
        at_least("schedule.steps", self.steps, 1)
        at_least("schedule.warmup", self.warmup, 0)
        if not 0 <= self.decay_to <= 1:
            raise error("schedule.decay_to", "a number from 0 to 1", self.decay_to)
        if not 0 < self.decay_at <= 1:
            raise error("schedule.decay_at", "a number over 0 and up to 1", self.decay_at)
        if self.kind != "constant" and self.warmup >= self._end:
            rule = f"fewer than the {self._end:g} steps (decay_at * steps) that the decay ends at"
            raise error("schedule.warmup", rule, self.warmup)

    def factor(self, step: int) -> float:
        """Share of the peak in the 0-based optimizer step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        if step >= self._end:
            return self.decay_to
        done = (step - self.warmup) / (self._end - self.warmup)
        left = (1 + math.cos(math.pi * done)) / 2 if self.kind == "paper" else 1 - done
        return self.decay_to + (1 - self.decay_to) * left

    def lr_at(self, step: int) -> float:
        """Learning rate of the 0-based optimizer step."""
        return self.lr * self.factor(step)

    @property
    def _end(self) -> float:
        return self.decay_at * self.steps

"""What a fine-tuning run is: one point of a grid, and the protocol that all points share."""

from dataclasses import asdict, dataclass
from typing import Any

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Setting:
    """A point of the grid.

    Attributes:
        lr: Peak learning rate.
        batch_size: Texts (or pairs) of one step.
        weight_decay: AdamW's, on matrices only.
        seed: Of the new head, dropout and the order of examples.
    """

    lr: float
    batch_size: int
    weight_decay: float
    seed: int = 0

    @property
    def name(self) -> str:
        """Also the name of its result's file."""
        return f"lr{self.lr:g}-batch{self.batch_size}-decay{self.weight_decay:g}-seed{self.seed}"

    def __str__(self) -> str:
        return (
            f"lr {self.lr:g}, batch {self.batch_size}, decay {self.weight_decay:g}, "
            f"seed {self.seed}"
        )


@dataclass(frozen=True)
class Protocol:
    """How every point is trained; the defaults are the paper's.

    Attributes:
        epochs: At most.
        evaluations: In an epoch; there is one every ``min(interval, steps of an epoch /
            evaluations)`` steps.
        interval: Most steps between two evaluations.
        patience: Evaluations without gain after which training stops.
        warmup: Share of all steps over which the learning rate rises.
        floor: Share of the peak that it falls to, in a line, ...
        floor_at: ... at this share of all steps; constant from there.
        clip: Largest gradient norm.
    """

    epochs: int = 10
    evaluations: int = 10
    interval: int = 500
    patience: int = 15
    warmup: float = 0.06
    floor: float = 0.1
    floor_at: float = 0.9
    clip: float = 1.0

    def steps(self, examples: int, batch_size: int) -> int:
        """Optimizer steps of a run that is not stopped early."""
        return self.epochs * steps_of_epoch(examples, batch_size)

    def evaluate_every(self, examples: int, batch_size: int) -> int:
        return max(1, min(self.interval, steps_of_epoch(examples, batch_size) // self.evaluations))

    def factor(self, step: int, steps: int) -> float:
        """What the peak learning rate is multiplied by at the 0-based ``step`` of ``steps``."""
        rise, fall = self.warmup * steps, self.floor_at * steps
        if step < rise:
            return (step + 1) / (rise + 1)
        if step >= fall:
            return self.floor
        return 1 - (1 - self.floor) * (step - rise) / (fall - rise)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def steps_of_epoch(examples: int, batch_size: int) -> int:
    return -(-examples // batch_size)

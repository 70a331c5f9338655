"""The settings of a contrastive run."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """The paper's values; what it leaves open is the default of its published code.

    Attributes:
        steps: Optimizer steps.
        batch_size: Pairs of one process's batch; all of one data set.
        lr: Peak learning rate, after a warm-up of ``warmup`` steps linear to 0.
        temperature: Of the similarities.
        max_length: Tokens kept of a text; None for what the model's files say.
        mini_batch_tokens: Tokens of one forward pass: memory, not the result.
        matryoshka: Leading dimensions that have a loss of their own; none for the plain loss.
    """

    steps: int = 2000
    batch_size: int = 128
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    temperature: float = 0.07
    max_length: int | None = None
    mini_batch_tokens: int = 8192
    precision: str = "float32"
    seed: int = 0
    matryoshka: tuple[int, ...] = ()

    def record(self) -> dict[str, Any]:
        """All settings; without ``matryoshka`` where it is empty, as in runs from before it."""
        return {name: value for name, value in asdict(self).items() if value != ()}

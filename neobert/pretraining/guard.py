"""When to stop a run: a loss or gradient that is not finite, or a loss far over its recent ones.

A loss spikes when it is over `spike` times the running median and also over it by `DEVIATIONS`
robust standard deviations and by `MARGIN`, so that neither a slow rise nor the noise of small
batches counts, nor that of a loss near zero, which is skewed and many times its median.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neobert.pretraining.rules import at_least, error

# The median absolute deviation of normal noise, times this, is its standard deviation.
SIGMA = 1.4826
DEVIATIONS = 8
MARGIN = 0.5  # nats; a run that diverges goes up by several
LEAST = 20  # losses before which there is no median to speak of


@dataclass(frozen=True)
class Limits:
    """What counts as a spike.

    Attributes:
        spike: Times the running median that stop the run, if they are also over it by more than
            its noise and by `MARGIN`; 0: never.
        window: Losses that the median is of.
        patience: Spikes in a row that stop it.
    """

    spike: float = 2.0
    window: int = 200
    patience: int = 1

    def __post_init__(self) -> None:
        if self.spike and not 1 < self.spike < math.inf:
            raise error("guard.spike", "a finite number over 1, or 0", self.spike)
        at_least("guard.window", self.window, LEAST)
        at_least("guard.patience", self.patience, 1)


class Guard:
    """Sees one loss and gradient norm after the other."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._losses: deque[float] = deque(maxlen=limits.window)
        self._above = 0

    def check(self, step: int, loss: float, grad_norm: float | None = None) -> str | None:
        """The reason to stop, in words; None goes on."""
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if value is not None and not math.isfinite(value):
                return f"step {step}: the {name} is {value}"
        if (median := self._spiked(loss)) is None:
            self._above = 0
            self._losses.append(loss)
            return None
        self._above += 1
        if self._above < self._limits.patience:
            return None
        return (
            f"step {step}: the loss is {loss:.4g}, {loss / median:.1f} times the median of the "
            f"last {len(self._losses)} ({median:.4g})"
        )

    def _spiked(self, loss: float) -> float | None:
        """The median, if the loss is too far over it."""
        if not self._limits.spike or len(self._losses) < LEAST:
            return None
        median = statistics.median(self._losses)
        deviation = SIGMA * statistics.median(abs(x - median) for x in self._losses)
        least = median + max(DEVIATIONS * deviation, MARGIN)
        return median if loss > max(self._limits.spike * median, least) else None

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"losses": list(self._losses), "above": self._above}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=self._limits.window)
        self._above = int(state["above"])

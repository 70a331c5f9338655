"""Numbers of steps, kept on the device until somebody reads them.

A step leaves a few scalars on its device; `Metrics.read` fetches those of many steps at once, which
is the only time that the host waits for the device.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from neobert.pretraining.batches import MicroBatch
from neobert.pretraining.ranks import Ranks


class StepNumbers(NamedTuple):
    """One step over all ranks: mean loss of the labelled tokens, norm of the whole gradient."""

    step: int
    loss: float
    grad_norm: float


@dataclass
class Window:
    """Sums since the last record; they survive a restart, so that records do not depend on it."""

    loss: float = 0.0
    masked: int = 0
    tokens: int = 0
    squares: int = 0  # of documents' lengths, for the work of attention

    @property
    def mean_loss(self) -> float:
        return self.loss / max(self.masked, 1)

    @property
    def context(self) -> float:
        """Mean over tokens of their document's length."""
        return self.squares / max(self.tokens, 1)


class _Pending(NamedTuple):
    step: int
    loss: Tensor  # sum over this rank's labelled tokens
    masked: Tensor  # labelled tokens of all ranks
    grad_norm: Tensor
    tokens: int
    squares: int
    documents: list[np.ndarray]


class Metrics:
    """Collects steps, and sums them up."""

    def __init__(self, ranks: Ranks, state: Mapping[str, Any] | None = None) -> None:
        self._ranks = ranks
        self._pending: list[_Pending] = []
        self.tokens = 0 if state is None else int(state["tokens"])
        self.masked = 0  # since this process began
        self.window = Window() if state is None else Window(**state["window"])
        self.stop = False
        self.documents: dict[int, list[np.ndarray]] = {}

    @property
    def state(self) -> dict[str, Any]:
        assert not self._pending
        return {"tokens": self.tokens, "window": asdict(self.window)}

    def add(
        self, step: int, loss: Tensor, masked: Tensor, grad_norm: Tensor, batches: list[MicroBatch]
    ) -> None:
        """Take a step's numbers; nothing is waited for."""
        self._pending.append(
            _Pending(
                step,
                loss,
                masked,
                grad_norm,
                sum(batch.tokens for batch in batches),
                sum(map(_squares, batches)),
                [batch.documents for batch in batches],
            )
        )

    def read(self, stop: bool = False) -> list[StepNumbers]:
        """The steps since the last call, the same on every rank; adds them to the window.

        Afterwards `stop` says whether any rank asked to stop, and `documents` has, by step, what
        this rank's micro-batches were made of.
        """
        pending, self._pending = self._pending, []
        self.documents = {each.step: each.documents for each in pending}
        counts = [[float(each.tokens), float(each.squares), 0.0] for each in pending]
        device = self._ranks.device
        # By step this rank's tokens, squares and loss; in the last row whether it asks to stop.
        own = torch.tensor([*counts, [float(stop), 0.0, 0.0]], dtype=torch.float64).to(device)
        same = own.new_zeros(len(own), 2)
        if pending:
            own[:-1, 2] = torch.stack([each.loss for each in pending])
            same[:-1, 0] = torch.stack([each.masked for each in pending])
            same[:-1, 1] = torch.stack([each.grad_norm for each in pending])
        *steps, last = torch.cat([self._ranks.sum(own), same], 1).tolist()
        self.stop = last[0] > 0
        found = []
        for each, (tokens, squares, loss, masked, norm) in zip(pending, steps, strict=True):
            self.window.loss += loss
            self.window.masked += int(masked)
            self.window.tokens += int(tokens)
            self.window.squares += int(squares)
            self.tokens += int(tokens)
            self.masked += int(masked)
            found.append(StepNumbers(each.step, loss / max(masked, 1.0), norm))
        return found

    def close_window(self) -> Window:
        """The sums since the last record; new ones begin."""
        window, self.window = self.window, Window()
        return window


def _squares(batch: MicroBatch) -> int:
    if batch.cu_seqlens is not None:
        lengths = batch.cu_seqlens.numpy().astype(np.int64)
        return int((np.diff(lengths) ** 2).sum())
    assert batch.attention_mask is not None
    return int((batch.attention_mask.sum(1) ** 2).sum())

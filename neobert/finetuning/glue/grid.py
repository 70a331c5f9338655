"""The grids of `neobert finetune glue`: which points, under which protocol."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from neobert.finetuning.schedule import Protocol, Setting


@dataclass(frozen=True)
class Grid:
    """Learning rates x batch sizes x weight decays; ``summary`` for the command's help."""

    summary: str
    lrs: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    weight_decays: tuple[float, ...]
    protocol: Protocol

    def settings(self, seeds: Sequence[int] = (0,)) -> list[Setting]:
        """All points, those of the first seed first."""
        points = itertools.product(self.lrs, self.batch_sizes, self.weight_decays)
        return [Setting(*point, seed) for seed, point in itertools.product(seeds, [*points])]


# A quick look rather than a comparison: fewer evaluations, which cost as much as the training where
# the dev set is as large as a tenth of the epoch.
_PROTOCOL = Protocol()
_SHORT = Protocol(epochs=4, evaluations=2, patience=4)

WIDTH = 768

PAPER = Grid(
    "the paper's: 6 learning rates x 5 batch sizes x 2 weight decays",
    (5e-6, 6e-6, 8e-6, 1e-5, 2e-5, 3e-5),
    (2, 4, 8, 16, 32),
    (1e-2, 1e-5),
    _PROTOCOL,
)
SMALL = Grid("3 learning rates x 2 batch sizes", (1e-5, 2e-5, 3e-5), (16, 32), (1e-2,), _PROTOCOL)
ONE = Grid("one point, to see it work", (3e-5,), (16,), (1e-2,), _SHORT)

GRIDS = {"paper": PAPER, "small": SMALL, "one": ONE}


def make_grid(
    name: str,
    width: int,
    lr: float | None = None,
    batch_size: int | None = None,
    weight_decay: float | None = None,
    epochs: int | None = None,
) -> Grid:
    """The grid of this name for a model of this width, with the given values instead of its own.

    The learning rate of "one" grows as the width shrinks: narrow models take, and need, a higher
    one. The others are as they are written, so that every model meets the same points.
    """
    grid = GRIDS[name]
    lrs = tuple(value * WIDTH / width for value in grid.lrs) if name == "one" else grid.lrs
    protocol = grid.protocol
    if epochs is not None:
        protocol = Protocol(**{**protocol.record(), "epochs": epochs})
    return Grid(
        grid.summary,
        lrs if lr is None else (lr,),
        grid.batch_sizes if batch_size is None else (batch_size,),
        grid.weight_decays if weight_decay is None else (weight_decay,),
        protocol,
    )

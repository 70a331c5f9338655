"""Batches of one data set each, data sets drawn with p in proportion to the root of their size."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler


class SquareRootBatchSampler(MultiDatasetDefaultBatchSampler):
    """As many batches in an epoch as the data sets have together; a small one begins anew.

    The draw depends on seed and epoch alone, and holds for as many batches in a row as there are
    processes: those share the batches out, and documents of all are each other's negatives.
    """

    def __iter__(self) -> Iterator[list[int]]:
        sizes = [len(dataset) for dataset in self.dataset.datasets]  # type: ignore[arg-type]
        offsets = [0, *itertools.accumulate(sizes)]
        weights = np.sqrt(sizes)
        draw = np.random.default_rng([self.seed or 0, self.epoch])
        batches = [_endless(sampler) for sampler in self.batch_samplers]
        together = torch.distributed.get_world_size() if _is_distributed() else 1
        for _ in range(0, len(self), together):
            which = int(draw.choice(len(sizes), p=weights / weights.sum()))
            for _ in range(together):
                yield [row + offsets[which] for row in next(batches[which])]

    def __len__(self) -> int:
        return sum(len(sampler) for sampler in self.batch_samplers)


def _endless(sampler: torch.utils.data.BatchSampler) -> Iterator[list[int]]:
    while True:
        yield from sampler


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()

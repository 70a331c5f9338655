"""Loss and accuracy on the held-out documents, beside the accuracy of the most frequent token."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from neobert.pretraining import batches, stream
from neobert.pretraining.batches import MicroBatch, training_documents
from neobert.pretraining.objective import Objective, autocast, inputs
from neobert.pretraining.ranks import Ranks
from neobert.pretraining.recipe import Recipe
from neobert.pretraining.store import Store
from neobert.pretraining.stream import Stream

# Documents whose tokens are counted for the baseline: enough to know the most frequent one.
COUNTED = 20_000


class Scores(NamedTuple):
    """Means over the labelled tokens of the held-out documents."""

    loss: float
    accuracy: float
    unigram_accuracy: float


def most_frequent(store: Store | Stream, recipe: Recipe) -> int:
    """The ordinary token that training documents have most often, from up to `COUNTED` of them; of
    a stream, which has not been read yet, the held-out documents."""
    if isinstance(store, Stream):
        ids = np.concatenate(store.held_out.ids)
    else:
        documents = training_documents(store, recipe, "all")
        some = documents[np.arange(min(documents.size, COUNTED))]
        ids, _ = store.beginnings(some, recipe.batch.max_length)
    counts = np.bincount(ids, minlength=store.vocabulary.size)
    counts[list(store.vocabulary.special)] = 0
    return int(counts.argmax())


def evaluate(
    objective: Objective, store: Store | Stream, recipe: Recipe, ranks: Ranks, frequent: int
) -> Scores:
    """Scores over all ranks; every rank calls it, and gets the same.

    Args:
        frequent: From `most_frequent`; the baseline predicts it everywhere.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    objective.eval()
    with torch.no_grad():
        for batch, counts in _share(_held_out(store, recipe), ranks):
            with autocast(recipe.train, ranks.device):
                loss, correct = objective(**inputs(batch, ranks.device))
            if counts:
                labels = batch.labels.flatten()[batch.rows]
                here = torch.tensor([0.0, 0.0, (labels == frequent).sum(), len(labels)])
                sums += here.to(sums)
                sums[0] += loss
                sums[1] += correct
    objective.train()
    loss, correct, unigram, labelled = ranks.sum(sums).tolist()
    labelled = max(labelled, 1.0)
    return Scores(loss / labelled, correct / labelled, unigram / labelled)


def _held_out(store: Store | Stream, recipe: Recipe) -> Iterator[MicroBatch]:
    if isinstance(store, Stream):
        return stream.held_out(store, recipe)
    return batches.held_out(store, recipe)


def _share(batches: Iterator[MicroBatch], ranks: Ranks) -> Iterator[tuple[MicroBatch, bool]]:
    """Every ``world``-th batch, and whether it counts.

    Each rank has as many as the others, because sharded weights are gathered by all of them in
    every forward: where batches run out, the first one fills in.
    """
    first: MicroBatch | None = None
    mine: MicroBatch | None = None
    number = 0
    for number, batch in enumerate(batches):
        first = first or batch
        if number % ranks.world == ranks.rank:
            mine = batch
        if number % ranks.world == ranks.world - 1:
            assert mine is not None
            yield mine, True
            mine = None
    if first is not None and (number + 1) % ranks.world:
        yield mine or first, mine is not None

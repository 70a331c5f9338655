"""The data path of pre-training: a tokenised store of real text to packed, masked batches."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
from docstrings import docstrings
from timing import summarize

from neobert.pretraining.batches import CHUNK_EPOCHS, Gather, MicroBatch, Planner, steps
from neobert.pretraining.recipe import Batch, Data, Recipe
from neobert.pretraining.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The docstrings of Python's standard library under BERT's tokenizer."""
    return docstrings(tmp_path_factory.mktemp("docstrings"))


def recipe(store: Store, **batch: Any) -> Recipe:
    return Recipe(Data(path="-", store=str(store.folder)), Batch(**{"bins": 4, **batch}))


@pytest.mark.parametrize("budget", [1024, 16384])
@pytest.mark.parametrize("masking", ["mask", "bert"])
def test_data_path(
    budget: int,
    masking: str,
    store: Store,
    quick: bool,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    """One process, one core: planning, gathering and masking, and how full the bins are."""
    settings = recipe(store, tokens=budget, masking=masking, workers=0)
    # Two whole chunks: in a part of one, the bin that stays unfilled would weigh too much.
    wanted = 2 * CHUNK_EPOCHS * store.tokens
    rates: list[float] = []
    plan_rates: list[float] = []
    fills: list[float] = []

    def rounds() -> None:
        for number in range(-1, 1 if quick else 5):
            planner, gather = Planner(store, settings), Gather(store, settings.batch)
            bins = real = 0
            planned = 0.0
            began = time.perf_counter()
            while real < wanted:
                start = time.perf_counter()
                _, plans = planner.next_step()
                planned += time.perf_counter() - start
                batches: list[MicroBatch] = [gather[plan] for plan in plans]
                real += sum(batch.tokens for batch in batches)
                bins += len(batches)
            if number >= 0:
                rates.append(real / (time.perf_counter() - began))
                plan_rates.append(real / planned)
                fills.append(real / bins / budget)

    once(rounds)
    record(
        "pretrain_data",
        f"docstrings, {store.tokens:,} tokens, budget {budget}, masking {masking}, one process",
        tokens_per_s=summarize(rates).median_s,
        low_tokens_per_s=min(rates),
        high_tokens_per_s=max(rates),
        planning_tokens_per_s=summarize(plan_rates).median_s,
        fill_share=fills[0],
    )
    if budget == 1024:  # a chunk of this store is only some 100 bins of 16,384
        assert fills[0] > 0.99


@pytest.mark.parametrize("workers", [1, 2])
def test_with_workers(
    workers: int,
    store: Store,
    quick: bool,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    """Through the loader's processes and shared memory, as training gets its batches."""
    settings = recipe(store, tokens=16384, workers=workers)
    rates: list[float] = []

    def rounds() -> None:
        for _ in range(1 if quick else 5):
            stream = steps(store, settings)
            next(stream)  # the workers have started
            real = 0
            began = time.perf_counter()
            for step in itertools.islice(stream, 2 if quick else 100):
                real += sum(batch.tokens for batch in step.micro_batches)
            rates.append(real / (time.perf_counter() - began))

    once(rounds)
    record(
        "pretrain_data_workers",
        f"docstrings, budget 16384, {workers} worker(s)",
        tokens_per_s=summarize(rates).median_s,
        low_tokens_per_s=min(rates),
        high_tokens_per_s=max(rates),
    )

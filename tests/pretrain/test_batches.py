"""The sequence of batches depends on the data and the recipe, and on nothing else."""

import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from small_recipe import content, recipe

from neobert.pretraining import batches
from neobert.pretraining.batches import Planner, Step, held_out, steps, view_of_step
from neobert.pretraining.recipe import Batch
from neobert.pretraining.store import SPECIALS, Store
from neobert.readers import InputError

VIEWS = {"all": 0.2, ">=20": 0.4, ">=30": 0.4}


def take(count: int, *arguments: Any, **settings: Any) -> list[Step]:
    return list(itertools.islice(steps(*arguments, **settings), count))


LAYOUTS = [{"layout": "packed"}, {"layout": "padded"}, {"views": VIEWS, "masking": "bert"}]


@pytest.mark.parametrize("batch", LAYOUTS, ids=["packed", "padded", "views"])
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(
    workers: int, batch: dict[str, Any], store: Store
) -> None:
    expected = take(6, store, recipe(store, **batch))
    found = take(6, store, recipe(store, workers=workers, **batch))
    assert [content(s) for s in found] == [content(s) for s in expected]
    assert [(s.state, s.view) for s in found] == [(s.state, s.view) for s in expected]


@pytest.mark.parametrize("batch", LAYOUTS, ids=["packed", "padded", "views"])
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_shares_the_same_bins(
    world: int, batch: dict[str, Any], store: Store
) -> None:
    expected = take(8, store, recipe(store, **batch))
    ranks = [take(8, store, recipe(store, **batch), world=world, rank=r) for r in range(world)]
    for number, step in enumerate(expected):
        parts = [content(rank[number]) for rank in ranks]
        assert [parts[k % world][k // world] for k in range(4)] == content(step)
        assert all(rank[number].state == step.state for rank in ranks)


@pytest.mark.parametrize("batch", LAYOUTS, ids=["packed", "padded", "views"])
def test_a_restart_from_any_step_continues_with_identical_bytes(
    batch: dict[str, Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "CHUNK_BINS", 7)  # steps of 4 cross the chunks' borders
    expected = take(14, store, recipe(store, **batch))
    for number in range(13):
        state = json.loads(json.dumps(expected[number].state))
        (again,) = take(1, store, recipe(store, **batch), state=state)
        assert content(again) == content(expected[number + 1])
        assert again.state == expected[number + 1].state


def test_a_restart_with_other_ranks_and_workers_continues(store: Store) -> None:
    expected = take(6, store, recipe(store))
    state = take(3, store, recipe(store), world=4, rank=1)[2].state
    ranks = [take(3, store, recipe(store, workers=1), world=2, rank=r, state=state) for r in (0, 1)]
    for a, b, step in zip(*ranks, expected[3:], strict=True):
        parts = content(a), content(b)
        assert [parts[k % 2][k // 2] for k in range(4)] == content(step)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("chunk_bins", [7, 256])
def test_every_document_comes_exactly_once_per_epoch(
    layout: str, chunk_bins: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "CHUNK_BINS", chunk_bins)
    planner = Planner(store, recipe(store, 25, layout=layout))
    seen: Counter[tuple[int, int]] = Counter()
    for _ in range(600):
        for plan in planner.next_step()[1]:
            seen.update(zip(plan.epochs.tolist(), plan.documents.tolist(), strict=True))
    assert set(seen.values()) == {1}
    whole = max(epoch for epoch, _ in seen) - batches.CHUNK_EPOCHS - 256 * 3 * 4 // 475
    assert whole >= 3
    apart = {n for b in held_out(store, recipe(store, 25)) for n in b.documents.tolist()}
    assert len(apart) == 25
    for epoch in range(whole):
        assert {d for e, d in seen if e == epoch} == set(range(500)) - apart


def test_epochs_seeds_and_views_have_orders_of_their_own(store: Store) -> None:
    def order(view: str = "all", **settings: Any) -> list[int]:
        chosen = recipe(store, layout="padded", views={view: 1.0}, **settings)
        plans = batches.View(store, chosen, view).chunk(0)
        return [d for plan in plans for d in plan.documents.tolist()]

    first = order()
    assert len(first) == 768  # one epoch and a half
    assert first[:268] != first[500:]
    assert first[:268] != order(seed=1)[:268]
    assert first == order()


def test_views_hold_only_documents_that_are_long_enough(store: Store) -> None:
    planner = Planner(store, recipe(store, 25, views=VIEWS))
    seen: dict[str, set[int]] = {name: set() for name in VIEWS}
    for _ in range(400):
        view, plans = planner.next_step()
        seen[view].update(d for plan in plans for d in plan.documents.tolist())
    sizes = store.lengths() + SPECIALS
    apart = {n for b in held_out(store, recipe(store, 25)) for n in b.documents.tolist()}
    for name, least in (("all", 0), (">=20", 20), (">=30", 30)):
        assert seen[name] == set(np.flatnonzero(sizes >= least).tolist()) - apart


def test_views_are_drawn_as_often_as_the_recipe_says() -> None:
    batch = Batch(views=VIEWS)
    drawn = Counter(view_of_step(batch, step) for step in range(5000))
    for name, chance in VIEWS.items():
        assert drawn[name] / 5000 == pytest.approx(chance, abs=0.02)
    other = [view_of_step(Batch(views=VIEWS, seed=1), step) for step in range(50)]
    assert other != [view_of_step(batch, step) for step in range(50)]


def test_a_packed_batch_is_the_documents_end_to_end(store: Store) -> None:
    for batch in take(1, store, recipe(store))[0].micro_batches:
        assert batch.cu_seqlens is not None
        assert batch.attention_mask is None
        ids = torch.where(batch.labels == -100, batch.input_ids, batch.labels)[0].numpy()
        bounds = batch.cu_seqlens.tolist()
        assert bounds[-1] == len(ids) == batch.tokens <= 128
        assert batch.max_seqlen == max(np.diff(bounds)) <= 40
        rows = np.flatnonzero(batch.labels[0] != -100)
        assert np.array_equal(batch.rows, rows)
        assert batch.input_ids.dtype == batch.labels.dtype == batch.rows.dtype == torch.int64
        for number, a, b in zip(batch.documents, bounds, bounds[1:], strict=False):
            start, end = store.offsets[number], store.offsets[number + 1]
            tokens = np.concatenate(store._shards)[start:end][:38]
            assert ids[a:b].tolist() == [2, *tokens.tolist(), 3]


def test_a_padded_batch_has_the_same_documents_and_masks(store: Store) -> None:
    packed = {}
    for plan in Planner(store, recipe(store)).next_step()[1]:
        batch = batches.Gather(store, recipe(store).batch)[plan]
        padded = batches.Gather(store, recipe(store, layout="padded").batch)[plan]
        assert padded.cu_seqlens is None
        assert padded.attention_mask is not None
        assert padded.input_ids.shape == (len(plan.documents), batch.max_seqlen)
        real = padded.attention_mask.bool()
        assert torch.equal(padded.input_ids[real], batch.input_ids[0])
        assert torch.equal(padded.labels[real], batch.labels[0])
        assert (padded.input_ids[~real] == 0).all()
        assert (padded.labels[~real] == -100).all()
        assert torch.equal(padded.labels.flatten()[padded.rows], batch.labels[0][batch.rows])
        packed[int(plan.documents[0])] = batch
    for step in take(3, store, recipe(store, layout="padded")):
        assert all(len(b.documents) == 3 for b in step.micro_batches)  # 128 // 40


def test_bins_of_real_lengths_are_nearly_full(store: Store) -> None:
    planner = Planner(store, recipe(store))
    loads = [int(p.lengths.sum()) for _ in range(300) for p in planner.next_step()[1]]
    assert np.mean(loads) > 0.99 * 128


def test_the_held_out_documents_are_the_same_for_every_seed(store: Store) -> None:
    runs = [list(held_out(store, recipe(store, 30, seed=seed))) for seed in (0, 1)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
    assert sum(len(b.documents) for b in runs[0]) == 30
    padded = list(held_out(store, recipe(store, 31, layout="padded")))
    assert sum(len(b.documents) for b in padded) == 31


def test_the_global_random_state_is_left_alone(store: Store) -> None:
    before = torch.get_rng_state()
    take(2, store, recipe(store))
    assert torch.equal(before, torch.get_rng_state())


CHANGES = [
    ({"tokens": 256}, "batch.tokens was 128, now 256"),
    ({"max_length": 50}, "batch.max_length was 40, now 50"),
    ({"seed": 1}, "batch.seed was 0, now 1"),
    ({"held_out": 3}, "data.held_out was 0, now 3"),
    ({"layout": "padded"}, "batch.layout was 'packed', now 'padded'"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_state_of_other_batches_is_refused(
    change: dict[str, Any], message: str, store: Store
) -> None:
    state = take(1, store, recipe(store))[0].state
    for allow in (False, True):
        with pytest.raises(InputError, match=f"resume: .*got {message}$"):
            steps(store, recipe(store, **change), state=state, allow_change=allow)


def test_a_state_of_another_store_is_refused(store: Store) -> None:
    state = take(1, store, recipe(store))[0].state
    state["made_for"]["store"] = "0" * 16
    with pytest.raises(InputError, match="got store was '0000000000000000', now '"):
        steps(store, recipe(store), state=state)


def test_harmless_changes_go_on_when_allowed(store: Store) -> None:
    state = take(1, store, recipe(store))[0].state
    changed = recipe(store, mask_rate=0.3, bins=2)
    with pytest.raises(InputError, match=r"batch\.bins was 4, now 2; .*\(--allow-change goes on\)"):
        steps(store, changed, state=state)
    (step,) = take(1, store, changed, state=state, allow_change=True)
    (expected,) = take(1, store, recipe(store), state=state)
    for a, b in zip(step.micro_batches, expected.micro_batches[:2], strict=True):
        assert np.array_equal(a.documents, b.documents)


@pytest.mark.parametrize(
    ("settings", "world", "message"),
    [
        ({"views": {">=500": 1.0}}, 1, "documents of at least 500 tokens for the view '>=500'"),
        ({"held_out": 500}, 1, r"data\.held_out: expected fewer than the store's 500"),
        ({}, 3, r"batch\.bins: expected a multiple of the 3 ranks, got 4"),
    ],
)
def test_what_cannot_be_dealt_is_refused_at_once(
    settings: dict[str, Any], world: int, message: str, store: Store
) -> None:
    with pytest.raises(InputError, match=message):
        steps(store, recipe(store, **settings), world=world)

"""On the fly: the sequence of batches depends on the texts and the recipe, and on nothing else."""

import itertools
import json
import os
import pickle
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_runs as runs
import yaml
from small_recipe import content, document_texts

from neobert.cli import main
from neobert.pretraining import batches, sources, stream
from neobert.pretraining.batches import Step
from neobert.pretraining.recipe import Batch, Data, Recipe
from neobert.pretraining.run import train
from neobert.pretraining.store import Store
from neobert.pretraining.stream import Lane, Place, Stream, held_out, steps, whole_state
from neobert.pretraining.trainer import DivergedError, Trainer
from neobert.readers import InputError

Small = Callable[..., Recipe]
TEXTS = document_texts(300)
LANES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files: four parts for the lanes, and two that they share row by row."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(6):
        some = TEXTS[number * 50 : (number + 1) * 50]
        (folder / f"{number}.txt").write_text("\n".join(some))
    return folder


@pytest.fixture
def made(folder: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    monkeypatch.setattr(batches, "CHUNK_BINS", 3)

    def make(held_out: int = 0, **batch: Any) -> Recipe:
        values = {"max_length": 40, "tokens": 128, "bins": 4, "workers": 0, **batch}
        data = Data(
            path=str(folder), tokenizer=str(tokenizer), on_the_fly=True, lanes=LANES,
            held_out=held_out,
        )  # fmt: skip
        return Recipe(data, Batch(**values))

    return make


Make = Callable[..., Recipe]
LAYOUTS = [{"layout": "packed", "masking": "bert"}, {"layout": "padded"}]


def take(count: int, recipe: Recipe, **settings: Any) -> list[Step]:
    return list(itertools.islice(steps(Stream(recipe), recipe, **settings), count))


def documents(found: list[Step]) -> list[int]:
    return [d for step in found for b in step.micro_batches for d in b.documents.tolist()]


@pytest.mark.parametrize("batch", LAYOUTS, ids=["packed", "padded"])
def test_ranks_and_workers_share_the_same_bins(batch: dict[str, Any], made: Make) -> None:
    expected = take(9, made(**batch))
    assert [content(s) for s in take(9, made(workers=2, **batch))] == [content(s) for s in expected]
    ranks = [take(9, made(workers=1, **batch), world=2, rank=rank) for rank in range(2)]
    for number, step in enumerate(expected):
        parts = [content(rank[number]) for rank in ranks]
        assert [parts[k % 2][k // 2] for k in range(4)] == content(step)
        assert whole_state([rank[number].state for rank in ranks]) == step.state


@pytest.mark.parametrize("batch", LAYOUTS, ids=["packed", "padded"])
def test_a_restart_from_any_step_continues_with_identical_bytes(
    batch: dict[str, Any], made: Make
) -> None:
    expected = take(14, made(**batch))  # several buffers of every lane, and epochs
    for number in range(13):
        state = json.loads(json.dumps(expected[number].state))
        (again,) = take(1, made(**batch), state=state)
        assert content(again) == content(expected[number + 1])
        assert again.state == expected[number + 1].state


def test_a_restart_with_other_ranks_workers_and_bins_continues(made: Make) -> None:
    expected = take(6, made())
    halves = [take(3, made(), world=2, rank=rank)[-1].state for rank in range(2)]
    state = json.loads(json.dumps(whole_state(halves)))
    found = take(3, made(workers=2), state=state)
    assert [content(s) for s in found] == [content(s) for s in expected[3:]]
    bins = [bin for step in expected[3:] for bin in content(step)]
    odd = take(3, made(bins=3), state=state, allow_change=True)
    assert [bin for step in odd for bin in content(step)] == bins[:9]
    # Three bins further no lane is where a step of four begins.
    ranks = [
        take(1, made(bins=2), state=odd[0].state, world=2, rank=rank, allow_change=True)
        for rank in range(2)
    ]
    assert [content(step)[0] for (step,) in ranks] == bins[3:5]


@pytest.mark.parametrize("apart", [0, 60])
def test_lanes_read_every_document_of_an_epoch_once(apart: int, made: Make) -> None:
    recipe = made(apart)
    opened = Stream(recipe)
    assert len(opened.held_out.numbers) == apart
    before: list[list[int]] = []
    for epoch in (0, 1):
        seen: Counter[int] = Counter(opened.held_out.numbers)
        orders = []
        for number in range(LANES):
            lane = Lane(opened, recipe, number, None)
            found = list(opened.documents(lane._rows(Place(epoch))))
            assert len(found) > 15
            orders.append([first for _, first, _ in found])
            seen.update(orders[-1])
        assert len(seen) == 300
        assert set(seen.values()) == {1}
        assert orders != before
        before = orders
    # Held out are the first, so all of file 0 at 60, and the first ten rows of file 1.
    ids = [opened.tokenizer([text])[0][:38] for text in TEXTS[:apart]]
    assert [found.tolist() for found in opened.held_out.ids] == ids


def test_documents_are_shuffled_by_the_seed_within_their_buffer(made: Make) -> None:
    first = documents(take(3, made(layout="padded")))
    assert first == documents(take(3, made(layout="padded")))
    other = documents(take(3, made(layout="padded", seed=1)))
    assert first != other
    lane = [b.documents for b, _ in itertools.islice(Lane(Stream(made()), made(), 0, None), 6)]
    numbers = np.concatenate(lane)
    assert (np.diff(numbers) < 0).any()
    assert len(set((numbers >> stream.PART_SHIFT).tolist())) <= 3  # a file or two per buffer


def test_masks_know_of_the_document_and_its_epoch_only(made: Make) -> None:
    def labels(recipe: Recipe) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for step in take(4, recipe):
            for batch in step.micro_batches:
                bounds = itertools.pairwise(batch.cu_seqlens.tolist())
                for document, (a, b) in zip(batch.documents.tolist(), bounds, strict=True):
                    found.setdefault(document, batch.labels[0, a:b].tolist())
        return found

    few = labels(made())
    recipe = made(tokens=256)
    many = labels(replace(recipe, data=replace(recipe.data, lanes=1)))
    both = few.keys() & many.keys()
    assert len(both) > 10
    assert all(few[document] == many[document] for document in both)
    other = labels(made(seed=1))
    assert any(few[document] != other[document] for document in few.keys() & other.keys())


def test_batches_hold_the_texts_and_are_nearly_full(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "CHUNK_BINS", 40)
    recipe, loads = made(), []
    opened = Stream(recipe)
    for step in take(10, recipe):
        for batch in step.micro_batches:
            ids = torch.where(batch.labels == -100, batch.input_ids, batch.labels)[0].tolist()
            loads.append(len(ids))
            for number, (a, b) in zip(
                batch.documents, itertools.pairwise(batch.cu_seqlens.tolist()), strict=True
            ):
                (place,) = opened.places(np.array([number])).values()
                name, _, row = place.rpartition(":")
                text = Path(name).read_text().split("\n")[int(row) - 1]
                assert ids[a:b] == [2, *opened.tokenizer([text])[0][:38], 3]
    assert np.mean(loads) > 0.97 * 128


def test_a_stream_can_be_sent_to_a_worker_that_is_not_forked(made: Make) -> None:
    recipe = made(5)
    again = pickle.loads(pickle.dumps(Stream(recipe)))
    (expected,) = take(1, recipe)
    assert content(next(steps(again, recipe))) == content(expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_are_read_by_their_parts_in_workers(
    streaming: bool, made: Make, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "PART_ROWS", 50)
    for number in range(6):
        lines = (folder / f"{number}.txt").read_text().split("\n")
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{number}.jsonl").write_text(text)
    expected = take(4, made(9))
    recipe = made(9, workers=2)
    data = replace(recipe.data, path=None, dataset=str(tmp_path / "set"), streaming=streaming)
    found = take(4, replace(recipe, data=data))
    assert [content(s) for s in found] == [content(s) for s in expected]
    (again,) = take(1, replace(recipe, data=data), state=found[2].state)
    assert content(again) == content(expected[3])


# --- runs


@pytest.fixture
def small(folder: Path, counting: Store, tokenizer: Path, tmp_path: Path) -> Small:
    def make(name: str = "run", **changes: Any) -> Recipe:
        data = {
            "path": str(folder), "store": "", "on_the_fly": True, "lanes": LANES,
            **changes.pop("data", {}),
        }  # fmt: skip
        return runs.recipe_of(counting, tokenizer, tmp_path / name, data=data, **changes)

    return make


def test_an_interrupted_run_goes_on_to_the_same_bits(small: Small, tmp_path: Path) -> None:
    train(small("whole"), quiet=True)
    recipe = small(checkpoint={"every": 100})
    assert runs.finish(runs.start(runs.die_at_fsync, small(), 6)) == -signal.SIGKILL
    changed = replace(recipe, batch=replace(recipe.batch, workers=2))
    process = runs.start(runs.signal_at, changed, 8, signal.SIGTERM, True)
    assert runs.finish(process) == 128 + signal.SIGTERM
    train(recipe, resume=True, quiet=True)
    assert runs.records(tmp_path / "run") == runs.records(tmp_path / "whole")
    assert runs.weights(tmp_path / "run/final") == runs.weights(tmp_path / "whole/final")
    losses = [record["loss"] for record in runs.records(tmp_path / "run", "train")]
    assert len(set(losses)) == 6
    assert [r["step"] for r in runs.records(tmp_path / "run", "eval")] == [4, 8, 12]


def test_a_run_of_two_ranks_goes_on_alone(small: Small, tmp_path: Path) -> None:
    train(small("whole"), quiet=True)
    recipe = small(log={"every": 1, "evaluate": 4})
    runs.on_ranks(2, recipe, tmp_path, stop=5, code=143)
    state = json.loads(next((tmp_path / "run/checkpoints").glob("*6/state.json")).read_bytes())
    assert state["state"]["data"]["lanes"].keys() == set("0123")
    train(recipe, resume=True, quiet=True)
    found = [r["loss"] for r in runs.records(tmp_path / "run", "eval")]
    expected = [r["loss"] for r in runs.records(tmp_path / "whole", "eval")]
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_stopped_run_names_the_lines_of_its_batch(
    small: Small, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_step", Trainer._step)  # to have it back
    runs.before_step(1, runs.poison)
    recipe = small(log={"every": 1, "evaluate": 0})
    with pytest.raises(DivergedError, match="step 2: the loss is nan"):
        train(recipe, quiet=True)
    (report,) = Path(recipe.train.run).glob("stopped/*/report.json")
    content = json.loads(report.read_bytes())
    numbers = {d for some in content["documents by rank and micro-batch"][0] for d in some}
    assert content["places"].keys() == {str(number) for number in numbers}
    assert set(content["places"].values()) <= {
        f"{folder}/{file}.txt:{row}" for file in range(6) for row in range(1, 51)
    }


def test_the_command_needs_no_store(small: Small, tmp_path: Path) -> None:
    recipe = small(schedule={"steps": 2, "warmup": 0})
    sections = {name: dict(vars(getattr(recipe, name))) for name in ("data", "batch", "train")}
    sections |= {name: dict(vars(getattr(recipe, name))) for name in ("model", "schedule")}
    del sections["data"]["store"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    path = str(tmp_path / "recipe.yaml")
    assert main(["pretrain", path, "--quiet"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"recipe.yaml", "run"}
    assert main(["pretrain", path, "--prepare"]) == 2


# --- what is refused


def test_changed_texts_and_lanes_are_refused_by_name(
    made: Make, folder: Path, tmp_path: Path
) -> None:
    (step,) = take(1, made())
    recipe = made()
    other = replace(recipe, data=replace(recipe.data, lanes=8))
    with pytest.raises(InputError, match=r"resume: .*got data.lanes was 4, now 8$"):
        take(1, other, state=step.state)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    moved = replace(recipe, data=replace(recipe.data, path=str(tmp_path)))
    os.utime(tmp_path / "0.txt", (1, 1))
    with pytest.raises(InputError, match=r"got input times was .*\(--allow-change goes on\)$"):
        take(1, moved, state=step.state)
    assert take(1, moved, state=step.state, allow_change=True)
    (tmp_path / "6.txt").write_text("w1")
    with pytest.raises(InputError, match="input files was 6, now 7; input bytes was "):
        take(1, moved, state=step.state, allow_change=True)


@pytest.mark.parametrize(
    ("settings", "world", "message"),
    [
        ({"workers": 2}, 4, r"data\.lanes: expected a multiple of 4 rank\(s\) x 2 worker\(s\), go"),
        ({}, 3, r"batch\.bins: expected a multiple of the 3 ranks, got 4"),
        ({"held_out": 300}, 1, r"data\.held_out: expected fewer than the stream's 300 documents"),
        ({"held_out": 299}, 1, r"data\.lanes: expected texts with tokens for every lane, .* of 4"),
        ({"views": {"all": 0.5, ">=9": 0.5}}, 1, r"batch\.views: expected a store for views of lo"),
    ],
)
def test_what_cannot_be_dealt_is_refused(
    settings: dict[str, Any], world: int, message: str, made: Make
) -> None:
    with pytest.raises(InputError, match=message):
        take(1, made(**settings), world=world)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_text_is_one_error_also_in_a_worker(
    workers: int, made: Make, tmp_path: Path
) -> None:
    (tmp_path / "in.txt").write_bytes(b"w1 w2\nw3\nw4\nw5\n\xff\n")
    recipe = made(workers=workers)
    recipe = replace(recipe, data=replace(recipe.data, path=str(tmp_path)))
    with pytest.raises(InputError) as caught:
        take(1, recipe)
    assert str(caught.value).startswith(f"{tmp_path}/in.txt:5: expected UTF-8, got byte 0xff")
    assert "\n" not in str(caught.value)


def test_settings_of_a_store_are_refused() -> None:
    with pytest.raises(InputError, match=r"data\.documents: expected none with data\.on_the_fly"):
        Data(path="in", on_the_fly=True, documents=5)
    with pytest.raises(InputError, match=r"data\.store: .* \(or data\.on_the_fly\), got none"):
        Data(path="in")


def test_held_out_documents_are_the_same_for_every_seed(made: Make) -> None:
    found = [list(held_out(Stream(made(20, seed=seed)), made(20, seed=seed))) for seed in (0, 1)]
    assert sum(len(batch.documents) for batch in found[0]) == 20
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)

"""Several processes give the run of one, and a run may go on with another number of them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training_runs as runs
from safetensors.torch import load_file

from neobert.pretraining import evaluation
from neobert.pretraining.ranks import Ranks
from neobert.pretraining.recipe import Recipe
from neobert.pretraining.run import train

Small = Callable[..., Recipe]
WRAPPERS = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, counting: Any, tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train(runs.recipe_of(counting, tokenizer, folder / "run"), quiet=True)
    return folder / "run"


def like_alone(alone: Path, run: Path) -> None:
    """The same batches; sums of floats in another order."""
    found, expected = runs.records(run), runs.records(alone)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert (a["kind"], a["step"], a["tokens"]) == (b["kind"], b["step"], b["tokens"])
        for key in a.keys() & {"loss", "accuracy", "unigram_accuracy", "grad_norm"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    tensors = load_file(alone / "final" / "model.safetensors")
    for name, tensor in load_file(run / "final" / "model.safetensors").items():
        assert tensor.shape == tensors[name].shape
        assert (tensor - tensors[name]).norm() < 1e-3 * tensors[name].norm() + 1e-6, name


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_an_evaluation_in_as_many_forwards_each(world: int) -> None:
    for count in range(7):
        batches: Any = [SimpleNamespace(number=number) for number in range(count)]
        shares = [
            list(evaluation._share(iter(batches), Ranks(rank, world, torch.device("cpu"))))
            for rank in range(world)
        ]
        assert len({len(share) for share in shares}) == 1
        counted = [batch.number for share in shares for batch, counts in share if counts]
        assert sorted(counted) == list(range(count))


@pytest.mark.parametrize("parallel", WRAPPERS)
def test_two_processes_train_as_one(
    parallel: str, small: Small, alone: Path, tmp_path: Path
) -> None:
    recipe = small(train={"parallel": parallel})
    runs.on_ranks(2, recipe, tmp_path)
    like_alone(alone, Path(recipe.train.run))


@pytest.mark.parametrize(("parallel", "worlds"), [("ddp", (1, 2)), ("fsdp", (2, 1))])
def test_a_run_goes_on_with_another_number_of_ranks(
    parallel: str, worlds: tuple[int, int], small: Small, alone: Path, tmp_path: Path
) -> None:
    """Each wrapper's state is loaded where there are others, or none."""
    recipe = small(train={"parallel": parallel})
    runs.on_ranks(worlds[0], recipe, tmp_path, stop=5, code=143)
    folder = Path(recipe.train.run)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [
        "step-00000003",
        "step-00000006",
    ]
    runs.on_ranks(worlds[1], recipe, tmp_path, resume=True)
    like_alone(alone, folder)
    notes = [record["text"] for record in runs.records(folder, "note")]
    assert any("step-00000006 on" in text and f"on {worlds[1]} rank" in text for text in notes)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    small: Small, alone: Path, tmp_path: Path
) -> None:
    recipe = small(checkpoint={"every": 100})
    runs.on_ranks(2, recipe, tmp_path, stop=5, code=143)
    folder = Path(recipe.train.run)
    # Rank 1 has the signal during step 6; the ranks read, and agree, after it.
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000006"]
    runs.on_ranks(2, recipe, tmp_path, resume=True)
    like_alone(alone, folder)


def test_both_ranks_documents_are_in_the_report_of_a_stop(small: Small, tmp_path: Path) -> None:
    recipe = small()
    runs.on_ranks(2, recipe, tmp_path, poisoned=3, code=runs.DIVERGED)
    (report,) = (Path(recipe.train.run) / "stopped").glob("*/report.json")
    documents = json.loads(report.read_bytes())["documents by rank and micro-batch"]
    assert [len(rank) for rank in documents] == [2, 2]


def test_no_user_of_the_group_is_its_last_owner(tmp_path: Path) -> None:
    """`DistributedDataParallel` as the last one can hang: see ``neobert/pretraining/ranks.py``."""
    assert runs.finish(runs.start(runs.outlive_the_group, tmp_path / "meeting")) == 0

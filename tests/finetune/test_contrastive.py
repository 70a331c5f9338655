"""Contrastive fine-tuning: the loss, the draw of data sets, the data, the run and its folder."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contrastive_ranks
import numpy as np
import pytest
import texts
import torch
from contrastive_ranks import kept_gradients
from encoders import ENCODERS, randomized
from torch.utils.data import BatchSampler, ConcatDataset, SequentialSampler

import neobert
from neobert import cli
from neobert.encode import Encoder
from neobert.finetuning.contrastive.data import load_pairs
from neobert.readers import InputError

st = pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer.losses import (  # noqa: E402
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
)

from neobert.finetuning.contrastive import loss as loss_module  # noqa: E402
from neobert.finetuning.contrastive.loss import CachedInfoNCELoss  # noqa: E402
from neobert.finetuning.contrastive.sampling import SquareRootBatchSampler  # noqa: E402

PAIRS = [("a cat", "the cats"), ("a dog", "two dogs"), ("one house", "houses"), ("red", "a color")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = randomized(ENCODERS["bert"].base(num_hidden_layers=1))
    return texts.save("bert", model, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"query": a, "positive": b}) for a, b in PAIRS * 3]
    path.write_text("\n".join(lines[:4]) + "\n")
    return path


@pytest.fixture
def contrastive(folder: Path, pairs: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        given = ["--model", str(folder), "--data", str(pairs), "--output", str(tmp_path / "out")]
        given += ["--steps", "4", "--batch-size", "2", "--device", "cpu", "--lr", "0.01"]
        return cli.main(["finetune", "contrastive", *given, *arguments])

    return run


@pytest.mark.parametrize(
    ("negatives", "at_once", "dims"), [(0, 2, ()), (2, 256, ()), (0, 256, (48, 7)), (2, 2, (7, 48))]
)
def test_the_loss_is_that_of_sentence_transformers(
    negatives: int,
    at_once: int,
    dims: tuple[int, ...],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_module, "CPU_QUERIES", at_once)
    draw = np.random.default_rng(0)
    columns = [
        [" ".join(draw.choice(["cat", "dog", "hat"], 4)) for _ in range(5)]
        for _ in range(2 + negatives)
    ]
    results = []
    for kind in ("theirs", "ours"):
        model = st.SentenceTransformer(str(folder), device="cpu")
        if kind == "ours":
            loss = CachedInfoNCELoss(model, 0.07, mini_batch_num_tokens=40)
        else:
            loss = CachedMultipleNegativesRankingLoss(model, scale=1 / 0.07, mini_batch_size=2)
        if dims:
            loss = MatryoshkaLoss(model, loss, dims)
        features = [model.preprocess(column) for column in columns]
        value = loss(features, torch.zeros(5))
        value.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((value.detach(), gradient))
    (expected, wanted), (actual, found) = results
    torch.testing.assert_close(actual, expected)
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def test_data_sets_are_drawn_by_the_root_of_their_size_one_per_batch() -> None:
    sizes = (10_000, 400, 100)
    data: ConcatDataset = ConcatDataset([list(range(n)) for n in sizes])  # type: ignore[list-item]
    inner = [BatchSampler(SequentialSampler(range(n)), 4, drop_last=True) for n in sizes]
    sampler = SquareRootBatchSampler(data, inner, seed=1)
    batches = list(sampler)
    assert len(batches) == len(sampler) == sum(n // 4 for n in sizes)
    bounds = np.cumsum([0, *sizes])
    which = [np.searchsorted(bounds, batch, side="right") - 1 for batch in batches]
    assert all(len(set(each.tolist())) == 1 for each in which)
    shares = Counter(int(each[0]) for each in which)
    expected = np.sqrt(sizes) / np.sqrt(sizes).sum()
    for i, share in enumerate(expected):
        assert shares[i] / len(batches) == pytest.approx(share, abs=0.03)
    assert list(sampler) == batches
    sampler.set_epoch(1)
    assert list(sampler) != batches


def test_processes_share_batches_of_one_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    data: ConcatDataset = ConcatDataset([list(range(300)), list(range(300))])  # type: ignore[list-item]
    inner = [BatchSampler(SequentialSampler(range(300)), 4, drop_last=True)] * 2
    first = [batch[0] // 300 for batch in SquareRootBatchSampler(data, inner)]
    assert all(len(set(first[i : i + 3])) == 1 for i in range(0, len(first), 3))
    assert set(first) == {0, 1}


def test_a_run_ends_in_a_folder_that_others_load(
    contrastive: Callable[..., int], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "say.json").write_text('{"pairs": "find: "}')
    assert contrastive("--instructions", str(tmp_path / "say.json")) == 0
    final = tmp_path / "out" / "final"
    theirs = st.SentenceTransformer(str(final), device="cpu").encode(texts.TEXTS)
    ours = Encoder.load(final, device="cpu").encode(texts.TEXTS)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    before = Encoder.load(folder, device="cpu").encode(texts.TEXTS)
    assert np.abs(ours - before).max() > 1e-3
    card = (final / "README.md").read_text()
    assert "## How it was made" in card
    assert "- pairs: 4 pairs" in card
    assert '"temperature": 0.07' in card
    assert '"pairs": "find: "' in card


def rank_loss(model: Path, dim: int | None = None) -> float:
    """Of `PAIRS`, on the first ``dim`` dimensions."""
    encoder = Encoder.load(model, device="cpu")
    a, b = (
        torch.nn.functional.normalize(torch.from_numpy(encoder.encode(list(side))[:, :dim]))
        for side in zip(*PAIRS, strict=True)
    )
    return float(torch.nn.functional.cross_entropy(a @ b.T / 0.07, torch.arange(len(PAIRS))))


def test_training_brings_pairs_together(
    contrastive: Callable[..., int], folder: Path, tmp_path: Path
) -> None:
    assert contrastive("--steps", "20", "--batch-size", "4") == 0
    assert rank_loss(tmp_path / "out" / "final") < 0.7 * rank_loss(folder)


def test_matryoshka_trains_leading_dimensions_too(
    contrastive: Callable[..., int],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = ("--steps", "20", "--batch-size", "4")
    assert contrastive(*steps, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    plain = rank_loss(tmp_path / "out" / "final", 2)
    dims = ("--matryoshka", "2", "48", "2")
    assert contrastive(*steps, *dims, "--restart") == 0
    assert "the model is in" in capsys.readouterr().out
    final = tmp_path / "out" / "final"
    assert rank_loss(final) < 0.7 * rank_loss(folder)
    assert rank_loss(final, 2) < 0.7 * min(plain, rank_loss(folder, 2))
    card = (final / "README.md").read_text()
    assert "negatives, each at the first 48, 2 dimensions (Matryoshka), every batch" in card
    assert contrastive(*steps) == 2  # another run
    assert "recipe was" in capsys.readouterr().err


def test_two_processes_have_the_gradient_of_one_with_all_their_pairs(
    folder: Path, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    for name, count in (("one", 24), ("two", 16)):
        words = ["".join(draw.choice(list("abcdefgh"), 6)) for _ in range(3 * count)]
        rows = zip(words[::3], words[1::3], words[2::3], strict=True)
        lines = [json.dumps({"query": q, "positive": p, "negative": n}) for q, p, n in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    given = ["--model", str(folder), "--device", "cpu", "--steps", "3", "--lr", "0.001"]
    given += ["--data", str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]
    alone = [*given, "--output", str(tmp_path / "alone"), "--batch-size", "8"]
    with kept_gradients() as expected:
        assert cli.main(["finetune", "contrastive", *alone]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", contrastive_ranks.__file__, str(tmp_path), *given]
    root = Path(neobert.__file__).parents[1]
    subprocess.run(
        [*command, "--output", str(tmp_path / "ranks"), "--batch-size", "4"],
        env={**os.environ, "PYTHONPATH": str(root)},
        check=True,
    )
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for step, (wanted, *ranks) in enumerate(zip(expected, *found, strict=True)):
        for gradient in ranks:
            assert (gradient - wanted).norm() <= 1e-4 * wanted.norm(), step
    ours, theirs = (
        Encoder.load(tmp_path / name / "final", device="cpu").encode(texts.TEXTS)
        for name in ("ranks", "alone")
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_a_killed_run_goes_on_from_its_checkpoint(
    contrastive: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calculate, calls = CachedInfoNCELoss.calculate_loss, []

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return calculate(self, *args, **kwargs)

    monkeypatch.setattr(CachedInfoNCELoss, "calculate_loss", killed)
    assert contrastive() == 130
    assert not (tmp_path / "out" / "final").exists()
    assert contrastive() == 0
    assert len(calls) == 5  # three steps are in the checkpoint
    # Killed while it wrote its last checkpoint: that one does not count.
    shutil.rmtree(tmp_path / "out" / "final")
    (tmp_path / "out" / "checkpoints" / "checkpoint-9").mkdir()
    assert contrastive() == 0
    assert not (tmp_path / "out" / "checkpoints" / "checkpoint-9").exists()
    assert contrastive("--lr", "0.02") == 2  # another run
    assert contrastive() == 0
    assert len(calls) == 5


def test_files_give_the_same_pairs_in_either_form(tmp_path: Path) -> None:
    rows = [{"anchor": "a", "positive": "b", "negative": ["c", "d"]}]
    (tmp_path / "x.jsonl").write_text("\ufeff" + json.dumps(rows[0]) + "\n\n")
    assert load_pairs(str(tmp_path / "x.jsonl")).columns == {
        "query": ["a"], "positive": ["b"], "negative_1": ["c"], "negative_2": ["d"],
    }  # fmt: skip
    (tmp_path / "y.tsv").write_text('query\tpositive\tnegative\n"a\tb\tc\n')
    assert load_pairs(str(tmp_path / "y.tsv")).columns["query"] == ['"a']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"query": "a"}', "x.jsonl:1: expected a text under 'positive', got None"),
        ("x.jsonl", '{"query": "a", "positive": " "}', "under 'positive', got ' '"),
        ("x.jsonl", "[1]", "x.jsonl:1: expected a JSON object, got list"),
        ("x.jsonl", "", "expected pairs, got none"),
        ("x.tsv", "query\tpositive\na", "x.tsv:2: expected 2 fields, got 1"),
        ("x.csv", "a", "data: expected a name ending in .jsonl or .tsv"),
        (
            "x.jsonl",
            '{"query": "a", "positive": "b", "negative": "c"}\n{"query": "a", "positive": "b"}',
            "x.jsonl:2: expected 1 negatives as in the first row, got 0",
        ),
    ],
)
def test_broken_pairs_are_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        load_pairs(str(tmp_path / name))
    assert message in str(caught.value)


def test_bad_input_is_one_line(
    contrastive: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "say.json").write_text('{"other": "find: "}')
    for arguments, message in (
        (["--output", str(tmp_path / "say.json")], "output: expected a folder, got the file"),
        (["--seed", "-3"], "argument --seed: expected a whole number from 0, got '-3'"),
        (["--data", "no/such-set"], "data: expected no/such-set from the hub, got"),
        (["--instructions", str(tmp_path / "say.json")], "expected names of pairs, got 'other'"),
        (["--temperature", "0"], "temperature: expected over 0, got 0.0"),
        (
            ["--matryoshka", "48", "49"],
            "matryoshka: expected at most 48 (the model's dimensions), got 49",
        ),
    ):
        assert contrastive(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()

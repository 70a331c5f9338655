"""Pseudo-perplexity: equal to a loop over single positions, resumed, and reported by length."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
import torch
from encoders import ENCODERS, randomized
from torch.nn import functional as F

from neobert import cli
from neobert.evaluation import pseudo_perplexity
from neobert.evaluation.masked_lm import MaskedLM, load_masked_lm
from neobert.evaluation.pseudo_perplexity import Document, read_documents

FAMILIES = [name for name, encoder in ENCODERS.items() if encoder.has("mlm")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            torch.manual_seed(0)
            texts.save(family, randomized(ENCODERS[family].head("mlm")), root / family)
        return root / family

    return folder


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, length in enumerate((20, 3, 40, 9, 0, 75)):
        (folder / f"{i}.txt").write_text(("the cat sat on a mat " * 9)[:length])
    return folder


@pytest.fixture
def evaluate(folders: Callable[[str], Path], documents: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        given = ["--model", str(folders("neobert")), "--input", str(documents)]
        given += ["--output", str(tmp_path / "out"), "--name", "a/b"]
        return cli.main(["evaluate", "pseudo-perplexity", *given, *arguments])

    return run


def naive(model: Any, ids: np.ndarray, positions: np.ndarray, mask: int) -> float:
    """The definition: one unpatched forward per masked token."""
    losses = []
    for position in positions:
        row = torch.from_numpy(ids.copy())[None]
        row[0, position] = mask
        with torch.no_grad():
            logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits
        losses.append(F.cross_entropy(logits[:, position], torch.tensor([ids[position]])))
    return float(torch.stack(losses).double().mean())


def document(masked_lm: MaskedLM, text: str = "the cat sat on the mat.") -> np.ndarray:
    return np.array(masked_lm.tokenizer(text)["input_ids"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_tokens", [1, 100])
def test_batched_and_packed_is_the_naive_loop(
    family: str, max_tokens: int, folders: Callable[[str], Path]
) -> None:
    plain = load_masked_lm(folders(family), patched=False)
    ours = load_masked_lm(folders(family))
    assert (plain.packed, ours.packed) == (False, True)
    ids = document(plain)
    positions = plain.maskable(ids)
    assert positions.tolist() == list(range(1, len(ids) - 1))
    expected = naive(plain.model, ids, positions, plain.tokenizer.mask_token_id)
    for masked_lm in (plain, ours):
        assert masked_lm.loss(ids, positions, max_tokens) == pytest.approx(expected, rel=2e-5)
    few = positions[[2, 7]]
    expected = naive(plain.model, ids, few, plain.tokenizer.mask_token_id)
    assert ours.loss(ids, few, max_tokens) == pytest.approx(expected, rel=2e-5)


def test_documents_come_out_in_order_with_their_lengths(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--min-tokens", "8") == 0
    found, _ = read_documents(tmp_path / "out" / "a--b")
    assert [Path(d.place).name for d in found] == [f"{i}.txt" for i in range(6)]
    assert [d.tokens for d in found] == [22, 5, 42, 11, 2, 64]  # cut at the model's 64
    assert [d.masked for d in found] == [20, 0, 40, 9, 0, 62]
    assert [d.loss is None for d in found] == [False, True, False, False, True, False]
    out = capsys.readouterr().out
    assert (tmp_path / "out" / "pseudo-perplexity.md").read_text() == out
    mean = math.exp(sum(d.loss for d in found if d.loss is not None) / 4)
    assert f"| a/b | all | all | 4 | 35 | {mean:.2f} |" in out
    assert f"| a/b | all | to 64 | 4 | 35 | {mean:.2f} |" in out
    assert "<table>" in (tmp_path / "out" / "pseudo-perplexity.html").read_text()


def test_a_killed_run_goes_on_behind_its_last_whole_line(
    evaluate: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate("--quiet") == 0
    path = tmp_path / "out" / "a--b" / "documents.jsonl"
    whole = path.read_bytes()
    loss, calls = MaskedLM.loss, []

    def counted(self: MaskedLM, *args: Any) -> float:
        calls.append(len(args[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(self, *args)

    monkeypatch.setattr(MaskedLM, "loss", counted)
    assert evaluate("--quiet", "--restart") == 130
    assert whole.startswith(path.read_bytes())
    assert path.read_bytes().count(b"\n") == 2
    with open(path, "ab") as file:
        file.write(whole.splitlines()[2][:30])  # as a kill in the middle of writing leaves it
    assert evaluate("--quiet") == 0
    assert path.read_bytes() == whole
    assert calls == [22, 5, 42, 42, 11, 64]


def test_a_sample_of_positions_is_the_same_every_time(
    evaluate: Callable[..., int], tmp_path: Path
) -> None:
    path = tmp_path / "out" / "a--b" / "documents.jsonl"
    assert evaluate("--quiet", "--positions", "4") == 0
    first = path.read_bytes()
    assert [json.loads(line)["masked"] for line in first.splitlines()] == [4, 3, 4, 4, 0, 4]
    assert evaluate("--quiet", "--positions", "4", "--restart", "--max-tokens", "1") == 0
    again = [json.loads(line)["loss"] for line in path.read_bytes().splitlines()]
    assert again == pytest.approx([json.loads(line)["loss"] for line in first.splitlines()])


def test_another_run_in_the_folder_is_refused(
    evaluate: Callable[..., int],
    documents: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate("--quiet", "--documents", "1") == 0
    assert evaluate("--quiet", "--documents", "2") == 0  # only goes further
    assert len(read_documents(tmp_path / "out" / "a--b")[0]) == 2
    assert evaluate("--quiet", "--min-tokens", "9") == 2
    assert "min_tokens was 1, now 9" in capsys.readouterr().err
    with (
        pseudo_perplexity.Job(tmp_path / "held", {}),
        pytest.raises(ValueError, match="expected one job in"),
    ):
        pseudo_perplexity.Job(tmp_path / "held", {})


def test_lines_and_records_are_documents_too(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"body": "a cat"}\n{"body": "two cats"}\n')
    given = ["--model", str(folders("bert")), "--input", str(path), "--field", "body"]
    given += ["--output", str(tmp_path / "out"), "--name", "m", "--quiet"]
    assert cli.main(["evaluate", "pseudo-perplexity", *given]) == 0
    assert [d.tokens for d in read_documents(tmp_path / "out" / "m")[0]] == [7, 10]


def test_a_model_without_its_head_or_mask_token_is_an_error(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = texts.save("bert", ENCODERS["bert"].base(), tmp_path / "base")
    assert evaluate("--model", str(base)) == 2
    error = capsys.readouterr().err
    assert "model: expected a checkpoint with a masked-LM head, got one without cls.pred" in error
    unmasked = texts.save("bert", ENCODERS["bert"].head("mlm"), tmp_path / "unmasked")
    tokenizer = texts.tokenizer("bert")
    tokenizer.mask_token = None
    tokenizer.save_pretrained(unmasked)
    assert evaluate("--model", str(unmasked)) == 2
    assert "expected a tokenizer with a mask token" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_measured_is_said_and_no_perplexity_overflows(
    evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--min-tokens", "100") == 2
    assert "expected measured documents" in capsys.readouterr().err
    assert math.isfinite(Document("x", 3, 1, 1e9).perplexity or math.nan)
    assert math.isfinite(pseudo_perplexity.mean_perplexity([Document("x", 3, 1, 1e9)]))

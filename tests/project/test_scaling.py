"""docs/scaling.md shows what the command prints, and the command's arithmetic is a hand's."""

import re
import shlex
from pathlib import Path

import pytest

from neobert.cli import main
from neobert.floors import ARCHITECTURES, GPUS, forward, scaling

TEXT = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text("utf-8")


def test_the_tables_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = re.findall(r"`neobert (bench --floor --corpus [^`]*)`", TEXT)
    assert main(shlex.split(command)) == 0
    assert f"```text\n{capsys.readouterr().out}```" in TEXT


def test_a_corpus_by_hand() -> None:
    model, gpu = ARCHITECTURES["neobert-250m"], GPUS["h100"]
    rate = scaling.tokens_per_s(model, gpu, 128)
    parts = forward(model, [128] * 128)
    assert rate == pytest.approx(16384 / sum(part.cost.floor_s(gpu, "bfloat16") for part in parts))
    corpus = scaling.Corpus(texts=1000, length=100)
    assert scaling.flows(model, corpus, rate=1e6, core=250_000) == {
        "texts/s": 1e4,
        "cores that tokenize": 4,
        "MB/s of text read": 4.5,
        "MB/s of float32 written": pytest.approx(1e4 * (768 * 4 + 16) / 1e6),
        "MB/s of float16 written": pytest.approx(1e4 * (768 * 2 + 16) / 1e6),
    }
    assert scaling.stored(model, corpus) == (
        1e5 * 4.5 / 1e12,
        [1000 * 3088 / 1e12, 1000 * 1552 / 1e12],
    )
    lines = scaling.report(model, corpus, [gpu], counts=(2,)).splitlines()
    seconds = 1e5 / scaling.tokens_per_s(model, gpu, 100) / 2
    assert lines[3].split()[-3:-1] == [f"{seconds:.1f}", "s"]
    assert "not measured" in lines[0]

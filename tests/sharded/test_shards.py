"""A folder of shards: every row once, in order, whatever was killed, changed or damaged."""

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sharded_runs as runs
from fake_encoder import FakeEncoder, embed, run_job
from jobs import TEXTS, Killed

from neobert.inputs import open_source
from neobert.outputs import OutputError
from neobert.readers import InputError, ReadOptions, line_starts
from neobert.sharded import checksum, owned, ray
from neobert.sharded.plan import Plan, make_plan


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of three files: lines with and without an end, and Parquet in groups of two."""
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(TEXTS[:7]).encode())
    (folder / "b" / "c.txt").write_text("\n".join(TEXTS[7:8]) + "\n")
    pq.write_table(pa.table({"text": TEXTS[8:]}), folder / "d.parquet", row_group_size=2)
    return folder


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of a run that nothing disturbed."""
    runs.run(source, tmp_path / "whole")
    return runs.parts(tmp_path / "whole")


def test_rows_are_in_order_with_their_sources(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    summary = runs.run(source, output)
    found = runs.table(output)
    assert found["row"] == [*range(18)]
    assert found["source"] == ["a.txt"] * 7 + ["b/c.txt"] + ["d.parquet"] * 10
    assert found["number"] == [*range(1, 8), 1, *range(1, 11)]
    np.testing.assert_array_equal(runs.vectors(output), [embed(text) for text in TEXTS])
    names = [f"part-{i:06}.parquet" for i in range(3)]
    assert list(runs.parts(output)) == ["_manifest.json", *names]
    manifest = runs.manifest(output)
    assert [tuple(part.values()) for part in manifest["shards"]] == [
        (names[0], 0, 8), (names[1], 8, 8), (names[2], 16, 2)
    ]  # fmt: skip
    assert (manifest["rows"], manifest["dim"], manifest["model"]) == (18, 8, "fake")
    assert manifest["input"]["identity"]["input"] == str(source)
    assert (summary.texts, summary.shards, summary.run.texts) == (18, 3, 18)
    assert summary.tokens == manifest["tokens"] == sum(min(len(t.split()), 5) for t in TEXTS)


def test_loading_the_model_is_no_part_of_the_rate(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("neobert.sharded.job.time.monotonic", lambda: now)

    def pass_by(seconds: float) -> None:
        nonlocal now
        now += seconds

    def load(*_: object) -> FakeEncoder:
        pass_by(100)
        return FakeEncoder(after_window=lambda done: pass_by(1))

    assert "this run 18 texts in 5.0 s, " in str(runs.run(source, tmp_path / "out", load=load))
    job = runs.job(source, tmp_path / "ray", load=load)
    with job.prepared(job.source()):
        results = ray.Worker(job, None, None)({"shards": ["0 1"]})
    assert (results["texts"], results["seconds"]) == ([16], [4.0])


def test_a_folder_holds_the_rows_of_one_file(source: Path, tmp_path: Path) -> None:
    run_job(source, tmp_path / "out.npy")
    runs.run(source, tmp_path / "out")
    np.testing.assert_array_equal(runs.vectors(tmp_path / "out"), np.load(tmp_path / "out.npy"))


def test_float16_shards_hold_the_rounded_rows(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert "[18, 8] float16 in 3 shards" in str(runs.run(source, output, output_dtype="float16"))
    assert runs.manifest(output)["output_dtype"] == "float16"
    column = pq.read_table(output)["embedding"].combine_chunks()
    assert column.type == pa.list_(pa.field("element", pa.float16()), 8)
    rows = column.flatten().to_numpy().reshape(-1, 8)
    np.testing.assert_array_equal(rows, np.float16([embed(text) for text in TEXTS]))


@pytest.mark.parametrize("every", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"a", b"a\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", b"\xef\xbb\xbfa\n\nb\r\n\n\nc"],
)
def test_lines_are_counted_as_they_are_read(
    data: bytes, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neobert.readers._COUNTED_BYTES", 3)
    path = tmp_path / "in.txt"
    path.write_bytes(data)
    texts = [row.text for row in open_source(str(path)).rows()]
    for first in range(3):
        lines, starts = line_starts(path, first, every)
        assert lines == len(texts)
        assert [line for line, _ in starts] == [*range(first, lines, every)]
        for line, byte in starts:
            rest = open_source(str(path)).rows_from(0, line, byte)
            assert [(row.text, row.number) for row in rest] == [
                (text, i + 1) for i, text in enumerate(texts) if i >= line
            ]


@pytest.mark.parametrize("shard_rows", [1, 3, 8, 17, 18, 19])
def test_shards_of_any_size_are_the_input(shard_rows: int, source: Path) -> None:
    opened = open_source(str(source))
    plan = make_plan(opened, shard_rows, print)
    texts = []
    for i in range(len(plan)):
        shard = plan[i]
        rows = opened.rows_from(shard.file, shard.skip, shard.offset)
        texts += [row.text for row, _ in zip(rows, range(shard.rows), strict=False)]
    assert texts == TEXTS
    assert Plan.from_record(json.loads(json.dumps(vars(plan)))) == plan


def test_ids_are_kept_and_may_be_the_same(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "key": i // 2}) for i, text in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    runs.run(tmp_path / "in.jsonl", tmp_path / "out", read=ReadOptions(id_column="key"))
    assert runs.table(tmp_path / "out")["id"] == [str(i // 2) for i in range(18)]


def test_a_pattern_names_files(source: Path, tmp_path: Path) -> None:
    runs.run(f"{source}/**/*.txt", tmp_path / "out")
    found = runs.table(tmp_path / "out")
    assert found["source"] == ["a.txt"] * 7 + ["b/c.txt"]
    assert runs.manifest(tmp_path / "out")["input"]["identity"]["input"] == f"{source}/**/*.txt"
    with pytest.raises(InputError, match=r"expected \.txt.* files to match, got none for .*\*\.md"):
        runs.run(f"{source}/*.md", tmp_path / "none")


KILLED = """
import sys
from pathlib import Path
import sharded_runs as runs
source, output, pids = map(Path, sys.argv[1:])
runs.run(source, output, pids=pids, hold=3)
"""


def test_a_process_killed_by_signal_9_resumes_to_the_same_bytes(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    output, pids = tmp_path / "out", tmp_path / "pids"
    pids.mkdir()
    with runs.start(KILLED, source, output, pids) as process:
        runs.wait_for(pids, "*-12")
        (kept,) = runs.wait_for(output, "part-*")
        process.send_signal(signal.SIGKILL)
    written = kept.stat().st_mtime_ns
    assert [path.name for path in output.glob("part-*")] == ["part-000000.parquet"]
    assert runs.run(source, output).run.texts == 10
    assert runs.parts(output) == whole
    assert kept.stat().st_mtime_ns == written


def stop_after(texts: int) -> Any:
    def stop(done: int) -> None:
        if done >= texts:
            raise Killed

    return lambda device, threads: FakeEncoder(after_window=stop)


@pytest.fixture
def half(source: Path, tmp_path: Path) -> Path:
    """The folder of a run that ended in its second shard."""
    output = tmp_path / "out"
    with pytest.raises(Killed):
        runs.run(source, output, load=stop_after(12))
    assert [path.name for path in output.glob("*part*")] == ["part-000000.parquet"]
    return output


def test_what_a_killed_process_half_wrote_is_removed(
    half: Path, source: Path, whole: dict[str, bytes]
) -> None:
    (half / "_part-000001.parquet.elsewhere-7.new").write_bytes(b"half")
    assert pq.read_table(half).num_rows == 8  # readers of data sets pass over it
    runs.run(source, half)
    assert runs.parts(half) == whole


@pytest.mark.parametrize("size", [0, 7, 2000])
def test_a_damaged_shard_is_made_again(
    size: int, half: Path, source: Path, whole: dict[str, bytes]
) -> None:
    os.truncate(half / "part-000000.parquet", size)
    assert runs.run(source, half).run.texts == 18
    assert runs.parts(half) == whole


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("place", [0, 0.1, 0.3, 0.5, 0.6, 0.8, 0.9, 0.99])
def test_a_shard_with_a_changed_bit_is_made_again(
    place: float, finished: bool, half: Path, source: Path, whole: dict[str, bytes]
) -> None:
    if finished:
        runs.run(source, half)
    shard = half / "part-000000.parquet"
    content = bytearray(shard.read_bytes())
    content[int(place * len(content))] ^= 1
    shard.write_bytes(content)
    assert runs.run(source, half).run.texts == (8 if finished else 18)
    assert runs.parts(half) == whole


def test_every_changed_byte_is_noticed(half: Path) -> None:
    """Also those of the checksum, and of what says where it stands."""
    shard = half / "part-000000.parquet"
    content = shard.read_bytes()
    assert checksum.is_intact(shard)
    sum_at = content.index(b'"crc32": "')
    for place in (*range(0, len(content), 23), *range(sum_at, sum_at + 19)):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert not checksum.is_intact(shard) or owned.footer(shard) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 2}, "window was 4, now 2"),
        ({"shard_rows": 4}, "shard_rows was 8, now 4"),
        ({"output_dtype": "float16"}, "output_dtype was 'float32', now 'float16'"),
        ({"options": runs.OPTIONS | {"dtype": "float16"}}, "dtype was 'float32', now 'float16'"),
        ({"read": ReadOptions(field="body")}, "field was 'text', now 'body'"),
        (
            {"load": lambda *_: FakeEncoder(fingerprint={"files": "f1", "prompt": ""})},
            "encoder files was 'f0', now 'f1'",
        ),
    ],
)
def test_another_job_does_not_resume(
    change: dict[str, Any], message: str, half: Path, source: Path
) -> None:
    with pytest.raises(InputError, match=rf"^resume: .*{message}.*--restart discards its"):
        runs.run(source, half, **change)
    assert (half / "part-000000.parquet").exists()
    assert runs.run(source, half, **change, restart=True).texts == 18


def test_a_changed_input_does_not_resume(half: Path, source: Path) -> None:
    (source / "e.txt").write_text("more")
    with pytest.raises(InputError, match=r"resume: .*input files was 3, now 4; .*input bytes was"):
        runs.run(source, half)
    assert runs.run(source, half, restart=True).texts == 19


def test_an_input_with_other_times_resumes_if_it_is_trusted(half: Path, source: Path) -> None:
    kept = (half / "part-000000.parquet").read_bytes()
    os.utime(source / "a.txt", ns=(0, 7))
    hint = r"input times was '\w+', now '\w+' \(--trust-input goes on if the texts are the same, "
    with pytest.raises(InputError, match=hint + "--restart discards its 1 shards"):
        runs.run(source, half)
    assert runs.run(source, half, trust_input=True).run.texts == 10
    assert (half / "part-000000.parquet").read_bytes() == kept
    np.testing.assert_array_equal(runs.vectors(half), [embed(text) for text in TEXTS])
    assert runs.run(source, half).run.texts == 0  # the times are now the new ones
    (source / "a.txt").write_text("more")
    with pytest.raises(InputError, match=r"input bytes was \d+, now \d+ \(--overwrite"):
        runs.run(source, half, trust_input=True)


def test_invalid_text_stops_a_run_that_goes_on_with_errors_replaced(
    source: Path, tmp_path: Path
) -> None:
    (source / "e.txt").write_bytes(b"fine\nbad \xff\n")
    output = tmp_path / "out"
    with pytest.raises(InputError, match=r"e\.txt:2: expected UTF-8, got byte 0xff"):
        runs.run(source, output)
    assert len([*output.glob("part-*")]) == 1
    summary = runs.run(source, output, read=ReadOptions(errors="replace"))
    assert (summary.texts, summary.run.texts) == (20, 12)


def test_a_change_while_it_is_read_is_seen(source: Path, tmp_path: Path) -> None:
    def touch(done: int) -> None:
        os.utime(source / "a.txt", ns=(0, done))

    with pytest.raises(InputError, match="expected no change while it was read"):
        runs.run(source, tmp_path / "out", load=lambda *_: FakeEncoder(after_window=touch))
    assert not (tmp_path / "out" / "_manifest.json").exists()


def test_a_finished_folder_is_kept_unless_it_is_to_be_replaced(
    source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    runs.run(source, output)
    before = runs.parts(output)

    def load(*_: object) -> FakeEncoder:
        raise AssertionError("loaded")

    assert runs.run(source, output, load=load).run.texts == 0
    with pytest.raises(InputError, match=r"which is complete \(--overwrite replaces it\)"):
        runs.run(source, output, restart=True)
    other = runs.OPTIONS | {"dtype": "float16"}
    with pytest.raises(InputError, match="--overwrite replaces its 3 shards"):
        runs.run(source, output, options=other)
    assert runs.parts(output) == before
    assert runs.run(source, output, options=other, overwrite=True).run.texts == 18


def test_a_job_without_shards_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    def fail(*_: object) -> FakeEncoder:
        raise ValueError("model: expected another")

    for folder in (tmp_path / "new", tmp_path / "empty"):
        existed = folder.name == "empty"
        if existed:
            folder.mkdir()
        with pytest.raises(ValueError, match="model: expected another"):
            runs.run(source, folder, load=fail)
        assert [*folder.iterdir()] == [] if existed else not folder.exists()


def test_a_second_job_in_the_folder_is_refused(source: Path, tmp_path: Path) -> None:
    first = runs.job(source, tmp_path / "out")
    with (
        first.prepared(first.source()),
        pytest.raises(InputError, match=r"expected one job in .*out, got a second one"),
    ):
        runs.run(source, tmp_path / "out")


def test_input_that_cannot_be_read_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    run = functools.partial(runs.run, output=tmp_path / "out", load=None)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match=r"expected at least one text, got none in .*empty\.txt"):
        run(tmp_path / "empty.txt")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no footer")
    with pytest.raises(InputError, match=r"bad\.parquet: expected a Parquet file, got"):
        run(tmp_path / "bad.parquet")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match="expected a column 'text', got columns body"):
        run(tmp_path / "other.parquet")
    with pytest.raises(InputError, match="expected files for a folder of shards, got '-'"):
        run("-")
    with pytest.raises(InputError, match="shard-rows: expected a multiple of the window 4, got 6"):
        run(tmp_path / "empty.txt", shard_rows=6)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_takes_no_more_keeps_finished_shards(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, iter(range(100))

    def full(descriptor: int) -> None:
        if (tmp_path / "out" / "part-000000.parquet").exists() and next(calls) > 0:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"No space left.*kept, make room and .* to resume"):
            runs.run(source, tmp_path / "out")
    assert len([*(tmp_path / "out").glob("*part-*")]) == 1
    runs.run(source, tmp_path / "out")
    assert runs.parts(tmp_path / "out") == whole


def test_embeddings_that_are_no_numbers_are_refused(source: Path, tmp_path: Path) -> None:
    class Broken(FakeEncoder):
        def stream_windows(self, *args: Any, **options: Any) -> Any:
            for number, chunk in enumerate(super().stream_windows(*args, **options)):
                chunk.embeddings[2:3] = np.nan if number == 3 else 0
                yield chunk

    with pytest.raises(InputError, match=r"expected finite embeddings, got NaN .* in row 14"):
        runs.run(source, tmp_path / "out", load=lambda *_: Broken())

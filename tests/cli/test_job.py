"""A job's output is whole or absent, and the same bytes however often the job was killed."""

import io
import itertools
import json
import os
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
from fake_encoder import DIM, FakeEncoder, embed, run_job
from jobs import TEXTS, Killed, files_of, stop_after

from neobert import outputs
from neobert.inputs import Source, StreamSource, open_source
from neobert.outputs import OutputError, Partial, partial_folder, read_description, sidecar
from neobert.readers import InputError, ReadOptions


def test_npy_holds_the_rows_and_a_description(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    summary = run_job(source, output)
    array = np.load(output, mmap_mode="r", allow_pickle=False)
    assert (array.dtype, array.shape) == (np.float32, (18, DIM))
    np.testing.assert_array_equal(array, [embed(text) for text in TEXTS])
    tokens = [len(text.split()) for text in TEXTS]
    assert (summary.texts, summary.tokens, summary.truncated) == (
        18,
        sum(min(n, 5) for n in tokens),
        sum(n > 5 for n in tokens),
    )
    description = json.loads(sidecar(output).read_bytes())
    assert description == read_description(output)
    assert (description["model"], description["rows"], description["dim"]) == ("fake", 18, DIM)
    assert description["input"]["identity"]["input"] == str(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.npy", "out.npy.json"]


def test_parquet_holds_rows_ids_and_a_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "PARQUET_GROUP_ROWS", 7)
    lines = [json.dumps({"text": text, "key": i}) for i, text in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    output = tmp_path / "out.parquet"
    run_job(open_source(str(tmp_path / "in.jsonl"), ReadOptions(id_column="key")), output)
    table = pq.read_table(output)
    assert [(f.name, str(f.type)) for f in table.schema] == [
        ("row", "int64"),
        ("id", "string"),
        ("embedding", f"fixed_size_list<element: float>[{DIM}]"),
    ]
    assert table["row"].to_pylist() == [*range(18)]
    assert table["id"].to_pylist() == [str(i) for i in range(18)]
    np.testing.assert_array_equal(
        table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, DIM),
        [embed(text) for text in TEXTS],
    )
    assert read_description(output)["rows"] == 18


def test_float16_holds_the_rounded_rows_also_after_a_kill(source: Path, output: Path) -> None:
    with pytest.raises(Killed):
        run_job(source, output, stop_after(8), output_dtype="float16")
    summary = run_job(source, output, output_dtype="float16")
    assert str(summary).endswith(f"[18, {DIM}] float16")
    assert read_description(output)["output_dtype"] == "float16"
    if output.suffix == ".npy":
        stored = np.load(output)
    else:
        column = pq.read_table(output)["embedding"].combine_chunks()
        stored = column.flatten().to_numpy().reshape(-1, DIM)
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, np.float16([embed(text) for text in TEXTS]))


def kills(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Kill ``run`` before its first, second, ... change of the disk; ends when it completes."""
    for calls in itertools.count():
        if completes(run, calls, monkeypatch):
            return
        yield calls


def completes(run: Callable[[], Any], calls: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """False if ``run`` wants to change the disk more than ``calls`` times, and was killed."""
    left = iter(range(calls))

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return real(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, name in (
            (os, "fsync"),
            (os, "replace"),
            (outputs, "write_all"),
            (shutil, "rmtree"),
        ):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            run()
        except Killed:
            return False
    return True


def test_a_kill_between_any_two_steps_loses_nothing(
    source: Path, output: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    points = 0
    for _ in kills(lambda: run_job(source, output), monkeypatch):
        points += 1
        seen = files_of(output)
        assert output.name not in seen or seen == expected
        run_job(source, output)
        assert files_of(output) == expected
        assert not partial_folder(output).exists()
        for name in expected:
            (output.parent / name).unlink()
    assert points > 20


def test_kills_add_up(
    source: Path, output: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every run ends a little later than the one before, and starts from what that one left."""
    for _ in kills(lambda: run_job(source, output), monkeypatch):
        pass
    assert files_of(output) == expected


def test_replacing_an_output_keeps_the_old_one_until_the_end(
    source: Path, output: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    output.write_bytes(b"old")
    again = lambda: run_job(source, output, overwrite=True)  # noqa: E731
    for _ in kills(again, monkeypatch):
        assert output.read_bytes() in (b"old", expected[output.name])
    assert files_of(output) == expected


def test_everything_is_on_the_disk_before_a_name_points_to_it(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut loses what was not synced; a kill does not, so only the order can be seen."""
    synced: set[int] = set()
    replaced: list[str] = []
    real_fsync, real_replace, real_write = os.fsync, os.replace, outputs.write_all

    def write(file: Any, data: memoryview) -> None:
        synced.discard(os.fstat(file.fileno()).st_ino)
        real_write(file, data)

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def replace(staged: Path, name: Path) -> None:
        assert staged.stat().st_ino in synced
        for rows in partial_folder(output).glob("[ir]*"):
            assert rows.stat().st_ino in synced or not replaced
        replaced.append(Path(name).name)
        real_replace(staged, name)

    monkeypatch.setattr(outputs, "write_all", write)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    run_job(open_source(str(source)), output)
    assert replaced[-1] == output.name
    assert replaced.count("state.json") == 7  # at the beginning, five windows, at the end


def test_half_written_rows_are_cut_off(
    source: Path, output: Path, expected: dict[str, bytes]
) -> None:
    with pytest.raises(Killed):
        run_job(source, output, stop_after(8))
    with open(partial_folder(output) / "rows.npy", "ab") as file:
        file.write(b"a torn write that is longer than all rows to come" * 20)
    run_job(source, output)
    assert files_of(output) == expected


def test_ids_follow_their_rows_through_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    for i in range(11):
        (folder / f"{i:02}.md").write_text(f"text {i}")
    output = tmp_path / "out.parquet"
    source = lambda: open_source(str(folder), ReadOptions(whole_files=True))  # noqa: E731
    with pytest.raises(Killed):
        run_job(source(), output, stop_after(8))
    with open(partial_folder(output) / "ids.jsonl", "ab") as file:
        file.write(b'"a torn write that is longer than all ids to come' * 20)
    run_job(source(), output)
    table = pq.read_table(output)
    assert table["id"].to_pylist() == [f"{i:02}.md" for i in range(11)]
    assert [v[0] for v in table["embedding"].to_pylist()] == [
        embed(f"text {i}")[0] for i in range(11)
    ]


DRIVER = """
import sys, time
from pathlib import Path
from fake_encoder import FakeEncoder, run_job

def slowly(done):
    print(done, flush=True)
    time.sleep(0.05)

run_job(Path(sys.argv[1]), Path(sys.argv[2]), FakeEncoder(after_window=slowly))
"""


def test_a_process_killed_by_signal_9_resumes_to_the_same_bytes(
    source: Path, output: Path, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", DRIVER, str(source), str(output)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "4\n"
        assert process.stdout.readline() == "8\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    capsys.readouterr()
    seen: list[int] = []
    run_job(source, output, FakeEncoder(after_window=seen.append))
    assert files_of(output) == expected
    assert "neobert: resuming at row 8" in capsys.readouterr().err
    assert seen == [4, 8, 10]  # ten of eighteen texts were left


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 5}, "window was 4, now 5"),
        ({"output_dtype": "float16"}, "output_dtype was 'float32', now 'float16'"),
        (
            {"options": {"model": "fake", "dtype": "bfloat16"}},
            "dtype was 'float32', now 'bfloat16'",
        ),
        ({"encoder": FakeEncoder(fingerprint={"files": "f1"})}, "encoder files was 'f0', now 'f1'"),
        ({"encoder": FakeEncoder(max_length=6)}, "encoder max_length was 5, now 6"),
        ({"source": StreamSource(io.BytesIO(b"x\n"), ReadOptions())}, "input was '.*', now '-'"),
    ],
)
def test_another_job_does_not_resume(
    change: dict[str, Any], message: str, source: Path, output: Path
) -> None:
    with pytest.raises(Killed):
        run_job(source, output, stop_after(8))
    with pytest.raises(InputError, match=rf"resume: .*{message}.*--restart discards its 8 rows"):
        run_job(**{"source": source, "output": output, **change})
    assert partial_folder(output).exists()


def test_a_changed_input_does_not_resume_but_restarts(source: Path, output: Path) -> None:
    with pytest.raises(Killed):
        run_job(source, output, stop_after(8))
    source.write_text("only this")
    with pytest.raises(InputError, match=r"resume: .*input bytes was"):
        run_job(source, output)
    assert run_job(source, output, restart=True).texts == 1
    assert read_description(output)["rows"] == 1


def test_an_input_with_other_times_resumes_if_it_is_trusted(source: Path, output: Path) -> None:
    with pytest.raises(Killed):
        run_job(source, output, stop_after(8))
    os.utime(source, ns=(0, 7))
    with pytest.raises(InputError, match="--trust-input goes on if the texts are the same, --rest"):
        run_job(source, output)
    done: list[int] = []
    encoder = FakeEncoder(after_window=done.append)
    assert run_job(source, output, encoder, trust_input=True).texts == len(TEXTS)
    assert done[-1] == len(TEXTS) - 8


def test_a_changed_input_is_seen_at_the_end(source: Path, output: Path) -> None:
    def touch(done: int) -> None:
        os.utime(source, ns=(0, done))

    with pytest.raises(InputError, match="expected no change while it was read"):
        run_job(source, output, FakeEncoder(after_window=touch))
    assert not output.exists()


def test_a_job_without_rows_leaves_nothing_behind(source: Path, output: Path) -> None:
    def fail() -> FakeEncoder:
        raise ValueError("model: expected another")

    with pytest.raises(ValueError, match="model: expected another"):
        outputs_of_failing_load(source, output, fail)
    assert not partial_folder(output).exists()
    partial_folder(output).mkdir()  # as a kill before the first row leaves it
    (partial_folder(output) / "rows.npy").write_bytes(b"half")
    run_job(source, output)
    assert read_description(output)["rows"] == 18


def outputs_of_failing_load(source: Path, output: Path, load: Callable[[], FakeEncoder]) -> None:
    from neobert.commands.job import encode_file

    encode_file(load, open_source(str(source)), output, options={})


def test_the_input_is_checked_before_the_model_is_loaded(source: Path, output: Path) -> None:
    def load() -> FakeEncoder:
        raise AssertionError("loaded")

    for content, message in (
        (b"fine\nbad \xff", r"in\.txt:2: expected UTF-8"),
        (b"", "at least one"),
    ):
        source.write_bytes(content)
        with pytest.raises(InputError, match=message):
            outputs_of_failing_load(source, output, load)


def test_one_job_at_a_time(source: Path, output: Path) -> None:
    def second(done: int) -> None:
        with pytest.raises(InputError, match=r"expected one job in .*partial, got a second one"):
            run_job(source, output)

    assert run_job(source, output, FakeEncoder(after_window=second)).texts == 18


def test_an_output_that_appears_meanwhile_is_not_replaced(source: Path, output: Path) -> None:
    encoder = FakeEncoder(after_window=lambda done: output.write_bytes(b"mine"))
    with pytest.raises(OutputError, match="appeared while its rows were made"):
        run_job(source, output, encoder)
    assert output.read_bytes() == b"mine"
    assert run_job(source, output, overwrite=True).texts == 18


def test_embeddings_that_are_not_numbers_are_refused(source: Path, output: Path) -> None:
    class Broken(FakeEncoder):
        def stream(self, *args: Any, **options: Any) -> Iterator[Any]:
            for chunk in super().stream(*args, **options):
                chunk.embeddings[2, 1] = np.nan
                yield chunk

    with pytest.raises(
        InputError, match="expected finite embeddings, got NaN or infinity in row 2"
    ):
        run_job(source, output, Broken())


def test_embeddings_beyond_float16_are_refused_there_alone(source: Path, output: Path) -> None:
    class Large(FakeEncoder):
        def stream(self, *args: Any, **options: Any) -> Iterator[Any]:
            for chunk in super().stream(*args, **options):
                chunk.embeddings[1, 0] = -65520  # 65504 and half of the last bit
                yield chunk

    with pytest.raises(InputError, match=r"at most 65,504 in float16, got .* in row 1; --output-d"):
        run_job(source, output, Large(), output_dtype="float16")
    assert run_job(source, output, Large(), restart=True).texts == 18


def test_an_interrupt_says_how_to_go_on(source: Path, output: Path) -> None:
    def interrupt(done: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"12 rows are kept in .*partial; .* to resume"):
        run_job(source, output, FakeEncoder(after_window=interrupt))


def stream(lines: list[str]) -> Source:
    return StreamSource(io.BytesIO("".join(f"{line}\n" for line in lines).encode()), ReadOptions())


def test_a_stream_resumes_when_the_same_lines_come_again(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.npy", tmp_path / "resumed.npy"
    run_job(stream(TEXTS), whole)
    for texts, rows in ((8, 8), (4, 12), (4, 16)):
        with pytest.raises(Killed):
            run_job(stream(TEXTS), resumed, stop_after(texts))
        state = json.loads((partial_folder(resumed) / "state.json").read_bytes())
        assert state["rows"] == rows
    run_job(stream(TEXTS), resumed)
    assert resumed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "lines", [["other", *TEXTS[1:]], TEXTS[:7], []], ids=["other", "few", "no"]
)
def test_a_stream_with_other_lines_does_not_resume(lines: list[str], output: Path) -> None:
    with pytest.raises(Killed):
        run_job(stream(TEXTS), output, stop_after(8))
    with pytest.raises(InputError, match="expected the same first 8 lines on standard input"):
        run_job(stream(lines), output)


def test_an_empty_stream_is_an_error(output: Path) -> None:
    with pytest.raises(InputError, match="at least one text, got none on standard input"):
        run_job(stream([]), output)
    assert not partial_folder(output).exists()


def test_summary_counts_all_runs(source: Path, output: Path) -> None:
    whole = run_job(source, output.with_stem("whole"))
    with pytest.raises(Killed):
        run_job(source, output, stop_after(8))
    resumed = run_job(source, output)
    assert (resumed.texts, resumed.tokens, resumed.truncated) == (
        whole.texts,
        whole.tokens,
        whole.truncated,
    )
    assert f"encoded 18 texts, {whole.tokens} tokens ({whole.truncated} texts truncated" in str(
        whole
    )
    assert str(resumed).endswith(f"{output} [18, {DIM}] float32")


def test_quiet_says_nothing(source: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Killed):
        run_job(source, output, stop_after(8), quiet=True)
    run_job(source, output, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_partial_close_is_safe_to_repeat(output: Path) -> None:
    partial = Partial.open(output)
    partial.begin({}, DIM, with_ids=True)
    partial.close()
    partial.close()

"""torchrun and Ray leave the bytes of one process, also when a worker is killed half-way."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import sharded_runs as runs
import texts
from encoders import ENCODERS, randomized

from neobert.cli import main
from neobert.sharded import ray

TEXTS = [f"text {i} " + "word " * (i % 7) for i in range(90)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(TEXTS))
    return path


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    runs.run(source, tmp_path / "whole")
    return runs.parts(tmp_path / "whole")


@pytest.fixture
def pids(tmp_path: Path) -> Path:
    (tmp_path / "pids").mkdir()
    return tmp_path / "pids"


TORCHRUN = "import runpy; runpy.run_module('torch.distributed.run', run_name='__main__')"
RANK = """
import sys
from pathlib import Path
import sharded_runs as runs
from neobert.sharded import torchrun
source, output, pids = map(Path, sys.argv[1:])
torchrun.run(runs.job(source, output, pids=pids, hold=4, restart=True))
"""


def torchrun(folder: Path, *arguments: object, restarts: int = 0) -> "subprocess.Popen[str]":
    options = ("--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}")
    return runs.start(
        TORCHRUN, *options, "--monitor-interval=0.1", *arguments, OMP_NUM_THREADS="1",
        TORCHELASTIC_ERROR_FILE=str(folder / "error.json"),
    )  # fmt: skip


def held(pids: Path) -> int:
    """The process that stands still, once it does."""
    (held,) = runs.wait_for(pids, "held")
    return int(held.read_text())


def workers(pids: Path) -> set[str]:
    return {path.name.partition("-")[0] for path in pids.glob("*-*")}


def test_a_rank_killed_by_signal_9_loses_no_row(
    source: Path, whole: dict[str, bytes], pids: Path, tmp_path: Path
) -> None:
    """torchrun starts both ranks again, and they keep what was finished in spite of --restart."""
    (tmp_path / "rank.py").write_text(RANK)
    output = tmp_path / "out"
    arguments = (tmp_path / "rank.py", source, output, pids)
    with torchrun(tmp_path, *arguments, restarts=1) as process:
        killed = held(pids)
        kept = runs.wait_for(output, "part-*")
        written = {path: path.stat().st_mtime_ns for path in kept}
        os.kill(killed, signal.SIGKILL)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert runs.parts(output) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == written
    assert len(workers(pids)) > 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts.save("bert", randomized(ENCODERS["bert"].base()), tmp_path_factory.mktemp("model"))


def command(model: Path, source: Path, output: Path, *options: str) -> list[str]:
    paths = ("--model", str(model), "--input", str(source), "--output", str(output))
    sizes = ("--window", "8", "--shard-rows", "16", "--device", "cpu", "--threads", "1")
    return ["encode", *paths, *sizes, *options]


@pytest.fixture(scope="module")
def local(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """An input, and the files that one process makes of it."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "in.txt").write_text("\n".join(TEXTS))
    assert main(command(model, folder / "in.txt", folder / "out", "--quiet")) == 0
    return folder / "in.txt", runs.parts(folder / "out")


def test_two_ranks_leave_the_bytes_of_one_process(
    local: tuple[Path, dict[str, bytes]], model: Path, tmp_path: Path
) -> None:
    source, expected = local
    arguments = command(model, source, tmp_path / "out", "--engine", "torchrun")
    with torchrun(tmp_path, "-m", "neobert", *arguments) as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert runs.parts(tmp_path / "out") == expected
    assert said.count("encoded 90 texts") == 1


def test_ranks_that_cannot_begin_say_it_once(
    local: tuple[Path, dict[str, bytes]], model: Path, tmp_path: Path
) -> None:
    arguments = command(model, tmp_path / "gone", tmp_path / "out", "--engine", "torchrun")
    with torchrun(tmp_path, "-m", "neobert", *arguments) as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert said.count("neobert: error: input: expected an existing file or folder") == 1


def test_a_slash_makes_a_name_with_dots_a_folder(
    local: tuple[Path, dict[str, bytes]], model: Path, tmp_path: Path
) -> None:
    source, expected = local
    arguments = ["--quiet", "--output", f"{tmp_path}/v1.2/"]
    assert main([*command(model, source, tmp_path / "-"), *arguments]) == 0
    assert runs.parts(tmp_path / "v1.2") == expected


def test_more_threads_give_the_same_bytes(
    local: tuple[Path, dict[str, bytes]],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, expected = local
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert main([*command(model, source, tmp_path / "out", "--quiet"), "--threads", "5"]) == 0
    assert runs.parts(tmp_path / "out") == expected


RAY = """
import sys
from pathlib import Path
import sharded_runs as runs
from neobert.sharded import ray
source, output, pids = map(Path, sys.argv[1:])
summary = ray.run(runs.job(source, output, pids=pids, hold=4), workers=2)
print(summary)
"""


def test_a_ray_worker_killed_by_signal_9_loses_no_row(
    source: Path, whole: dict[str, bytes], pids: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    with runs.start(RAY, source, tmp_path / "out", pids) as process:
        killed = held(pids)
        runs.wait_for(tmp_path / "out", "part-*")
        os.kill(killed, signal.SIGKILL)
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert runs.parts(tmp_path / "out") == whole
    assert len(workers(pids)) == 3
    assert "encoded 90 texts" in said


def test_a_task_that_kills_its_workers_is_given_up(source: Path, tmp_path: Path) -> None:
    """Each attempt is a new worker; here it lives on, and only the count is looked at."""
    job = runs.job(source, tmp_path / "out")
    with job.prepared(job.source()) as folder:
        errors = [
            str(ray.Worker(job, None, None)({"shards": ["3 4"]})["error"][0])
            for _ in range(ray.MOST_ATTEMPTS + 1)
        ]
        assert errors[:-1] == [""] * ray.MOST_ATTEMPTS
        assert "gave up on shards 3 4, whose worker died 6 times" in errors[-1]
        assert folder.unfinished() == [0, 1, 2, *range(5, 12)]


@pytest.mark.parametrize(("shards", "workers"), [(1, 4), (7, 2), (1000, 2), (100_000, 512)])
def test_every_shard_is_in_one_task(shards: int, workers: int) -> None:
    tasks = ray._tasks([*range(shards)], workers)
    assert [number for task in tasks for number in task] == [*range(shards)]
    assert len(tasks) >= min(shards, ray.TASKS_PER_WORKER * workers)
    assert max(map(len, tasks)) <= ray.MOST_SHARDS_PER_TASK


def test_ray_leaves_the_bytes_of_one_process_and_says_errors_in_one_line(
    local: tuple[Path, dict[str, bytes]], model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    source, expected = local
    arguments = command(model, source, tmp_path / "out", "--engine", "ray", "--workers", "2")
    code = "import sys; from neobert.cli import main; sys.exit(main(sys.argv[1:]))"
    with runs.start(code, *arguments, "--quiet") as process:
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert runs.parts(tmp_path / "out") == expected
    (tmp_path / "bad.txt").write_bytes(b"fine\n" * 40 + b"\xff")
    arguments = command(model, tmp_path / "bad.txt", tmp_path / "bad", "--engine", "ray")
    with runs.start(code, *arguments, "--quiet") as process:
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "neobert: error: " in said
    assert said.endswith(
        "bad.txt:41: expected UTF-8, got byte 0xff at column 1 (invalid start "
        "byte); --errors replace goes on\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "out.npy", "--engine", "ray"], "output: expected a folder"),
        (["--output", "out", "--engine", "torchrun"], "engine: expected to be started by"),
        (["--output", "out", "--workers", "2"], "workers: expected --engine ray with it"),
        (["--output", "gone/out"], "output: expected an existing folder, got gone"),
        (["--output", "out", "--shard-rows", "9"], "shard-rows: expected a multiple of the"),
        (["--output", "out.npy"], "shard-rows: expected a folder of shards as --output with"),
        (["--output", "out", "--input", ""], "input: expected a path, a pattern or -, got ''"),
        (["--output", "full"], "output: expected nothing but an earlier"),
        (["--output", ""], "output: expected a name, got ''"),
        (
            ["--output", "out.d"],
            "output: expected a name ending in .npy or .parquet, or for a folder of shards one "
            "without an ending or with a slash behind it, got out.d",
        ),
    ],
)  # fmt: skip
def test_unfit_commands_are_refused(
    options: list[str], message: str, source: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert main([*command(tmp_path, source, tmp_path / "-"), *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"neobert: error: {message}")
    assert err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_refused(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert main(command(tmp_path, source, tmp_path / "out")) == 2
    assert "output: expected a writable folder, got" in capsys.readouterr().err

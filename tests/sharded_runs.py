"""Jobs over a folder of shards with a stand-in for the encoder, in this process or in others."""

import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from fake_encoder import FakeEncoder

from neobert.readers import ReadOptions
from neobert.sharded import local
from neobert.sharded.job import Job, Summary

OPTIONS = {"model": "fake", "dtype": "float32", "device": "cpu"}


def fake(
    pids: Path | None, hold: int, device: str | None = None, threads: int | None = None
) -> FakeEncoder:
    """An encoder that tells its process and its texts so far in a file for each window.

    Behind ``hold`` windows it stands still, if it is the first to come so far.
    """
    windows = itertools.count(1)

    def tell(done: int) -> None:
        if pids is None:
            return
        (pids / f"{os.getpid()}-{done}").touch()
        if next(windows) == hold:
            with contextlib.suppress(FileExistsError):
                mine = pids / f"{os.getpid()}.held"
                mine.write_text(str(os.getpid()))
                os.link(mine, pids / "held")
                time.sleep(600)

    return FakeEncoder(after_window=tell)


def job(source: Path | str, output: Path, **changes: Any) -> Job:
    """Windows of four texts, shards of eight; ``pids`` and ``hold`` are `fake`'s."""
    load = functools.partial(fake, changes.pop("pids", None), changes.pop("hold", 0))
    return Job(
        **{
            "load": load,
            "input": str(source),
            "output": output,
            "read": ReadOptions(),
            "options": OPTIONS,
            "window": 4,
            "shard_rows": 8,
            "quiet": True,
            **changes,
        }
    )


def run(source: Path | str, output: Path, **changes: Any) -> Summary:
    return local.run(job(source, output, **changes))


def parts(output: Path) -> dict[str, bytes]:
    """Every file that a reader of the data set sees, and the manifest."""
    return {
        path.name: path.read_bytes()
        for path in sorted(output.iterdir())
        if path.name not in ("_job.json", "_encoder.json", "_lock")
    }


def table(output: Path) -> dict[str, list[Any]]:
    return pq.read_table(output).to_pydict()  # type: ignore[no-any-return]


def vectors(output: Path) -> np.ndarray:
    return np.array(table(output)["embedding"], np.float32)


def manifest(output: Path) -> dict[str, Any]:
    return json.loads((output / "_manifest.json").read_bytes())  # type: ignore[no-any-return]


def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A Python process that can import what tests import."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
    )


def wait_for(folder: Path, pattern: str) -> list[Path]:
    """The files that match, once there are any."""
    for _ in range(2400):
        if folder.exists() and (found := sorted(folder.glob(pattern))):
            return found
        time.sleep(0.05)
    raise TimeoutError(f"{folder}: expected {pattern}, got none")

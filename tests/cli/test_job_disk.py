"""A disk that takes no more, or less than it was given, loses nothing that was done."""

import errno
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_encoder import DIM, run_job
from jobs import files_of

from neobert import outputs
from neobert.outputs import OutputError, read_description

FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from fake_encoder import run_job
from neobert.cli import _explain

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    run_job(Path(sys.argv[1]), Path(sys.argv[2]))
except OSError as error:
    print(*_explain(error))
"""


@pytest.mark.parametrize(
    ("name", "limit", "texts"), [("out.npy", 2000, 79), ("out.parquet", 900, 19)]
)
def test_a_disk_that_takes_no_more_keeps_what_is_done(
    name: str, limit: int, texts: int, source: Path, tmp_path: Path
) -> None:
    """A limit on file size stands for the full disk; .parquet meets it at the very end."""
    output = tmp_path / name
    source.write_text("\n".join(f"text {i}" for i in range(texts)))
    command = [sys.executable, "-c", FULL_DISK, str(source), str(output), str(limit)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    rows = (limit - 128) // (4 * 4 * DIM) * 4 if name == "out.npy" else texts
    assert f"{output}: File too large; {rows} rows are kept in {output}.partial" in done.stdout
    assert done.stdout.endswith("make room and run the same command again to resume 1\n")
    assert not output.exists()
    run_job(source, output)
    assert read_description(output)["rows"] == texts


def test_no_space_left_is_one_line(
    source: Path, output: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = outputs.write_all, itertools.count()

    def full(file: Any, data: memoryview) -> None:
        if next(calls) == 2:
            real(file, data[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_all", full)
        with pytest.raises(
            OutputError, match=r"No space left on device; 8 rows are kept in .*resume"
        ):
            run_job(source, output)
    run_job(source, output)
    assert files_of(output) == expected


def test_a_short_write_is_continued(tmp_path: Path) -> None:
    class Narrow(io.BytesIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data[:3]))

    file = Narrow()
    outputs.write_all(file, memoryview(b"ten bytes!"))
    assert file.getvalue() == b"ten bytes!"

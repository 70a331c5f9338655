"""Input and output of a small encoding job."""

from pathlib import Path

import pytest
from fake_encoder import run_job
from jobs import TEXTS, files_of


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(TEXTS))
    return path


@pytest.fixture(params=["out.npy", "out.parquet"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


@pytest.fixture
def expected(source: Path, output: Path) -> dict[str, bytes]:
    """The files of a run that nothing disturbed."""
    run_job(source, output)
    files = files_of(output)
    for name in files:
        (output.parent / name).unlink()
    return files

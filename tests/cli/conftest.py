"""Input and output of a small encoding job."""

from pathlib import Path

import pytest
from jobs import TEXTS


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(TEXTS))
    return path


@pytest.fixture(params=["out.npy", "out.parquet"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param

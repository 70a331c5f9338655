"""Settings of every test: a seed, and NaN in every buffer that nothing has written."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # read by Triton; pins FMA contraction
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products on a GPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.pop("NEOBERT_ATTENTION", None)  # what is tested is ours
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # parity.py, support.py

pytest_plugins = ["support"]

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreting

    interpreting.quicken()


@pytest.fixture(autouse=True)
def _seed_and_poison() -> Iterator[None]:
    """An output that a kernel left unwritten is NaN, so it cannot pass."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def ordered_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter a row's sum has one order, as on a GPU.

    NumPy's library adds in an order that may depend on a row's place, on some processors.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":

        def product(a: Any, b: Any, dtype: Any) -> Any:
            return (a[..., :, :, None] * b[..., None, :, :]).sum(-2, dtype=dtype)

        monkeypatch.setattr("numpy.matmul", product)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--repeats", type=int, default=2, help="runs that must give the same bits")


@pytest.fixture
def repeats(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("repeats"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

"""A tiny model in a folder, and a command that fine-tunes it on made-up tasks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import texts
import torch
from encoders import ENCODERS

from neobert import cli


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = ENCODERS["neobert"].base(num_hidden_layers=1)
    return texts.save("neobert", model, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def finetune(model_folder: Path, tmp_path: Path) -> Callable[..., int]:
    """``neobert finetune glue`` on ``tmp_path/data`` into ``tmp_path/out``, one short epoch."""

    def run(task: str, *arguments: str) -> int:
        given = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
        given += ["--grid", "one", "--epochs", "1", "--name", "Tiny", "--model", str(model_folder)]
        return cli.main(["finetune", "glue", "--task", task, *given, *arguments])

    return run

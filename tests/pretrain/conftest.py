"""Stores of made-up documents."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_recipe import document_texts, write_tokenizer
from training_runs import counting_store, recipe_of

from neobert.pretraining.prepare import prepare
from neobert.pretraining.recipe import Data, Recipe
from neobert.pretraining.store import Store


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def data(tmp_path: Path, tokenizer: Path) -> Callable[..., Data]:
    """``data(texts, ...)`` writes a .jsonl file and gives the section that reads it."""

    def make(texts: list[str], **settings: Any) -> Data:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        values = {"path": str(path), "tokenizer": str(tokenizer), "store": str(tmp_path / "store")}
        return Data(**{**values, **settings})

    return make


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Store:
    folder = tmp_path_factory.mktemp("data")
    (folder / "in.txt").write_text("\n".join(document_texts(500)))
    return prepare(
        Data(
            path=str(folder / "in.txt"),
            tokenizer=str(tokenizer),
            store=str(folder / "store"),
            shard_tokens=2000,
        ),
        quiet=True,
    )


@pytest.fixture(scope="session")
def counting(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Store:
    """Documents that a model can learn."""
    return counting_store(tmp_path_factory.mktemp("counting"), tokenizer)


@pytest.fixture
def small(counting: Store, tokenizer: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """``small("name", section={...})``: a small run in a folder of that name."""

    def make(name: str = "run", **changes: Any) -> Recipe:
        return recipe_of(counting, tokenizer, tmp_path / name, **changes)

    return make

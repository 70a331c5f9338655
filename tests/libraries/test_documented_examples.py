"""The Python examples of docs/patching.md run as they stand, on tiny models under their names."""

import importlib.util
import re
from pathlib import Path

import pytest
from encoders import ENCODERS
from texts import TEXTS, save

PAGE = Path(__file__).parents[2] / "docs/patching.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
MODELS = {
    "BAAI/bge-small-en-v1.5": ("bert", "base", {}),
    "cross-encoder/ms-marco-MiniLM-L6-v2": ("bert", "sequence", {"num_labels": 1}),
    "naver/splade-v3": ("bert", "mlm", {}),
    "google-bert/bert-base-uncased": ("bert", "mlm", {}),
    "FacebookAI/roberta-base": ("roberta", "mlm", {}),
}


def libraries(example):
    names = re.findall(r"^(?:from|import) (\w+)", example, re.M)
    return "-".join(name for name in names if name not in ("neobert_kernels", "torch"))


# What the Trainer's defaults say on a machine without a GPU.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("example", EXAMPLES, ids=libraries)
def test_an_example_runs(example, tmp_path, monkeypatch):
    for name in re.findall(r"^(?:from|import) (\w+)", example, re.M):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in re.findall(r'"([\w-]+/[\w.-]+)"', example):
        family, kind, changes = MODELS[name]
        encoder = ENCODERS[family]
        model = encoder.base() if kind == "base" else encoder.head(kind, **changes)
        save(family, model, Path(name))
    short = [text for text in TEXTS if len(text) < 60]
    exec(compile(example, str(PAGE), "exec"), {"texts": short})


def test_every_library_has_an_example():
    shown = "\n".join(EXAMPLES)
    for name in ("SentenceTransformer", "CrossEncoder", "SparseEncoder", "Trainer", "peft"):
        assert name in shown
    assert {"pipeline", "Accelerator"} <= set(re.findall(r"\w+", shown))

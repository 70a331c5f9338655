"""The recipes that come with the project: the paper's numbers, and a run of both stages."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from neobert import NeoBERTConfig
from neobert.passages import standard_library_code
from neobert.pretraining import log
from neobert.pretraining.recipe import Recipe, read_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FILES = sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.glob("*/*.yaml"))


def recipe(name: str) -> Recipe:
    return read_recipe(RECIPES / name)


def settings(name: str) -> dict[str, Any]:
    sections = dataclasses.asdict(recipe(name))
    return {f"{s}.{key}": v for s, values in sections.items() for key, v in values.items()}


@pytest.mark.parametrize("name", FILES)
def test_every_recipe_describes_a_model_and_a_run_of_its_own(name: str) -> None:
    found = recipe(name)
    config = NeoBERTConfig(**found.model.shape)
    assert config.max_length >= found.batch.max_length
    assert found.train.run == f"runs/{name.removesuffix('.yaml')}"
    if found.model.init_from is not None:
        assert found.model.init_from != found.train.run


def test_stage_1_is_the_papers() -> None:
    found = recipe("neobert/stage1.yaml")
    batch, adamw, schedule = found.batch, found.optimizer, found.schedule
    assert (found.data.dataset, found.data.column) == ("tiiuae/falcon-refinedweb", "content")
    assert (batch.rows * batch.bins, batch.max_length, batch.layout) == (2048, 1024, "padded")
    assert (batch.mask_rate, batch.masking, batch.views) == (0.2, "mask", {"all": 1})
    assert (adamw.beta1, adamw.beta2, adamw.eps) == (0.9, 0.95, 1e-8)
    assert (adamw.weight_decay, adamw.clip, adamw.decay) == (0.1, 1.0, "weights")
    corners = [schedule.lr_at(step) for step in (1999, 900_000, 999_999)]
    assert corners == [6e-4, pytest.approx(6e-5), pytest.approx(6e-5)]
    assert schedule.steps == 1_000_000
    assert NeoBERTConfig(**found.model.shape).to_dict() == NeoBERTConfig().to_dict()


def test_stage_2_is_the_papers() -> None:
    first, found = recipe("neobert/stage1.yaml"), recipe("neobert/stage2.yaml")
    batch, schedule = found.batch, found.schedule
    assert (batch.rows * batch.bins, batch.max_length) == (512, 4096)
    assert batch.views == {"all": 0.2, ">=1024": 0.4, ">=2048": 0.4}
    assert [schedule.lr_at(s) for s in (0, 49_999)] == [
        pytest.approx(first.schedule.lr_at(999_999))
    ] * 2
    assert schedule.steps == 50_000
    assert found.model.init_from == first.train.run
    assert (found.data, found.optimizer) == (first.data, first.optimizer)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_packed_recipes_have_the_papers_tokens_in_a_step(stage: str) -> None:
    padded, packed = (recipe(f"neobert/{stage}{end}.yaml") for end in ("", "_packed"))
    assert packed.batch.layout == "packed"
    slots = padded.batch.rows * padded.batch.bins * padded.batch.max_length
    assert packed.batch.tokens * packed.batch.bins == slots == 1 << 21
    same = {"layout": padded.batch.layout, "tokens": 65_536, "bins": 32}
    assert dataclasses.replace(packed.batch, **same) == padded.batch


LADDER = [
    ("m1", "m2", {"dataset", "path", "column", "streaming", "store"}),
    ("m2", "m3", {"tokenizer", "store", "vocab_size"}),
    ("m2", "m4", {"weight_decay", "kind", "warmup", "decay_to", "decay_at"}),
    ("m4", "m5", {"mask_rate", "masking"}),
    ("m5", "m6", {"layout"}),
    ("m5", "m7", {"num_hidden_layers", "hidden_size", "intermediate_size"}),
    ("m5", "m8", {"num_hidden_layers"}),
    ("m8", "m9", {"max_length", "tokens", "bins", "lr"}),
]


@pytest.mark.parametrize(("before", "after", "changed"), LADDER)
def test_an_ablation_changes_what_its_name_says(before: str, after: str, changed: set[str]) -> None:
    a, b = (settings(f"ablations/{name}.yaml") for name in (before, after))
    found = {key.partition(".")[2] for key in a if a[key] != b[key]}
    assert found == changed | {"run"}


def test_m9_has_both_stages() -> None:
    first, second = settings("ablations/m9.yaml"), settings("ablations/m9_stage2.yaml")
    papers = settings("neobert/stage2.yaml")
    own = {"train.run": "runs/ablations/m9_stage2", "model.init_from": first["train.run"]}
    assert second == {**papers, **own}


def test_the_documented_recipe_is_one(tmp_path: Path) -> None:
    docs = (RECIPES.parent / "docs" / "pretraining.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", docs, re.DOTALL)
    (tmp_path / "other.yaml").write_text("optimizer: {eps: 1e-6}")
    (tmp_path / "recipe.yaml").write_text(text)
    found = read_recipe(tmp_path / "recipe.yaml")
    assert (found.batch.bins, found.optimizer.eps) == (128, 1e-6)
    for name in re.findall(r"recipes/[\w/]+\.(?:yaml|py)", docs):
        assert (RECIPES.parent / name).is_file()


def smoke() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cpu_smoke", RECIPES / "cpu_smoke" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cpu_smoke_runs_both_stages_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    texts = [p.text for p in standard_library_code(Path(json.__file__).parent)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    arguments = ["--quick", "--texts", str(tmp_path / "in.jsonl"), "--run", str(tmp_path / "run")]
    assert smoke().main(arguments) == 0
    first, second = (log.read(tmp_path / "run" / f"stage{n}") for n in (1, 2))
    losses = [record["loss"] for record in first if record["kind"] == "train"]
    assert np.mean(losses[-5:]) < losses[0] - 1
    assert second[-1]["kind"] == "eval"
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "stage2" / "final" / "model.safetensors").exists()

    assert smoke().main(arguments) == 0  # finished: nothing is trained again
    again = [log.read(tmp_path / "run" / f"stage{n}") for n in (1, 2)]
    assert [r for r in again[0] if r["kind"] != "note"] == [r for r in first if r["kind"] != "note"]
    assert [r for r in again[1] if r["kind"] != "note"] == [
        r for r in second if r["kind"] != "note"
    ]

"""Raw embeddings on STS-B: what sentence-transformers' own evaluator gives."""

from pathlib import Path

import numpy as np
import pytest
import texts
import torch
from encoders import ENCODERS, randomized
from glue_files import write_task

from neobert import cli
from neobert.encode import Encoder
from neobert.evaluation.sts import correlations
from neobert.finetuning.glue.data import load
from neobert.finetuning.glue.tasks import TASKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = randomized(ENCODERS["bert"].base(num_hidden_layers=2))
    return texts.save("bert", model, tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("normalize", [False, True])
def test_correlations_are_those_of_sentence_transformers(
    normalize: bool, folder: Path, tmp_path: Path
) -> None:
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.evaluation import (
        EmbeddingSimilarityEvaluator,
    )

    dev = load(TASKS["STS-B"], write_task(tmp_path, "STS-B", dev=60)).dev[""]
    assert dev.labels is not None
    dev.texts[1][3] = ""
    evaluator = EmbeddingSimilarityEvaluator(
        *dev.texts, dev.labels.tolist(), main_similarity="cosine"
    )
    expected = evaluator(st.SentenceTransformer(str(folder), device="cpu"))
    found = correlations(Encoder.load(folder, device="cpu", normalize=normalize), dev).values
    for name in ("pearson", "spearman"):
        assert found[name] == pytest.approx(expected[f"{name}_cosine"], abs=1e-4)
        assert abs(expected[f"{name}_cosine"]) < 0.99
    assert len(set(np.round(list(found.values()), 6))) == 2


def test_the_command_prints_them_or_says_why_there_are_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["evaluate", "sts", "--model", str(folder), "--device", "cpu"]
    data = write_task(tmp_path, "STS-B")
    assert cli.main([*given, "--data", str(data)]) == 0
    expected = correlations(Encoder.load(folder, device="cpu"), load(TASKS["STS-B"], data).dev[""])
    assert f"STS-B dev, 12 pairs, raw embeddings: {expected.line()}" in capsys.readouterr().out
    path = data / "STS-B" / "dev.tsv"
    path.write_text("\n".join(path.read_text().splitlines()[:2]))
    assert cli.main([*given, "--data", str(data)]) == 0
    out = capsys.readouterr()
    assert "pearson undefined, spearman undefined; pearson: every label is the same" in out.out
    assert "STS-B/dev.tsv: every label is" in out.err

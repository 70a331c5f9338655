"""Scores: the metrics' definitions, the mean of two, and no NaN."""

import json
import math

import numpy as np
import pytest

from neobert.finetuning.glue.metrics import Scores, evaluate
from neobert.finetuning.glue.tasks import TASKS

LABELS = np.array([1, 1, 1, 0, 0, 1])
PREDICTIONS = np.array([1, 0, 1, 1, 0, 1])  # 3 true, 1 false positive; 1 false, 1 true negative


def scores(name: str, labels: np.ndarray, predictions: np.ndarray) -> Scores:
    return evaluate(TASKS[name], {"": labels}, {"": predictions})


def test_metrics_are_what_their_definitions_say() -> None:
    mrpc = scores("MRPC", LABELS, PREDICTIONS)
    assert mrpc.values == pytest.approx({"accuracy": 4 / 6, "f1": 6 / 8})
    assert mrpc.score == pytest.approx((4 / 6 + 6 / 8) / 2)
    matthews = (3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2)
    assert scores("CoLA", LABELS, PREDICTIONS).score == pytest.approx(matthews)
    x, y = np.array([0.0, 1.0, 2.0, 5.0]), np.array([0.1, 0.4, 0.2, 3.0])
    stsb = scores("STS-B", x, y)
    assert stsb.values == pytest.approx({"pearson": np.corrcoef(x, y)[0, 1], "spearman": 0.8})


def test_mnli_is_the_mean_of_matched_and_mismatched() -> None:
    labels = {"m": np.array([0, 1, 2, 0]), "mm": np.array([2, 2])}
    result = evaluate(TASKS["MNLI"], labels, {"m": np.array([0, 1, 0, 0]), "mm": np.array([2, 0])})
    assert result.values == {"accuracy m": 0.75, "accuracy mm": 0.5}
    assert result.score == 0.625


@pytest.mark.parametrize(
    ("name", "labels", "predictions", "value"),
    [
        ("MRPC", [0, 0, 0], [0, 0, 1], None),  # no positive label
        ("MRPC", [1, 1, 0], [0, 0, 0], (1 / 3 + 0) / 2),  # none predicted: F1 is 0
        ("CoLA", [1, 1, 1], [1, 0, 1], None),
        ("CoLA", [1, 0, 1], [1, 1, 1], 0.0),
        ("STS-B", [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], None),
        ("STS-B", [1.0, 2.0, 3.0], [2.5, 2.5, 2.5], None),
        ("STS-B", [1.0, 2.0, 3.0], [math.nan, 1.0, 2.0], None),
        ("STS-B", [1.0], [1.0], None),
        ("RTE", [1, 1, 0], [math.nan, 1, 0], None),  # of logits that are not finite
        ("RTE", [1, 1, 1], [1, 1, 0], 2 / 3),  # accuracy needs no second class
    ],
)
def test_one_class_is_defined_or_said_undefined(
    name: str, labels: list, predictions: list, value: float | None
) -> None:
    result = scores(name, np.array(labels), np.array(predictions))
    assert result.score == (None if value is None else pytest.approx(value))
    assert set(result.undefined) == {k for k, v in result.values.items() if v is None}
    assert "NaN" not in json.dumps([result.values, result.score])
    if value is None:
        assert "undefined" in result.line()

"""The tasks' metrics, through scikit-learn and scipy; a number, or None and the reason."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from neobert.finetuning.glue.tasks import Task
from neobert.readers import InputError

Metric = Callable[[np.ndarray, np.ndarray], float]


class UndefinedError(ValueError):
    """The metric has no value here; the message says why."""


@dataclass(frozen=True)
class Scores:
    """Results on all dev parts of a task.

    Attributes:
        values: By metric (and part), None where undefined.
        undefined: Why, for those.
    """

    values: dict[str, float | None]
    undefined: dict[str, str] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """The mean of the metrics, which the task is judged by; None if one has no value."""
        values = [value for value in self.values.values() if value is not None]
        if len(values) < len(self.values) or not values:
            return None
        return sum(values) / len(values)

    def line(self) -> str:
        return ", ".join(f"{name} {shown(value)}" for name, value in self.values.items())


def shown(value: float | None, digits: int = 4) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def require() -> None:
    """Raise now, not after a training run, where the libraries are missing."""
    try:
        import scipy.stats  # noqa: F401
        import sklearn.metrics  # noqa: F401
    except ImportError as error:
        raise InputError(
            "metrics: expected scikit-learn and scipy, pip install 'neobert-kernels[metrics]', "
            f"got {error}"
        ) from None


def evaluate(
    task: Task, labels: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray]
) -> Scores:
    """Score predictions (class numbers, or scores) of each dev part; NaN is undefined."""
    values: dict[str, float | None] = {}
    undefined = {}
    for part in task.dev:
        for metric in task.metrics:
            name = f"{metric} {part.name}".strip()
            try:
                if not np.isfinite(predictions[part.name]).all():
                    raise UndefinedError("a prediction is not finite")
                values[name] = METRICS[metric](labels[part.name], predictions[part.name])
            except UndefinedError as reason:
                values[name], undefined[name] = None, str(reason)
    return Scores(values, undefined)


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def _f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Of class 1; 0 where a model never predicts it."""
    from sklearn.metrics import f1_score

    if not (labels == 1).any():
        raise UndefinedError("no label is 1")
    return float(f1_score(labels, predictions, zero_division=0.0))


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """0 where a model predicts one class only, as scikit-learn has it."""
    from sklearn.metrics import matthews_corrcoef

    if (labels == labels[0]).all():
        raise UndefinedError("every label is the same")
    return float(matthews_corrcoef(labels, predictions))


def _correlation(function: str) -> Metric:
    def correlation(labels: np.ndarray, predictions: np.ndarray) -> float:
        import scipy.stats

        for name, values in (("label", labels), ("prediction", predictions)):
            if (values == values[0]).all():
                raise UndefinedError(f"every {name} is the same")
        with warnings.catch_warnings():
            # Nearly constant predictions: the value is kept where there is one.
            warnings.simplefilter("ignore")
            value = float(getattr(scipy.stats, function)(labels, predictions)[0])
        if not np.isfinite(value):
            raise UndefinedError("predictions hardly differ")
        return value

    return correlation


METRICS: dict[str, Metric] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}

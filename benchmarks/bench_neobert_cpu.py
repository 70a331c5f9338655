"""NeoBERT's 250M shape on the CPU: one ragged batch, padded through SDPA and patched."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timing import Timing, summarize

import neobert_kernels as nk
from neobert import NeoBERTConfig, NeoBERTModel

SHORTEST, LONGEST = 16, 512


def ragged_batch(texts: int, longest: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, lengths evenly spread from 16 to ``longest``."""
    lengths = torch.linspace(SHORTEST, longest, texts).round().long()
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = torch.randint(
        1000, vocabulary, (texts, longest), generator=torch.Generator().manual_seed(0)
    )
    return ids * mask, mask


@torch.inference_mode()
def hidden(model: NeoBERTModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The final hidden states of the real tokens, ``[T, C]``."""
    return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]


def test_neobert_ragged_batch(
    quick: bool, device: str, once: Callable[..., Any], record: Callable[..., None]
) -> None:
    if device == "cuda":
        pytest.skip("measures the CPU")
    torch.manual_seed(0)
    config = NeoBERTConfig(num_hidden_layers=2) if quick else NeoBERTConfig()
    model = NeoBERTModel(config).eval()
    short = ragged_batch(2, 40, config.vocab_size)
    padded_short = hidden(model, *short)
    exact = hidden(model.double(), *short)
    model.float()
    nk.patch(model)
    error = (hidden(model, *short) - exact).abs().max()
    floor = 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert error <= 2 * (padded_short - exact).abs().max() + floor
    nk.unpatch(model)

    batch = ragged_batch(4 if quick else 16, LONGEST, config.vocab_size)
    seconds: dict[str, list[float]] = {"padded": [], "patched": []}

    def rounds() -> dict[str, Timing]:
        for number in range(-1, 1 if quick else 5):
            for name in sorted(seconds, reverse=bool(number % 2)):
                if name == "patched":
                    nk.patch(model)
                began = time.perf_counter()
                hidden(model, *batch)
                if number >= 0:
                    seconds[name].append(time.perf_counter() - began)
                if name == "patched":
                    nk.unpatch(model)

        return {name: summarize(taken) for name, taken in seconds.items()}

    timings = once(rounds)
    tokens = int(batch[1].sum())
    padded, patched = timings["padded"], timings["patched"]
    ratios = [p / q for p, q in zip(seconds["padded"], seconds["patched"], strict=True)]
    record(
        "neobert_ragged",
        f"{config.num_hidden_layers} x {config.hidden_size}, {len(batch[0])} texts of {SHORTEST} "
        f"to {LONGEST} tokens, float32, {torch.get_num_threads()} threads",
        ratio=padded.median_s / patched.median_s,
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        tokens_per_s=tokens / patched.median_s,
        baseline_tokens_per_s=tokens / padded.median_s,
        max_error=float(error),
        **patched.values("patched"),
        **padded.values("padded"),
    )

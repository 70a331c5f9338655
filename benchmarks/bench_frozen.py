"""The forms of a patched model for inference, frozen and batch-invariant, on ragged batches.

The limit is the time of the Linear layers' FLOP at the rate of a large product of the same run.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ceilings import Ceilings
from shapes import MODELS, NO_DROPOUT, SMALL, Model, lengths_of
from timing import CEILINGS, Timing, interleaved
from ways import Ways

from neobert.floors import forward
from neobert.floors.models import of_config

SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
MINILM = Model(
    "transformers", "Bert", 512, NO_DROPOUT | SIZES, base_options={"add_pooling_layer": False}
)
NAMES = ("minilm-l6", "bert-base", "nomic-bert-base", "neobert-250m")
WAYS = ("patched", "frozen", "batch_invariant")
DOCUMENTS = {"cpu": 8, "cuda": 128}


@pytest.mark.importance(1)
@pytest.mark.parametrize("model", NAMES)
def test_frozen(
    model: str,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    if quick and model != "minilm-l6":
        pytest.skip("--quick runs the smallest model")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    made = MINILM if model == "minilm-l6" else MODELS[model]
    ways = Ways(made, device, dtype, **(SMALL if quick else {}))
    lengths = [n // (8 if quick else 1) for n in lengths_of("ragged", DOCUMENTS[device])]
    ids, mask = ways.batch(lengths)
    limits = Ceilings(device, dtype, quick)
    variants: dict[str, Callable[[int], object]] = dict(limits.variants)
    for name in WAYS:
        way, why = ways.working(name)
        assert way is not None, why
        variants[name] = lambda _, way=way: way(ids, mask)  # type: ignore[misc]
    timings: dict[str, Timing] = once(
        lambda: interleaved(variants, rounds=1 if quick else 11, device=device, warm_up=1)
    )
    parts = forward(of_config(ways.plain.config), lengths, str(dtype).removeprefix("torch."))
    flop = sum(part.cost.flop for part in parts if part.operator.startswith("Linear"))
    limit_s = flop / limits.rates(timings)["gemm_flop_per_s"]
    values: dict[str, Any] = {}
    for name, timing in timings.items():
        values |= timing.values(name)
        if name not in CEILINGS:
            values[f"{name}_tokens_per_s"] = sum(lengths) / timing.median_s
            values[f"{name}_share_of_gemm"] = limit_s / timing.median_s
    record(
        "frozen",
        f"{model}, ragged, {len(lengths)} documents, {sum(lengths)} tokens, "
        f"{str(dtype).removeprefix('torch.')}, {device}",
        ratio=timings["patched"].median_s / timings["frozen"].median_s,
        batch_invariant_cost=timings["batch_invariant"].median_s / timings["frozen"].median_s,
        flop=flop,
        **values,
    )

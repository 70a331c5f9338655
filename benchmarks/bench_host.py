"""The host's share of a patched forward, on any machine: launches, allocations, Python's time.

Kernels are compiled and not started (see `host_budget`), so no number depends on a GPU; on one, the
driver adds its own host time to each launch. The products of the narrow model are part of the time.
"""

from collections.abc import Callable
from typing import Any

import host_budget
import pytest
import torch
from shapes import MODELS
from timing import Timing, interleaved

NAMES = [name for name in MODELS if not name.endswith("-large")]
LENGTHS = {"1 text of 16 tokens": [16], "1 text of 512 tokens": [512]}
FORMS: dict[str, dict[str, Any]] = {"patched": {}, "frozen": {"inference": True}}


@pytest.mark.importance(1)
@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("model", NAMES)
def test_host(
    model: str,
    case: str,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    if quick and (model, case) != ("neobert-250m", "1 text of 16 tokens"):
        pytest.skip("--quick runs the first model and case")
    make, lengths = MODELS[model].make, LENGTHS[case]
    values: dict[str, Any] = {}
    layers = 2 if quick else make(vocab_size=100, pad_token_id=1).config.num_hidden_layers
    calls = {}
    for form, options in FORMS.items():
        whole, layer = host_budget.per_layer(make, lengths, **options)
        assert not whole.waits
        values |= {
            f"{form}_launches_per_layer": layer.total,
            f"{form}_allocations_per_layer": layer.allocations,
            f"{form}_launches": whole.total + (layers - host_budget.COUNTED) * layer.total,
        }
    with host_budget.without_launches():
        for form, options in FORMS.items():
            built = host_budget.narrow(make, layers, **options)
            calls[form] = _call(built, host_budget.batch(lengths, "cpu"))
        timings: dict[str, Timing] = once(
            lambda: interleaved(calls, rounds=3 if quick else 30, at_least_s=0.05)
        )
    for form, timing in timings.items():
        values |= timing.values(form)
    record(
        "host",
        f"{model}, {case}, {layers} layers, no launches",
        ratio=timings["patched"].median_s / timings["frozen"].median_s,
        synchronisations=0,
        **values,
    )


def _call(model: Any, inputs: dict[str, Any]) -> Callable[[int], object]:
    @torch.inference_mode()
    def call(number: int) -> object:
        return model(**inputs)

    return call

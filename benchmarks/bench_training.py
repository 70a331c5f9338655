"""A masked-LM training step: forward, loss at a fifth of the tokens, backward, AdamW.

On a GPU weights are float32 and autocast is bfloat16, as in the paper. Model-FLOP utilisation is
the products of forward and backward, each counted once, over the rate of a product timed in the
same rounds; what a way computes twice, or on padding, does not count.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ceilings import Ceilings
from shapes import FIRST, MODELS, SMALL, VOCABULARY, batch_of, longest_of, padded
from timing import CEILINGS, Variant, columns, interleaved
from torch import Tensor
from ways import DoesNotFitError, fits, fitting_peak

import neobert_kernels as nk
from neobert.floors.models import backward, forward, of_config

TOKENS = {"cuda": 16384, "cpu": 256}
LABELLED = 5  # every so many tokens one has a label


def labels_of(ids: Tensor, mask: Tensor) -> Tensor:
    labels = torch.full_like(ids, -100)
    labels[:, ::LABELLED] = ids[:, ::LABELLED]
    return labels.where(mask.bool(), torch.full_like(labels, -100))


def step_of(model: Any, inputs: dict[str, Tensor], device: str) -> Callable[[int], Tensor]:
    """One step; returns the loss, which stays on the device."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")

    def step(_: int) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def check(plain: Any, patched: Any, inputs: dict[str, Tensor], device: str) -> None:
    """Both have the same loss and, taken together, the same gradients, before a weight changes."""
    found = []
    for model in (plain, patched):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**inputs).loss
        loss.backward()
        squares = [p.grad.double().pow(2).sum() for p in model.parameters() if p.grad is not None]
        found.append((float(loss.detach()), float(sum(squares)) ** 0.5))
        model.zero_grad(set_to_none=True)
    close = 2e-2 if device == "cuda" else 1e-4
    assert found[0] == pytest.approx(found[1], rel=close)


def fitting_steps(
    models: dict[str, Any], inputs: dict[str, Tensor], device: str
) -> tuple[dict[str, Variant], dict[str, Any]]:
    """Steps of the models that fit, checked against each other first; peaks, or why there is none.

    Without room for that check neither gets a number.
    """
    steps: dict[str, Variant] = {}
    values: dict[str, Any] = {}
    try:
        fits(lambda: check(models["sdpa"], models["patched"], inputs, device))
    except DoesNotFitError as error:
        return {}, {f"{name}_out_of_memory": str(error)[:120] for name in models}
    for name, model in models.items():
        step = step_of(model, inputs, device)
        try:
            fits(functools.partial(step, 0))  # the optimizer's state is not of the step
            values[f"{name}_peak_bytes"] = fitting_peak(step, device)
            steps[name] = step
        except DoesNotFitError as error:
            values[f"{name}_out_of_memory"] = str(error)[:120]
            model.zero_grad(set_to_none=True)
    return steps, values


@pytest.mark.parametrize("case", ["fixed 1024", "fixed 4096"])
@pytest.mark.parametrize("model", FIRST)
def test_training(
    model: str,
    case: str,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    longest = MODELS[model].longest
    if longest < 1024 and case == "fixed 1024":
        case = f"fixed {longest}"
    if longest_of(case) > longest:
        pytest.skip(f"{model} takes at most {longest} tokens")
    if quick and case == "fixed 4096":
        pytest.skip("--quick runs the shorter case")
    if device == "cpu" and not quick and case == "fixed 4096":
        pytest.skip("a size for a GPU")
    torch.manual_seed(0)
    small: dict[str, Any] = SMALL if quick else {}
    shown = f"{model}, {case}"
    if device == "cpu" and not quick:
        small, case = {"num_hidden_layers": 4}, f"fixed {TOKENS[device]}"
        shown = f"{model} of 4 layers, {case}"
    plain = MODELS[model].masked_lm(**small).to(device).train()
    patched = copy.deepcopy(plain)
    nk.patch(patched)
    lengths = batch_of(case, TOKENS[device], longest)
    lengths = [n // 16 for n in lengths] if quick else lengths
    ids, mask = padded(lengths, device, min(plain.config.vocab_size, VOCABULARY))
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels_of(ids, mask)}
    models = {"patched": patched, "sdpa": plain}
    steps, values = fitting_steps(models, inputs, device)
    ceilings = Ceilings(device, torch.bfloat16 if device == "cuda" else torch.float32, quick)
    timings = once(
        lambda: interleaved(
            steps | ceilings.variants, rounds=2 if quick else 5, device=device, warm_up=1
        )
    )
    shape = of_config(plain.config)
    labelled = int((inputs["labels"] != -100).sum())
    parts = forward(shape, lengths, labelled=labelled) + backward(shape, lengths, labelled=labelled)
    flop = sum(part.cost.flop for part in parts if part.cost.matrix)
    # The backward of attention forms its scores again: of its five products four are the model's.
    flop -= sum(
        p.cost.flop // 5 for p in parts if p.backward and p.operator.startswith("attention")
    )
    rates = ceilings.rates(timings)
    tokens = sum(lengths)
    for name in steps:
        median = timings[name].median_s
        values[f"{name}_tokens_per_s"] = tokens / median
        values[f"{name}_flop_utilisation"] = flop / median / rates["gemm_flop_per_s"]
    if len(steps) == 2:
        values["ratio"] = timings["sdpa"].median_s / timings["patched"].median_s
    record(
        "training",
        f"{shown}, {tokens} tokens, {labelled} labelled, "
        f"{'bfloat16 autocast' if device == 'cuda' else 'float32'}, {device}",
        **values,
        model_flop=flop,
        **rates,
        **columns({k: t for k, t in timings.items() if k not in CEILINGS}),
    )

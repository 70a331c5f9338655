"""Under autocast (the Trainer's bf16 and fp16) a patched model rounds no worse."""

import copy

import pytest
import torch
from covering import covering
from encoders import ENCODERS, padded, with_labels
from parity import assert_same, assert_same_gradients

import neobert_kernels as nk


@covering(family=ENCODERS, dtype=[torch.bfloat16, torch.float16], kind=["base", "mlm", "sequence"])
def test_outputs_and_gradients(family, dtype, kind):
    encoder = ENCODERS[family]
    if kind != "base" and not encoder.has(kind):
        pytest.skip(f"{family} has no such head")
    model = (encoder.base() if kind == "base" else encoder.head(kind)).train()
    ids, mask = padded(family)
    if kind == "base":
        inputs = {"input_ids": ids, "attention_mask": mask}
        weights = torch.randn(int(mask.sum()), model.config.hidden_size)
    else:
        labels = {"labels": torch.randint(0, 2, (len(ids),))} if kind == "sequence" else {}
        inputs = with_labels(kind, ids, mask) | labels
    exact, rounded = copy.deepcopy(model).double(), copy.deepcopy(model)
    nk.patch(model)
    results = []
    for each in (model, rounded, exact):
        with torch.autocast("cpu", dtype, enabled=each is not exact):
            out = each(**inputs)
        results.append(out.last_hidden_state[mask == 1] if kind == "base" else out.loss)
        ((results[-1] * weights).sum() if kind == "base" else results[-1]).backward()
    if kind == "base":
        assert_same(*results)
    else:  # one number: its distance from float64 is luck
        torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=0)
    assert_same_gradients(model, rounded, exact)

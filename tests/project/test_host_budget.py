"""What a patched forward launches, and that it waits for nothing."""

import host_budget
import pytest
import torch
from shapes import MODELS

MOST = {"neobert-250m": 8}  # launches of a layer, also without the frozen form
NAMES = [name for name in MODELS if not name.endswith("-large")]


@pytest.mark.parametrize("name", NAMES)
def test_launches_of_a_layer(name):
    for options in ({}, {"inference": True}):
        whole, layer = host_budget.per_layer(MODELS[name].make, [100, 50], **options)
        assert not whole.waits
        assert layer.total <= (8 if options else MOST.get(name, 11)), layer.launches
        assert layer.launches["aten::linear"] <= (0 if options else 7)
        if options:
            assert layer.launches["aten::mm"] + layer.launches["aten::addmm"] == 4
            assert layer.allocations == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_long_documents_turn_before_attention(frozen):
    _, layer = host_budget.per_layer(MODELS["neobert-250m"].make, [300], inference=frozen)
    assert layer.total == 9


@pytest.mark.parametrize("name", NAMES)
def test_launches_of_a_layer_on_few_tokens(name):
    """Frozen: two products around attention and two of the feed-forward, into buffers for all."""
    whole, layer = host_budget.per_layer(MODELS[name].make, [12, 4], inference=True)
    assert not whole.waits
    assert layer.launches == {"neobert::fused_linear": 4, "neobert::attention": 1}
    assert layer.allocations == 0


@pytest.mark.parametrize("fault", ["wait", "launch"])
def test_what_it_counts_is_there(fault, monkeypatch):
    from neobert_kernels.patching import neobert

    embed = neobert.embed

    def slower(base, batch, tokens, extras):
        x = embed(base, batch, tokens, extras)
        return x.nonzero() if fault == "wait" else x + 1

    with host_budget.without_data():
        model = host_budget.build(MODELS["neobert-250m"].make, 2)
        before = host_budget.count(model, [7])
        monkeypatch.setitem(vars(neobert.FAMILY), "embed", slower)
        if fault == "launch":
            assert host_budget.count(model, [7]).total == before.total + 1
            return
        recorder = host_budget._Recorder()
        with recorder, torch.inference_mode(), pytest.raises(Exception, match="meta"):
            model(**host_budget.batch([7]))
    assert recorder.counts.waits

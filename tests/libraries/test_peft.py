"""LoRA around a patched model, under it, and merged into it."""

import copy

import pytest
import torch
from encoders import ENCODERS, padded, randomized, with_labels

import neobert_kernels as nk

peft = pytest.importorskip("peft")
families = pytest.mark.parametrize("family", ENCODERS)
mlm = pytest.mark.parametrize("family", [f for f, e in ENCODERS.items() if e.has("mlm")])
sequence = pytest.mark.parametrize("family", [f for f, e in ENCODERS.items() if e.has("sequence")])


def adapt(model, targets, **options):
    config = peft.LoraConfig(target_modules=list(targets), init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def output(model, family, kind):
    torch.manual_seed(1)
    ids, mask = padded(family)
    if kind == "base":
        return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask == 1]
    return model(**with_labels(kind, ids, mask)).loss


@families
@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("kind", ["base", "mlm", "sequence", "token"])
def test_adapters_learn_the_same(family, kind, patch_first):
    encoder = ENCODERS[family]
    if kind != "base" and not encoder.has(kind):
        pytest.skip(f"{family} has no such head")
    labels = {"num_labels": 3} if kind in ("sequence", "token") else {}
    model = encoder.base() if kind == "base" else encoder.head(kind, **labels)
    twin = copy.deepcopy(model)
    torch.manual_seed(2)
    plain = adapt(twin, encoder.lora).train()
    torch.manual_seed(2)
    if patch_first:
        nk.patch(model)
        model = adapt(model, encoder.lora).train()
    else:
        model = adapt(model, encoder.lora).train()
        nk.patch(model)
    results = [output(each, family, kind) for each in (model, plain)]
    torch.testing.assert_close(*results)
    weights = torch.randn_like(results[0])
    for each in results:
        (each * weights).sum().backward()
    largest = max(p.grad.norm() for p in plain.parameters() if p.grad is not None)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert (a.grad - b.grad).norm() <= 1e-5 * (b.grad.norm() + largest), name


@mlm
@pytest.mark.parametrize("patch_first", [True, False])
def test_an_adapter_on_the_decoder_is_applied(family, patch_first):
    model = randomized(ENCODERS[family].head("mlm"))
    twin = copy.deepcopy(model)
    head = model.get_output_embeddings()
    (decoder,) = (name.split(".")[-1] for name, part in model.named_modules() if part is head)
    adapted = []
    for each, patched in ((model, True), (twin, False)):
        torch.manual_seed(2)
        if patched and patch_first:
            nk.patch(each)
        each = adapt(each, [decoder], ensure_weight_tying=False).train()
        if patched and not patch_first:
            nk.patch(each)
        adapted.append(each)
    losses = [output(each, family, "mlm") for each in adapted]
    torch.testing.assert_close(*losses)
    with adapted[0].disable_adapter():
        assert not torch.allclose(output(adapted[0], family, "mlm"), losses[0], rtol=1e-5)
    losses[0].backward()
    (grad,) = (p.grad for n, p in adapted[0].named_parameters() if f"{decoder}.lora_B" in n)
    assert grad.any()


@sequence
def test_a_saved_classifier_is_the_one_that_runs(family):
    model = randomized(ENCODERS[family].head("sequence", num_labels=3))
    name = next(n for n, _ in model.named_children() if n.startswith("class"))
    nk.patch(model)
    adapted = adapt(model, ENCODERS[family].lora, modules_to_save=[name], task_type="SEQ_CLS")
    loss = output(adapted.train(), family, "sequence")
    loss.backward()
    saved = [p for n, p in adapted.named_parameters() if "modules_to_save" in n]
    assert saved
    assert all(p.grad is not None and p.grad.any() for p in saved)
    with torch.no_grad():
        for p in saved:
            p.zero_()
    patched = output(adapted, family, "sequence")
    assert not torch.allclose(patched, loss)
    nk.unpatch(adapted)
    torch.testing.assert_close(patched, output(adapted, family, "sequence"))


@families
@pytest.mark.parametrize("unpatched", [True, False])
def test_merging_keeps_the_adapted_output(family, unpatched):
    encoder = ENCODERS[family]
    model = adapt(randomized(encoder.base()), encoder.lora).eval()
    expected = output(model, family, "base")
    nk.patch(model)
    if unpatched:
        nk.unpatch(model)
    merged = model.merge_and_unload()
    assert ("forward" in vars(merged)) != unpatched
    difference = (output(merged, family, "base") - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()
    assert not any("lora" in n for n, _ in merged.named_parameters())


@families
def test_adapters_are_saved_and_load_on_a_plain_model(family, tmp_path):
    encoder = ENCODERS[family]
    base = randomized(encoder.base())
    plain = copy.deepcopy(base)
    model = adapt(base, encoder.lora).eval()
    nk.patch(model)
    expected = output(model, family, "base")
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(output(loaded, family, "base"), expected, rtol=1e-4, atol=1e-4)

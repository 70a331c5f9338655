"""accelerate, DDP, FSDP2, torch.save and deep copies of a patched model."""

import copy

import pytest
import ranks
import torch
from encoders import ENCODERS, padded, randomized, with_labels

import neobert_kernels as nk

families = pytest.mark.parametrize("family", ENCODERS)
cases = [(f, k) for f, e in ENCODERS.items() for k in ranks.KINDS if e.has(k)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(ranks.run, (str(folder),), nprocs=ranks.WORLD)
    return torch.load(folder / "gradients.pt")


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_processes_have_the_mean_gradient(wrapper, found):
    for family, kind in cases:
        model = ranks.build(family, kind)
        for rank in range(ranks.WORLD):
            (model(**ranks.batch(family, kind, rank)).loss / ranks.WORLD).backward()
        expected = ranks.gradients(model)
        actual = found[family, kind, wrapper]
        assert actual.keys() == expected.keys(), (family, kind)
        largest = max(g.norm() for g in expected.values())
        for name, grad in expected.items():
            difference = (actual[name] - grad).norm()
            assert difference <= 1e-5 * (grad.norm() + largest), (family, kind, name)


@families
def test_fsdp_in_mixed_precision_leaves_angles_in_float32(family, found):
    expected = ranks.build(family, "mlm")(**ranks.batch(family, "mlm", 0)).loss
    loss = found[family, "mlm", "bf16 loss"]
    torch.testing.assert_close(loss.float(), expected.detach(), rtol=0.02, atol=0)


def loss(model, family):
    torch.manual_seed(1)
    return model(**with_labels("mlm", *padded(family))).loss


@pytest.mark.parametrize("family", [f for f, e in ENCODERS.items() if e.has("mlm")])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_prepares_a_patched_model(family, precision):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    model = ENCODERS[family].head("mlm").train()
    plain = copy.deepcopy(model)
    nk.patch(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    losses = []
    for each in (model, plain):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3)
        each, optimizer = accelerator.prepare(each, optimizer)
        for _ in range(2):
            value = loss(each, family)
            accelerator.backward(value)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(value.detach())
    tolerance = {"rtol": 1e-5 if precision == "no" else 1e-3, "atol": 0}
    torch.testing.assert_close(*losses, **tolerance)
    plain.load_state_dict(model.state_dict())
    nk.unpatch(model)  # accelerate's wrapper stays, around the plain forward
    expected = loss(plain, family)
    assert torch.equal(loss(model, family), expected)
    with nk.patched(model):
        torch.testing.assert_close(loss(model, family), expected, **tolerance)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    with nk.patched(model):
        assert loss(model, family).isfinite()
    assert all("forward" not in vars(m) for m in model.modules())
    assert loss(model, family).isfinite()


@families
def test_a_prepared_model_is_not_patched_over(family):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    model = ENCODERS[family].base()
    accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    with pytest.raises(ValueError, match="whose forward was already replaced"):
        nk.patch(model)


@families
def test_a_pickled_module_is_the_plain_one_and_can_be_patched_again(family, tmp_path):
    model = randomized(ENCODERS[family].base()).eval()
    ids, mask = padded(family)
    real = mask == 1
    plain = model(input_ids=ids, attention_mask=mask).last_hidden_state
    nk.patch(model)
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    out = loaded(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(out[real], plain[real])
    nk.patch(loaded)
    assert torch.equal(loaded(input_ids=ids, attention_mask=mask).last_hidden_state, expected)
    nk.unpatch(loaded)
    assert all("forward" not in vars(m) for m in loaded.modules())

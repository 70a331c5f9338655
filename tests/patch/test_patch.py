"""patch and unpatch: the same numbers on real tokens only, and nothing left behind."""

import copy
import sys

import pytest
import torch
from parity import assert_within_budget
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

import neobert_kernels as nk
from neobert import NeoBERTConfig, NeoBERTForMaskedLM, NeoBERTModel

LENGTHS = (9, 1, 17, 5)
SIDES = ("right", "left")


def bert_config(**changes):
    sizes = {
        "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3,
        "intermediate_size": 80, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return BertConfig(**(sizes | changes))


def neobert_config(**changes):
    sizes = {
        "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3,
        "intermediate_size": 96, "max_length": 64,
    }  # fmt: skip
    return NeoBERTConfig(**(sizes | changes))


BASES = {
    "bert": lambda: BertModel(bert_config()),
    "neobert": lambda: NeoBERTModel(neobert_config()),
}
HEADS = {
    "bert": lambda: BertForMaskedLM(bert_config()),
    "neobert": lambda: NeoBERTForMaskedLM(neobert_config()),
}
families = pytest.mark.parametrize("family", BASES)


@pytest.fixture
def model(family):
    return randomized(BASES[family]()).eval()


def randomized(model):
    """Weights large enough that an error in one place shows in the output."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if "orm" in name and "weight" in name else 0))
    return model


def padded(lengths=LENGTHS, side="right"):
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        where = slice(0, n) if side == "right" else slice(max(lengths) - n, None)
        ids[row, where] = torch.randint(1, 97, (n,))
        mask[row, where] = 1
    return ids, mask


def last(model, **inputs):
    return model(**inputs).last_hidden_state


def assert_same(actual, rounded, exact, what="output"):
    assert_within_budget(actual.detach(), rounded.detach(), exact.detach(), what, ulps=4)


def assert_same_gradient(actual, rounded, exact, what):
    """The same budget on the norm: behind a whole model single elements are rounding noise."""
    error, reference = ((grad.double() - exact).norm() for grad in (actual, rounded))
    floor = 4 * torch.finfo(actual.dtype).eps * exact.norm()
    assert error <= 2 * reference + floor, f"{what}: error {error:.3e} of {exact.norm():.3e}"


@families
@pytest.mark.parametrize("side", SIDES)
def test_padded_batch_equals_the_unpatched_model(model, side):
    ids, mask = padded(side=side)
    real = mask.bool()
    exact = last(copy.deepcopy(model).double(), input_ids=ids, attention_mask=mask)[real]
    rounded = last(model, input_ids=ids, attention_mask=mask)[real]
    nk.patch(model)
    out = last(model, input_ids=ids, attention_mask=mask)
    assert_same(out[real], rounded, exact)
    assert not out[~real].any()


@families
def test_packed_input_equals_each_document_alone(model):
    ids, mask = padded()
    alone = [row[None, real == 1] for row, real in zip(ids, mask, strict=True)]
    rounded = torch.cat([last(model, input_ids=row)[0] for row in alone])
    wide = copy.deepcopy(model).double()
    exact = torch.cat([last(wide, input_ids=row)[0] for row in alone])
    nk.patch(model)
    packing = nk.unpad(mask)
    packed = packing.pack(ids)[None]
    lengths = {"cu_seq_lens_q": packing.cu_seqlens, "max_length_q": packing.max_seqlen}
    assert_same(last(model, input_ids=packed, **lengths)[0], rounded, exact)
    both = lengths | {"cu_seq_lens_k": packing.cu_seqlens, "max_length_k": packing.max_seqlen}
    restarts = packing.positions[None]
    assert_same(last(model, input_ids=packed, position_ids=restarts, **both)[0], rounded, exact)
    assert_same(last(model, input_ids=packed, position_ids=restarts)[0], rounded, exact)


@families
def test_without_a_mask_every_token_counts(model):
    ids = torch.randint(1, 97, (2, 7))
    exact = last(copy.deepcopy(model).double(), input_ids=ids)
    rounded = last(model, input_ids=ids)
    nk.patch(model)
    assert_same(last(model, input_ids=ids), rounded, exact)
    embeds = model.get_input_embeddings()(ids)
    assert_same(last(model, inputs_embeds=embeds), rounded, exact)


@families
def test_given_positions_are_used(model):
    ids = torch.randint(1, 97, (2, 7))
    positions = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
    exact = last(copy.deepcopy(model).double(), input_ids=ids, position_ids=positions)
    rounded = last(model, input_ids=ids, position_ids=positions)
    nk.patch(model)
    assert_same(last(model, input_ids=ids, position_ids=positions), rounded, exact)


@families
def test_a_document_never_sees_another(model):
    ids, mask = padded()
    nk.patch(model)
    before = last(model, input_ids=ids, attention_mask=mask)
    ids[2] = (ids[2] + 1) % 97
    after = last(model, input_ids=ids, attention_mask=mask)
    same = [0, 1, 3]
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[2], after[2])


@families
def test_rows_of_padding_give_zeros(model):
    ids, mask = padded()
    mask[1] = 0
    nk.patch(model)
    out = last(model, input_ids=ids, attention_mask=mask)
    assert not out[1].any()
    assert not last(model, input_ids=ids, attention_mask=mask * 0).any()


@families
def test_hidden_states_are_those_of_the_unpatched_model(model):
    ids, mask = padded()
    inputs = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
    real = mask.bool()
    exact = copy.deepcopy(model).double()(**inputs).hidden_states
    rounded = model(**inputs).hidden_states
    nk.patch(model)
    actual = model(**inputs)
    assert len(actual.hidden_states) == len(rounded) == 4
    assert torch.equal(actual.hidden_states[-1], actual.last_hidden_state)
    for a, r, e in zip(actual.hidden_states, rounded, exact, strict=True):
        assert_same(a[real], r[real], e[real])
    model.config.output_hidden_states = True
    assert len(model(input_ids=ids).hidden_states) == 4
    assert isinstance(model(input_ids=ids, return_dict=False), tuple)


def test_pooled_output_and_token_types_of_bert():
    model = randomized(BASES["bert"]()).eval()
    ids, mask = padded()
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
    exact = copy.deepcopy(model).double()(**inputs).pooler_output
    rounded = model(**inputs).pooler_output
    nk.patch(model)
    assert_same(model(**inputs).pooler_output, rounded, exact)


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_every_gradient_through_a_head(family, checkpointing):
    model = HEADS[family]().train()  # as initialized: saturated softmaxes would amplify rounding
    ids, mask = padded()
    labels = torch.where((torch.rand(ids.shape) < 0.5) & (mask == 1), ids, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    exact, rounded = copy.deepcopy(model).double(), copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    nk.patch(model)
    losses = []
    for each in (model, rounded, exact):
        loss = each(**inputs).loss
        loss.backward()
        losses.append(loss)
    assert_same(*losses, "loss")
    pairs = zip(model.named_parameters(), rounded.parameters(), exact.parameters(), strict=True)
    for (name, a), r, e in pairs:
        assert (a.grad is None) == (r.grad is None), name
        if a.grad is not None:
            assert_same_gradient(a.grad, r.grad, e.grad, name)


@pytest.mark.parametrize("family", HEADS)
def test_fifty_training_steps_follow_the_unpatched_model(family):
    model = HEADS[family]().train()
    plain = copy.deepcopy(model)
    nk.patch(model)
    curves = []
    for each in (model, plain):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3)
        losses = []
        for _ in range(50):
            ids, mask = padded()
            loss = each(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
            loss.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < curves[0][0]
    # Both curves are float32 rounding apart at step 0 and training amplifies it; a wrong gradient
    # shows as a drift of percents.
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=0)


def forwards(model):
    return {name: module.forward for name, module in model.named_modules()}


@families
def test_unpatch_restores_the_very_same_objects(model):
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = dict(model.state_dict(keep_vars=True))
    classes = {name: type(module) for name, module in model.named_modules()}
    ids, mask = padded()
    before = last(model, input_ids=ids, attention_mask=mask)
    nk.patch(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    patched_state = model.state_dict(keep_vars=True)
    assert all(patched_state[k] is v for k, v in state.items())
    assert patched_state.keys() == state.keys()
    nk.unpatch(model)
    for name, module in model.named_modules():
        now = vars(module)
        assert now.keys() == attributes[name].keys()
        assert all(now[key] is value for key, value in attributes[name].items())
        assert module.forward.__func__ is type(module).forward
    assert torch.equal(last(model, input_ids=ids, attention_mask=mask), before)


@families
def test_patching_changes_no_class_and_no_module_global(model):
    names = ["transformers.models.bert.modeling_bert", "transformers.modeling_utils", "torch.nn"]
    names += ["neobert.model", "torch.nn.functional"]
    before = {name: dict(vars(sys.modules[name])) for name in names}
    own = dict(vars(type(model)))
    nk.patch(model)
    assert dict(vars(type(model))) == own
    for name in names:
        now = vars(sys.modules[name])
        assert all(now[key] is value for key, value in before[name].items()), name


@families
def test_another_instance_stays_as_it_is(family, model):
    other = BASES[family]()
    nk.patch(model)
    assert all("forward" not in vars(m) for m in other.modules())
    with pytest.raises(ValueError, match="model: expected a patched model"):
        nk.unpatch(other)


@families
def test_patching_twice_is_an_error(model):
    nk.patch(model)
    with pytest.raises(ValueError, match=r"model: expected an unpatched model .* got a patched"):
        nk.patch(model)


@families
def test_a_deep_copy_of_a_patched_model_is_patched_by_itself(model):
    ids, mask = padded()
    nk.patch(model)
    twin = copy.deepcopy(model)
    expected = last(model, input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(last(twin, input_ids=ids, attention_mask=mask), expected)
    nk.unpatch(twin)
    assert "forward" in vars(model)


@families
def test_saving_a_patched_model_saves_the_plain_one(model, tmp_path):
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    nk.patch(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(v, plain[k]) for k, v in loaded.state_dict().items())
    assert "forward" not in vars(loaded)


@families
def test_lora_trains_through_a_patched_model(family):
    import peft

    model = randomized(BASES[family]())
    targets = {"bert": ["query", "value", "dense"], "neobert": ["qkv", "wo", "w12", "w3"]}[family]
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).train()
    ids, mask = padded()
    plain = last(adapted, input_ids=ids, attention_mask=mask)[mask.bool()]
    nk.patch(adapted)
    patched = last(adapted, input_ids=ids, attention_mask=mask)[mask.bool()]
    torch.testing.assert_close(patched, plain)
    patched.sum().backward()
    trained = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    lower = [g for n, g in trained.items() if "pooler" not in n]
    assert all(g is not None and g.any() for g in lower)


def test_a_base_inside_any_module_is_found():
    outer = nn.ModuleDict({"a": BASES["bert"](), "b": BASES["neobert"](), "c": nn.Linear(2, 2)})
    report = nk.patch(outer)
    assert report.families == {"a": "bert", "b": "neobert"}
    assert [entry.name for entry in report.left] == ["c"]
    assert sum(entry.what == "BertLayer" for entry in report.replaced) == 3
    assert "3 x NeoBERTLayer" in str(report)
    assert set(report.implementations) >= {"attention", "rms_norm", "add_layer_norm"}


@pytest.mark.parametrize(
    "where", ["embeddings", "encoder.layer.1.attention.output", "encoder.layer.1.output"]
)
def test_every_dropout_of_hidden_states_is_kept(where):
    ids, _ = padded()
    model = randomized(BASES["bert"]()).train()
    nk.patch(model)
    assert torch.equal(last(model, input_ids=ids), last(model, input_ids=ids))
    model.get_submodule(f"{where}.dropout").p = 0.5
    assert not torch.equal(last(model, input_ids=ids), last(model, input_ids=ids))


def test_attention_dropout_is_refused_in_training():
    ids, _ = padded()
    model = BertModel(bert_config(attention_probs_dropout_prob=0.1)).train()
    nk.patch(model)
    with pytest.raises(ValueError, match=r"attention dropout: expected 0 .* got 0.1"):
        model(input_ids=ids)
    model.eval()(input_ids=ids)


class Other(BertModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def hooked():
    model = BASES["bert"]()
    model.encoder.layer[1].forward = lambda *args: None
    return model


def swapped():
    model = BASES["neobert"]()
    model.transformer_encoder[2].ffn_norm = nn.RMSNorm(48)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Linear(2, 2),
            "supported family .bert, neobert.*Linear; the unpatched model st",
        ),
        (lambda: Other(bert_config()), "supported family"),
        (lambda: "bert", "model: expected a torch.nn.Module, got str"),
        (lambda: BASES["bert"]().double(), "float32, float16 or bfloat16 weights, got embeddings"),
        (
            lambda: BASES["neobert"]().to("meta"),
            "weights in memory, got encoder.weight on the meta",
        ),
        (lambda: BertModel(bert_config(is_decoder=True)), "got a decoder"),
        (hooked, "forward of their class, got encoder.layer.1, whose forward was already replaced"),
        (swapped, "transformer_encoder.2.ffn_norm to be NeoBERTRMSNorm, got RMSNorm"),
    ],
)
def test_what_cannot_be_patched_is_named_and_left_alone(make, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        nk.patch(model)
    if isinstance(model, nn.Module):
        ours = [m for m in model.modules() if hasattr(m.forward, "_neobert_kernels")]
        assert not ours


IDS = torch.ones(2, 5, dtype=torch.long)
ONE = torch.ones(1, 5, dtype=torch.long)
CU = torch.tensor([0, 2, 5], dtype=torch.int32)


@families
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input_ids: expected either input_ids or inputs_embeds, got neither"),
        ({"input_ids": IDS[0]}, "input_ids: expected 2 dimensions"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :4]}, "attention_mask: expected shape"),
        ({"input_ids": IDS, "attention_mask": IDS[None]}, "attention_mask: expected 2 dim"),
        ({"input_ids": IDS, "position_ids": IDS[:, :4]}, "position_ids: expected shape"),
        ({"input_ids": IDS, "output_attentions": True}, "output_attentions: expected False"),
        ({"input_ids": IDS.repeat(1, 20)}, "input_ids: expected at most 64 tokens .*, got 100"),
        ({"input_ids": ONE, "cu_seq_lens_q": CU}, "max_length_q: expected the longest length"),
        (
            {"input_ids": IDS, "cu_seq_lens_q": CU, "max_length_q": 3},
            "input_ids: expected one row when packed, got 2 rows",
        ),
        (
            {"input_ids": ONE, "cu_seq_lens_q": CU[:2], "max_length_q": 3},
            "cu_seq_lens_q: expected a last element equal to the number of tokens .5., got 2",
        ),
        (
            {"input_ids": ONE, "cu_seq_lens_q": CU.long(), "max_length_q": 3},
            "cu_seq_lens_q: expected dtype int32",
        ),
        (
            {"input_ids": ONE, "cu_seq_lens_q": CU, "max_length_q": 2},
            "max_length_q: expected at least the longest document .3., got 2",
        ),
        (
            {"input_ids": ONE, "cu_seq_lens_q": CU, "max_length_q": 3, "attention_mask": ONE},
            "attention_mask: expected None when packed",
        ),
        (
            {"input_ids": ONE, "position_ids": torch.tensor([[0, 1, 0, 2, 3]])},
            "position_ids: expected 0, 1, 2, ... from each restart",
        ),
    ],
)
def test_bad_input_is_one_clear_error(model, inputs, message):
    nk.patch(model)
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_classification_head_on_a_patched_bert():
    model = randomized(BertForSequenceClassification(bert_config(num_labels=3))).eval()
    ids, mask = padded()
    exact = copy.deepcopy(model).double()(ids, mask).logits
    rounded = model(ids, mask).logits
    nk.patch(model)
    assert_same(model(ids, mask).logits, rounded, exact)

"""patch and unpatch: the same numbers on real tokens only, and nothing left behind."""

import copy
import inspect
import sys

import pytest
import torch
import transformers
from encoders import ENCODERS, LENGTHS, padded, randomized, widened
from parity import assert_same, assert_same_gradients
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import neobert_kernels as nk
from neobert_kernels import _runtime

SIDES = ("right", "left")
families = pytest.mark.parametrize("family", ENCODERS)
about_modules = pytest.mark.skipif(
    _runtime.INTERPRET, reason="about modules, which are the same whatever runs in them"
)


@pytest.fixture
def model(family):
    return randomized(ENCODERS[family].base()).eval()


def last(model, **inputs):
    return model(**inputs).last_hidden_state


@families
@pytest.mark.parametrize("side", SIDES)
def test_padded_batch_equals_the_unpatched_model(family, model, side, supports):
    supports(family, "base", "padded")
    ids, mask = padded(family, side=side)
    real = mask.bool()
    exact = last(copy.deepcopy(model).double(), input_ids=ids, attention_mask=mask)[real]
    rounded = last(model, input_ids=ids, attention_mask=mask)[real]
    nk.patch(model)
    out = last(model, input_ids=ids, attention_mask=mask)
    assert_same(out[real], rounded, exact)
    assert not out[~real].any()


@families
def test_packed_input_equals_each_document_alone(family, model, supports):
    supports(family, "base", "packed")
    ids, mask = padded(family)
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
    restarts = packing.positions[None] + ENCODERS[family].first_position
    assert_same(last(model, input_ids=packed, position_ids=restarts, **both)[0], rounded, exact)
    assert_same(last(model, input_ids=packed, position_ids=restarts)[0], rounded, exact)


@families
def test_every_gradient_of_a_base_model(family, supports):
    """With a large eps, which no default hides, and with gradient checkpointing."""
    supports(family, "base", "train")
    model = ENCODERS[family].base(**{ENCODERS[family].eps: 0.5}).train()
    ids, mask = padded(family)
    exact, rounded, checkpointed = widened(model), copy.deepcopy(model), copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    nk.patch(model)
    nk.patch(checkpointed)
    outs = [
        last(each, input_ids=ids, attention_mask=mask)[mask == 1]
        for each in (model, checkpointed, rounded, exact)
    ]
    for out in outs:
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert_same(outs[0], *outs[2:])
    assert_same_gradients(model, rounded, exact)
    assert_same_gradients(checkpointed, rounded, exact)


@about_modules
@families
def test_a_compiled_base_model_is_the_patched_one(family, supports):
    supports(family, "base", "compile")
    model = randomized(ENCODERS[family].base(num_hidden_layers=2)).eval()
    nk.patch(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for lengths in (LENGTHS, (3, 12)):
        ids, mask = padded(family, lengths)
        with torch.no_grad():
            inputs = {"input_ids": ids, "attention_mask": mask}
            torch.testing.assert_close(last(compiled, **inputs), last(model, **inputs))


@families
def test_without_a_mask_every_token_counts(family, model):
    ids = torch.randint(2, 97, (2, 7))
    exact = last(copy.deepcopy(model).double(), input_ids=ids)
    rounded = last(model, input_ids=ids)
    nk.patch(model)
    assert_same(last(model, input_ids=ids), rounded, exact)
    embeds = model.get_input_embeddings()(ids)
    assert_same(last(model, inputs_embeds=embeds), rounded, exact)


@families
def test_given_positions_are_used(family, model):
    ids = torch.randint(2, 97, (2, 7))
    positions = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
    exact = last(copy.deepcopy(model).double(), input_ids=ids, position_ids=positions)
    rounded = last(model, input_ids=ids, position_ids=positions)
    nk.patch(model)
    assert_same(last(model, input_ids=ids, position_ids=positions), rounded, exact)


@pytest.mark.parametrize(
    ("family", "positions"),
    [
        ("bert", [0, 1, 4, 9, 10, 20, 30]),
        ("nomic_bert", [3, 4, 5, 7, 11, 13, 40]),
        ("roberta", [2, 3, 1, 4, 5, 6, 7]),  # the third token is a padding id, which does not count
    ],
)
def test_one_row_of_rising_positions_is_one_document(family, model, positions):
    inputs = {"input_ids": torch.randint(2, 97, (1, 7)), "position_ids": torch.tensor([positions])}
    exact, rounded = last(copy.deepcopy(model).double(), **inputs), last(model, **inputs)
    nk.patch(model)
    assert_same(last(model, **inputs), rounded, exact)


@families
def test_a_document_never_sees_another(family, model):
    ids, mask = padded(family)
    nk.patch(model)
    before = last(model, input_ids=ids, attention_mask=mask)
    ids[2] = (ids[2] + 1) % 97
    after = last(model, input_ids=ids, attention_mask=mask)
    same = [0, 1, 3]
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[2], after[2])


@families
def test_rows_of_padding_give_zeros(family, model):
    ids, mask = padded(family)
    mask[1] = 0
    nk.patch(model)
    out = last(model, input_ids=ids, attention_mask=mask)
    assert not out[1].any()
    assert not last(model, input_ids=ids, attention_mask=mask * 0).any()


@families
def test_hidden_states_are_those_of_the_unpatched_model(family, model):
    ids, mask = padded(family)
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
    model = randomized(ENCODERS["bert"].base()).eval()
    ids, mask = padded("bert")
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
    exact = copy.deepcopy(model).double()(**inputs).pooler_output
    rounded = model(**inputs).pooler_output
    nk.patch(model)
    assert_same(model(**inputs).pooler_output, rounded, exact)


@about_modules
@families
def test_unpatch_restores_the_very_same_objects(family, model):
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = dict(model.state_dict(keep_vars=True))
    classes = {name: type(module) for name, module in model.named_modules()}
    ids, mask = padded(family)
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


@about_modules
@families
def test_patching_changes_no_class_and_no_module_global(family, model):
    names = ["transformers.models.bert.modeling_bert", "transformers.modeling_utils", "torch.nn"]
    names += ["neobert.model", "torch.nn.functional"]
    before = {name: dict(vars(sys.modules[name])) for name in names}
    own = dict(vars(type(model)))
    nk.patch(model)
    assert dict(vars(type(model))) == own
    for name in names:
        now = vars(sys.modules[name])
        assert all(now[key] is value for key, value in before[name].items()), name


@about_modules
@families
def test_another_instance_stays_as_it_is(family, model):
    other = ENCODERS[family].base()
    nk.patch(model)
    assert all("forward" not in vars(m) for m in other.modules())
    with pytest.raises(ValueError, match="model: expected a patched model"):
        nk.unpatch(other)


@about_modules
@families
def test_patching_twice_is_an_error(family, model):
    nk.patch(model)
    with pytest.raises(ValueError, match=r"model: expected an unpatched model .* got a patched"):
        nk.patch(model)


@about_modules
@families
def test_a_deep_copy_of_a_patched_model_is_patched_by_itself(family, model):
    ids, mask = padded(family)
    nk.patch(model)
    twin = copy.deepcopy(model)
    expected = last(model, input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(last(twin, input_ids=ids, attention_mask=mask), expected)
    nk.unpatch(twin)
    assert "forward" in vars(model)


@about_modules
@families
def test_saving_a_patched_model_saves_the_plain_one(model, tmp_path):
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    nk.patch(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(v, plain[k]) for k, v in loaded.state_dict().items())
    assert "forward" not in vars(loaded)


@about_modules
@families
def test_lora_trains_through_a_patched_model(family):
    import peft

    model = randomized(ENCODERS[family].base())
    targets = list(ENCODERS[family].lora)
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).train()
    ids, mask = padded(family)
    plain = last(adapted, input_ids=ids, attention_mask=mask)[mask.bool()]
    nk.patch(adapted)
    patched = last(adapted, input_ids=ids, attention_mask=mask)[mask.bool()]
    torch.testing.assert_close(patched, plain)
    patched.sum().backward()
    trained = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    lower = [g for n, g in trained.items() if "pooler" not in n]
    assert all(g is not None and g.any() for g in lower)


@about_modules
def test_a_base_inside_any_module_is_found():
    outer = nn.ModuleDict(
        {"a": ENCODERS["bert"].base(), "b": ENCODERS["neobert"].base(), "c": nn.Linear(2, 2)}
    )
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
    ids, _ = padded("bert")
    model = randomized(ENCODERS["bert"].base()).train()
    nk.patch(model)
    assert torch.equal(last(model, input_ids=ids), last(model, input_ids=ids))
    model.get_submodule(f"{where}.dropout").p = 0.5
    assert not torch.equal(last(model, input_ids=ids), last(model, input_ids=ids))


@about_modules
def test_attention_dropout_is_refused_in_training():
    ids, _ = padded("bert")
    model = ENCODERS["bert"].base(attention_probs_dropout_prob=0.1).train()
    nk.patch(model)
    with pytest.raises(ValueError, match=r"attention dropout: expected 0 .* got 0.1"):
        model(input_ids=ids)
    model.eval()(input_ids=ids)


def test_padding_ids_inside_a_text_do_not_count_in_roberta():
    model = randomized(ENCODERS["roberta"].base()).eval()
    ids, mask = padded("roberta")
    ids[0, 3] = ids[2, 5] = 1
    expected = last(model, input_ids=ids, attention_mask=mask)[mask == 1]
    nk.patch(model)
    torch.testing.assert_close(last(model, input_ids=ids, attention_mask=mask)[mask == 1], expected)
    packing = nk.unpad(mask)
    lengths = {"cu_seq_lens_q": packing.cu_seqlens, "max_length_q": packing.max_seqlen}
    packed = last(model, input_ids=packing.pack(ids)[None], **lengths)[0]
    torch.testing.assert_close(packed, expected)


@about_modules
@about_modules
@pytest.mark.parametrize(
    ("family", "watched"),
    [
        ("bert", "encoder.layer.0.intermediate"),
        ("bert", "encoder.layer.0.intermediate.dense"),
        ("eurobert", "layers.0.mlp.gate_proj"),
    ],
)
@pytest.mark.parametrize("own", [True, False], ids=["its own hook", "a hook of all modules"])
def test_a_hook_sees_what_a_module_gave(family, watched, own, model):
    """Unwatched, and with no graph, an activation takes the place of its argument."""
    ids, mask = padded(family)
    nk.patch(model)
    seen = []
    module = model.get_submodule(watched)

    def keep(of, x, y):
        if of is module:
            seen.append((x[0], y))

    handle = module.register_forward_hook(keep) if own else register_module_forward_hook(keep)
    with torch.no_grad():
        hooked = last(model, input_ids=ids, attention_mask=mask)
        handle.remove()
        ((x, y),) = seen
        assert torch.equal(y, module(x))
        assert torch.equal(last(model, input_ids=ids, attention_mask=mask), hooked)


def test_the_signature_stays_that_of_the_class():
    for encoder in ENCODERS.values():
        for model in (encoder.base(), encoder.head("mlm")):
            before = inspect.signature(model.forward)
            nk.patch(model)
            assert inspect.signature(model.forward) == before
            with pytest.raises(TypeError, match="two values for 'input_ids'"):
                model(torch.ones(1, 2), input_ids=torch.ones(1, 2))
            with pytest.raises(TypeError, match="positional arguments, got 30"):
                model(*[None] * 30)


@about_modules
def test_two_patched_models_keep_their_own_options():
    ids, mask = padded("bert")
    a, b = (randomized(ENCODERS["bert"].base()).eval() for _ in range(2))
    nk.patch(a, packed_output=True)
    nk.patch(b)
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert last(a, **inputs).shape[:2] == (1, sum(LENGTHS))
    assert last(b, **inputs).shape[:2] == ids.shape


@about_modules
def test_a_context_manager_unpatches_also_after_an_error():
    model = ENCODERS["bert"].base()
    with nk.patched(model) as report:
        assert report.families == {"": "bert"}
        assert "forward" in vars(model)
    assert "forward" not in vars(model)
    with pytest.raises(ValueError, match="either input_ids"), nk.patched(model):
        model()
    assert "forward" not in vars(model)


@about_modules
def test_the_report_says_what_was_left_and_why():
    encoder = ENCODERS["bert"]
    report = nk.patch(encoder.head("mlm"))
    assert [e.name for e in report.replaced if e.what == "BertForMaskedLM"] == [""]
    assert not [e for e in report.left if "own forward" in e.why]
    other = nk.patch(transformers.BertForNextSentencePrediction(encoder.config()))
    (entry,) = [e for e in other.left if "own forward" in e.why]
    assert (entry.name, entry.what) == ("", "BertForNextSentencePrediction")

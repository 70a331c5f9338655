"""patch and unpatch: the same numbers on real tokens only, and nothing left behind."""

import copy
import inspect
import sys

import pytest
import torch
import transformers
from encoders import ENCODERS, LENGTHS, padded, randomized
from parity import assert_same
from torch import nn
from transformers import BertModel

import neobert_kernels as nk

SIDES = ("right", "left")
families = pytest.mark.parametrize("family", ENCODERS)


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


@families
def test_another_instance_stays_as_it_is(family, model):
    other = ENCODERS[family].base()
    nk.patch(model)
    assert all("forward" not in vars(m) for m in other.modules())
    with pytest.raises(ValueError, match="model: expected a patched model"):
        nk.unpatch(other)


@families
def test_patching_twice_is_an_error(family, model):
    nk.patch(model)
    with pytest.raises(ValueError, match=r"model: expected an unpatched model .* got a patched"):
        nk.patch(model)


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


def test_attention_dropout_is_refused_in_training():
    ids, _ = padded("bert")
    model = ENCODERS["bert"].base(attention_probs_dropout_prob=0.1).train()
    nk.patch(model)
    with pytest.raises(ValueError, match=r"attention dropout: expected 0 .* got 0.1"):
        model(input_ids=ids)
    model.eval()(input_ids=ids)


class Other(BertModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def hooked():
    model = ENCODERS["bert"].base()
    model.encoder.layer[1].forward = lambda *args: None
    return model


def swapped():
    model = ENCODERS["neobert"].base()
    model.transformer_encoder[2].ffn_norm = nn.RMSNorm(48)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Linear(2, 2),
            "supported family .bert, .*neobert.*Linear; the unpatched model st",
        ),
        (lambda: Other(ENCODERS["bert"].config()), "supported family"),
        (lambda: "bert", "model: expected a torch.nn.Module, got str"),
        (
            lambda: ENCODERS["bert"].base().double(),
            "float32, float16 or bfloat16 weights, got embeddings",
        ),
        (
            lambda: ENCODERS["neobert"].base().to("meta"),
            "weights in memory, got encoder.weight on the meta",
        ),
        (lambda: ENCODERS["bert"].base(is_decoder=True), "got a decoder"),
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
PACKED = {"cu_seq_lens_q": CU, "max_length_q": 3}


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
        ({"input_ids": IDS, "attention_mask": {"full_attention": IDS}}, "attention_mask: .* dict"),
        ({"input_ids": ONE, "cu_seq_lens_q": CU}, "max_length_q: expected a value beside"),
        (
            {"input_ids": IDS, "cu_seq_lens_q": CU, "max_length_q": 3},
            "input_ids: expected one row when packed, got 2 rows",
        ),
        (
            {"input_ids": ONE, "cu_seq_lens_q": CU[:2], "max_length_q": 3},
            "cu_seq_lens_q: expected a last element equal to the number of tokens .5., got 2",
        ),
        (
            {"input_ids": ONE, "cu_seq_lens_k": CU, "max_length_k": 3},
            "cu_seq_lens_k: expected None without cu_seq_lens_q",
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
            {"input_ids": ONE, "max_length_q": 3},
            "cu_seq_lens_q: expected a value beside",
        ),
        ({"input_ids": ONE, "max_seqlen": 3}, "cu_seqlens: expected a value beside max_seqlen"),
        (
            {"input_ids": ONE, **PACKED, "cu_seqlens": CU, "max_seqlen": 3},
            "cu_seqlens: expected None beside cu_seq_lens_q",
        ),
        (
            {"input_ids": ONE, **PACKED, "cu_seq_lens_k": torch.tensor([0, 3, 5]).int()},
            "cu_seq_lens_k: expected the documents of cu_seq_lens_q, got others",
        ),
        (
            {"input_ids": ONE, **PACKED, "cu_seq_lens_k": [0, 2, 5]},
            "cu_seq_lens_k: expected a t",
        ),
        (
            {"input_ids": ONE, **PACKED, "max_length_q": "x"},
            "max_length_q: expected an int, got",
        ),
        (
            {"input_ids": ONE, **PACKED, "max_length_q": 3.7},
            "max_length_q: expected an int, got",
        ),
        ({"input_ids": ONE.float()}, "input_ids: expected dtype int64 or int32, got float32"),
        (
            {"input_ids": ONE, "position_ids": ONE.float()},
            "position_ids: expected dtype int64",
        ),
        (
            {"input_ids": ONE, "cu_seq_lens_q": CU, "max_length_q": 3, "attention_mask": ONE},
            "attention_mask: expected None when packed",
        ),
        (
            {"input_ids": ONE, "position_ids": torch.tensor([[0, 1, 0, 2, 3]])},
            "position_ids: expected (0, 1, 2, ... from each restart|.* start at position 2)",
        ),
    ],
)
def test_bad_input_is_one_clear_error(model, inputs, message):
    nk.patch(model)
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize("family", [f for f, e in ENCODERS.items() if e.longest])
def test_documents_over_the_longest_length_are_refused(family, model):
    nk.patch(model)
    longest = ENCODERS[family].longest
    with pytest.raises(ValueError, match=f"expected at most {longest} tokens .*, got 100"):
        model(IDS.repeat(1, 20))


def test_restarts_of_roberta_are_counted_from_its_first_position():
    model = randomized(ENCODERS["roberta"].base()).eval()
    nk.patch(model)
    with pytest.raises(ValueError, match=r"position_ids: expected 2, 3, 4, ... from each restart"):
        model(ONE, position_ids=torch.tensor([[2, 3, 2, 4, 5]]))
    with pytest.raises(ValueError, match=r"position_ids: expected a first position of 2, got 5"):
        model(ONE, position_ids=torch.tensor([[5, 2, 3, 2, 3]]))


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


def test_the_signature_stays_that_of_the_class():
    for encoder in ENCODERS.values():
        for model in (encoder.base(), encoder.head("mlm")):
            before = inspect.signature(model.forward)
            nk.patch(model)
            assert inspect.signature(model.forward) == before
            with pytest.raises(TypeError, match="two values for 'input_ids'"):
                model(IDS, input_ids=IDS)
            with pytest.raises(TypeError, match="positional arguments, got 30"):
                model(*[None] * 30)


@families
@pytest.mark.parametrize("name", ["sliding_window", "is_causal", "encoder_hidden_states"])
def test_what_would_be_ignored_is_refused(model, name):
    nk.patch(model)
    with pytest.raises(ValueError, match=f"{name}: expected None in a patched encoder"):
        model(IDS, **{name: 3})


def test_hooks_on_parts_that_are_not_called_are_refused():
    model = ENCODERS["bert"].base()
    norm = model.encoder.layer[1].output.LayerNorm
    handle = norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"encoder.layer.1 LayerNorm without hooks"):
        nk.patch(model)
    handle.remove()
    model.encoder.layer[1].register_forward_hook(lambda *_: None)
    nk.patch(model)


def test_two_patched_models_keep_their_own_options():
    ids, mask = padded("bert")
    a, b = (randomized(ENCODERS["bert"].base()).eval() for _ in range(2))
    nk.patch(a, packed_output=True)
    nk.patch(b)
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert last(a, **inputs).shape[:2] == (1, sum(LENGTHS))
    assert last(b, **inputs).shape[:2] == ids.shape


def test_a_context_manager_unpatches_also_after_an_error():
    model = ENCODERS["bert"].base()
    with nk.patched(model) as report:
        assert report.families == {"": "bert"}
        assert "forward" in vars(model)
    assert "forward" not in vars(model)
    with pytest.raises(ValueError, match="either input_ids"), nk.patched(model):
        model()
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packed_output": 1}, "packed_output: expected True or False, got 1"),
        ({"packed_output": None}, "packed_output: expected True or False, got None"),
        ({"mlm_logits": "no"}, "mlm_logits: expected True or False, got 'no'"),
        (
            {"labelled_rows_only": True, "mlm_logits": True},
            "labelled_rows_only: expected False where mlm_logits",
        ),
    ],
)
def test_wrong_options_are_named(options, message):
    model = ENCODERS["bert"].base()
    with pytest.raises(ValueError, match=message):
        nk.patch(model, **options)
    assert "forward" not in vars(model)


def test_the_report_says_what_was_left_and_why():
    encoder = ENCODERS["bert"]
    report = nk.patch(encoder.head("mlm"))
    assert [e.name for e in report.replaced if e.what == "BertForMaskedLM"] == [""]
    assert not [e for e in report.left if "own forward" in e.why]
    other = nk.patch(transformers.BertForNextSentencePrediction(encoder.config()))
    (entry,) = [e for e in other.left if "own forward" in e.why]
    assert (entry.name, entry.what) == ("", "BertForNextSentencePrediction")


def bypassed():
    """Parts that a patched encoder reads and does not call, by family."""
    yield "bert", "mlm", ["bert.encoder", "bert.encoder.layer.0.attention", "cls.predictions"]
    yield "roberta", "mlm", ["roberta.encoder", "lm_head"]
    yield "nomic_bert", "mlm", ["nomic_bert.layers.0.self_attn", "cls"]
    yield "modernbert", "mlm", ["model.layers.0.attn", "model.final_norm"]
    yield "eurobert", "mlm", ["model.layers.0.mlp", "model.norm"]
    yield "neobert", "mlm", ["model.transformer_encoder.0.ffn", "model.layer_norm"]


CASES = [(family, kind, path) for family, kind, paths in bypassed() for path in paths]


@pytest.mark.parametrize(("family", "kind", "path"), CASES)
def test_nothing_that_someone_changed_is_passed_over(family, kind, path):
    for change, why in [
        (
            lambda part: setattr(part, "forward", lambda *a, **k: None),
            "with the forward of its class",
        ),
        (lambda part: part.register_forward_pre_hook(lambda *a: None), "without hooks"),
        (lambda part: part.register_full_backward_hook(lambda *a: None), "without hooks"),
        (lambda part: setattr(part, "__class__", type("Own", (type(part),), {})), "got Own"),
    ]:
        model = ENCODERS[family].head(kind)
        change(model.get_submodule(path))
        with pytest.raises(ValueError, match=why):
            nk.patch(model)
        assert not any(getattr(m, "_neobert_kernels_options", None) for m in model.modules())


def test_a_norm_without_weights_is_refused():
    model = ENCODERS["bert"].base()
    model.encoder.layer[0].output.LayerNorm = nn.LayerNorm(48, elementwise_affine=False)
    with pytest.raises(ValueError, match="LayerNorm with a weight, got elementwise_affine=False"):
        nk.patch(model)


def test_a_part_that_was_unpatched_by_itself_is_named():
    model = ENCODERS["bert"].head("mlm")
    with nk.patched(model):
        nk.unpatch(model.bert)
        with pytest.raises(ValueError, match="its encoder to be patched as the head is"):
            model(IDS)
    with nk.patched(model):
        nk.unpatch(model)

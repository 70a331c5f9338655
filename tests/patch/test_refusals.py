"""What `patch` and a patched model refuse: one clear error, and nothing is changed."""

import pytest
import torch
from encoders import ENCODERS, head_cases, padded, randomized, with_labels
from torch import nn
from transformers import BertModel

import neobert_kernels as nk

families = pytest.mark.parametrize("family", ENCODERS)


@pytest.fixture
def model(family):
    return randomized(ENCODERS[family].base()).eval()


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
        (
            {"input_ids": ONE, "position_ids": torch.tensor([[7, 8, 9, 7, 8]])},
            "position_ids: expected documents .* got 7 at the first token, a restart at token 3",
        ),
        (
            {"input_ids": ONE, "position_ids": torch.tensor([[7, 8, 2, 3, 4]])},
            "position_ids: expected documents .* got 7 at the first token, a restart at token 2",
        ),
        (
            {"input_ids": ONE, **PACKED, "max_length_k": 4},
            "max_length_k: expected max_length_q .3., got 4",
        ),
        ({"input_ids": ONE * 97}, "input_ids: expected values in 0..96, got 97"),
        ({"input_ids": -ONE}, "input_ids: expected values in 0..96, got -1"),
    ],
)
def test_bad_input_is_one_clear_error(model, inputs, message):
    nk.patch(model)
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_a_row_of_falling_positions_is_one_document_where_a_mask_says_so():
    model = randomized(ENCODERS["bert"].base()).eval()
    positions = torch.tensor([[7, 8, 9, 7, 8]])
    expected = model(ONE, position_ids=positions).last_hidden_state
    nk.patch(model)
    out = model(ONE, attention_mask=ONE, position_ids=positions).last_hidden_state
    torch.testing.assert_close(out, expected)


def test_padding_may_hold_any_id():
    model = ENCODERS["bert"].base().eval()
    nk.patch(model)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    model(torch.where(mask == 1, ONE, -100), attention_mask=mask)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm_roberta", "nomic_bert"])
def test_ids_outside_of_a_table_are_named(family, model):
    nk.patch(model)
    types = model.config.type_vocab_size
    with pytest.raises(ValueError, match=f"token_type_ids: expected values in 0..{types - 1}, got"):
        model(IDS, token_type_ids=IDS * types)
    if family != "nomic_bert":
        most = model.config.max_position_embeddings
        with pytest.raises(ValueError, match=f"position_ids: expected values in 0..{most - 1}, go"):
            model(IDS, position_ids=ONE * most)


@pytest.mark.parametrize(("family", "kind"), head_cases())
@pytest.mark.parametrize("wrong", [97, -1])
def test_labels_that_no_class_has_are_named(family, kind, wrong):
    if kind == "question":
        pytest.skip("a position outside of the row does not count")
    model = ENCODERS[family].head(kind)
    inputs = with_labels(kind, *padded(family))
    inputs["labels"] = torch.full_like(inputs["labels"], wrong)
    nk.patch(model)
    for training in (False, True):
        with pytest.raises(ValueError, match=rf"labels: expected values in .*or -100, got {wrong}"):
            model.train(training)(**inputs)


@pytest.mark.parametrize("family", [f for f, e in ENCODERS.items() if e.longest])
def test_documents_over_the_longest_length_are_refused(family, model):
    nk.patch(model)
    longest = ENCODERS[family].longest
    with pytest.raises(ValueError, match=f"expected at most {longest} tokens .*, got 100"):
        model(IDS.repeat(1, 20))


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


def test_restarts_of_roberta_are_counted_from_its_first_position():
    model = randomized(ENCODERS["roberta"].base()).eval()
    nk.patch(model)
    with pytest.raises(ValueError, match=r"position_ids: expected 2, 3, 4, ... from each restart"):
        model(ONE, position_ids=torch.tensor([[2, 3, 2, 4, 5]]))
    with pytest.raises(ValueError, match=r"documents from position 2 on .* got 5 at the first tok"):
        model(ONE, position_ids=torch.tensor([[5, 2, 3, 2, 3]]))

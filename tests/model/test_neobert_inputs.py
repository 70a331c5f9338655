"""What `forward` takes and gives: masks, packed rows, lengths, embeddings, outputs, errors."""

from typing import Any

import neobert_oracle as oracle
import pytest
import torch
from neobert_oracle import Shape
from parity import assert_within_budget
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DataCollatorWithFlattening,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from neobert import NeoBERTForMaskedLM


def test_no_mask_means_no_padding(model: NeoBERTForMaskedLM, ids: Tensor):
    assert torch.equal(model(ids).logits, model(ids, torch.ones_like(ids)).logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.bfloat16], ids=str)
def test_a_mask_may_have_any_dtype(
    dtype: torch.dtype, model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor
):
    assert torch.equal(model(ids, mask.to(dtype)).logits, model(ids, mask).logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_row_of_nothing_but_padding_counts_as_unpadded(
    implementation: str, model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor
):
    model.set_attn_implementation(implementation)
    expected = model(ids, mask).logits
    assert mask[1].all()
    mask[1] = 0
    assert torch.equal(model(ids, mask).logits, expected)


def test_the_mask_is_linear_in_length_and_absent_where_nothing_is_padded(
    model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor, monkeypatch: pytest.MonkeyPatch
):
    masks: list[Any] = []
    attention: Any = F.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model(ids, mask)
    assert len(masks) == Shape().layers
    assert all(seen.untyped_storage().nbytes() == mask.numel() for seen in masks)
    masks.clear()
    model(ids, torch.ones_like(mask))
    assert masks == [None] * Shape().layers


def test_attentions_are_distributions_over_the_real_keys(
    model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor
):
    assert model.config._attn_implementation == "sdpa"
    attentions = model(ids, mask, output_attentions=True).attentions
    assert len(attentions) == Shape().layers
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        padded = (mask == 0)[:, None, None, :].expand_as(weights)
        assert not weights[padded].any()


def test_hidden_states_run_from_the_embeddings_to_the_final_norm(
    model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor
):
    out = model.model(ids, mask, output_hidden_states=True)
    assert len(out.hidden_states) == Shape().layers + 1
    assert torch.equal(out.hidden_states[0], model.model.encoder(ids))
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert model.model(ids, mask).hidden_states is None


def test_embeddings_replace_ids(model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor):
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(None, mask, None, embeddings).logits, model(ids, mask).logits)


def test_packed_embeddings(model: NeoBERTForMaskedLM, packed: dict[str, Any]):
    by_ids = model(**packed).logits
    packed["inputs_embeds"] = model.get_input_embeddings()(packed.pop("input_ids"))
    assert torch.equal(model(**packed).logits, by_ids)


def test_the_flattening_collator_packs(
    model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor, exact: dict, rounded: dict
):
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    texts = [row[real.bool()] for row, real in zip(ids, mask, strict=True)]
    batch = collate([{"input_ids": text.tolist()} for text in texts])
    assert {"position_ids", "cu_seq_lens_q", "max_length_q"} <= batch.keys()
    real = mask.bool()
    logits = model(**batch).logits[0]
    assert_within_budget(logits, rounded["logits"][real], exact["logits"][real])


def test_autocast_keeps_the_residual_stream_in_float32(
    model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor, weights: dict, exact: dict
):
    reduced = oracle.forward(weights, Shape(), ids, mask, torch.bfloat16)["logits"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, mask, output_hidden_states=True)
    assert {state.dtype for state in out.hidden_states} == {torch.float32}
    assert_within_budget(out.logits, reduced, exact["logits"])


def test_what_a_trainer_or_tokenizer_adds_has_no_effect(
    model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor
):
    plain = model(ids, mask)
    extra = model(ids, mask, token_type_ids=torch.ones_like(ids), num_items_in_batch=3)
    assert torch.equal(extra.logits, plain.logits)
    assert torch.equal(model(ids, mask, return_dict=False)[0], plain.logits)


def test_return_dict_of_the_config(model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor):
    model.config.return_dict = False
    assert isinstance(model(ids, mask), tuple)
    assert isinstance(model.model(ids, mask), tuple)


def test_a_registered_attention_gets_the_padding(
    model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor, exact: dict, rounded: dict
):
    AttentionInterface.register("neobert_test", sdpa_attention_forward)
    AttentionMaskInterface.register("neobert_test", sdpa_mask)
    model.set_attn_implementation("neobert_test")
    assert_within_budget(model(ids, mask).logits, rounded["logits"], exact["logits"])


def test_an_attention_that_would_attend_to_padding_is_refused(
    model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor
):
    AttentionInterface.register("neobert_maskless", sdpa_attention_forward)
    model.set_attn_implementation("neobert_maskless")
    assert model(ids).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"attn_implementation: .*, got neobert_maskless"):
        model(ids, mask)


def test_too_long_names_both_numbers(model: NeoBERTForMaskedLM):
    assert model(torch.ones(1, 64).long()).logits.shape[1] == 64
    rule = r"input_ids: expected at most 64 tokens \(max_length\), got 65"
    ids, boundaries = torch.ones(1, 65).long(), torch.tensor([0, 65]).int()
    with pytest.raises(ValueError, match=rule):
        model(ids)
    with pytest.raises(ValueError, match=rule):
        model(ids, cu_seqlens=boundaries, max_seqlen=65)


def test_a_packed_row_may_be_longer_than_a_document(model: NeoBERTForMaskedLM):
    boundaries = torch.tensor([0, 50, 90]).int()
    out = model(torch.ones(1, 90).long(), cu_seqlens=boundaries, max_seqlen=50)
    assert out.logits.isfinite().all()


def test_no_step_reads_data_back(model: Any):
    """On the meta device there is no data, so a length check or a mask that looked would fail."""
    model = model.to("meta")
    ids = torch.ones(2, 30, dtype=torch.long, device="meta")
    assert model(ids, torch.ones_like(ids)).logits.shape == (2, 30, Shape().vocab)
    with pytest.raises(ValueError, match="at most 64"):
        model(torch.ones(1, 65, dtype=torch.long, device="meta"))


TWO: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 2, 6]).int(), "max_seqlen": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_ids: expected either input_ids or inputs_embeds, got neither"),
        ({"input_ids": (2, 3), "inputs_embeds": (2, 3, 48)}, "input_ids: expected .*, got both"),
        ({"input_ids": (6,)}, "input_ids: expected 2 dimensions"),
        ({"inputs_embeds": (2, 3)}, "inputs_embeds: expected 3 dimensions"),
        ({"inputs_embeds": (2, 3, 47)}, r"inputs_embeds: expected shape \(2, 3, 48\)"),
        ({"input_ids": (2, 3), "attention_mask": (2, 4)}, r"attention_mask: expected shape \(2, 3"),
        ({"input_ids": (2, 3), "attention_mask": (2, 1, 3, 3)}, "attention_mask: expected shape"),
        ({"input_ids": (2, 3), "position_ids": (3,)}, "position_ids: expected 2 dimensions"),
        ({"input_ids": (2, 3), "position_ids": (2, 4)}, "position_ids: expected shape"),
        ({"input_ids": (3, 3), "position_ids": (2, 3)}, "position_ids: expected shape"),
        ({"input_ids": (2, 6), **TWO}, "input_ids: expected one row when packed, got 2 rows"),
        ({"input_ids": (1, 5), **TWO}, "cu_seqlens: expected a last element"),
        ({"input_ids": (1, 6), "attention_mask": (1, 6), **TWO}, "attention_mask: expected None"),
        ({"input_ids": (1, 6), "output_attentions": True, **TWO}, "output_attentions: expected F"),
        ({"input_ids": (2, 3), "past_key_values": object()}, "past_key_values: expected None"),
        ({"input_ids": (1, 6), **TWO, "max_seqlen": None}, "max_seqlen: expected a value besi"),
        ({"input_ids": (1, 6), "max_seqlen": 6}, "cu_seqlens: expected a value beside max_seqlen"),
        ({"input_ids": (1, 6), "max_length_q": 6}, "cu_seq_lens_q: expected a value beside max_"),
        ({"input_ids": (1, 6), "max_length_k": 6}, "max_length_k: expected None without cu_seq_"),
        ({"input_ids": (1, 6), **TWO, "max_length_k": 5}, "max_length_k: expected max_seqlen .4.,"),
        ({"input_ids": (1, 6), **TWO, "max_seqlen": 3}, "max_seqlen: expected at least"),
        (
            {"input_ids": (1, 6), "cu_seq_lens_q": TWO["cu_seqlens"].long(), "max_length_q": 4},
            "cu_seq_lens_q: expected dtype int32",
        ),
    ],
    ids=lambda case: case[:40] if isinstance(case, str) else "",
)
def test_rejects(arguments: dict[str, Any], message: str, model: NeoBERTForMaskedLM):
    made = {
        name: torch.ones(*shape, dtype=torch.float32 if name == "inputs_embeds" else torch.long)
        if isinstance(shape, tuple)
        else shape
        for name, shape in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        model(**made)

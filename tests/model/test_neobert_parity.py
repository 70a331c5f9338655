"""The model computes what the description says, on every path, and each trap would be seen."""

from pathlib import Path
from typing import Any

import neobert_oracle as oracle
import pytest
import torch
from neobert_oracle import RELEASED_WIDTH, Shape
from parity import assert_within_budget
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM

from neobert import NeoBERTForMaskedLM, NeoBERTModel
from neobert.model import documents_of


def test_padded_batch(
    model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor, exact: dict, rounded: dict
):
    out = model(ids, mask, output_hidden_states=True, output_attentions=True)
    assert_within_budget(out.logits, rounded["logits"], exact["logits"])
    assert len(out.hidden_states) == Shape().layers + 1
    assert len(out.attentions) == Shape().layers
    for name in ("hidden_states", "attentions"):
        for i, actual in enumerate(getattr(out, name)):
            assert_within_budget(actual, rounded[name][i], exact[name][i], f"{name}[{i}]")


@pytest.mark.parametrize("fault", oracle.FAULTS)
def test_every_trap_lies_far_outside_the_budget(
    fault: str, weights: dict, ids: Tensor, mask: Tensor, exact: dict, rounded: dict
):
    wrong = oracle.forward(weights, Shape(), ids, mask, fault=fault)["logits"]
    with pytest.raises(AssertionError, match="over budget"):
        assert_within_budget(wrong.float(), rounded["logits"], exact["logits"])
    assert (wrong - exact["logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("names", ["hugging face", "upstream"])
def test_packed_documents_equal_padded_ones(
    names: str,
    model: NeoBERTForMaskedLM,
    packed: dict[str, Any],
    mask: Tensor,
    exact: dict,
    rounded: dict,
):
    if names == "upstream":
        packed["cu_seqlens"] = packed.pop("cu_seq_lens_q")
        packed["max_seqlen"] = packed.pop("max_length_q")
    real = mask.bool()
    logits = model(**packed).logits
    assert_within_budget(logits[0], rounded["logits"][real], exact["logits"][real])


def test_a_sentence_alone_equals_itself_in_any_company(
    model: NeoBERTForMaskedLM, ids: Tensor, exact: dict, rounded: dict
):
    for row, length in ((0, 9), (2, 1), (3, 5)):
        alone = model(ids[row : row + 1, :length]).logits[0]
        assert_within_budget(alone, rounded["logits"][row, :length], exact["logits"][row, :length])


def test_left_padding_equals_right_padding(
    model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor, exact: dict, rounded: dict
):
    left, left_mask = torch.zeros_like(ids), torch.zeros_like(mask)
    for i, length in enumerate(mask.sum(1).tolist()):
        left[i, -length:], left_mask[i, -length:] = ids[i, :length], 1
    logits = model(left, left_mask).logits[left_mask.bool()]
    real = mask.bool()
    assert_within_budget(logits, rounded["logits"][real], exact["logits"][real], ulps=4)


def test_a_document_never_sees_its_neighbours(model: NeoBERTForMaskedLM, packed: dict[str, Any]):
    before = model(**packed).logits
    packed["input_ids"][0, 9:25] = 7  # all of the second document
    after = model(**packed).logits
    assert torch.equal(before[0, :9], after[0, :9])
    assert torch.equal(before[0, 25:], after[0, 25:])
    assert not torch.equal(before[0, 9:25], after[0, 9:25])


def test_given_positions_replace_the_default(model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor):
    default = model(ids, mask).logits
    row = torch.arange(ids.shape[1])[None]
    assert torch.equal(model(ids, mask, row).logits, default)
    assert torch.equal(model(ids, mask, row.expand(len(ids), -1)).logits, default)
    assert not torch.allclose(model(ids, mask, 3 * row).logits, default, atol=1e-2)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM])
def test_the_released_width(auto: Any, tmp_path: Path):
    shape = RELEASED_WIDTH
    weights = oracle.draw(shape)
    ids = torch.randint(1, shape.vocab, (2, 24))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    exact = oracle.forward(weights, shape, ids, mask)
    rounded = oracle.forward(weights, shape, ids, mask, torch.float32)
    out = auto.from_pretrained(oracle.write(tmp_path, shape, weights))(ids, mask)
    name = "last_hidden_state" if auto is AutoModel else "logits"
    assert_within_budget(out[name], rounded[name], exact[name])


def test_float64_weights_are_no_further_from_exact(
    folder: Path, ids: Tensor, mask: Tensor, exact: dict, rounded: dict
):
    model = NeoBERTForMaskedLM.from_pretrained(folder, dtype=torch.float64)
    logits = model(ids, mask).logits
    assert logits.dtype == torch.float64
    assert_within_budget(logits.float(), rounded["logits"], exact["logits"])


def test_casting_to_bfloat16_leaves_the_rotary_angles_alone(
    folder: Path, weights: dict, ids: Tensor, mask: Tensor
):
    """Far into a document bfloat16 cannot tell neighbouring positions apart."""

    def expected(dtype: torch.dtype, fault: str | None = None) -> Tensor:
        return oracle.forward(weights, Shape(), ids, mask, dtype, fault, first_position=3000)[
            "logits"
        ]

    model = NeoBERTForMaskedLM.from_pretrained(folder).to(torch.bfloat16)
    positions = 3000 + torch.arange(ids.shape[1])[None]
    rounded, exact = expected(torch.bfloat16), expected(torch.float64)
    assert_within_budget(model(ids, mask, positions).logits, rounded, exact)
    with pytest.raises(AssertionError, match="over budget"):
        assert_within_budget(expected(torch.bfloat16, "cast_angles"), rounded, exact)


def test_the_angles_come_from_positions_in_float32_and_live_in_no_buffer(folder: Path):
    model = NeoBERTModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert not list(model.buffers())
    cos, sin = model._rotary(None, model.encoder(torch.zeros(1, 64, dtype=torch.long)), None)
    assert cos.dtype == sin.dtype == torch.float32
    even = torch.arange(0, 16, 2, dtype=torch.float64)
    angle = torch.arange(64, dtype=torch.float64)[:, None] * 10000.0 ** (-even / 16)
    assert_within_budget(cos, angle.float().cos(), angle.cos())
    assert_within_budget(sin, angle.float().sin(), angle.sin())


def test_positions_restart_with_every_document(
    model: NeoBERTForMaskedLM, packed: dict[str, Any], mask: Tensor
):
    base, lengths = model.model, mask.sum(1).tolist()
    row = base.encoder(packed["input_ids"])
    tables = base._rotary(None, row, documents_of(packed))
    for table, once in zip(tables, base._rotary(None, row[:, :16], None), strict=True):
        assert torch.equal(table, torch.cat([once[:length] for length in lengths]))

"""Packing: the real tokens, in order, and the way back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neobert_kernels import Packing, unpad
from neobert_kernels._packed import (
    document_of_token,
    full,
    restarting_positions,
    unpad_by_host,
)

CUDA = torch.cuda.is_available()


def mask_of(rows):
    return torch.tensor(rows)


masks = st.integers(1, 6).flatmap(
    lambda length: st.lists(
        st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=1, max_size=5
    )
)


@given(masks)
def test_unpack_of_pack_keeps_tokens_and_zeros_the_rest(rows):
    mask = mask_of(rows)
    packing = unpad(mask)
    x = torch.randn(*mask.shape, 3)
    there = packing.pack(x)
    assert torch.equal(there, x[mask.bool()])
    assert torch.equal(packing.unpack(there), x * mask[..., None])


@given(masks)
def test_boundaries_positions_and_lengths_agree_with_the_mask(rows):
    mask = mask_of(rows)
    packing = unpad(mask)
    lengths = [sum(row) for row in rows]
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(rows) + 1)]
    assert packing.max_seqlen == max(lengths)
    assert isinstance(packing.max_seqlen, int)
    columns = [column for row in rows for column, real in enumerate(row) if real]
    assert packing.positions.tolist() == columns
    documents = document_of_token(packing.cu_seqlens, sum(lengths))
    assert documents.tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]
    restarts = restarting_positions(packing.cu_seqlens, sum(lengths))
    assert restarts.tolist() == [i for n in lengths for i in range(n)]


@given(masks)
def test_the_host_finds_the_same(rows):
    """On a GPU small batches go there; the large ones, and all of a CPU's, stay."""
    mask = mask_of(rows)
    expected, found = unpad(mask), unpad_by_host(mask.to("cuda" if CUDA else "cpu"))
    for name in ("indices", "cu_seqlens"):
        theirs, ours = getattr(expected, name), getattr(found, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu(), theirs)
        assert ours.data_ptr() % 16 == 0 or not len(ours)  # or kernels would be others
    assert found.max_seqlen == expected.max_seqlen
    assert (found.batch_size, found.padded_length) == mask.shape


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64], ids=str)
def test_a_mask_may_have_any_whole_dtype(dtype, device):
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]], device=device)
    assert torch.equal(unpad(mask.to(dtype)).indices, unpad(mask).indices)


def test_gradients_flow_to_real_tokens_only(device):
    mask = torch.tensor([[1, 0], [1, 1]], device=device)
    packing = unpad(mask)
    x = torch.randn(2, 2, 4, device=device, requires_grad=True)
    packing.unpack(packing.pack(x) * 2).sum().backward()
    assert torch.equal(x.grad, 2.0 * mask[..., None].expand_as(x))


def test_a_batch_without_padding_moves_nothing(device):
    x = torch.randn(2, 3, 4, device=device)
    expected = unpad(torch.ones(2, 3, device=device, dtype=torch.long))
    packing = full(2, 3, x.device)
    assert torch.equal(packing.cu_seqlens, expected.cu_seqlens)
    assert torch.equal(packing.indices, expected.indices)
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.pack(x).data_ptr() == x.data_ptr()


def test_no_rows_and_no_columns():
    for shape in ((0, 4), (3, 0)):
        packing = unpad(torch.ones(shape, dtype=torch.long))
        assert packing.max_seqlen == 0
        assert packing.unpack(packing.pack(torch.ones(*shape, 2))).shape == (*shape, 2)


PACKING = unpad(torch.tensor([[1, 1, 0]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unpad([[1]]), "attention_mask: expected a torch.Tensor, got list"),
        (
            lambda: unpad(torch.ones(3, dtype=torch.long)),
            r"attention_mask: expected 2 dimensions, got shape \(3,\)",
        ),
        (lambda: PACKING.pack(torch.ones(1, 4)), r"x: expected shape \(1, 3, ...\), got \(1, 4\)"),
        (lambda: PACKING.unpack(torch.ones(3)), r"x: expected 2 tokens, got shape \(3,\)"),
        (lambda: PACKING.pack(torch.ones(1, 3, device="meta")), "x: expected device cpu, got meta"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_packing_is_immutable():
    assert isinstance(PACKING, Packing)
    with pytest.raises(AttributeError):
        PACKING.max_seqlen = 3


def test_an_additive_mask_is_refused_because_its_zeros_mean_the_opposite():
    additive = torch.tensor([[0.0, 0.0, -torch.inf]])
    with pytest.raises(ValueError, match="attention_mask: expected dtype bool or an integer one"):
        unpad(additive)

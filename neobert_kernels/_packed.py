"""Packed batches: the real tokens of a padded batch, end to end, and the way back."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neobert_kernels import _check

# Of a padded batch whose mask goes to the host: two copies, not a dozen launches. Unmeasured.
FEW_SLOTS = 16384


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the T real tokens of a padded ``[B, S]`` batch stand, document after document.

    Attributes:
        indices: ``[T]`` int64, positions in the flattened ``[B * S]`` batch, rising.
        cu_seqlens: ``[B + 1]`` int32; document b is ``cu_seqlens[b]:cu_seqlens[b + 1]``.
        max_seqlen: The longest document, a Python int.
        batch_size: B.
        padded_length: S.
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    batch_size: int
    padded_length: int

    @property
    def positions(self) -> Tensor:
        """``[T]`` int64: the column of every token, which is its position in a padded batch."""
        return self.indices % max(self.padded_length, 1)

    def pack(self, x: Tensor) -> Tensor:
        """``[B, S, ...]`` to ``[T, ...]``, differentiable."""
        _check.tensor("x", x, least_ndim=2)
        if x.shape[:2] != (self.batch_size, self.padded_length):
            rule = f"shape ({self.batch_size}, {self.padded_length}, ...)"
            raise _check.error("x", rule, tuple(x.shape))
        _check.device("x", x, self.indices.device)
        flat = x.reshape(self.batch_size * self.padded_length, *x.shape[2:])
        return flat if len(self.indices) == len(flat) else flat.index_select(0, self.indices)

    def unpack(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """``[T, ...]`` to ``[B, S, ...]``, ``fill`` at the padding, differentiable."""
        _check.tensor("x", x, least_ndim=1)
        if len(x) != len(self.indices):
            raise _check.error("x", f"{len(self.indices)} tokens", f"shape {tuple(x.shape)}")
        _check.device("x", x, self.indices.device)
        slots = self.batch_size * self.padded_length
        if len(x) != slots:
            x = x.new_full((slots, *x.shape[1:]), fill).index_copy(0, self.indices, x)
        return x.view(self.batch_size, self.padded_length, *x.shape[1:])


def unpad(attention_mask: Tensor) -> Packing:
    """Find the real tokens of a padded batch. Padding may be on either side, or between tokens.

    Args:
        attention_mask: ``[B, S]`` bool or integer; zero means padding. An additive float mask means
            the opposite, so floats are refused.

    Returns:
        The `Packing`. On a GPU this waits once a batch, never once a layer: up to `FEW_SLOTS` slots
        for the mask, of which the host makes the rest, and beyond for T and the longest length.

    Raises:
        ValueError: ``attention_mask`` is not two-dimensional, or not of a bool or integer dtype.
    """
    _check.tensor("attention_mask", attention_mask, ndim=2)
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise _check.error("attention_mask", "dtype bool or an integer one", attention_mask.dtype)
    if _suits_host(attention_mask):
        return unpad_by_host(attention_mask)
    real = attention_mask != 0
    lengths = real.sum(1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Packing(
        indices=real.flatten().nonzero().squeeze(1),
        cu_seqlens=cu_seqlens,
        max_seqlen=int(lengths.max()) if lengths.numel() else 0,
        batch_size=attention_mask.shape[0],
        padded_length=attention_mask.shape[1],
    )


def _suits_host(mask: Tensor) -> bool:
    """A small one on a GPU, unless a compiler or a subclass has to see what becomes of it."""
    small = mask.is_cuda and mask.numel() <= FEW_SLOTS
    return small and type(mask) is Tensor and not torch.compiler.is_compiling()


def unpad_by_host(attention_mask: Tensor) -> Packing:
    """`unpad` of a small batch: to the host and back, where a GPU takes a dozen launches."""
    B, S = attention_mask.shape
    real = attention_mask.cpu().numpy() != 0
    lengths = real.sum(1)
    indices = real.reshape(-1).nonzero()[0]
    # Both in one copy, each from a multiple of 16 bytes; four boundaries take as many.
    first = B // 4 * 2 + 2
    sent = np.zeros(first + len(indices), np.int64)
    np.cumsum(lengths, out=sent[:first].view(np.int32)[1 : B + 1])
    sent[first:] = indices
    found = torch.from_numpy(sent).to(attention_mask.device)
    return Packing(
        indices=found[first:],
        cu_seqlens=found[:first].view(torch.int32)[: B + 1],
        max_seqlen=int(lengths.max(initial=0)),
        batch_size=B,
        padded_length=S,
    )


def full(batch_size: int, length: int, device: torch.device) -> Packing:
    """The packing of a batch without padding: nothing moves, nothing is read back."""
    tokens = batch_size * length
    return Packing(
        indices=torch.arange(tokens, device=device),
        cu_seqlens=torch.arange(batch_size + 1, dtype=torch.int32, device=device) * length,
        max_seqlen=length,
        batch_size=batch_size,
        padded_length=length,
    )


def document_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """``[T]`` int64: the document each packed token belongs to, without a synchronisation."""
    lengths = cu_seqlens.diff()
    documents = torch.arange(len(lengths), device=cu_seqlens.device)
    return documents.repeat_interleave(lengths.long(), output_size=tokens)


def restarting_positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """``[T]`` int64: each document's tokens counted from 0."""
    starts = cu_seqlens[:-1].long()[document_of_token(cu_seqlens, tokens)]
    return torch.arange(tokens, device=cu_seqlens.device) - starts

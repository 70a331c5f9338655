"""One call's input in packed form, however the caller laid it out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neobert_kernels import _check
from neobert_kernels._packed import Packing, full, restarting_positions, unpad


@dataclass(frozen=True, eq=False)
class Batch:
    """Documents end to end: boundaries, positions, and the way back to the caller's layout.

    Attributes:
        cu_seqlens: ``[B + 1]`` int32.
        max_seqlen: The longest document.
        positions: ``[T]`` int64.
        packing: How a padded batch was packed; None if the caller packed it.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    positions: Tensor
    packing: Packing | None

    def pack(self, x: Tensor) -> Tensor:
        """``[B, S, ...]`` (packed: ``[1, T, ...]``) to ``[T, ...]``."""
        return x.flatten(0, 1) if self.packing is None else self.packing.pack(x)

    def unpack(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """``[T, ...]`` back to what the caller sent; ``fill`` at the padding."""
        return x[None] if self.packing is None else self.packing.unpack(x, fill)

    def layout(self, packed: bool) -> Callable[[Tensor], Tensor]:
        """`unpack`, or where ``packed`` output was asked for, ``[T, ...]`` to ``[1, T, ...]``."""
        return (lambda x: x[None]) if packed else self.unpack

    def with_positions(self, positions: Tensor) -> "Batch":
        return replace(self, positions=positions)


def read_batch(
    tokens: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
    longest: int | None,
    first: int = 0,
) -> Batch:
    """Find the documents of a call.

    Args:
        tokens: ``input_ids [B, S]`` or ``inputs_embeds [B, S, C]``.
        attention_mask: ``[B, S]`` or None for a batch without padding.
        position_ids: ``[B, S]`` or ``[1, S]``. With one row and no mask, positions that restart at
            ``first`` mean packed documents.
        kwargs: May hold ``cu_seq_lens_q`` and ``max_length_q`` (or ``cu_seqlens`` and
            ``max_seqlen``) of a packed ``[1, T]`` input; they are taken out.
        longest: The model's maximum length in tokens, or None.
        first: The position of a document's first token.

    Raises:
        ValueError: A shape or a combination breaks the rules above, or a document is too long.
    """
    rows, length = tokens.shape[:2]
    if position_ids is not None:
        _check.tensor("position_ids", position_ids, ndim=2)
        _check.shape("position_ids", position_ids, (1 if len(position_ids) == 1 else rows, length))
    bounds = boundaries(tokens, attention_mask, position_ids, kwargs, first)
    if bounds is not None:
        cu_seqlens, max_seqlen = bounds
        _check_length(max_seqlen, longest)
        if position_ids is None:
            positions = restarting_positions(cu_seqlens, length) + first
        else:
            positions = position_ids[0]
        return Batch(cu_seqlens, max_seqlen, positions, packing=None)
    _check_length(length, longest)
    if attention_mask is None:
        packing = full(rows, length, tokens.device)
    else:
        _check.tensor("attention_mask", attention_mask, ndim=2)
        _check.shape("attention_mask", attention_mask, (rows, length))
        _check.device("attention_mask", attention_mask, tokens.device)
        packing = unpad(attention_mask)
    if position_ids is None:
        positions = packing.positions + first
    else:
        positions = packing.pack(position_ids.expand(rows, length))
    return Batch(packing.cu_seqlens, packing.max_seqlen, positions, packing)


def _check_length(length: int, longest: int | None) -> None:
    if longest is not None and length > longest:
        raise _check.error("input_ids", f"at most {longest} tokens a document", length)


def boundaries(
    tokens: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
    first: int,
) -> tuple[Tensor, int] | None:
    """``(cu_seqlens, max_seqlen)`` of an input ``[1, T, ..]`` that the caller packed, else None."""
    found, names = None, ("", "")
    for lengths, longest in (("cu_seq_lens_q", "max_length_q"), ("cu_seqlens", "max_seqlen")):
        cu_seqlens, max_seqlen = kwargs.pop(lengths, None), kwargs.pop(longest, None)
        if cu_seqlens is not None:
            if max_seqlen is None:
                raise _check.error(longest, f"the longest length beside {lengths}", None)
            found, names = (cu_seqlens, int(max_seqlen)), (lengths, longest)
    other, _ = kwargs.pop("cu_seq_lens_k", None), kwargs.pop("max_length_k", None)
    if found is not None:
        if len(tokens) != 1:
            raise _check.error("input_ids", "one row when packed", f"{len(tokens)} rows")
        if attention_mask is not None:
            raise _check.error("attention_mask", "None when packed", tuple(attention_mask.shape))
        _check.documents(*found, tokens.shape[1], tokens.device, names)
        if other is not None and other is not found[0] and not _same(other, found[0]):
            rule = f"the documents of {names[0]} {tuple(found[0].shape)}"
            raise _check.error("cu_seq_lens_k", rule, f"others {tuple(other.shape)}")
        return found
    if other is not None:
        raise _check.error("cu_seq_lens_k", "None without cu_seq_lens_q", tuple(other.shape))
    if position_ids is None or attention_mask is not None or len(tokens) != 1:
        return None
    positions = position_ids[0]
    starts = (positions == first).nonzero().squeeze(1)
    if first and len(zeros := (positions == 0).nonzero()) > 1:
        rule = f"packed documents that start at position {first}, as this model counts"
        got = f"{len(zeros)} that start at 0 (pass cu_seq_lens_q and max_length_q instead)"
        raise _check.error("position_ids", rule, got)
    if len(starts) < 2:
        return None
    bounds = torch.cat([starts, starts.new_tensor([len(positions)])]).int()
    if int(bounds[0]):
        raise _check.error("position_ids", f"a first position of {first}", int(positions[0]))
    expected = restarting_positions(bounds, len(positions)) + first
    if not torch.equal(positions, expected.to(positions)):
        rule = f"{first}, {first + 1}, {first + 2}, ... from each restart"
        raise _check.error("position_ids", rule, "positions that skip or repeat")
    return bounds, int(bounds.diff().max())


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal as far as it can be seen without waiting for a GPU."""
    readable = a.device.type == b.device.type == "cpu" and not torch.compiler.is_compiling()
    return a.shape == b.shape and (not readable or torch.equal(a, b))


def setting(kwargs: dict[str, Any], name: str, config: Any) -> bool:
    """A call's output option, or the config's default for it; taken out of ``kwargs``."""
    value = kwargs.pop(name, None)
    return bool(getattr(config, name, False) if value is None else value)


# Arguments of transformers' attention functions and decoders that change what is computed.
_IGNORED = (
    "cache",
    "encoder_attention_mask",
    "encoder_hidden_states",
    "head_mask",
    "is_causal",
    "past_key_values",
    "sliding_window",
)


def refuse_ignored(kwargs: dict[str, Any]) -> None:
    """Raise for an argument that would change the result and that a patched encoder ignores."""
    for name in _IGNORED:
        value = kwargs.get(name)
        if value is not None and value is not False:
            got = value if isinstance(value, int) else type(value).__name__
            raise _check.error(name, "None in a patched encoder, which would ignore it", got)

"""One call's input in packed form, however the caller laid it out."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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

    def documents(self) -> Iterator[tuple["Batch", slice]]:
        """Each document as a batch of its own, and its tokens. On a GPU this reads boundaries."""
        for low, high in itertools.pairwise(self.cu_seqlens.tolist()):
            bounds = self.cu_seqlens.new_tensor([0, high - low])
            yield Batch(bounds, high - low, self.positions[low:high], None), slice(low, high)

    def with_positions(self, positions: Tensor) -> "Batch":
        return replace(self, positions=positions)

    def with_longest(self, max_seqlen: int) -> "Batch":
        """``max_seqlen`` may be more than the longest document has."""
        return replace(self, max_seqlen=max_seqlen)


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
            ``first`` mean packed documents, and those that restart elsewhere are refused.
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
        _check.dtype("position_ids", position_ids, (torch.int64, torch.int32))
        _check.shape("position_ids", position_ids, (1 if len(position_ids) == 1 else rows, length))
    if attention_mask is not None:
        _check.tensor("attention_mask", attention_mask, ndim=2)
    bounds = boundaries(tokens, attention_mask, position_ids, kwargs, first)
    if bounds is not None:
        cu_seqlens, max_seqlen = bounds
        _check_length(max_seqlen, longest, "max_length_q" if position_ids is None else "input_ids")
        if position_ids is None:
            positions = restarting_positions(cu_seqlens, length) + first
        else:
            positions = position_ids[0]
            _refuse_other_count(positions, first, 1)
        return Batch(cu_seqlens, max_seqlen, positions, packing=None)
    _check_length(length, longest, "input_ids")
    if attention_mask is None:
        packing = full(rows, length, tokens.device)
    else:
        _check.shape("attention_mask", attention_mask, (rows, length))
        _check.device("attention_mask", attention_mask, tokens.device)
        packing = unpad(attention_mask)
    if position_ids is None:
        positions = packing.positions + first if first else packing.positions
    else:
        positions = packing.pack(position_ids.expand(rows, length))
    return Batch(packing.cu_seqlens, packing.max_seqlen, positions, packing)


def _check_length(length: int, longest: int | None, name: str) -> None:
    if longest is not None and length > longest:
        raise _check.error(name, f"at most {longest} tokens a document", length)


def boundaries(
    tokens: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
    first: int,
) -> tuple[Tensor, int] | None:
    """``(cu_seqlens, max_seqlen)`` of an input ``[1, T, ..]`` that the caller packed, else None."""
    found, names = given_boundaries(kwargs)
    if found is not None:
        if len(tokens) != 1:
            raise _check.error("input_ids", "one row when packed", f"{len(tokens)} rows")
        if attention_mask is not None:
            raise _check.error("attention_mask", "None when packed", tuple(attention_mask.shape))
        _check.documents(*found, tokens.shape[1], tokens.device, names)
        return found
    if position_ids is None or attention_mask is not None or len(tokens) != 1:
        return None
    positions = position_ids[0]
    # A document begins where the count does, or where it falls back to something else, which is
    # refused below. ``first - 1`` is a padding id inside a text (RoBERTa).
    falls = F.pad(positions.diff() <= 0, (1, 0)) & (positions != first - 1)
    starts = ((positions == first) | falls).nonzero().squeeze(1)
    _refuse_other_count(positions, first, 2)
    if len(starts) < 2 and not falls[starts].any():
        return None
    if len(starts) == len(positions):
        rule = "documents of more than one token (for others pass cu_seq_lens_q and max_length_q)"
        raise _check.error("position_ids", rule, f"{first} at every token")
    bounds = torch.cat([starts, starts.new_tensor([len(positions)])]).int()
    if int(bounds[0]):
        rule = f"documents from position {first} on (for others pass cu_seq_lens_q, max_length_q)"
        got = f"{int(positions[0])} at the first token, a restart at token {int(bounds[0])}"
        raise _check.error("position_ids", rule, got)
    expected = restarting_positions(bounds, len(positions)) + first
    if not torch.equal(positions, expected.to(positions)):
        rule = f"{first}, {first + 1}, {first + 2}, ... from each restart"
        raise _check.error("position_ids", rule, "positions that skip or repeat")
    return bounds, int(bounds.diff().max())


def _refuse_other_count(positions: Tensor, first: int, at_least: int) -> None:
    """Raise for documents counted from 0, as collators do, where the model counts from ``first``.

    Position 0 exists in such a model's table, so nothing else would notice.
    """
    if first == 0 or torch.compiler.is_compiling():
        return
    zeros = int((positions == 0).sum())
    if zeros >= at_least:
        rule = f"packed documents that start at position {first}, as this model counts"
        got = f"{zeros} that start at 0 (pass cu_seq_lens_q and max_length_q, no position_ids)"
        raise _check.error("position_ids", rule, got)


def setting(kwargs: dict[str, Any], name: str, config: Any) -> bool:
    """A call's output option, or the config's default for it; taken out of ``kwargs``."""
    value = kwargs.pop(name, None)
    return bool(getattr(config, name, False) if value is None else value)


# Boundaries and longest document of a packed call, in transformers' and in upstream's words.
_PAIRS = (("cu_seq_lens_q", "max_length_q"), ("cu_seqlens", "max_seqlen"))
_KEYS = ("cu_seq_lens_k", "max_length_k")


def given_boundaries(
    kwargs: dict[str, Any],
) -> tuple[tuple[Tensor, int] | None, tuple[str, str]]:
    """The one pair of boundaries and length in ``kwargs``, with its names; all are taken out."""
    given = {name: kwargs.pop(name, None) for pair in (*_PAIRS, _KEYS) for name in pair}
    present = [pair for pair in _PAIRS if any(given[name] is not None for name in pair)]
    if not present:
        for name in _KEYS:
            if given[name] is not None:
                raise _check.error(name, "None without cu_seq_lens_q", _shown(given[name]))
        return None, ("", "")
    if len(present) > 1:
        raise _check.error(present[1][0], f"None beside {present[0][0]}", "both")
    names = present[0]
    for name, other in (names, names[::-1]):
        if given[name] is None:
            raise _check.error(name, f"a value beside {other}", None)
    bounds, longest = (given[name] for name in names)
    if isinstance(longest, Tensor) and longest.numel() == 1 and longest.device.type == "cpu":
        longest = longest.item()
    if not isinstance(longest, int) or isinstance(longest, bool):
        raise _check.error(names[1], "an int", repr(longest))
    _check_keys(given["cu_seq_lens_k"], bounds, names[0])
    if given["max_length_k"] not in (None, longest):
        raise _check.error("max_length_k", f"{names[1]} ({longest})", given["max_length_k"])
    return (bounds, longest), names


def _check_keys(keys: Any, bounds: Any, name: str) -> None:
    """``cu_seq_lens_k`` must say what the queries' boundaries say; values are read on a CPU."""
    if keys is None or keys is bounds:
        return
    _check.tensor("cu_seq_lens_k", keys)
    _check.tensor(name, bounds)
    _check.shape("cu_seq_lens_k", keys, bounds.shape)
    on_cpu = keys.device.type == bounds.device.type == "cpu"
    if on_cpu and not torch.compiler.is_compiling() and not torch.equal(keys, bounds):
        raise _check.error("cu_seq_lens_k", f"the documents of {name}", "others")


def _shown(value: Any) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else value


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

"""Other attentions on packed ``q, k, v [T, H, D]``: the library's peers, and FlexAttention.

One that is missing or refuses its input is reported as absent, with the reason.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neobert_kernels._packed import document_of_token
from neobert_kernels.ops.attention.peers import PEERS, attend

Peer = Callable[[Tensor, Tensor, Tensor, list[int], Tensor], Tensor]


def of_library(name: str) -> Peer:
    """A peer of `nk.attention`, told the lengths, so that none waits for the device."""

    def peer(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], cu_seqlens: Tensor) -> Tensor:
        return attend(name, q, k, v, cu_seqlens, max(lengths), lengths=lengths)

    return peer


def flex(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], cu_seqlens: Tensor) -> Tensor:
    """FlexAttention over all tokens at once; blocks without a common document are skipped."""
    parts = [x.transpose(0, 1)[None] for x in (q, k, v)]
    mask = _block_mask(tuple(lengths), cu_seqlens)
    return _compiled_flex()(*parts, block_mask=mask)[0].transpose(0, 1)


_MASKS: dict[tuple[int, ...], Any] = {}


def _block_mask(lengths: tuple[int, ...], cu_seqlens: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    if lengths not in _MASKS:
        T = sum(lengths)
        document = document_of_token(cu_seqlens, T)

        def together(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return document[i] == document[j]

        _MASKS[lengths] = create_block_mask(together, None, None, T, T, device=str(document.device))
    return _MASKS[lengths]


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def attention_peers(device: str) -> dict[str, Peer]:
    """Every peer there may be on ``device``; a benchmark finds out which there are."""
    peers = {name: of_library(name) for name in PEERS}
    return peers | {"flex": flex} if device == "cuda" else peers

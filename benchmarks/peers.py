"""Other attentions on packed ``q, k, v [T, H, D]``, each pinned to one implementation.

A peer is never a fallback of ours: it runs where a benchmark names it, and one that is missing or
refuses its input is reported as absent, with the reason.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from neobert_kernels._packed import document_of_token

Peer = Callable[[Tensor, Tensor, Tensor, list[int], Tensor], Tensor]
PINNED = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}


def sdpa(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], cu_seqlens: Tensor
) -> Tensor:
    """Padded to the longest document; a ragged batch pays for padding, unpadding and its mask."""
    B, S = len(lengths), max(lengths)
    if min(lengths) == S:
        parts = [x.unflatten(0, (B, S)).transpose(1, 2) for x in (q, k, v)]
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*parts).transpose(1, 2).flatten(0, 1)
    row, rows = _slots(tuple(lengths), q.device)
    q, k, v = (
        x.new_zeros(B * S, *x.shape[1:]).index_copy(0, rows, x).unflatten(0, (B, S)).transpose(1, 2)
        for x in (q, k, v)
    )
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(q, k, v, attn_mask=row)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, rows)


@functools.cache
def _slots(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The mask of real keys ``[B, 1, 1, S]``, and each token's row in the padded batch."""
    S = max(lengths)
    real = torch.arange(S, device=device) < torch.tensor(lengths, device=device)[:, None]
    return real[:, None, None], real.flatten().nonzero().squeeze(1)


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], cu_seqlens: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(lengths)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
    assert isinstance(out, Tensor)
    return out


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], cu_seqlens: Tensor, deterministic: bool
) -> Tensor:
    module: Any = importlib.import_module("flash_attn")
    longest = max(lengths)
    return module.flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, deterministic=deterministic
    )


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
    """Every peer there may be on ``device``; `working` finds out which there are."""
    peers: dict[str, Peer] = {
        name: functools.partial(sdpa, backend) for name, backend in PINNED.items()
    }
    if device == "cuda":
        peers |= {"torch_varlen": torch_varlen, "flex": flex}
        for name, fixed in (("flash_attn", False), ("flash_attn_deterministic", True)):
            peers[name] = functools.partial(flash_attn, deterministic=fixed)
    return peers


def installed(name: str) -> bool:
    """Whether a peer's package is there at all."""
    return not name.startswith("flash_attn") or importlib.util.find_spec("flash_attn") is not None

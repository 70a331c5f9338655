"""Attention by others, for those who ask: torch's SDPA on one backend, torch varlen, flash-attn.

A peer runs where `attention` is given its name, or the environment variable ``NEOBERT_ATTENTION``
is; never by itself. One that is missing or cannot do what is asked is an error, and nothing else
runs in its place. RoPE is applied before, by `rope`. No document sees another: varlen peers take
the boundaries, SDPA takes documents of one length as a batch, others as a masked padded batch.

What `attention` promises beyond its result is not promised here: a peer rounds, sums and repeats as
it likes, SDPA asks the device for the lengths (a synchronization), and a compiler breaks its graph.
"""

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from neobert_kernels import _check
from neobert_kernels.ops.rope import rope

OURS = "neobert_kernels"
VARIABLE = "NEOBERT_ATTENTION"
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Packed:
    """Documents and options of one call; ``lengths`` only for peers that need them."""

    cu_seqlens: Tensor
    max_seqlen: int
    window: int | None
    scale: float | None
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Peer:
    """``run(q, k, v, packed)``, the dtypes it takes on a GPU and on a CPU, and what it needs."""

    run: Callable[[Tensor, Tensor, Tensor, Packed], Tensor]
    gpu: Sequence[torch.dtype] = HALF
    cpu: Sequence[torch.dtype] = ()
    package: str = "torch"
    lengths: bool = False
    mask_on_gpu: bool = True


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    B, S = len(packed.lengths), max(packed.lengths)
    mask, rows = _padding(packed.lengths, packed.window, q.device)

    def batch(x: Tensor) -> Tensor:
        if rows is not None:
            x = x.new_zeros(B * S, *x.shape[1:]).index_copy(0, rows, x)
        return x.unflatten(0, (B, S)).transpose(1, 2)

    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(
            batch(q), batch(k), batch(v), attn_mask=mask, scale=packed.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    out = out.transpose(1, 2).flatten(0, 1)
    return out if rows is None else out.index_select(0, rows)


@functools.lru_cache(maxsize=2)  # of one forward: its layers with and without a window
@torch.inference_mode(False)  # autograd may keep what an earlier inference made
def _padding(
    lengths: tuple[int, ...], window: int | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The mask of who sees whom, ``[B or 1, 1, S or 1, S]``, and each token's row in the batch.

    None for a mask that would hide nothing, and for rows that are the tokens as they are.
    """
    S = max(lengths)
    i = torch.arange(S, device=device)
    mask = rows = None
    if min(lengths) < S:
        real = i < torch.tensor(lengths, device=device)[:, None]
        mask, rows = real[:, None, None], real.flatten().nonzero().squeeze(1)
    if window is not None and window < S - 1:
        near = ((i[:, None] - i).abs() <= window)[None, None]
        # Padding sees its neighbours, or a softmax over nothing would be NaN.
        mask = near if mask is None else near & (mask | ~mask.transpose(-1, -2))
    return mask, rows


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    varlen: Any = importlib.import_module("torch.nn.attention.varlen")
    options: dict[str, Any] = {"scale": packed.scale}
    if packed.window is not None:
        options["window_size"] = (packed.window, packed.window)
    group = q.shape[1] // k.shape[1]
    if group > 1 and _takes(varlen.varlen_attn, "enable_gqa"):
        options["enable_gqa"] = True
    elif group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    bounds, longest = packed.cu_seqlens, packed.max_seqlen
    return varlen.varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)


@functools.cache
def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether this version of a peer has a parameter."""
    return name in inspect.signature(function).parameters


def _flash_attn(deterministic: bool, q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    module: Any = importlib.import_module("flash_attn")
    reach = -1 if packed.window is None else packed.window
    bounds, longest = packed.cu_seqlens, packed.max_seqlen
    return module.flash_attn_varlen_func(
        q, k, v, bounds, bounds, longest, longest, softmax_scale=packed.scale,
        window_size=(reach, reach), deterministic=deterministic,
    )  # fmt: skip


def _pinned(backend: SDPBackend, **needs: Any) -> Peer:
    return Peer(functools.partial(_sdpa, backend), lengths=True, **needs)


PEERS = {
    "sdpa_flash": _pinned(SDPBackend.FLASH_ATTENTION, cpu=_check.DTYPES, mask_on_gpu=False),
    "sdpa_cudnn": _pinned(SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": _pinned(SDPBackend.EFFICIENT_ATTENTION, gpu=_check.DTYPES),
    "sdpa_math": _pinned(SDPBackend.MATH, gpu=_check.DTYPES, cpu=_check.DTYPES),
    "torch_varlen": Peer(_torch_varlen),
    "flash_attn": Peer(functools.partial(_flash_attn, False), package="flash_attn"),
    "flash_attn_deterministic": Peer(functools.partial(_flash_attn, True), package="flash_attn"),
}


def asked(implementation: str | None = None) -> str | None:
    """The peer that the argument or else the environment names; None for our own.

    Raises:
        ValueError: There is no such peer.
    """
    name = os.environ.get(VARIABLE) if implementation is None else implementation
    if name is None or name == OURS or (implementation is None and not name):
        return None
    if not isinstance(name, str) or name not in PEERS:
        where = "implementation" if implementation is not None else VARIABLE
        raise _check.error(where, f"one of {', '.join((OURS, *PEERS))}", repr(name))
    return name


def missing(name: str, device: torch.device | str) -> str:
    """Why a peer cannot run on a device at all; empty where nothing is known against it."""
    peer, kind = PEERS[name], torch.device(device).type
    if kind == "cpu" and not peer.cpu:
        return "needs a GPU"
    if importlib.util.find_spec(peer.package) is None:
        return f"the package {peer.package} is not installed"
    return ""


def attend(name: str, *arguments: Any, lengths: Sequence[int] | None = None) -> Tensor:
    """`attention` of checked arguments, in its order; ``lengths`` spare SDPA the synchronization.

    Raises:
        ValueError: The peer is not there, or not for this device, dtype, window or batch.
    """
    run = _attend
    if torch.compiler.is_compiling():  # not a decorator, which would load the compiler for all
        run = torch.compiler.disable(_attend, reason="attention's peers are not traced")
    return run(name, *arguments, lengths=lengths)


def _attend(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    window: int | None = None,
    scale: float | None = None,
    *,
    lengths: Sequence[int] | None,
) -> Tensor:
    peer, kind = PEERS[name], q.device.type
    reason = missing(name, q.device)
    if reason:
        raise _check.error("implementation", f"a peer that runs on {kind}", f"{name}: {reason}")
    dtypes = peer.cpu if kind == "cpu" else peer.gpu
    if q.dtype not in dtypes:
        rule = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise _check.error("q", f"dtype {rule} for {name}", str(q.dtype).removeprefix("torch."))
    if lengths is None and peer.lengths:
        lengths = cu_seqlens.diff().tolist()
    real = tuple(n for n in lengths or () if n)
    if kind != "cpu" and not peer.mask_on_gpu and (window is not None or len(set(real)) > 1):
        rule = f"documents of one length and no window for {name}, which takes no mask"
        raise _check.error("implementation", rule, "others (torch_varlen takes any)")
    if cos is not None and sin is not None:
        q, k = rope(q, cos, sin, interleaved), rope(k, cos, sin, interleaved)
    if not len(q):  # empty, and yet it depends on all three
        return q * (k.sum() + v.sum())
    try:
        with torch.autocast(kind, enabled=False):
            return peer.run(q, k, v, Packed(cu_seqlens, max_seqlen, window, scale, real))
    except RuntimeError as error:
        if not any(words in str(error) for words in ("No viable backend", "No available kernel")):
            raise
        got = f"shapes {tuple(q.shape)} and {tuple(k.shape)}, {q.dtype} on {q.device}"
        raise _check.error("implementation", f"inputs that torch's {name} takes", got) from error

"""attention against pinned peers: fixed lengths and a ragged batch, forward and backward.

RoPE is counted on both sides: peers get q and k from `nk.rope`. Matrix work is counted on real
tokens, ``4 * H * D * sum(length**2)`` forward and 2.5 times that more backward (`neobert.floors`).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ceilings import Ceilings
from parity import assert_parity, assert_within_budget
from peers import Peer, attention_peers
from timing import columns, host_time, interleaved, over, peak_memory, ratios, rotated
from torch import Tensor

import neobert_kernels as nk
from neobert.floors import operators
from neobert_kernels import _runtime
from neobert_kernels._packed import restarting_positions

H, D = 12, 64
TOKENS = 16384


def lengths_of(case: str, quick: bool) -> list[int]:
    tokens = 128 if quick else TOKENS if torch.cuda.is_available() else 2048
    if case != "ragged":
        length = min(int(case), tokens)
        return [length] * (tokens // length)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(64, generator=generator) * tokens / 256 + tokens / 64
    return [max(1, int(n)) for n in drawn]


def ours(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], cu_seqlens: Tensor, cos: Tensor,
         sin: Tensor) -> Tensor:  # fmt: skip
    return nk.attention(
        q, k, v, cu_seqlens, max(lengths), cos=cos, sin=sin, interleaved=True
    )  # fmt: skip


def with_rope(peer: Peer) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], cu_seqlens: Tensor, cos: Tensor,
             sin: Tensor) -> Tensor:  # fmt: skip
        q, k = (nk.rope(x, cos, sin, interleaved=True) for x in (q, k))
        return peer(q, k, v, lengths, cu_seqlens)

    return call


def working(
    lengths: list[int], options: tuple[Any, ...], inputs: list[Tensor], training: bool, device: str
) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """Peers that run here and are right, and why the others are absent."""
    found, absent = {}, {}
    cu_seqlens, cos, sin = options

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nk.attention_reference(
            q, k, v, cu_seqlens, max(lengths), cos=cos, sin=sin, interleaved=True
        )

    rounded, exact = reference(*inputs), reference(*(x.double() for x in inputs))
    for name, peer in attention_peers(device).items():
        call = with_rope(peer)
        try:
            leaves = [x.detach().requires_grad_(training) for x in inputs]
            out = call(*leaves, lengths, *options)
            if training:
                torch.autograd.grad(out.sum(), leaves)
            assert_within_budget(out.detach(), rounded, exact, name, ulps=4)
        except Exception as error:  # whatever it raises is why it is absent
            absent[f"{name}_absent"] = str(error).strip().partition("\n")[0][:120]
        else:
            found[name] = call
    return found, absent


@pytest.mark.importance(1)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", ["512", "1024", "2048", "4096", "ragged"])
def test_attention(
    case: str,
    training: bool,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    gpu = device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    lengths = lengths_of(case, quick)
    if quick and case not in ("512", "ragged"):
        pytest.skip("--quick runs one fixed length")
    if not quick and case.isdigit() and int(case) > max(lengths):
        pytest.skip("a size for a GPU")
    T, shown = sum(lengths), f"{max(lengths)}" if case.isdigit() else case
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    options = (cu_seqlens, *nk.rope_table(restarting_positions(cu_seqlens, T), D))

    def make() -> list[Tensor]:
        qkv = torch.randn(T, H, 3, D, device=device, dtype=dtype)
        return [x.detach().requires_grad_(training) for x in qkv.unbind(2)]

    few = [0, 65, 1, 62]
    few_bounds = torch.tensor([0, *few], device=device).cumsum(0).int()
    few_options = (few_bounds, *nk.rope_table(restarting_positions(few_bounds, 128), D))
    assert_parity(
        lambda q, k, v: ours(q, k, v, few, *few_options),
        lambda q, k, v: nk.attention_reference(
            q, k, v, few_options[0], 65, cos=few_options[1], sin=few_options[2], interleaved=True
        ),
        [torch.randn(128, 2, D, device=device, dtype=dtype) for _ in range(3)],
    )
    peers, absent = working(lengths, options, [x.detach() for x in make()], training, device)
    sets = rotated(make, device)
    gradients = None
    if training:
        gradients = [[torch.randn(T, H, D, device=device, dtype=dtype)] for _ in sets]

    def packed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: function(q, k, v, lengths, *options)

    variants = {
        name: over(sets, packed(f), gradients) for name, f in {"ours": ours, **peers}.items()
    }
    ceilings = Ceilings(device, dtype, quick)
    timings = once(
        lambda: interleaved(variants | ceilings.variants, rounds=3 if quick else 30, device=device)
    )
    cost = operators.attention(lengths, H, D, dtype.itemsize, rotary=True)
    if training:
        cost = cost.plus(operators.attention_backward(lengths, H, D, dtype.itemsize, rotary=True))
    memory = {f"{k}_peak_bytes": peak_memory(v, device) for k, v in variants.items()} if gpu else {}
    host = host_time(variants, calls=3, rounds=3) if gpu else {}
    record(
        "attention",
        f"{'forward and backward' if training else 'forward'}, {shown}, {T} tokens, "
        f"{str(dtype).removeprefix('torch.')}, {device}",
        implementation=_runtime.implementation("attention", device),
        **ceilings.against(cost, timings),
        **ratios(timings),
        **{f"{name}_host_s": timing.median_s for name, timing in host.items()},
        **memory,
        **absent,
        **columns(timings),
    )

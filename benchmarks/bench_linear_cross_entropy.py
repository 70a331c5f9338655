"""linear_cross_entropy against the dense loss, torch.compile and Liger; time and peak memory.

On a GPU also the bare matrix products on the gathered rows, the floor of what any of them can do.
On a CPU each variant's peak memory is that of a process of its own.
"""

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ceilings import Ceilings
from parity import assert_parity
from timing import Timing, Variant, columns, host_time, interleaved, peak_memory, ratios
from torch import Tensor
from torch.nn import functional as F

import neobert_kernels as nk
from neobert.floors import operators
from neobert_kernels import _runtime

C, V, SHARE = 768, 30_522, 0.2
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return nk.linear_cross_entropy(x, weight, labels, bias)


def dense(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias), labels)


def make(tokens: int, device: str, vocabulary: int = V) -> list[Tensor]:
    """x, weight, bias and labels, of which every fifth counts."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, weight, bias = (
        torch.randn(shape, device=device, dtype=dtype) * scale
        for shape, scale in (((tokens, C), 1.0), ((vocabulary, C), 0.02), ((vocabulary,), 0.02))
    )
    labels = torch.randint(vocabulary, (tokens,), device=device)
    labels[torch.arange(tokens, device=device) % round(1 / SHARE) > 0] = -100
    return [x, weight, bias, labels]


def step(loss: Loss, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Forward and backward."""
    leaves = [t.detach().requires_grad_() for t in tensors[:3]]
    return torch.autograd.grad(loss(leaves[0], leaves[1], leaves[2], tensors[3]), leaves)


def products(tensors: list[Tensor]) -> Variant:
    """The three matrix products on gathered rows, with all logits in memory."""
    x, weight, _, labels = tensors
    rows = x[labels != -100]
    dlogits = torch.randn(len(rows), len(weight), device=x.device, dtype=x.dtype)
    return lambda _: (rows @ weight.t(), dlogits @ weight, dlogits.t() @ rows)


def liger() -> Loss | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    module = importlib.import_module("liger_kernel.transformers")
    fused = module.LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, bias, labels: fused(weight, x, labels, bias)


def peak_bytes(name: str, tokens: int) -> int:
    """Peak memory of one CPU step above that of its inputs, in a process of its own."""
    code = (
        f"import json, sys, torch; sys.path[:0] = {sys.path!r}\n"
        f"import bench_linear_cross_entropy as bench\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"tensors = bench.make({tokens}, 'cpu')\n"
        f"bench.step(bench.{name}, [t[:64] if len(t) == {tokens} else t for t in tensors])\n"
        f"def kib(key): return next(int(line.split()[1]) for line in open('/proc/self/status')\n"
        f"                          if line.startswith(key))\n"
        f"open('/proc/self/clear_refs', 'w').write('5')\n"
        f"before = kib('VmRSS'); bench.step(bench.{name}, tensors)\n"
        f"print(json.dumps([before * 1024, kib('VmHWM') * 1024]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, peak = json.loads(done.stdout.splitlines()[-1])
    return peak - before


def interleaved_on_gpu(variants: dict[str, Variant], rounds: int) -> dict[str, Timing]:
    return interleaved(variants, rounds=rounds, device="cuda")


def few_rounds(variants: dict[str, Variant], rounds: int) -> dict[str, Timing]:
    """For steps of many seconds: one call each to warm up, then one in every round."""
    return host_time(variants, calls=1, rounds=rounds)


@pytest.mark.importance(1)
@pytest.mark.parametrize("tokens", [16_384])
def test_linear_cross_entropy(
    tokens: int,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    gpu = device == "cuda"
    tokens = 256 if quick else tokens
    vocabulary = 500 if quick else V
    small = make(40, device, 70)
    assert_parity(
        lambda x, w, b: nk.linear_cross_entropy(x, w, small[3], b),
        lambda x, w, b: nk.linear_cross_entropy_reference(x, w, small[3], b),
        small[:3],
    )
    tensors = make(tokens, device, vocabulary)
    losses: dict[str, Loss] = {"ours": ours, "dense": dense}
    if gpu:
        torch.compiler.reset()
        losses["compile"] = torch.compile(dense)
        peer = liger()
        if peer is not None:
            losses["liger"] = peer

    def variant(loss: Loss) -> Variant:
        return lambda _: step(loss, tensors)

    variants = {name: variant(loss) for name, loss in losses.items()}
    ceilings = Ceilings(device, tensors[0].dtype, quick)
    variants |= ceilings.variants
    if gpu:
        variants["products"] = products(tensors)
    measure = interleaved_on_gpu if gpu else few_rounds
    timings = once(lambda: measure(variants, 3 if quick or not gpu else 30))
    memory = {}
    if gpu:
        memory = {name: peak_memory(variants[name], device) or 0 for name in losses}
    elif not quick and sys.platform == "linux":
        memory = {name: peak_bytes(name, tokens) for name in ("ours", "dense")}
    labelled = int((tensors[3] != -100).sum())
    shape = (tokens, labelled, C, vocabulary, tensors[0].element_size(), True)
    cost = operators.linear_cross_entropy(*shape).plus(
        operators.linear_cross_entropy_backward(*shape)
    )
    record(
        "linear_cross_entropy",
        f"forward and backward, {tokens} tokens, {labelled} labelled, V = {vocabulary}, "
        f"{str(tensors[0].dtype).removeprefix('torch.')}, {device}",
        implementation=_runtime.implementation("linear_cross_entropy", device),
        liger="measured" if "liger" in losses else "absent",
        **ceilings.against(cost, timings),
        **ratios(timings),
        **{
            f"memory_ratio_to_{name}": value / memory["ours"]
            for name, value in memory.items()
            if name != "ours"
        },
        **{f"{name}_peak_bytes": value for name, value in memory.items()},
        **columns(timings),
    )

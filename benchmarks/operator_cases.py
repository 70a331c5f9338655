"""One telling call of every registered operator, small and at the size of a NeoBERT batch.

What `gpu_tune`, `gpu_sanitize` and the test of determinism run. Small ones have rows past a block,
an empty document and one of a single token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neobert.selfcheck import Sample
from neobert_kernels import _runtime
from neobert_kernels._packed import restarting_positions
from neobert_kernels.ops.rope import rope_table_reference

TINY, FULL = "tiny", "full"
LENGTHS = {TINY: (70, 1, 0, 66), FULL: (512,) * 32}
LONG = {TINY: (130,), FULL: (4096,) * 4}
WIDTH = {TINY: 96, FULL: 768}
INNER = {TINY: 80, FULL: 2048}
HEADS = {TINY: (2, 16), FULL: (12, 64)}
VOCABULARY = {TINY: 130, FULL: 30_522}
FEW_ROWS = {TINY: 33, FULL: 64}
PAIRS = {TINY: (33, 65), FULL: (4096, 8192)}


class Maker:
    """Random arguments on one device, in one dtype, of one size."""

    def __init__(self, size: str, device: str, dtype: torch.dtype) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device)
        return (x * scale).to(self.dtype)

    def bounds(self, lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *lengths], device=self.device).cumsum(0).int()

    def norm(self, added: bool, bias: bool) -> Sample:
        T, C = sum(LENGTHS[self.size]), WIDTH[self.size]
        args = [self.normal(T, C) for _ in range(1 + added)]
        args += [self.normal(C) for _ in range(1 + bias)]
        return Sample(tuple(args), leaves=tuple(range(len(args))))

    def gated(self, packed: bool) -> Sample:
        T, F = sum(LENGTHS[self.size]), INNER[self.size]
        args = (self.normal(T, 2 * F),) if packed else (self.normal(T, F), self.normal(T, F))
        return Sample(args, leaves=tuple(range(len(args))))

    def tables(self, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        positions = restarting_positions(self.bounds(lengths), sum(lengths))
        return rope_table_reference(positions, HEADS[self.size][1])

    def attention(self, packed: bool, lengths: tuple[int, ...], **options: Any) -> Sample:
        (H, D), T = HEADS[self.size], sum(lengths)
        cos, sin = self.tables(lengths)
        options = {"cos": cos, "sin": sin, "interleaved": True, **options}
        rest = (self.bounds(lengths), max(lengths))
        qkv = self.normal(T, H, 3, D)
        if packed:
            return Sample((qkv, *rest), options)
        return Sample((*qkv.unbind(2), *rest), options, leaves=(0, 1, 2))

    def rope(self) -> Sample:
        lengths = LENGTHS[self.size]
        return Sample((self.normal(sum(lengths), *HEADS[self.size]), *self.tables(lengths)))

    def loss(self) -> Sample:
        T, C, V = sum(LENGTHS[self.size]), WIDTH[self.size], VOCABULARY[self.size]
        labels = torch.randint(V, (T,), generator=self.generator, device=self.device)
        labels[torch.arange(T, device=self.device) % 5 > 0] = -100
        args = (self.normal(T, C), self.normal(V, C, scale=0.02), labels, self.normal(V))
        return Sample(args, leaves=(0, 1, 3))

    def linear(self) -> Sample:
        T, C, F = sum(LENGTHS[self.size]), WIDTH[self.size], INNER[self.size]
        args = (self.normal(T, C), self.normal(F, C, scale=0.02), self.normal(F))
        return Sample(args, leaves=())

    def fused_linear(self, held: bool) -> Sample:
        """With a norm, a residual and a gated unit, or the product that leads back."""
        M, C, F = FEW_ROWS[self.size], WIDTH[self.size], INNER[self.size]
        if not held:
            args = (self.normal(M, F), self.normal(C, F, scale=0.02), self.normal(C))
            return Sample(args, leaves=())
        args = (self.normal(M, C), self.normal(2 * F, C, scale=0.02), self.normal(2 * F))
        norm = {"norm": "rms_norm", "norm_weight": self.normal(C)}
        options = {"residual": self.normal(M, C), **norm, "activation": "swiglu"}
        return Sample(args, options, leaves=())

    def pool(self) -> Sample:
        lengths = LENGTHS[self.size]
        x = self.normal(sum(lengths), WIDTH[self.size])
        return Sample((x, self.bounds(lengths), True))

    def info_nce(self) -> Sample:
        N, M = PAIRS[self.size]
        documents = self.normal(M, WIDTH[self.size])
        queries = documents[:N] + self.normal(N, WIDTH[self.size])
        return Sample((queries, documents, 0.05), leaves=(0, 1))

    def rope_table(self) -> Sample:
        T = sum(LENGTHS[self.size])
        return Sample((torch.arange(T, device=self.device), HEADS[self.size][1]), leaves=())


Make = Callable[[Maker], Sample]
# Operator, then what is special about the case; the most important first.
CASES: dict[tuple[str, str], Make] = {
    ("attention", "512"): lambda m: m.attention(False, LENGTHS[m.size]),
    ("attention", "4096"): lambda m: m.attention(False, LONG[m.size]),
    ("add_rms_norm", ""): lambda m: m.norm(True, False),
    ("swiglu", ""): lambda m: m.gated(True),
    ("linear_cross_entropy", ""): lambda m: m.loss(),
    ("rope", ""): lambda m: m.rope(),
    ("add_layer_norm", ""): lambda m: m.norm(True, True),
    ("rms_norm", ""): lambda m: m.norm(False, False),
    ("layer_norm", ""): lambda m: m.norm(False, True),
    ("geglu", ""): lambda m: m.gated(True),
    ("silu_mul", ""): lambda m: m.gated(False),
    ("gelu_mul", ""): lambda m: m.gated(False),
    ("info_nce", ""): lambda m: m.info_nce(),
    ("batch_invariant_linear", ""): lambda m: m.linear(),
    ("fused_linear", ""): lambda m: m.fused_linear(True),
    ("fused_linear", "product alone"): lambda m: m.fused_linear(False),
    ("mean_pool", ""): lambda m: m.pool(),
    ("first_pool", ""): lambda m: m.pool(),
    ("rope_table", ""): lambda m: m.rope_table(),
    ("attention", "4096, window 64"): lambda m: m.attention(False, LONG[m.size], window=64),
    ("qkv_attention", "512"): lambda m: m.attention(True, LENGTHS[m.size]),
}


def sample(
    operator: str, case: str, size: str, device: str, dtype: torch.dtype = torch.float32
) -> Sample:
    return CASES[operator, case](Maker(size, device, dtype))


def outputs(operator: str, given: Sample, gradients: list[Tensor] | None = None) -> list[Tensor]:
    """Outputs and every gradient of one call; ``gradients`` come in where given, else ones."""
    public = _runtime.load_operators()[operator].public
    args = list(given.args)
    leaves = []
    for i in given.leaves:
        args[i] = args[i].detach().requires_grad_()
        leaves.append(args[i])
    out = public(*args, **given.options)
    outs = list(out) if isinstance(out, tuple) else [out]
    if not leaves:
        return outs
    incoming = gradients or [torch.ones_like(o) for o in outs]
    return [o.detach() for o in outs] + list(torch.autograd.grad(outs, leaves, incoming))

"""Bytes, FLOP and exponentials that one call of an operator cannot do without.

Every input is read once and every output written once, whatever an implementation really moves.
FLOP are multiplications and additions, on matrix units where an operator is products and on
ordinary ones elsewhere; ``special`` counts exponentials, reciprocals and roots per element. A
backward that must compute something again is not charged for it: this is work, not effort.

Sizes by the letters of the package: T tokens, C width, F feed-forward width, H heads, D head size,
V vocabulary, B documents. ``e`` is the size of an element in bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from neobert.floors.gpus import Gpu

INDEX = 8  # bytes of a token id or a label
FLOAT32 = 4


@dataclass(frozen=True)
class Cost:
    """What some work costs, all of it on one kind of unit (`matrix` or not)."""

    bytes: int = 0
    flop: int = 0
    special: int = 0
    matrix: bool = False

    def times(self, count: int) -> "Cost":
        return Cost(self.bytes * count, self.flop * count, self.special * count, self.matrix)

    def plus(self, other: "Cost") -> "Cost":
        """Both, one after the other, on the same kind of unit."""
        assert self.matrix == other.matrix, "products and other arithmetic have different rates"
        return Cost(
            self.bytes + other.bytes,
            self.flop + other.flop,
            self.special + other.special,
            self.matrix,
        )

    def seconds(self, gpu: Gpu, dtype: str = "bfloat16") -> dict[str, float]:
        """Time that each unit of ``gpu`` needs; an operator takes at least the longest."""
        rate = gpu.flop_per_s(dtype) if self.matrix else gpu.float32_flop_per_s
        return {
            "memory": self.bytes / gpu.bytes_per_s,
            "matrix" if self.matrix else "arithmetic": self.flop / rate,
            "exponentials": self.special / gpu.special_per_s,
        }

    def floor_s(self, gpu: Gpu, dtype: str = "bfloat16") -> float:
        return max(self.seconds(gpu, dtype).values())

    def bound(self, gpu: Gpu, dtype: str = "bfloat16") -> str:
        """Which unit sets the floor."""
        seconds = self.seconds(gpu, dtype)
        return max(seconds, key=seconds.__getitem__)


def linear(T: int, inputs: int, outputs: int, e: int, bias: bool = False) -> Cost:
    """``[T, inputs]`` to ``[T, outputs]``."""
    moved = T * (inputs + outputs) + inputs * outputs + outputs * bias
    return Cost(e * moved, 2 * T * inputs * outputs, matrix=True)


def fused_linear(
    T: int, inputs: int, outputs: int, e: int, *, bias: bool = False, added: bool = False,
    normed: bool = False, gated: bool = False,
) -> Cost:  # fmt: skip
    """A `linear` from x, a residual (``added``) and a norm's weight to y, the sum and the norm.

    ``outputs`` are those of the product, of which a gated unit writes half. The few FLOP of norm
    and unit are not counted, which belong on other units.
    """
    columns = outputs // 2 if gated else outputs
    rows = T * (inputs * (1 + 2 * added + normed) + columns)
    moved = rows + inputs * outputs + outputs * bias + inputs * normed
    return Cost(e * moved, 2 * T * inputs * outputs, 2 * T * columns * gated, matrix=True)


def linear_backward(T: int, inputs: int, outputs: int, e: int, bias: bool = False) -> Cost:
    """Both products: dy, x and the weight in, dx and dweight out."""
    moved = T * (outputs + 2 * inputs) + 2 * inputs * outputs + outputs * bias
    return Cost(e * moved, 4 * T * inputs * outputs, matrix=True)


def norm(T: int, C: int, e: int, *, added: bool, centered: bool, bias: bool = False) -> Cost:
    """rms_norm and layer_norm (``centered``), with a residual (``added``): x to y, or both to both.

    A mean square, a scale and a weight; the mean and its subtraction; the sum with the residual.
    """
    tensors = 4 if added else 2
    flop = 4 + 3 * centered + added + bias
    return Cost(e * (T * C * tensors + C * (1 + bias)), flop * T * C, T)


def norm_backward(
    T: int, C: int, e: int, *, added: bool, centered: bool, bias: bool = False
) -> Cost:
    """x and dy to dx and dweight; ``added``: h, dy and dh to one gradient for both addends."""
    tensors = 4 if added else 3
    flop = 10 + 4 * centered + added + bias
    return Cost(e * (T * C * tensors + 2 * C * (1 + bias)), flop * T * C, T)


def gated_unit(T: int, F: int, e: int) -> Cost:
    """swiglu and geglu, packed or as two tensors: gate and value to the product."""
    return Cost(e * 3 * T * F, 4 * T * F, 2 * T * F)


def gated_unit_backward(T: int, F: int, e: int) -> Cost:
    """dy, gate and value to both gradients."""
    return Cost(e * 5 * T * F, 10 * T * F, 2 * T * F)


def gelu(T: int, F: int, e: int) -> Cost:
    return Cost(e * 2 * T * F, 4 * T * F, T * F)


def gelu_backward(T: int, F: int, e: int) -> Cost:
    return Cost(e * 3 * T * F, 8 * T * F, T * F)


def rope(T: int, H: int, D: int, e: int) -> Cost:
    """``[T, H, D]`` turned by float32 tables of ``[T, D / 2]``; the backward is the same."""
    return Cost(e * 2 * T * H * D + FLOAT32 * T * D, 3 * T * H * D)


def rope_table(T: int, D: int) -> Cost:
    """Positions to cosine and sine."""
    return Cost(INDEX * T + FLOAT32 * T * D, T * D // 2, T * D)


def pairs(lengths: Sequence[int], window: int | None = None) -> int:
    """Scores of all documents: every token with every other, or those up to ``window`` apart."""
    if window is None:
        return sum(n * n for n in lengths)
    reach = [(n, min(window, max(n - 1, 0))) for n in lengths]
    return sum(n + 2 * n * w - w * (w + 1) for n, w in reach)


def attention(
    lengths: Sequence[int], H: int, D: int, e: int, *, kv_heads: int | None = None,
    window: int | None = None, rotary: bool = False,
) -> Cost:  # fmt: skip
    """q, k and v to the output and a float32 per row for the backward; RoPE's tables if inside."""
    T, scores = sum(lengths), H * pairs(lengths, window)
    moved = e * T * D * (2 * H + 2 * (kv_heads or H)) + FLOAT32 * T * (H + D * rotary)
    return Cost(moved, 4 * D * scores, scores, matrix=True)


def attention_backward(
    lengths: Sequence[int], H: int, D: int, e: int, *, kv_heads: int | None = None,
    window: int | None = None, rotary: bool = False,
) -> Cost:  # fmt: skip
    """Five products where the forward has two: q, k, v, out and dout in, dq, dk and dv out."""
    T, scores = sum(lengths), H * pairs(lengths, window)
    moved = e * T * D * (4 * H + 4 * (kv_heads or H)) + FLOAT32 * T * (H + D * rotary)
    return Cost(moved, 10 * D * scores, scores, matrix=True)


def linear_cross_entropy(T: int, labelled: int, C: int, V: int, e: int, bias: bool = False) -> Cost:
    """Rows with a label through the vocabulary: no logits leave the chip."""
    moved = e * (labelled * C + V * C + V * bias) + INDEX * T + FLOAT32 * labelled
    return Cost(moved, 2 * labelled * C * V, labelled * V, matrix=True)


def linear_cross_entropy_backward(
    T: int, labelled: int, C: int, V: int, e: int, bias: bool = False
) -> Cost:
    """Two products: the labelled rows and the weight in, all of dx and dweight out."""
    moved = e * (labelled * C + T * C + 2 * V * C + V * bias) + INDEX * T
    return Cost(moved, 4 * labelled * C * V, labelled * V, matrix=True)


def embedding(T: int, C: int, e: int, tables: int = 0, longest: int = 0, types: int = 0) -> Cost:
    """A row for every token; learned positions and token types are read once and added."""
    moved = e * C * (2 * T + longest + types) + INDEX * T
    return Cost(moved, tables * T * C)


def embedding_backward(T: int, C: int, e: int) -> Cost:
    """dy and the rows of the gradient that it is added to."""
    return Cost(e * C * 3 * T + INDEX * T, T * C)


def mean_pool(T: int, B: int, C: int, e: int) -> Cost:
    return Cost(e * C * (T + B) + FLOAT32 * (B + 1), T * C)


def mean_pool_backward(T: int, B: int, C: int, e: int) -> Cost:
    """Also of first_pool, which writes zeros for every other token."""
    return Cost(e * C * (T + B) + FLOAT32 * (B + 1), T * C)


def first_pool(B: int, C: int, e: int) -> Cost:
    return Cost(e * C * 2 * B + FLOAT32 * (B + 1))


def info_nce(N: int, M: int, C: int, e: int) -> Cost:
    """Queries ``[N, C]`` against documents ``[M, C]``."""
    return Cost(e * C * (N + M) + FLOAT32 * N, 2 * N * M * C, N * M, matrix=True)


def info_nce_backward(N: int, M: int, C: int, e: int) -> Cost:
    return Cost(e * C * 2 * (N + M) + FLOAT32 * N, 4 * N * M * C, N * M, matrix=True)


def adamw(parameters: int) -> Cost:
    """One step in float32: weight, gradient and two moments in, weight and two moments out."""
    return Cost(FLOAT32 * 7 * parameters, 12 * parameters, 2 * parameters)

"""What GPUs can do by their data sheets: dense rates, without structured sparsity."""

from dataclasses import dataclass

from neobert_kernels import _check

# Exponentials, reciprocals and the like per clock and multiprocessor, on all of these GPUs: CUDA
# C++ programming guide, table of the throughput of native arithmetic instructions.
SPECIAL_PER_CLOCK = 16


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU; a measured rate of the real card may replace any of them.

    Attributes:
        name: As people call it.
        bytes_per_s: Memory bandwidth, bytes read and written together.
        matrix_flop_per_s: Products in bfloat16 or float16, sums in float32.
        float32_flop_per_s: Ordinary float32 arithmetic, and float32 products without TF32.
        special_per_s: Exponentials and reciprocals.
        memory_bytes: Size of its memory.
        source: Where the numbers are from.
    """

    name: str
    bytes_per_s: float
    matrix_flop_per_s: float
    float32_flop_per_s: float
    special_per_s: float
    memory_bytes: float
    source: str

    def flop_per_s(self, dtype: str) -> float:
        """The rate of matrix products with operands of ``dtype``."""
        return self.float32_flop_per_s if dtype == "float32" else self.matrix_flop_per_s


def _gpu(
    name: str, tb_per_s: float, matrix: float, float32: float, sms: int, ghz: float, gb: int,
    source: str,
) -> Gpu:  # fmt: skip
    special = SPECIAL_PER_CLOCK * sms * ghz * 1e9
    return Gpu(name, tb_per_s * 1e12, matrix * 1e12, float32 * 1e12, special, gb * 1e9, source)


GPUS: dict[str, Gpu] = {
    "a100": _gpu("A100 80GB SXM", 2.039, 312, 19.5, 108, 1.41, 80, "NVIDIA A100 data sheet"),
    "h100": _gpu("H100 SXM", 3.35, 989.4, 66.9, 132, 1.83, 80, "NVIDIA H100 data sheet"),
    "h200": _gpu("H200 SXM", 4.8, 989.4, 66.9, 132, 1.83, 141, "NVIDIA H200 data sheet"),
    "b200": _gpu("B200 (HGX)", 8.0, 2250, 80, 148, 1.86, 180, "NVIDIA Blackwell technical brief"),
    "l4": _gpu("L4", 0.3, 121, 30.3, 58, 2.04, 24, "NVIDIA L4 data sheet"),
    "rtx-4090": _gpu(
        "GeForce RTX 4090", 1.008, 165.2, 82.6, 128, 2.52, 24, "NVIDIA Ada architecture white paper"
    ),
}


def gpu(name: str) -> Gpu:
    """The GPU called ``name`` in `GPUS`.

    Raises:
        ValueError: There is none; the message lists those that are known.
    """
    if name not in GPUS:
        raise _check.error("gpu", f"one of {', '.join(GPUS)}", repr(name))
    return GPUS[name]

"""The one rounding of a result, for kernels that make it with the bits of a GPU everywhere."""

from neobert_kernels import _runtime
from neobert_kernels._triton import tl, triton

if _runtime.INTERPRET:

    @triton.jit
    def rounded(x, dtype: tl.constexpr):
        """To the nearest, as a GPU does; the interpreter by itself truncates to bfloat16."""
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            x = bits.to(tl.float32, bitcast=True)
        return x.to(dtype)

else:

    @triton.jit
    def rounded(x, dtype: tl.constexpr):
        return x.to(dtype)

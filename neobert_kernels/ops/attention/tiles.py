"""Launch choices of the attention kernels: pure functions of shape, dtype and GPU generation.

None of this was chosen by a clock yet. Each number is argued from the ahead-of-time report in
docs/attention.md: registers without a spill, shared memory, and so blocks per multiprocessor.

Only the outer tile (a program's own rows), TMA and RoPE's place depend on the longest document. The
inner tile, which fixes the order of sums over tokens, does not: without RoPE a document gives the
same bits whatever documents share its batch. With it, a batch whose longest document is over
`TURN_INSIDE` may differ in the last bit from one where it is not: channels are added in another
order.
"""

import functools
from dataclasses import dataclass

import torch

from neobert_kernels._triton import triton

MAX_HEAD_SIZE = 128
SHORT = 64  # tokens: no longer document means the small outer tile
# Up to here k turns as it is loaded, once for every query tile; above, q and k turn once, before.
# At 256 there are two query tiles, so turning inside does twice the arithmetic of turning before,
# and saves a launch and 4 * D * itemsize bytes of traffic a token and head. Unmeasured.
TURN_INSIDE = 256


@dataclass(frozen=True)
class Tile:
    """One kernel's cut: ``outer`` rows belong to a program, which walks over ``inner`` at a time.

    The outer rows are queries in the forward and in dq, keys in dk and dv.
    """

    outer: int
    inner: int
    warps: int
    stages: int
    tma: bool = False  # the forward's copies, where q and k need no turning as they are loaded
    registers: int | None = None  # of a lane; None: the assembler may spill a few for more blocks
    specialized: bool = False  # warps that copy and warps that multiply; with TMA and 4 warps only

    def __post_init__(self) -> None:
        assert not self.specialized or (self.tma and self.warps == 4), "would not take effect"


@dataclass(frozen=True)
class Columns:
    """A row of D channels as one or two parts, each a power of two and at least 16 wide.

    Two parts waste less than the next power of two where D is 80 or 96 (64 + 16, 64 + 32).
    """

    first: int
    second: int  # 0: one part


@dataclass(frozen=True)
class Tiles:
    """Every launch choice of one call."""

    forward: Tile
    dq: Tile
    dkv: Tile
    turn_inside: bool  # k turns as the forward loads it, not before
    turn_inside_backward: bool
    search: int = 1024  # boundaries that a program looks at together; two 16-byte loads a lane

    def turns_inside(self, backward: bool) -> bool:
        return self.turn_inside_backward if backward else self.turn_inside


@functools.cache
def columns(D: int) -> Columns:
    """The parts of a plain row: two where that saves a quarter of the columns or more."""
    whole = max(16, triton.next_power_of_2(D))
    first = whole // 2
    second = max(16, triton.next_power_of_2(D - first)) if first >= 16 else whole
    return Columns(first, second) if first + second <= whole * 3 // 4 else Columns(whole, 0)


@functools.cache
def halves(D: int) -> Columns:
    """The parts of a row whose pairs turn: first members, second members."""
    half = max(16, triton.next_power_of_2(D // 2))
    return Columns(half, half)


# From here the forward copies by TMA on Hopper. A program writes three descriptors before its first
# copy, about a microsecond, which 16 key tiles and more hide. Unmeasured.
TMA_FROM = 1024


def choose(D: int, dtype: torch.dtype, sm: int, longest: int, aligned: bool) -> Tiles:
    """The launch choices for head size ``D`` and documents of at most ``longest`` tokens.

    ``aligned``: every row of q, k and v starts at a multiple of 16 bytes, as TMA needs.
    """
    return _choose(
        D > 64, dtype == torch.float32, sm, longest <= SHORT, longest <= TURN_INSIDE,
        aligned and longest >= TMA_FROM,
    )  # fmt: skip


# sm_90, 16 bits, head sizes to 64: the forward for documents up to `SHORT`, up to `TMA_FROM`, and
# longer; the backward.
SHORTEST = Tile(64, 64, 4, 3)
MIDDLE = Tile(128, 64, 8, 3)
LONG = Tile(128, 64, 8, 3, tma=True)
DQ_SHORTEST = Tile(64, 64, 4, 2)
DKV_SHORTEST = Tile(64, 64, 4, 2)
DQ = Tile(128, 64, 8, 2)
DKV = Tile(128, 64, 8, 2)


@functools.cache
def _choose(wide: bool, exact: bool, sm: int, short: bool, inside: bool, tma: bool) -> Tiles:
    if exact:
        # float32 is exact: products run on the ordinary units, out of registers, so small tiles.
        tile = functools.partial(Tile, warps=8, stages=1, registers=255)
        if wide:
            forward = tile(32, 16)
            return Tiles(forward, Tile(16, 16, 8, 1), forward, inside, inside)
        forward = tile(32, 32)
        return Tiles(forward, forward, tile(32, 16), inside, inside)
    if sm == 90 and not wide:
        if short:
            return Tiles(SHORTEST, DQ_SHORTEST, DKV_SHORTEST, inside, inside)
        return Tiles(LONG if tma else MIDDLE, DQ, DKV, inside, inside)
    # One warp to 16 rows, the least that a tensor core takes; 4 warps share a Hopper instruction.
    outer, warps = (64, 4) if short else (128, 8)
    if sm < 90 or sm >= 120:  # products out of registers: the backward has none to turn rows in
        return Tiles(
            forward=Tile(outer, 32 if wide else 64, warps, 2),
            dq=Tile(32, 32, 2, 2) if short else Tile(outer, 32, warps, 2),
            dkv=Tile(outer, 16 if wide else 32, warps, 2),
            turn_inside=inside,
            turn_inside_backward=False,
        )
    if sm >= 100:  # accumulators have a memory of their own, and two blocks 128 registers a lane:
        inside = False  # the rotation does not fit into these, nor do descriptors of wide rows
        tma = tma and not wide
    # dk and dv are two sums of outer by D: 128 registers of a lane at D = 128.
    dkv = Tile(outer, 32 if wide else 64, warps, 1 if wide and sm >= 100 else 2)
    return Tiles(
        # `SPECIALIZED` below is the other candidate: it waits for a measurement.
        forward=Tile(outer, 64, warps, 2 if wide else 3, tma),
        dq=Tile(outer, 64, warps, 2),
        dkv=dkv,
        turn_inside=inside,
        turn_inside_backward=inside and not wide,
    )


# The forward with warps of two kinds, for long documents of head size 64 on Hopper: one block of
# two multiplying warp groups and one that copies, against the two blocks of the choice above.
SPECIALIZED = Tile(128, 64, 4, 3, tma=True, specialized=True)

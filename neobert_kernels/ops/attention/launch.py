"""From the operators' arguments to kernel launches, and the same launches without a GPU."""

import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neobert_kernels import _runtime
from neobert_kernels._launch import MOST_PREPARED, Prepared, Ready
from neobert_kernels._triton import triton
from neobert_kernels.ops.attention import tiles
from neobert_kernels.ops.attention.backward import attention_dkv_kernel, attention_dq_kernel
from neobert_kernels.ops.attention.forward import attention_forward_kernel
from neobert_kernels.ops.rope import ready_pair, turn

KERNELS = (attention_forward_kernel, attention_dq_kernel, attention_dkv_kernel)


class Form(NamedTuple):
    """What of a call is compiled into its kernels, besides a tile."""

    D: int
    group: int  # query heads for each key/value head
    turning: bool
    interleaved: bool
    windowed: bool

    def constexprs(
        self, tile: tiles.Tile, inside: bool, search: int, *, backward: bool
    ) -> dict[str, Any]:
        """``inside``: rows that turn do so as they are loaded."""
        inside = self.turning and inside
        # Gradients of turned rows turn back in pairs, wherever the rows themselves were turned.
        pairs = self.turning if backward else inside
        rows, values = (tiles.halves if pairs else tiles.columns)(self.D), tiles.columns(self.D)
        return {
            "D": self.D,
            "GROUP": self.group,
            "FIRST": rows.first,
            "SECOND": rows.second,
            "V_FIRST": values.first,
            "V_SECOND": values.second,
            "OUTER": tile.outer,
            "INNER": tile.inner,
            "SEARCH": search,
            "TURN": inside,
            "INTERLEAVED": self.interleaved and pairs,
            "HAS_WINDOW": self.windowed,
            **(
                {"PAIRS": pairs} if backward else {"TMA": tile.tma, "SPECIALIZED": tile.specialized}
            ),
        }


def _rows(x: Tensor) -> Tensor:
    """``x`` itself where its channels are neighbours and a tile's offsets fit into 32 bits."""
    step, _, neighbour = x.stride()
    if step >= 2**31 // 128:
        return x.contiguous()
    return x if neighbour == 1 else _runtime.neighbouring(x)


def _aligned(*tensors: Tensor) -> bool:
    """Every row starts at a multiple of 16 bytes."""
    bits = 0  # of all addresses and distances, in bytes
    for x in tensors:
        size, (step, head, _) = x.element_size(), x.stride()
        bits |= x.data_ptr() | step * size | head * size
    return bits % 16 == 0


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel writes its TMA descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


class Call(NamedTuple):
    """The tensors of one call as the kernels take them."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    cos: Tensor
    sin: Tensor
    window: int
    scale: float
    form: Form
    choice: tiles.Tiles

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cos: Tensor | None,
        sin: Tensor | None,
        interleaved: bool,
        window: int | None,
        scale: float,
        *,
        backward: bool,
        turn: Callable[..., tuple[Tensor, Tensor]] = turn,
    ) -> "Call":
        """Turns q and k here where they are not turned as they are loaded."""
        q, k, v = _rows(q), _rows(k), _rows(v)
        aligned = _aligned(q, k, v)
        _, H, D = q.shape
        choice = tiles.choose(D, q.dtype, _runtime.generation(q), max_seqlen, aligned)
        windowed = window is not None and window < max_seqlen - 1
        form = Form(D, H // k.shape[1], cos is not None, interleaved, windowed)
        if cos is None or sin is None:
            cos = sin = cu_seqlens  # a pointer that no kernel follows
        else:
            cos, sin = cos.contiguous(), sin.contiguous()
            if not choice.turns_inside(backward):
                q, k = turn(q, k, cos, sin, interleaved)
        reach = window if window is not None and windowed else 0
        return cls(
            q, k, v, cu_seqlens.contiguous(), cos, sin, reach, float(scale), form, choice
        )  # fmt: skip

    def ready(
        self,
        which: int,
        tile: tiles.Tile,
        heads: int,
        pointers: list[Tensor],
        strided: list[Tensor],
    ) -> Ready:
        """`KERNELS` ``[which]`` with its grid and arguments.

        One program per slot of the work map (see `locate`) and head. Nothing asks the GPU.
        """
        tokens, documents = self.q.shape[0], self.cu_seqlens.shape[0] - 1
        inside, search = self.choice.turns_inside(which > 0), self.choice.search
        grid = tokens // tile.outer + documents, heads, 1
        arguments = (
            self.q, self.k, self.v, self.cos, self.sin, self.cu_seqlens, *pointers, tokens,
            documents, self.window, self.scale,
            *self.q.stride()[:2], *self.k.stride()[:2], *self.v.stride()[:2],
            *[step for x in strided for step in x.stride()[:2]],
        )  # fmt: skip
        return Ready(_prepared(which, tile, self.form, inside, search), grid, arguments)

    def run(self, which: int, tile: tiles.Tile, *rest: Any) -> None:
        """Start what is `ready`."""
        ready = self.ready(which, tile, *rest)
        (Described(ready) if tile.tma else ready).start()


class Described(NamedTuple):
    """A launch of a kernel that writes TMA descriptors before it reads by them."""

    ready: Ready

    def start(self) -> None:
        # The allocator is a context variable: in a copy of the context, a user's own one stays.
        contextvars.copy_context().run(self._start)

    def _start(self) -> None:
        triton.set_allocator(_workspace)
        self.ready.start()

    def bound(self, *_: Any) -> None:
        """The driver alone has no place for the descriptors."""


@functools.lru_cache(MOST_PREPARED)
def _prepared(which: int, tile: tiles.Tile, form: Form, inside: bool, search: int) -> Prepared:
    return Prepared(
        KERNELS[which], form.constexprs(tile, inside, search, backward=which > 0),
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        **_runtime.FP_FUSION,
    )  # fmt: skip


def forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``out [T, H, D]`` and ``lse [H, T]``."""
    T, H, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((H, T), dtype=torch.float32)
    if T:
        call = Call.of(q, *rest, backward=False)
        call.run(0, call.choice.forward, H, [out, lse], [])
    return out, lse


def ready(
    out: Tensor, lse: Tensor, turned: Callable[[], Tensor], q: Tensor, k: Tensor, *rest: Any
) -> list[Ready | Described]:
    """The forward's launches, to be started any number of times, T over 0.

    q, k and v, with neighbouring channels, are read anew at each start, the rest is not.

    Args:
        turned: Returns memory for q and k where they turn before the kernel, ``[T, heads of both,
            D]``; several launches that run one after the other may share it.
    """
    launches: list[Ready | Described] = []

    def later(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        H, both = q.shape[1], turned()
        launches.append(ready_pair(q, k, cos, sin, interleaved, both))
        return both[:, :H], both[:, H:]

    call = Call.of(q, k, *rest, backward=False, turn=later)
    tile = call.choice.forward
    attention = call.ready(0, tile, q.shape[1], [out, lse], [])
    return [*launches, Described(attention) if tile.tma else attention]


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    *rest: Any,
) -> None:
    """Fill ``grads``: dq, dk and dv with neighbouring channels and any other strides."""
    T, H, _ = q.shape
    if not T:
        return
    dq, dk, dv = grads
    call = Call.of(q, k, *rest, backward=True)
    dout, delta = _rows(dout), torch.empty_like(lse)
    call.run(1, call.choice.dq, H, [out, dout, lse, delta, dq], [dout, dq])
    call.run(2, call.choice.dkv, k.shape[1], [dout, lse, delta, dk, dv], [dout, dk, dv])


# (dtype, longest document, form): the shapes of spec'd encoders, each option at least once.
CASES = (
    (torch.bfloat16, 64, Form(64, 1, True, False, False)),
    (torch.bfloat16, 256, Form(64, 1, True, True, False)),
    (torch.bfloat16, 4096, Form(64, 1, True, True, False)),
    (torch.bfloat16, 4096, Form(64, 1, True, False, True)),
    (torch.bfloat16, 512, Form(32, 1, False, False, False)),
    (torch.bfloat16, 4096, Form(96, 1, False, False, False)),
    (torch.bfloat16, 4096, Form(128, 3, True, False, False)),
    (torch.float16, 4096, Form(64, 1, False, False, False)),
    (torch.float32, 256, Form(64, 1, True, True, False)),
    (torch.float32, 4096, Form(128, 1, False, False, True)),
)


def launches(sm: int) -> Iterator[_runtime.Launch]:
    for dtype, longest, form in CASES:
        choice = tiles.choose(form.D, dtype, sm, longest, aligned=True)
        for kernel, tile in zip(KERNELS, (choice.forward, choice.dq, choice.dkv), strict=True):
            yield _launch(kernel, tile, choice, dtype, longest, form)
    if sm == 90:
        dtype, longest, form = torch.bfloat16, 4096, Form(64, 1, True, True, False)
        choice = tiles.choose(form.D, dtype, sm, longest, aligned=True)
        yield _launch(attention_forward_kernel, tiles.SPECIALIZED, choice, dtype, longest, form)


def _launch(
    kernel: Any,
    tile: tiles.Tile,
    choice: tiles.Tiles,
    dtype: torch.dtype,
    longest: int,
    form: Form,
) -> _runtime.Launch:
    types = dict.fromkeys(("lse_ptr", "delta_ptr", "cos_ptr", "sin_ptr"), "*fp32")
    signature = _runtime.signature(kernel, dtype, cu_seqlens_ptr="*i32", scale="fp32", **types)
    backward = kernel is not attention_forward_kernel
    inside = choice.turns_inside(backward)
    words = [f"D={form.D} {_runtime.TRITON_TYPES[dtype]} <={longest}"]
    words += ["turned inside" if inside else "turned before"] * form.turning
    words += ["interleaved"] * (form.interleaved and (inside or backward))
    words += ["window"] * form.windowed + ["TMA"] * tile.tma + ["specialized"] * tile.specialized
    return _runtime.Launch(
        kernel=kernel,
        name=kernel.__name__.removesuffix("_kernel"),
        case=" ".join(words),
        signature=signature,
        constexprs=form.constexprs(tile, inside, choice.search, backward=backward),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
        aligned=tuple(n for n in signature if n.endswith("_ptr") or "_stride_" in n),
        memory_bound=False,
        matrix=dtype != torch.float32,  # exact products are not for tensor cores
        tma=tile.tma,
        warp_specialized=tile.specialized,
    )

"""From the operators' arguments to kernel launches, and the same launches without a GPU."""

import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neobert_kernels import _runtime
from neobert_kernels._triton import triton
from neobert_kernels.ops.attention import tiles
from neobert_kernels.ops.attention.backward import dkv_kernel, dq_kernel
from neobert_kernels.ops.attention.forward import forward_kernel
from neobert_kernels.ops.rope import turn

KERNELS = (forward_kernel, dq_kernel, dkv_kernel)


@dataclass(frozen=True)
class Form:
    """What of a call is compiled into its kernels, besides a tile."""

    D: int
    group: int  # query heads for each key/value head
    turning: bool
    interleaved: bool
    windowed: bool

    def constexprs(self, choice: tiles.Tiles, tile: tiles.Tile, backward: bool) -> dict[str, Any]:
        inside = self.turning and choice.turns_inside(backward)
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
            "SEARCH": choice.search,
            "TURN": inside,
            "INTERLEAVED": self.interleaved and pairs,
            "HAS_WINDOW": self.windowed,
            **(
                {"PAIRS": pairs} if backward else {"TMA": tile.tma, "SPECIALIZED": tile.specialized}
            ),
        }


def _rows(x: Tensor) -> Tensor:
    """``x`` itself where its channels are neighbours and a tile's offsets fit into 32 bits."""
    return _runtime.neighbouring(x) if x.stride(0) < 2**31 // 128 else x.contiguous()


def _aligned(x: Tensor) -> bool:
    """Every row starts at a multiple of 16 bytes."""
    step = 16 // x.element_size()
    return x.data_ptr() % 16 == 0 and x.stride(0) % step == 0 and x.stride(1) % step == 0


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel writes its TMA descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@dataclass(frozen=True)
class Call:
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
    ) -> "Call":
        """Turns q and k here where they are not turned as they are loaded."""
        q, k, v = map(_rows, (q, k, v))
        aligned = all(map(_aligned, (q, k, v)))
        sm = _runtime.generation(q)
        choice = tiles.choose(q.shape[2], q.dtype, sm, max_seqlen, aligned)
        windowed = window is not None and window < max_seqlen - 1
        form = Form(q.shape[2], q.shape[1] // k.shape[1], cos is not None, interleaved, windowed)
        if cos is None or sin is None:
            cos = sin = cu_seqlens  # a pointer that no kernel follows
        else:
            cos, sin = cos.contiguous(), sin.contiguous()
            if not choice.turns_inside(backward):
                q, k = turn(q, k, cos, sin, interleaved)
        reach = window if window is not None and windowed else 0
        cu_seqlens = cu_seqlens.contiguous()
        return cls(q, k, v, cu_seqlens, cos, sin, reach, scale, form, choice)

    def run(
        self,
        kernel: Any,
        tile: tiles.Tile,
        heads: int,
        pointers: list[Tensor],
        strided: list[Tensor],
        backward: bool,
    ) -> None:
        """One program per slot of the work map (see `locate`) and head; nothing asks the GPU."""
        tokens, documents = self.q.shape[0], self.cu_seqlens.shape[0] - 1
        strides = [x.stride(i) for x in (self.q, self.k, self.v, *strided) for i in (0, 1)]
        grid = (tokens // tile.outer + documents, heads)

        def start() -> None:
            if tile.tma:
                triton.set_allocator(_workspace)
            kernel[grid](
                self.q, self.k, self.v, self.cos, self.sin, self.cu_seqlens, *pointers, tokens,
                documents, self.window, self.scale, *strides,
                **self.form.constexprs(self.choice, tile, backward), num_warps=tile.warps,
                num_stages=tile.stages, maxnreg=tile.registers, **_runtime.FP_FUSION,
            )  # fmt: skip

        # The allocator is a context variable: in a copy of the context, a user's own one stays.
        contextvars.copy_context().run(start) if tile.tma else start()


def forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``out [T, H, D]`` and ``lse [H, T]``."""
    T, H, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((H, T), dtype=torch.float32)
    if T:
        call = Call.of(q, *rest, backward=False)
        call.run(forward_kernel, call.choice.forward, H, [out, lse], [], backward=False)
    return out, lse


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
    call.run(
        dq_kernel, call.choice.dq, H, [out, dout, lse, delta, dq], [dout, dq], backward=True
    )  # fmt: skip
    call.run(
        dkv_kernel, call.choice.dkv, k.shape[1], [dout, lse, delta, dk, dv], [dout, dk, dv],
        backward=True,
    )  # fmt: skip


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
        yield _launch(forward_kernel, tiles.SPECIALIZED, choice, dtype, longest, form)


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
    backward = kernel is not forward_kernel
    inside = choice.turns_inside(backward)
    words = [f"D={form.D} {_runtime.TRITON_TYPES[dtype]} <={longest}"]
    words += ["turned inside" if inside else "turned before"] * form.turning
    words += ["interleaved"] * (form.interleaved and (inside or backward))
    words += ["window"] * form.windowed + ["TMA"] * tile.tma + ["specialized"] * tile.specialized
    return _runtime.Launch(
        kernel=kernel,
        name=f"attention_{kernel.__name__.removesuffix('_kernel')}",
        case=" ".join(words),
        signature=signature,
        constexprs=form.constexprs(choice, tile, backward),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
        aligned=tuple(n for n in signature if n.endswith("_ptr") or "_stride_" in n),
        memory_bound=False,
        matrix=dtype != torch.float32,  # exact products are not for tensor cores
        tma=tile.tma,
        warp_specialized=tile.specialized,
    )

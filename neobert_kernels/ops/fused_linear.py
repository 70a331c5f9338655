"""A Linear layer for few rows, with the norm before it and the activation behind it.

``h = x + residual``, ``u = norm(h)``, ``z = u @ weight.T + bias``, ``y = act(z)``: one launch. The
norm is `rms_norm` or `layer_norm`; ``act`` is the erf form of GELU or, over the halves of ``z``,
the gated unit of `swiglu` or `geglu`. Each part may be missing.

Few rows keep no GPU busy: a product's time is that of its weights' way from memory, and of the
launches around it. So every program normalizes the rows again, which it finds in L2, and reads its
columns' weights before it looks at them. A sum over K has a slice for each warp, and the slices are
added in order, so a row's bits do not depend on the rows beside it. The kernel takes any number of
rows and reads all weights once for every 16.

Rounding: ``h`` and ``u`` are rounded as by `add_rms_norm` and `add_layer_norm`; products are exact,
sums, bias and activation float32, and ``y`` is rounded once. float32 inputs are multiplied as IEEE
float32, never as TF32. There is no gradient.

Source: the parts are those of `rms_norm`, `layer_norm`, `swiglu` and ``F.linear``.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neobert_kernels import _check, _runtime
from neobert_kernels._launch import MOST_PREPARED, Prepared
from neobert_kernels._triton import tl, triton
from neobert_kernels.ops._rounding import rounded
from neobert_kernels.ops.layer_norm import layer_norm_reference
from neobert_kernels.ops.rms_norm import rms_norm_reference
from neobert_kernels.ops.swiglu import activate, geglu_reference, swiglu_reference

NORMS = ("rms_norm", "layer_norm")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "swiglu": swiglu_reference,
    "geglu": geglu_reference,
}
GATED = ("swiglu", "geglu")
# Of a row that is added or normalized, by the bytes of one: a program keeps it in registers.
MOST_CHANNELS = {2: 1024, 4: 384}
MOST_OUTPUTS = 65_535 * 8  # as many blocks of columns as a grid has


def fused_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract of `fused_linear` in plain PyTorch: the CPU path and, in float64, the oracle."""
    h = x if residual is None else x + residual
    u = h
    if norm_weight is not None:
        if norm == "layer_norm":
            u = layer_norm_reference(h, norm_weight, norm_bias, eps)
        else:
            u = rms_norm_reference(h, norm_weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        z = F.linear(u.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    y = z if activation is None else ACTIVATIONS[activation](z)
    return y.to(x.dtype), h, u


@triton.jit
def _channels(j, SLICES: tl.constexpr, SLICE: tl.constexpr):
    """The channels of chunk ``j`` as ``[SLICES, 1, SLICE]``: a slice is what one warp adds up."""
    slices = tl.arange(0, SLICES)[:, None, None]
    return (j * SLICES + slices) * SLICE + tl.arange(0, SLICE)[None, None, :]


@triton.jit
def _load_chunk(
    ptr, row, rows, stride, k, ROWS_FIT: tl.constexpr, K_FITS: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Channels ``k`` of the rows ``row`` as ``[SLICES, rows, SLICE]``, zeros outside."""
    at = ptr + row.to(tl.int64)[None, :, None] * stride + k
    if ROWS_FIT and K_FITS:
        return tl.load(at)
    elif ROWS_FIT:
        return tl.load(at, mask=k < K, other=0.0)
    elif K_FITS:
        return tl.load(at, mask=(row < rows)[None, :, None], other=0.0)
    return tl.load(at, mask=(row < rows)[None, :, None] & (k < K), other=0.0)


@triton.jit
def _multiplied(u, w, sums, WIDE: tl.constexpr):
    """``sums [SLICES, ROWS, COLUMNS]`` and the products of one chunk.

    ``WIDE``: the interpreter multiplies no bfloat16.
    """
    if WIDE:
        u, w = u.to(tl.float32), w.to(tl.float32)
    return tl.dot(u, tl.trans(w, 0, 2, 1), sums, input_precision="ieee")


@triton.jit
def _row_sum(x):
    """``[SLICES, ROWS, SLICE]`` to ``[1, ROWS, 1]``."""
    return tl.sum(tl.sum(x, axis=2), axis=0)[None, :, None]


@triton.jit
def _statistics(
    hs, row, rows, eps, K: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr,
    CENTERED: tl.constexpr,
):  # fmt: skip
    """``(mean, scale)`` of the norm of rows in chunks ``hs``, each ``[1, ROWS, 1]``."""
    mean = tl.zeros_like(_row_sum(hs[0].to(tl.float32)))
    if CENTERED:
        total = hs[0].to(tl.float32)
        for j in tl.static_range(1, len(hs)):
            total += hs[j].to(tl.float32)
        # `/` may be two units off: as in `_norms`, what the quotient lacks is added to it.
        sums = _row_sum(total)
        SHARE: tl.constexpr = 1.0 / K
        mean = sums * SHARE
        mean = tl.fma(tl.fma(mean, -1.0 * K, sums), SHARE, mean)
    total = tl.zeros(hs[0].shape, tl.float32)
    for j in tl.static_range(len(hs)):
        x = hs[j].to(tl.float32)
        if CENTERED:
            x = tl.where(_channels(j, SLICES, SLICE) < K, x - mean, 0.0)
        total += x * x
    # Finite past the last row, where an eps of 0 would give NaN.
    past = (row >= rows).to(tl.float32)[None, :, None]
    return mean, tl.rsqrt(_row_sum(total) / K + eps + past)


@triton.jit
def _normalized(h, mean, scale, norm_weight_ptr, norm_bias_ptr, k, K: tl.constexpr):
    """Channels ``k`` of the norm, rounded; zero past the last one, which has no weight.

    Without a norm it is ``h``, and nobody computes the statistics.
    """
    if norm_weight_ptr is None:
        return h
    inside = k < K
    u = (h.to(tl.float32) - mean) * scale
    u *= tl.load(norm_weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if norm_bias_ptr is not None:
        u += tl.load(norm_bias_ptr + k, mask=inside, other=0.0).to(tl.float32)
    return rounded(u, h.dtype)


@triton.jit
def _store_chunk(ptr, tile, row, rows, k, K: tl.constexpr):
    at = ptr + row.to(tl.int64)[None, :, None] * K + k
    tl.store(at, tile, mask=(row < rows)[None, :, None] & (k < K))


@triton.jit(do_not_specialize=["M"])
def _fused_linear_kernel(
    x_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, u_ptr,
    M, x_stride, residual_stride, weight_stride, eps,
    F: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SLICES: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr, ACTIVATION: tl.constexpr,
    CENTERED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program to ``[ROWS, COLUMNS]`` of y; its rows and their norm as well, if they have one.

    Of the pointers behind ``x`` all but ``weight`` and ``y`` may be None. The programs of the first
    columns write ``h`` and ``u`` where these are wanted. Programs of the same columns, whose
    weights are the same, are neighbours.
    """
    GATED_UNIT: tl.constexpr = ACTIVATION == "swiglu" or ACTIVATION == "geglu"
    CHUNKS: tl.constexpr = (K + SLICES * SLICE - 1) // (SLICES * SLICE)
    K_FITS: tl.constexpr = K % (SLICES * SLICE) == 0
    FITS: tl.constexpr = F % COLUMNS == 0
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value_ptr = weight_ptr + tl.cast(F, tl.int64) * weight_stride  # the second half's weights
    sums = tl.zeros((SLICES, ROWS, COLUMNS), tl.float32)
    value_sums = tl.zeros((SLICES, ROWS, COLUMNS), tl.float32)
    if norm_weight_ptr is None and residual_ptr is None:
        for j in tl.range(0, CHUNKS, num_stages=STAGES):
            k = _channels(j, SLICES, SLICE)
            x = _load_chunk(x_ptr, row, M, x_stride, k, False, K_FITS, K)
            w = _load_chunk(weight_ptr, column, F, weight_stride, k, FITS, K_FITS, K)
            sums = _multiplied(x, w, sums, WIDE)
            if GATED_UNIT:
                w = _load_chunk(value_ptr, column, F, weight_stride, k, FITS, K_FITS, K)
                value_sums = _multiplied(x, w, value_sums, WIDE)
    else:
        # Weights come from far away and rows from L2: all are asked for before any is used.
        ws, values, hs = (), (), ()
        for j in tl.static_range(CHUNKS):
            k = _channels(j, SLICES, SLICE)
            w = _load_chunk(weight_ptr, column, F, weight_stride, k, FITS, K_FITS, K)
            ws = ws + (w,)  # noqa: RUF005
            if GATED_UNIT:
                w = _load_chunk(value_ptr, column, F, weight_stride, k, FITS, K_FITS, K)
                values = values + (w,)  # noqa: RUF005
        for j in tl.static_range(CHUNKS):
            k = _channels(j, SLICES, SLICE)
            h = _load_chunk(x_ptr, row, M, x_stride, k, False, K_FITS, K)
            if residual_ptr is not None:
                r = _load_chunk(residual_ptr, row, M, residual_stride, k, False, K_FITS, K)
                h = rounded(h.to(tl.float32) + r.to(tl.float32), x_ptr.dtype.element_ty)
            hs = hs + (h,)  # noqa: RUF005
        mean, scale = _statistics(hs, row, M, eps, K, SLICES, SLICE, CENTERED)
        own = tl.where(tl.program_id(1) == 0, M, 0)  # rows that this program writes
        for j in tl.static_range(CHUNKS):
            k = _channels(j, SLICES, SLICE)
            if h_ptr is not None:
                _store_chunk(h_ptr, hs[j], row, own, k, K)
            u = _normalized(hs[j], mean, scale, norm_weight_ptr, norm_bias_ptr, k, K)
            if u_ptr is not None:
                _store_chunk(u_ptr, u, row, own, k, K)
            sums = _multiplied(u, ws[j], sums, WIDE)
            if GATED_UNIT:
                value_sums = _multiplied(u, values[j], value_sums, WIDE)
    y = tl.sum(sums, axis=0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        y, _ = activate(y, GELU=ACTIVATION != "swiglu")
    if GATED_UNIT:
        value = tl.sum(value_sums, axis=0)
        if bias_ptr is not None:
            b = tl.load(bias_ptr + F + column, mask=column < F, other=0.0)
            value += b.to(tl.float32)[None, :]
        y *= value
    at = row.to(tl.int64)[:, None] * F + column[None, :]
    mask = (row < M)[:, None] & (column < F)[None, :]
    tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty), mask=mask)


ROWS = 16  # of a program: what a tensor core takes at once


@dataclass(frozen=True)
class Choice:
    """A program makes ``columns`` columns with a warp for each of ``slices`` of a chunk."""

    columns: int
    slices: int
    slice: int
    stages: int
    registers: int | None = None  # of a lane; None: left to the assembler

    def constexprs(self, F: int, K: int, activation: str | None, centered: bool) -> dict[str, Any]:
        return {
            "F": F, "K": K, "ROWS": ROWS, "COLUMNS": self.columns, "SLICES": self.slices,
            "SLICE": self.slice, "STAGES": self.stages, "ACTIVATION": activation,
            "CENTERED": centered, "WIDE": _runtime.INTERPRET,
        }  # fmt: skip


@functools.cache
def choice(itemsize: int, held: bool) -> Choice:
    """16 columns, so that 768 outputs are 48 programs and NeoBERT's 2,304 are 144. Unmeasured.

    Rows that are ``held`` in registers take a lane of eight warps 24 of them at 768 channels of
    bfloat16, and as many for each of the weights' halves; float32 has twice the warps and half the
    columns. Without, four chunks of 16 KiB are on their way.
    """
    if not held:
        return Choice(16, 4, 128 // itemsize, 4)
    if itemsize == 2:
        return Choice(16, 8, 32, 1, registers=255)
    return Choice(8, 16, 16, 1, registers=127)


def takes(K: int, itemsize: int) -> bool:
    """Whether the kernel adds and normalizes rows of ``K`` channels."""
    return MOST_CHANNELS[itemsize] >= K


Start = tuple[Callable[..., None], tuple[Any, ...]]  # see `Prepared.starter`


def launch(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    weight: Tensor, bias: Tensor | None, y: Tensor, h: Tensor | None, u: Tensor | None,
    eps: float, activation: str | None, centered: bool,
) -> Start:  # fmt: skip
    """Start the kernel on ``[M, K]`` rows with neighbouring channels, M over 0.

    ``h`` and ``u`` may be None. Returns what starts it on arguments of the same form.
    """
    (M, K), F = x.shape, y.shape[-1]
    held = norm_weight is not None or residual is not None
    tile = choice(x.element_size(), held)
    prepared = _prepared(tile, F, K, activation, centered)
    grid = (-(-M // ROWS), -(-F // tile.columns), 1)
    arguments = (
        x, residual, norm_weight, norm_bias, weight, bias, y, h, u, M,
        K if M == 1 else x.stride(0),  # of one row a stride may be anything
        0 if residual is None else K if M == 1 else residual.stride(0), weight.stride(0),
        float(eps),
    )  # fmt: skip
    prepared(grid, *arguments)
    return prepared.starter(grid, *arguments)


@functools.lru_cache(MOST_PREPARED)
def _prepared(tile: Choice, F: int, K: int, activation: str | None, centered: bool) -> Prepared:
    constexprs = tile.constexprs(F, K, activation, centered)
    return Prepared(
        _fused_linear_kernel, constexprs, num_warps=tile.slices, num_stages=tile.stages,
        maxnreg=tile.registers, **_runtime.FP_FUSION,
    )  # fmt: skip


class Repeated:
    """A launch on weights that stay: looked up once for a number of rows, then only started.

    Args:
        weight, bias, norm_weight, norm_bias: As `launch` takes them, on one device.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None, eps: float = 0.0, centered: bool = False,
        activation: str | None = None,
    ) -> None:  # fmt: skip
        self.weights = norm_weight, norm_bias, weight, bias
        self.options = float(eps), activation, centered
        self.numbers = weight.stride(0), float(eps)
        self.starts: dict[int, Start] = {}

    def __call__(
        self, x: Tensor, residual: Tensor | None, y: Tensor, h: Tensor | None, u: Tensor | None
    ) -> None:
        """As `launch`, on contiguous tensors in memory of their own.

        Whether there is a residual, ``h`` or ``u`` is the same in every call.
        """
        M, K = x.shape
        found = self.starts.get(blocks := -(-M // ROWS))
        if found is None:
            self.starts[blocks] = launch(x, residual, *self.weights, y, h, u, *self.options)
            return
        start, rest = found
        step = 0 if residual is None else K
        start(x, residual, *self.weights, y, h, u, M, K, step, *self.numbers, *rest)


def _launch(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    weight: Tensor, bias: Tensor | None, eps: float, activation: str | None, centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, h, u = _fake(
        x, residual, norm_weight, norm_bias, weight, bias, eps, activation, centered
    )  # fmt: skip
    if not x.numel():
        return y, h, u
    launch(
        _runtime.as_rows(x), None if residual is None else _runtime.as_rows(residual),
        None if norm_weight is None else norm_weight.contiguous(),
        None if norm_bias is None else norm_bias.contiguous(),
        _runtime.neighbouring(weight), None if bias is None else bias.contiguous(),
        y.view(-1, y.shape[-1]), None if residual is None else h,
        None if norm_weight is None else u, eps, activation, centered,
    )  # fmt: skip
    return y, h, u


def _fake(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    weight: Tensor, bias: Tensor | None, eps: float, activation: str | None, centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """An empty tensor stands for ``h`` or ``u`` where it is nothing new."""
    outputs = weight.shape[0] // (2 if activation in GATED else 1)
    return (
        x.new_empty((*x.shape[:-1], outputs)),
        x.new_empty((0,) if residual is None else x.shape),
        x.new_empty((0,) if norm_weight is None else x.shape),
    )


_forward = _runtime.register(
    "fused_linear(Tensor x, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias,"
    " Tensor weight, Tensor? bias, float eps, str? activation, bool centered)"
    " -> (Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``act(norm(x + residual) @ weight.T + bias)``, made for few rows: at most some dozens.

    It takes any number of them, and PyTorch's product is faster for many. It follows no autocast.

    Args:
        x: ``[..., K]``; float32, float16 or bfloat16; any strides.
        weight: ``[N, K]`` in the dtype of ``x``, N at most 524,280 where a kernel runs. A copy is
            made of one whose channels are no neighbours in memory.
        bias: ``[N]`` in the dtype of ``x``, optional.
        residual: The shape, dtype and device of ``x``, optional.
        norm: "rms_norm", "layer_norm" or None. Where a kernel runs, with one or with a residual,
            K is at most 1,024, in float32 384.
        norm_weight: ``[K]``; needed with a norm, its dtype may differ.
        norm_bias: ``[K]``, of "layer_norm" only, optional.
        eps: Of the norm.
        activation: "gelu" (erf), or "swiglu" or "geglu", whose gate is made by the first half of
            the weights' rows; None: none.

    Returns:
        ``(y, h, u)``: ``[..., N]``, of a gated unit ``[..., N / 2]``; ``x + residual``, which is
        ``x`` without one; and its norm, which is ``h`` without one. All in ``x.dtype``, without
        gradient.

    Raises:
        ValueError: A shape, dtype, device or name breaks the rules above, or a gradient would be
            recorded.
    """
    _check_arguments(x, weight, bias, residual, norm, norm_weight, norm_bias, eps, activation)
    if not _runtime.use_kernel(x):
        return fused_linear_reference(
            x, weight, bias, residual=residual, norm=norm, norm_weight=norm_weight,
            norm_bias=norm_bias, eps=eps, activation=activation,
        )  # fmt: skip
    y, h, u = _forward(
        x, residual, norm_weight, norm_bias, weight, bias, float(eps), activation,
        norm == "layer_norm",
    )  # fmt: skip
    h = x if residual is None else h
    return y, h, h if norm is None else u


def _check_arguments(
    x: Any, weight: Any, bias: Any, residual: Any, norm: Any, norm_weight: Any, norm_bias: Any,
    eps: Any, activation: Any,
) -> None:  # fmt: skip
    _check.product(x, weight, bias)
    K = x.shape[-1]
    if activation is not None and activation not in tuple(ACTIVATIONS):
        raise _check.error("activation", f"None or one of {', '.join(ACTIVATIONS)}", activation)
    if activation in GATED and len(weight) % 2:
        rule = f"an even number of rows with activation={activation!r}"
        raise _check.error("weight", rule, len(weight))
    if residual is not None:
        _check.like("residual", residual, "x", x)
    if norm is not None and norm not in NORMS:
        raise _check.error("norm", f"None or one of {', '.join(NORMS)}", norm)
    if (norm is None) != (norm_weight is None):
        rule = "None without a norm" if norm is None else f"a tensor with norm={norm!r}"
        raise _check.error("norm_weight", rule, "one" if norm is None else None)
    if norm_weight is not None:
        _check.vector("norm_weight", norm_weight, K, x.device)
    if norm_bias is not None:
        if norm != "layer_norm":
            raise _check.error("norm_bias", "None without norm='layer_norm'", "one")
        _check.vector("norm_bias", norm_bias, K, x.device)
    _check.positive("eps", eps, zero=True)
    if len(weight) > MOST_OUTPUTS and _runtime.use_kernel(x):
        raise _check.error("weight", f"at most {MOST_OUTPUTS} rows where kernels run", len(weight))
    held = residual is not None or norm is not None
    if held and not takes(K, x.element_size()) and _runtime.use_kernel(x):
        most = f"at most {MOST_CHANNELS[x.element_size()]} channels of {_check.plain(x.dtype)}"
        raise _check.error("x", f"{most} with a norm or a residual, where kernels run", K)
    _check.no_gradient(
        x=x, weight=weight, bias=bias, residual=residual, norm_weight=norm_weight,
        norm_bias=norm_bias,
    )  # fmt: skip


# What the layers of the supported families ask for: (outputs, K, dtype, options). Products before
# attention, out of it, up and down of NeoBERT, BERT-base, BERT-large and ModernBERT-large.
def _launches(sm: int) -> Iterator[_runtime.Launch]:
    half = torch.bfloat16
    cases = [
        (2304, 768, half, "rms_norm", None, False),
        (2304, 768, half, None, None, False),
        (768, 768, half, None, None, False),
        (768, 768, half, None, None, True),
        (2048, 768, half, "rms_norm", "swiglu", False),
        (768, 2048, half, None, None, False),
        (3072, 768, half, "layer_norm", "gelu", True),
        (384, 1536, half, None, None, True),
        (1536, 384, torch.float16, "layer_norm", "gelu", True),
        (2624, 1024, half, "layer_norm", "geglu", False),
        (4096, 1024, half, "layer_norm", "gelu", True),
        (1000, 760, half, "layer_norm", "swiglu", True),
        (1536, 384, torch.float32, "layer_norm", "geglu", True),
        (1152, 384, torch.float32, "rms_norm", None, False),
        (768, 2048, torch.float32, None, None, False),
    ]
    for outputs, K, dtype, norm, activation, bias in cases:
        tile = choice(dtype.itemsize, norm is not None)
        missing = [] if bias else ["bias_ptr", "norm_bias_ptr"]
        if norm is None:
            missing += ["residual_ptr", "norm_weight_ptr", "norm_bias_ptr", "h_ptr", "u_ptr"]
        elif norm == "rms_norm":
            missing += ["norm_bias_ptr", "u_ptr"]
        else:
            missing += ["h_ptr"]
        signature = _runtime.signature(
            _fused_linear_kernel, dtype, eps="fp32", **dict.fromkeys(missing, "constexpr")
        )
        aligned = tuple(n for n, t in signature.items() if t.startswith("*") or "stride" in n)
        words = [f"F={outputs} K={K} {_runtime.TRITON_TYPES[dtype]}", norm, activation]
        yield _runtime.Launch(
            kernel=_fused_linear_kernel,
            name="fused_linear",
            case=" ".join(filter(None, [*words, "bias" if bias else None])),
            signature=signature,
            constexprs=tile.constexprs(outputs, K, activation, norm == "layer_norm")
            | dict.fromkeys(missing),
            num_warps=tile.slices,
            num_stages=tile.stages,
            maxnreg=tile.registers,
            aligned=aligned,
            narrow_once=1,  # the store of y
            matrix=dtype != torch.float32,  # exact products are not for tensor cores
            few_rows=True,
        )


_runtime.operator(fused_linear, fused_linear_reference, (_fused_linear_kernel,), _launches)

"""The launches of a stack: made out once, then started by CUDA's driver, without a module's call.

A layer is a list of parts over buffers that all layers share. The driver reads the buffers'
addresses where a `_Program` keeps them, so each forward has buffers of its own and writes their
addresses once. A thread's first forward starts as Triton does it, which compiles and loads what is
then kept, and makes the GPU's context the thread's; kernels with TMA descriptors always do. The
next forwards, until two sizes have been seen, run both ways, which waits for the GPU: unless the
bits are the same, Triton starts everything from there on.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neobert_kernels import _driver
from neobert_kernels._launch import ALIGNMENT, Ready
from neobert_kernels.ops import _norms, swiglu
from neobert_kernels.ops.attention import launch as attention
from neobert_kernels.ops.fused_linear import launch as fused
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.blocks import rotated
from neobert_kernels.patching.stacks import Layer, Linear, Norm, Stack

PROOFS = 2  # sizes of batches over which a program's launches are compared with Triton's


class _Buffers(NamedTuple):
    """What layers read and write, one after the other; the first reads ``input`` in place of ``x``.

    Attributes:
        x: Of a layer: what is added to. With ``delta`` it is normalized.
        next_x: The same behind attention, and of the next layer.
        normed: What a norm makes and a product reads.
        delta: What attention's product makes, and the feed-forward's second.
        value: The second half of ``expanded``, which a gated unit multiplies by.
    """

    input: Tensor
    x: Tensor
    next_x: Tensor
    normed: Tensor
    delta: Tensor
    qkv: Tensor
    mixed: Tensor
    expanded: Tensor
    value: Tensor
    activated: Tensor

    @classmethod
    def of(cls, x: Tensor, layer: Layer, few: bool) -> "_Buffers":
        """On ``x`` ``[T, C]``. Attention's and the feed-forward's share their memory.

        Of `_few` no launch makes ``normed`` or ``expanded``.
        """
        widths = len(layer.qkv.weight), layer.out.weight.shape[1]
        half = layer.contract.weight.shape[1]
        gates = 2 * half if layer.activation in fused.GATED and not few else 0
        inner = gates, half
        memory = x.new_empty(max(sum(_sizes(len(x), widths)), sum(_sizes(len(x), inner))))
        qkv, mixed = _carved(memory, len(x), widths)
        expanded, activated = _carved(memory, len(x), inner)
        own, next_x, delta = (x.new_empty(x.shape) for _ in range(3))
        normed = own if few else x.new_empty(x.shape)
        if not gates:  # an activation in place
            expanded = activated
        return cls(
            x, own, next_x, normed, delta, qkv, mixed, expanded, expanded[:, half:], activated
        )


def _sizes(T: int, widths: Sequence[int]) -> list[int]:
    """Elements that each takes, so that the next one is aligned."""
    return [-(-T * width // ALIGNMENT) * ALIGNMENT for width in widths]


def _carved(memory: Tensor, T: int, widths: Sequence[int]) -> list[Tensor]:
    """Contiguous ``[T, width]``, one behind the other."""
    sizes = _sizes(T, widths)
    parts = memory[: sum(sizes)].split(sizes)
    return [part[: T * w].view(T, w) for part, w in zip(parts, widths, strict=True)]


class Attend(NamedTuple):
    """Attention of a kind; its launches are made out by each forward."""

    window: int | None
    theta: float | None


class Multiply:
    """A product by PyTorch, from buffer to buffer."""

    def __init__(self, linear: Linear, source: str, target: str) -> None:
        self.weight, self.bias = linear
        self.source, self.target = (_Buffers._fields.index(name) for name in (source, target))

    def __call__(self, to: _Buffers) -> None:
        x, y = to[self.source], to[self.target]
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=y)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=y)


def _gelu(to: _Buffers) -> None:
    torch.ops.aten.gelu.out(to.expanded, out=to.activated)


# What starts by itself, or a kernel's launch.
Part = Attend | Callable[[_Buffers], Ready | None]


def _few(stack: Stack) -> list[list[Part]]:
    """Five launches a layer: norms and activations are part of `fused_linear`."""

    def kept(x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Where the sum and its norm go: one of them is what is added to later."""
        return (None, x) if stack.post_norm else (x, None)

    def parts(layer: Layer, first: bool) -> list[Part]:
        def before(to: _Buffers) -> Ready:
            if first:
                return _fused(layer.qkv, to.input, to.qkv, norm=layer.before)
            return _fused(layer.qkv, to.next_x, to.qkv, to.delta, layer.before, *kept(to.x))

        def out(to: _Buffers) -> Ready:
            return _fused(layer.out, to.mixed, to.delta)

        def expand(to: _Buffers) -> Ready:
            return _fused(
                layer.expand, to.input if first else to.x, to.activated, to.delta, layer.between,
                *kept(to.next_x), layer.activation,
            )  # fmt: skip

        def contract(to: _Buffers) -> Ready:
            return _fused(layer.contract, to.activated, to.delta)

        return [before, Attend(layer.window, layer.theta), out, expand, contract]

    return [parts(layer, not number) for number, layer in enumerate(stack.layers)]


def _fused(
    linear: Linear, x: Tensor, y: Tensor, residual: Tensor | None = None, norm: Norm | None = None,
    h: Tensor | None = None, u: Tensor | None = None, activation: str | None = None,
) -> Ready:  # fmt: skip
    kind, weight, bias, eps = norm or ("rms_norm", None, None, 0.0)
    return fused.ready(
        x, residual, weight, bias, *linear, y, h, u, eps, activation, kind == "layer_norm"
    )


def of_many(stack: Stack) -> bool:
    """Whether `_many` takes it: layers normalize what they add, and all rows are aligned."""
    first, like = stack.layers[0], stack.after.weight
    widths = (*first.qkv.weight.shape, *first.expand.weight.shape, first.contract.weight.shape[1])
    aligned = all(width * like.element_size() % ALIGNMENT == 0 for width in widths)
    return aligned and all(layer.before is not None for layer in stack.layers[1:])


def _many(stack: Stack) -> list[list[Part]]:
    """The operators of the layers' own forwards, in their order."""

    def normed(norm: Norm, x: Tensor, delta: Tensor | None, kept: Tensor, other: Tensor) -> Ready:
        """``kept`` is what is added to later: the sum, or else the norm."""
        y, h = (kept, other) if stack.post_norm else (other, kept)
        first, residual = (x, None) if delta is None else (delta, x)
        return _norms.ready(
            first, residual, norm.weight, norm.bias, norm.eps, y, None if delta is None else h,
            norm.kind == "layer_norm",
        )  # fmt: skip

    def parts(layer: Layer, first: bool) -> list[Part]:
        def before(to: _Buffers) -> Ready:
            assert layer.before is not None
            if first:
                return normed(layer.before, to.input, None, to.x, to.normed)
            return normed(layer.before, to.next_x, to.delta, to.x, to.normed)

        def between(to: _Buffers) -> Ready:
            x = to.input if first else to.x
            return normed(layer.between, x, to.delta, to.next_x, to.normed)

        def activate(to: _Buffers) -> Ready:
            gelu = layer.activation == "geglu"
            return swiglu.ready(to.expanded, to.value, to.activated, gelu)

        found: list[Part] = [] if layer.before is None else [before]
        plain = "x" if stack.post_norm else "normed"
        source = "input" if layer.before is None else plain
        return [
            *found,
            Multiply(layer.qkv, source, "qkv"),
            Attend(layer.window, layer.theta),
            Multiply(layer.out, "mixed", "delta"),
            between,
            Multiply(layer.expand, "next_x" if stack.post_norm else "normed", "expanded"),
            activate if layer.activation in fused.GATED else _gelu,
            Multiply(layer.contract, "activated", "delta"),
        ]

    return [parts(layer, not number) for number, layer in enumerate(stack.layers)]


Attention = Ready | attention.Described


def _attention(
    stack: Stack, kinds: set[Attend], to: _Buffers, batch: Batch
) -> dict[Attend, list[Attention]]:
    """Attention over the buffers, of every kind."""
    q, k, v = stack.split(to.qkv)
    T, H, D = q.shape
    out, lse = to.mixed.view(T, H, D), q.new_empty((H, T), dtype=torch.float32)
    scale = D**-0.5 if stack.scale is None else stack.scale
    tables = {
        theta: rotated(batch, D, theta) if theta is not None else None
        for theta in {kind.theta for kind in kinds}
    }
    turned: list[Tensor] = []

    def once() -> Tensor:
        if not turned:
            turned.append(q.new_empty((T, H + k.shape[1], D)))
        return turned[0]

    found = {}
    for kind in kinds:
        table = tables[kind.theta]
        cos, sin = (None, None) if table is None else (table.cos, table.sin)
        found[kind] = attention.ready(
            out, lse, once, q, k, v, batch.cu_seqlens, min(batch.max_seqlen, T), cos, sin,
            stack.interleaved, kind.window, scale,
        )  # fmt: skip
    return found


class _Program:
    """All layers as the driver takes them, for any number of rows.

    One thread at a time runs it: the addresses of the buffers are written into it.

    Args:
        parts: Of all layers, which have been started on ``to``.
    """

    def __init__(self, parts: Sequence[Part | Ready], to: _Buffers) -> None:
        self.queue = _driver.Queue()
        self.addresses = [_driver.Pointer() for _ in to]
        cells = {id(x): address for x, address in zip(to, self.addresses, strict=True)}
        memory = {x.untyped_storage().data_ptr() for x in to[1:]}  # the input is a caller's
        self.parts: list[Any] = []
        self.proofs = set[int]()  # numbers of blocks of rows over which it gave Triton's bits
        self.kernels = {part.prepared.kernel for part in parts if isinstance(part, Ready)}
        self.possible = True
        for part in parts:
            if isinstance(part, Ready):
                tensors = [x for x in part.arguments if isinstance(x, Tensor)]
                others = [x for x in tensors if id(x) not in cells]
                assert not any(x.untyped_storage().data_ptr() in memory for x in others)
                launch = part.bound(self.queue, cells)
                self.possible = self.possible and launch is not None
                self.parts.append(launch)
            else:
                self.parts.append(part)

    def proven(self, rows: int) -> bool:
        """Whether bits were compared over so many blocks of rows, or over enough others."""
        return len(self.proofs) >= PROOFS or _blocks(rows) in self.proofs

    def usable(self) -> bool:
        """Whether the driver may start it, as far as Triton and its hooks are concerned."""
        return self.possible and not _watched(self.kernels)

    def run(self, to: _Buffers, attend: dict[Attend, list[Attention]]) -> None:
        """While it is usable."""
        self.queue.turn_to(_driver.stream(), len(to.input))
        between: dict[Attend, list[Any]] = {}
        for kind, launches in attend.items():
            between[kind] = [ready.bound(self.queue) or ready for ready in launches]
        for address, x in zip(self.addresses, to, strict=True):
            address.value = x.data_ptr()
        start, launched = _driver.starter(), _driver.Launch
        for part in self.parts:
            if type(part) is launched:
                if code := start(*part.call, None):
                    raise _driver.RefusedError(code)
            elif type(part) is Attend:
                for each in between[part]:
                    if type(each) is not launched:
                        each.start()  # has descriptors, or is of a form that has not started yet
                    elif code := start(*each.call, None):
                        raise _driver.RefusedError(code)
            else:
                part(to)


def _blocks(rows: int) -> int:
    """The least that makes a kernel start more programs."""
    return -(-rows // fused.ROWS)


def _must_not_wait() -> bool:
    """Whether somebody forbids to wait for the GPU."""
    return torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode() != 0


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def _watched(kernels: Iterable[Any]) -> bool:
    """Whether a hook of Triton is to see launches."""
    return not _driver.unseen() or any(kernel.pre_run_hooks for kernel in kernels)


class _Thread(threading.local):
    """What is so in each thread."""

    started = False  # Triton has made the GPU's context the thread's


class Launches:
    """Runs a stack, any number of times.

    Args:
        stack: Its weights stay where they are.
        few: Whether it runs as `_few` says, or else as `_many`.
    """

    def __init__(self, stack: Stack, *, few: bool) -> None:
        self.stack, self.few = stack, few
        layers = _few(stack) if few else _many(stack)
        self.parts = [part for layer in layers for part in layer]
        self.kinds = {part for part in self.parts if isinstance(part, Attend)}
        self.thread = _Thread()
        self.idle: list[_Program] = []  # no thread runs these
        self.trusted = True

    @property
    def like(self) -> Tensor:
        """A weight of the dtype and on the device of all."""
        return self.stack.after.weight

    def run(self, x: Tensor, batch: Batch) -> Tensor:
        """``[T, C]`` to ``[T, C]``, with the last norm, on the current GPU; T over 0."""
        if not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
            x = x.clone(memory_format=torch.contiguous_format)
        program = None
        if self.thread.started:
            with suppress(IndexError):
                program = self.idle.pop()
        usable = program is not None and self.trusted and program.usable()
        if program is not None and usable and program.proven(len(x)):
            y = self._by_driver(program, x, batch)
        elif program is not None and usable and not _must_not_wait():
            y = self._compared(program, x, batch)
        else:
            y, started, to = self._by_triton(x, batch)
            self.thread.started = True
            if program is None and not self.idle and self.trusted and _driver.library():
                kernels = {part.prepared.kernel for part in started if isinstance(part, Ready)}
                program = None if _watched(kernels) else _Program(started, to)
        if program is not None and self.trusted:
            self.idle.append(program)
        return y

    def _compared(self, program: _Program, x: Tensor, batch: Batch) -> Tensor:
        """By Triton and by the driver; unless the bits are the same, Triton starts all later ones.

        It waits for the GPU.
        """
        y, why = self._by_triton(x, batch)[0], None
        try:
            if not _same_bits(self._by_driver(program, x, batch, spoil=True), y):
                why = "other bits than Triton's"
        except _driver.RefusedError as error:
            why = str(error)
        if why is None:
            program.proofs.add(_blocks(len(x)))
            return y
        self.trusted = False
        self.idle.clear()
        warnings.warn(
            f"neobert_kernels: launches by CUDA's driver gave {why} over {len(x)} tokens and go "
            "through Triton from here on; please report this with what `neobert doctor` prints "
            "(NEOBERT_DIRECT=0 does without)",
            RuntimeWarning,
            stacklevel=2,
        )
        return y

    def _by_driver(self, program: _Program, x: Tensor, batch: Batch, spoil: bool = False) -> Tensor:
        """``spoil``: no buffer holds what an earlier forward left in that memory."""
        to = _Buffers.of(x, self.stack.layers[0], self.few)
        if spoil:
            for buffer in to[1:]:
                buffer.fill_(torch.nan)
        attend = _attention(self.stack, self.kinds, to, batch)
        program.run(to, attend)
        return self.stack.after.add(to.next_x, to.delta)

    def _by_triton(self, x: Tensor, batch: Batch) -> tuple[Tensor, list[Part | Ready], _Buffers]:
        """Also what was started, and on which buffers."""
        to = _Buffers.of(x, self.stack.layers[0], self.few)
        attend = _attention(self.stack, self.kinds, to, batch)
        started = [self._start(part, to, attend) for part in self.parts]
        return self.stack.after.add(to.next_x, to.delta), started, to

    def _start(
        self, part: Part, to: _Buffers, attend: dict[Attend, list[Attention]]
    ) -> Part | Ready:
        """As Triton does it; the part, or what it made."""
        if isinstance(part, Attend):
            for launch in attend[part]:
                launch.start()
            return part
        ready = part(to)
        if ready is None:
            return part
        ready.start()
        return ready

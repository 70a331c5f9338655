"""The launches of a stack on few tokens: made out once, then started by CUDA's driver.

The driver reads the buffers' addresses where `_Program` keeps them, so each forward has buffers of
its own and writes their addresses once for all layers. The first forward of a thread on some number
of blocks of rows starts as Triton does it, which compiles and loads what is then kept.
"""

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neobert_kernels import _driver
from neobert_kernels._launch import ALIGNMENT, Ready
from neobert_kernels.ops.attention import launch as attention
from neobert_kernels.ops.fused_linear import launch as fused
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.blocks import rotated
from neobert_kernels.patching.stacks import Layer, Linear, Norm, Stack


class _Buffers(NamedTuple):
    """What layers read and write, one after the other; the first reads ``input`` in place of ``x``.

    Attributes:
        x, delta: Of a layer; it adds and normalizes them, its product behind attention makes
            ``delta``.
        next_x, next_delta: What the next layer adds and normalizes.
    """

    input: Tensor
    x: Tensor
    delta: Tensor
    next_x: Tensor
    next_delta: Tensor
    qkv: Tensor
    mixed: Tensor
    expanded: Tensor

    @classmethod
    def of(cls, x: Tensor, layer: Layer) -> "_Buffers":
        gated = 2 if layer.activation in fused.GATED else 1
        widths = (
            len(layer.qkv.weight), layer.out.weight.shape[1], len(layer.expand.weight) // gated,
        )  # fmt: skip
        like = [torch.empty_like(x) for _ in range(4)]
        return cls(x, *like, *[x.new_empty((len(x), width)) for width in widths])


Kind = tuple[int | None, float | None]  # of attention: its window and RoPE's theta


def _attention(stack: Stack, to: _Buffers, batch: Batch) -> dict[Kind, Ready]:
    """Attention over the buffers, of every kind."""
    q, k, v = stack.split(to.qkv)
    T, H, D = q.shape
    out, lse = to.mixed.view(T, H, D), q.new_empty((H, T), dtype=torch.float32)
    scale = D**-0.5 if stack.scale is None else stack.scale
    kinds = {(layer.window, layer.theta) for layer in stack.layers}
    tables = {
        theta: rotated(batch, D, theta) if theta is not None else None
        for theta in {theta for _, theta in kinds}
    }
    found = {}
    for window, theta in kinds:
        table = tables[theta]
        cos, sin = (None, None) if table is None else (table.cos, table.sin)
        found[window, theta] = attention.ready(
            out, lse, q, k, v, batch.cu_seqlens, min(batch.max_seqlen, T), cos, sin,
            stack.interleaved, window, scale,
        )  # fmt: skip
    return found


class _Step:
    """One layer's launches."""

    def __init__(self, layer: Layer, post_norm: bool) -> None:
        self.layer, self.post_norm = layer, post_norm
        self.kind: Kind = (layer.window, layer.theta)

    def ready(self, to: _Buffers, first: bool) -> tuple[Ready, ...]:
        """The product before attention and the three behind it.

        What the first layer has is what is added to later, and nothing is added to it before.
        """
        layer, x = self.layer, to.input if first else to.x
        if first:
            before = _product(layer.qkv, to.input, to.qkv, norm=layer.before)
        else:
            sums = self._kept(to.x)
            before = _product(layer.qkv, to.next_x, to.qkv, to.next_delta, layer.before, *sums)
        sums = self._kept(to.next_x)
        norm, activation = layer.between, layer.activation
        return (
            before,
            _product(layer.out, to.mixed, to.delta),
            _product(layer.expand, x, to.expanded, to.delta, norm, *sums, activation=activation),
            _product(layer.contract, to.expanded, to.next_delta),
        )

    def _kept(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Where the sum and its norm go: one of them is what is added to later."""
        return (None, x) if self.post_norm else (x, None)


def _product(
    linear: Linear, x: Tensor, y: Tensor, residual: Tensor | None = None, norm: Norm | None = None,
    h: Tensor | None = None, u: Tensor | None = None, activation: str | None = None,
) -> Ready:  # fmt: skip
    kind, weight, bias, eps = norm or ("rms_norm", None, None, 0.0)
    return fused.ready(
        x, residual, weight, bias, *linear, y, h, u, eps, activation, kind == "layer_norm"
    )


class _Program:
    """The products of all layers as the driver takes them, for one number of blocks of rows.

    One thread at a time runs it: the addresses of the buffers are written into it.

    Args:
        layers: Of each step what is `ready` on ``to`` and has been started.
    """

    def __init__(self, steps: list[_Step], layers: list[tuple[Ready, ...]], to: _Buffers) -> None:
        self.queue = _driver.Queue()
        self.rows, self.addresses = _driver.Int(), [_driver.Pointer() for _ in to]
        cells: dict[int, Any] = {fused.NUMBER_OF_ROWS: self.rows}
        cells |= {id(x): address for x, address in zip(to, self.addresses, strict=True)}
        self.layers: list[tuple[Kind, list[_driver.Launch]]] = []
        for step, ready in zip(steps, layers, strict=True):
            bound = [
                found for launch in ready if (found := launch.bound(self.queue, cells)) is not None
            ]
            if len(bound) == len(ready):
                self.layers.append((step.kind, bound))
        self.possible = len(self.layers) == len(steps)

    def run(self, to: _Buffers, attend: dict[Kind, Ready]) -> bool:
        """Whether it was possible; otherwise nothing has been started."""
        if not self.possible or not _driver.unseen() or fused.fused_linear_kernel.pre_run_hooks:
            return False
        between = {
            kind: bound for kind, ready in attend.items() if (bound := ready.bound(self.queue))
        }
        if len(between) < len(attend):  # of a form that Triton has not started yet
            return False
        for address, x in zip(self.addresses, to, strict=True):
            address.value = x.data_ptr()
        self.rows.value = len(to.input)
        launches = [
            launch
            for kind, (before, *behind) in self.layers
            for launch in (before, between[kind], *behind)
        ]
        self.queue.run(launches, _driver.stream())
        return True


class _Own(threading.local):
    """A thread's programs, by the number of blocks of rows."""

    def __init__(self) -> None:
        self.programs: dict[int, _Program] = {}


class Launches:
    """Runs a stack, any number of times, on at most a few blocks of rows.

    Args:
        stack: Its weights stay where they are.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.steps = [_Step(layer, stack.post_norm) for layer in stack.layers]
        self.own = _Own()

    @property
    def like(self) -> Tensor:
        """A weight of the dtype and on the device of all."""
        return self.stack.after.weight

    def run(self, x: Tensor, batch: Batch) -> Tensor:
        """``[T, C]`` to ``[T, C]``, with the last norm, on the current GPU; T over 0."""
        if not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
            x = x.clone(memory_format=torch.contiguous_format)
        to = _Buffers.of(x, self.stack.layers[0])
        attend = _attention(self.stack, to, batch)
        programs = self.own.programs
        program = programs.get(blocks := -(-len(x) // fused.ROWS))
        if program is None or not program.run(to, attend):
            layers = [step.ready(to, first=not number) for number, step in enumerate(self.steps)]
            for step, (before, *behind) in zip(self.steps, layers, strict=True):
                for launch in (before, attend[step.kind], *behind):
                    launch.start()
            if program is None and _driver.library() is not None:
                programs[blocks] = _Program(self.steps, layers, to)
        return self.stack.after.add(to.next_x, to.next_delta)

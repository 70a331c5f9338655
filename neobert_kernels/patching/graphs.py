"""`patch(model, cuda_graphs=True)`: a forward is one launch instead of some two hundred.

A graph repeats what it recorded, on the same memory and with the same sizes. So a batch is laid
into the smallest bucket of tokens and documents that takes it: rows behind its own belong to
documents behind its own, which attention keeps apart, and are dropped. What remains open is the
longest document, which picks attention's launch choices: batches that it would pick others for have
graphs of their own. A replay gives the bits of the same forward without a graph over the bucket;
products of another number of rows may round differently from those over the batch alone, unless the
model is batch-invariant: then rows do not know each other, and attention has one longest document.

Graphs of a model share memory and are replayed one after the other: a lock orders the threads that
start them, an event the streams that run them. The least recently used graph makes room for a new
one.
"""

import bisect
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from neobert_kernels import _check
from neobert_kernels.ops.attention import tiles
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.blocks import has_hooks

GRAPHS = "_neobert_kernels_graphs"

MOST_GRAPHS = 32
MOST_TOKENS = 8192  # larger batches keep a GPU busy for longer than the host takes: no graph
LEAST_TOKENS = 16
LONGEST = 1 << 20  # stands for every document beyond the last limit

Outputs = tuple[Tensor, Tensor | None]  # hidden states [T, C] and the pooler's output [B, C]
Forward = Callable[[Tensor, Batch, dict[str, Tensor]], Outputs]


class Bucket(NamedTuple):
    """Sizes of a graph.

    Attributes:
        tokens, documents: As recorded.
        max_seqlen: One length for all that make attention launch the same.
        piece: The longest document that padding tokens may form.
    """

    tokens: int
    documents: int
    max_seqlen: int
    piece: int


def edges(windows: set[int]) -> list[int]:
    """Longest documents up to which attention launches the same; past the last one, too."""
    own = {tiles.SHORT, tiles.TURN_INSIDE, tiles.TMA_FROM - 1}
    return sorted(own | {window + 1 for window in windows})


def bucket_of(tokens: int, documents: int, longest: int, limits: list[int]) -> Bucket:
    """The smallest bucket for a batch: powers of two, and for tokens one and a half times those."""
    room = LEAST_TOKENS
    while room < tokens:
        power = room & (room - 1) == 0
        room = room * 3 // 2 if power else room * 4 // 3
    place = bisect.bisect_left(limits, longest)
    if place < len(limits):
        max_seqlen = piece = limits[place]
    else:
        max_seqlen, piece = LONGEST, room
    needed = documents + -(-(room - tokens) // piece)
    return Bucket(room, 1 << max(needed - 1, 0).bit_length(), max_seqlen, piece)


def padded_bounds(cu_seqlens: Tensor, tokens: int, bucket: Bucket) -> Tensor:
    """``[bucket.documents + 1]`` int32: documents of padding tokens behind the batch's own.

    Args:
        cu_seqlens: ``[B + 1]``.
        tokens: T, which a GPU is not asked for.
    """
    bounds = cu_seqlens.new_empty(bucket.documents + 1)
    lay_bounds(bounds, pieces(bucket, cu_seqlens.device), cu_seqlens, tokens, bucket)
    return bounds


def pieces(bucket: Bucket, device: torch.device) -> Tensor:
    """``[bucket.documents]`` int32: where documents of padding end, from the batch's end on."""
    many = torch.arange(1, bucket.documents + 1, dtype=torch.int32, device=device)
    return many * bucket.piece


def lay_bounds(
    bounds: Tensor, ends: Tensor, cu_seqlens: Tensor, tokens: int, bucket: Bucket
) -> None:
    """Write `padded_bounds` into ``bounds``, in three launches; ``ends`` are its `pieces`."""
    own, behind = bounds.tensor_split([len(cu_seqlens)])
    own.copy_(cu_seqlens)
    torch.add(ends[: len(behind)], tokens, out=behind).clamp_(max=bucket.tokens)


class Recorder(Protocol):
    """Runs a function once to record it; every `replay` repeats it on the same tensors."""

    outputs: Outputs

    def replay(self) -> None: ...


class CudaGraph:
    """What a CUDA device does in ``function``, recorded."""

    def __init__(self, function: Callable[[], Outputs], pool: Any) -> None:
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # compiles kernels and makes workspaces, which may not be recorded
        torch.cuda.current_stream().wait_stream(stream)
        # Other threads may go on using the device meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = function()

    def replay(self) -> None:
        self.graph.replay()


@dataclass(frozen=True, eq=False)
class _Entry:
    """A graph and the tensors that it reads."""

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    pieces: Tensor  # of its bucket
    extras: dict[str, Tensor]
    recorder: Recorder


class Graphs:
    """The graphs of one base model.

    Args:
        base: The model; its weights are read where they are.
        limits: Longest documents up to which attention launches the same, as `edges`.
        record: Makes a `Recorder`; a stand-in where there is no GPU.
    """

    def __init__(
        self,
        base: nn.Module,
        limits: list[int],
        record: Callable[[Callable[[], Outputs], Any], Recorder] = CudaGraph,
        most: int = MOST_GRAPHS,
    ) -> None:
        self.stands_in = record is not CudaGraph
        self.limits, self.record, self.most = limits, record, most
        self.entries: OrderedDict[Any, _Entry] = OrderedDict()
        self.lock = threading.Lock()
        self.pool: Any = None
        self.done: Any = None  # the event behind the last replay's results
        self.modules = list(base.named_modules())
        self.hooks = [
            hooks for _, m in self.modules for hooks in (m._forward_hooks, m._forward_pre_hooks)
        ]
        self.addresses = self._addresses()

    def _addresses(self) -> tuple[list[int], list[int]]:
        """Which weights there are and where: at every call, so quickly."""
        weights = [
            weight
            for _, module in self.modules
            for own in (module._parameters, module._buffers)
            if own
            for weight in own.values()
            if weight is not None
        ]
        return list(map(id, weights)), list(map(Tensor.data_ptr, weights))

    def run(
        self, forward: Forward, tokens: Tensor, batch: Batch, extras: dict[str, Tensor]
    ) -> Outputs:
        """`forward` of a batch by a replay, recorded first where its bucket is new."""
        if any(self.hooks):
            for name, module in self.modules:
                if has_hooks(module):
                    rule = "modules without hooks with cuda_graphs=True (a replay runs none)"
                    raise _check.error("model", rule, f"one on {name or 'the model'}")
        T, B = len(tokens), len(batch.cu_seqlens) - 1
        bucket = bucket_of(T, B, batch.max_seqlen, self.limits)
        key = (bucket, tokens.dtype, tokens.shape[1:], tuple(sorted(extras)))
        with self.lock, torch.cuda.device_of(tokens):
            addresses = self._addresses()
            if addresses != self.addresses:  # weights were moved or replaced
                self.entries.clear()
                self.addresses = addresses
            stream = torch.cuda.current_stream() if tokens.is_cuda else None
            if stream is not None and self.done is not None:
                stream.wait_event(self.done)  # another stream may still read the results
            entry = self.entries.pop(key, None)
            if entry is None:
                entry = self._recorded(forward, bucket, tokens, batch, extras)
            self.entries[key] = entry  # now the most recently used
            entry.tokens[:T].copy_(tokens)
            entry.positions[:T].copy_(batch.positions)
            lay_bounds(entry.cu_seqlens, entry.pieces, batch.cu_seqlens, T, bucket)
            for name, value in extras.items():
                entry.extras[name][:T].copy_(value)
            entry.recorder.replay()
            x, pooled = entry.recorder.outputs
            found = x[:T].clone(), None if pooled is None else pooled[:B].clone()
            if stream is not None:
                if self.done is None:
                    self.done = torch.cuda.Event()
                self.done.record(stream)
            return found

    # Tensors made in inference mode could not be written outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _recorded(
        self,
        forward: Forward,
        bucket: Bucket,
        tokens: Tensor,
        batch: Batch,
        extras: dict[str, Tensor],
    ) -> _Entry:
        while len(self.entries) >= self.most:
            self.entries.popitem(last=False)
        if self.pool is None and tokens.is_cuda:
            self.pool = torch.cuda.graph_pool_handle()

        def whole(x: Tensor) -> Tensor:
            """Room for ``x``; behind it its first row again, which is valid everywhere."""
            made = torch.empty(bucket.tokens, *x.shape[1:], dtype=x.dtype, device=x.device)
            return made.copy_(x[:1].expand(made.shape))

        own, positions = whole(tokens), whole(batch.positions)
        kinds = {name: whole(value) for name, value in extras.items()}
        bounds = padded_bounds(batch.cu_seqlens, len(tokens), bucket)
        ends = pieces(bucket, bounds.device)
        static = Batch(bounds, bucket.max_seqlen, positions, None)
        recorder = self.record(lambda: forward(own, static, kinds), self.pool)
        return _Entry(own, positions, bounds, ends, kinds, recorder)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model records graphs of its own."""

    def __reduce__(self) -> tuple:
        return type(None), ()


def takes(graphs: Graphs, base: nn.Module, tokens: Tensor, keep: bool) -> bool:
    """Whether a call goes through a graph; without one: training, a compiler, a large batch.

    Raises:
        ValueError: It asks for what cannot be recorded.
    """
    if torch.compiler.is_compiling() or base.training:
        return False
    if torch.is_grad_enabled() and (
        tokens.requires_grad or any(p.requires_grad for p in base.parameters())
    ):
        return False
    if not (tokens.is_cuda or graphs.stands_in):
        raise _check.error("model", "a CUDA device with cuda_graphs=True", tokens.device)
    if keep:
        rule = "False with cuda_graphs=True (a graph keeps the last layer's states alone)"
        raise _check.error("output_hidden_states", rule, True)
    if tokens.is_cuda and torch.is_autocast_enabled("cuda"):
        rule = "no autocast with cuda_graphs=True (cast the model, then patch it)"
        raise _check.error("model", rule, f"autocast to {torch.get_autocast_dtype('cuda')}")
    if torch.cuda.is_available() and tokens.is_cuda and torch.cuda.is_current_stream_capturing():
        rule = "no capture around a call with cuda_graphs=True (patch without it)"
        raise _check.error("model", rule, "a stream that is being captured")
    return 0 < len(tokens) <= MOST_TOKENS

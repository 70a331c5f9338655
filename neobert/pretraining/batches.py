"""From a store to batches: packed or padded, masked, the same for any number of ranks and workers.

The main process plans (from lengths alone), workers gather and mask. For every view an endless
sequence of bins is a function of the seed and of a position in it: document positions run through
one shuffled epoch after the other, a chunk of them at a time is packed, and the chunk's bins are
shuffled. A step draws its view by a hash of (seed, step) and takes the next `bins` bins of it; bin
k goes to rank k % world. So a few counters are all that a checkpoint has to keep.
"""

import dataclasses
import signal
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from neobert.files import differences
from neobert.pretraining.hashing import key, uniform
from neobert.pretraining.masking import IGNORE_INDEX, Masked, Masking, stream_keys
from neobert.pretraining.order import Permutation
from neobert.pretraining.packing import pack
from neobert.pretraining.recipe import Batch, Recipe, view_minimum
from neobert.pretraining.rules import error
from neobert.pretraining.store import SPECIALS, Store, Vocabulary

# Bins of a chunk: its last bin is what stays unfilled, well under 1 % of so many. A small store
# has fewer: a chunk mixes no more than so many of its epochs.
CHUNK_BINS, CHUNK_EPOCHS = 256, 4
STATE_VERSION = 1
GRACE_SECONDS = 30  # that a worker lives after a SIGTERM
# Changes after which the positions in a state still mean the same bins.
HARMLESS = frozenset(
    {"batch.bins", "batch.mask_rate", "batch.masking", "batch.views", "input times"}
)
# First words of the keys of every kind of draw.
_HELD_OUT, ORDER, _BINS, _VIEW, MASK = range(5)


@dataclass(frozen=True)
class MicroBatch:
    """One bin on the CPU. Packed: one row of T tokens. Padded: B rows of S.

    Attributes:
        input_ids: ``[1, T]`` or ``[B, S]`` int64, masked.
        labels: The same shape, -100 where not labelled.
        cu_seqlens: ``[B + 1]`` int32, the documents' boundaries; None when padded.
        max_seqlen: Tokens of the longest document.
        rows: ``[N]`` int64, the labelled positions of the flattened ``labels``.
        documents: ``[B]`` int64, the documents' numbers in the store.
        attention_mask: ``[B, S]`` int64 when padded; None when packed.
        tokens: Real tokens.
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    rows: Tensor
    documents: np.ndarray
    attention_mask: Tensor | None
    tokens: int

    def pin_memory(self) -> "MicroBatch":
        """What `DataLoader` calls where there is a GPU."""
        tensors: dict[str, Any] = {
            k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return dataclasses.replace(self, **tensors)


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        micro_batches: This rank's share of the bins.
        state: JSON-able; `steps` continues after this step with it.
        view: The view that all ranks' bins are drawn from.
    """

    micro_batches: list[MicroBatch]
    state: dict[str, Any]
    view: str


class Plan(NamedTuple):
    """One bin: documents, their lengths in it ([CLS] and [SEP] included), their epochs."""

    documents: np.ndarray
    lengths: np.ndarray
    epochs: np.ndarray
    mask_key: int


def bins_of(chunk: Plan, batch: Batch, *parts: int) -> list[Plan]:
    """The documents of a chunk, which are in an order of their own, in bins.

    Args:
        parts: Key the bins' shuffle; without any, they are not shuffled.
    """
    order, bounds = _bounds(chunk.lengths, batch)
    bins = np.arange(len(bounds) - 1)
    if parts and batch.layout == "packed":
        # Packing puts the longest documents first; steps should not see that order.
        bins = Permutation(len(bins), _BINS, *parts)(bins)
    documents, lengths, epochs, mask_key = chunk
    chosen = (order[bounds[i] : bounds[i + 1]] for i in bins.tolist())
    return [Plan(documents[o], lengths[o], epochs[o], mask_key) for o in chosen]


def _bounds(lengths: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """As `pack` returns them."""
    if batch.layout == "packed":
        return pack(lengths, batch.tokens)
    count = len(lengths)
    return np.arange(count), np.r_[np.arange(0, count, batch.rows), count]


class Documents:
    """The documents of a view that are not held out: all by a formula, filtered ones by a list."""

    def __init__(self, store: Store, held_out: int, least: int) -> None:
        self._spread = Permutation(len(store), _HELD_OUT)
        self._list: np.ndarray | None = None
        self.size = len(store) - held_out
        if least:
            fits = np.flatnonzero(store.lengths() + SPECIALS >= least)
            fits = np.setdiff1d(fits, self._spread(np.arange(self.size, len(store))), True)
            self._list, self.size = fits, len(fits)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        return self._spread(positions) if self._list is None else self._list[positions]


def training_documents(store: Store, recipe: Recipe, view: str) -> Documents:
    """The documents of a view.

    Raises:
        InputError: There are none, or more are held out than there are.
    """
    held_out = recipe.data.held_out
    if held_out >= len(store):
        raise error("data.held_out", f"fewer than the store's {len(store):,} documents", held_out)
    documents = Documents(store, held_out, view_minimum(view))
    if not documents.size:
        rule = f"documents of at least {view_minimum(view):,} tokens for the view {view!r}"
        raise error("batch.views", rule, f"none in {store.folder}")
    return documents


class View:
    """The endless sequence of one view's bins, chunk after chunk."""

    def __init__(self, store: Store, recipe: Recipe, name: str) -> None:
        self._store, self._batch = store, recipe.batch
        self._documents = training_documents(store, recipe, name)
        least = view_minimum(name)
        self._key = key(ORDER, recipe.batch.seed, least)
        self._mask_key = key(MASK, recipe.batch.seed, least)
        self._chunk_documents = self._documents_of_a_chunk()
        self._held: tuple[int, list[Plan]] = (-1, [])

    def _documents_of_a_chunk(self) -> int:
        """As many as fill `CHUNK_BINS` bins, but no more than `CHUNK_EPOCHS` epochs."""
        if self._batch.layout == "padded":
            return self._batch.rows * CHUNK_BINS
        size = self._documents.size
        total = 0
        for start in range(0, size, 1 << 20):
            some = self._documents[np.arange(start, min(size, start + (1 << 20)))]
            total += int(self._lengths(some).sum())
        return max(1, min(CHUNK_EPOCHS * size, CHUNK_BINS * self._batch.tokens * size // total))

    def _lengths(self, documents: np.ndarray) -> np.ndarray:
        return np.minimum(self._store.lengths(documents) + SPECIALS, self._batch.max_length)

    def chunk(self, number: int) -> list[Plan]:
        """The bins of a chunk; the last one asked for is kept."""
        if self._held[0] != number:
            self._held = number, self._plan(number)
        return self._held[1]

    def _plan(self, number: int) -> list[Plan]:
        first = number * self._chunk_documents
        epochs, positions = np.divmod(
            np.arange(first, first + self._chunk_documents), self._documents.size
        )
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            positions[here] = self._shuffle(epoch)(positions[here])
        documents = self._documents[positions]
        lengths = self._lengths(documents)
        whole = Plan(documents, lengths, epochs, self._mask_key)
        return bins_of(whole, self._batch, self._key, number)

    def _shuffle(self, epoch: int) -> Permutation:
        return Permutation(self._documents.size, self._key, epoch)


class Planner:
    """Plans of one step after the other for all ranks; `state` continues after the last one."""

    def __init__(
        self,
        store: Store,
        recipe: Recipe,
        state: Mapping[str, Any] | None = None,
        allow_change: bool = False,
    ) -> None:
        self._batch = recipe.batch
        self._made_for = made_for(store, recipe)
        self._views = {name: View(store, recipe, name) for name in recipe.batch.views}
        self._step = 0
        self._at = {name: {"chunk": 0, "bin": 0} for name in self._views}
        if state is not None:
            require_same(state, self._made_for, allow_change)
            self._step = int(state["step"])
            # A view that is new since then begins at its first bin.
            self._at |= {k: dict(v) for k, v in state["views"].items() if k in self._at}

    @property
    def state(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "step": self._step,
            "views": {name: dict(at) for name, at in self._at.items()},
            "made_for": self._made_for,
        }

    def next_step(self) -> tuple[str, list[Plan]]:
        """The next step's view and all its bins."""
        view = view_of_step(self._batch, self._step)
        at, source = self._at[view], self._views[view]
        plans: list[Plan] = []
        while len(plans) < self._batch.bins:
            chunk = source.chunk(at["chunk"])
            taken = chunk[at["bin"] : at["bin"] + self._batch.bins - len(plans)]
            plans += taken
            at["bin"] += len(taken)
            if at["bin"] >= len(chunk):
                at["chunk"], at["bin"] = at["chunk"] + 1, 0
        self._step += 1
        return view, plans


def view_of_step(batch: Batch, step: int) -> str:
    """The view that a step's bins are drawn from."""
    at = uniform(key(_VIEW, batch.seed, step))
    for name, chance in batch.views.items():
        at -= chance
        if at < 0:
            return name
    return name  # the chances' last bits


def made_for(store: Store, recipe: Recipe) -> dict[str, Any]:
    """All that decides the batches."""
    return {"store": store.digest, **batch_settings(recipe)}


def batch_settings(recipe: Recipe) -> dict[str, Any]:
    """What decides the batches beside the documents."""
    names = ("max_length", "tokens", "bins", "layout", "mask_rate", "masking", "views", "seed")
    settings = {f"batch.{name}": getattr(recipe.batch, name) for name in names}
    return {"data.held_out": recipe.data.held_out, **settings}


def require_same(state: Mapping[str, Any], now: Mapping[str, Any], allow_change: bool) -> None:
    """Refuse a state of other data.

    Raises:
        InputError: Naming what changed, unless that is `HARMLESS` and allowed.
    """
    if state.get("version") != STATE_VERSION:
        raise error("resume", f"a data state of version {STATE_VERSION}", state.get("version"))
    allowed = HARMLESS if allow_change else frozenset()
    kept = {key: value for key, value in now.items() if key not in allowed}
    if changed := differences(state["made_for"], kept):
        names = {text.partition(" was ")[0] for text in changed}
        hint = " (--allow-change goes on)" if names <= HARMLESS else ""
        raise error("resume", "the data and batches of the checkpoint", "; ".join(changed) + hint)


class Readable(Protocol):
    """What micro-batches need of documents; `Store` describes it."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def read(
        self, documents: np.ndarray, most: np.ndarray, out: np.ndarray, at: np.ndarray
    ) -> None: ...


class Gather(Dataset[MicroBatch]):
    """Plans to micro-batches: reads tokens, adds [CLS] and [SEP], masks."""

    def __init__(self, store: Readable, batch: Batch) -> None:
        self._store, self._batch = store, batch
        vocabulary = store.vocabulary
        special = np.zeros(vocabulary.size, bool)
        special[list(vocabulary.special)] = True
        special[[vocabulary.cls, vocabulary.sep, vocabulary.mask, vocabulary.pad]] = True
        self._mask = Masking(batch.mask_rate, batch.masking == "bert", vocabulary.mask, special)

    def __getitem__(self, plan: Plan) -> MicroBatch:
        bounds = np.concatenate([[0], np.cumsum(plan.lengths)])
        ids = np.empty(bounds[-1], np.int64)
        ids[bounds[:-1]] = self._store.vocabulary.cls
        ids[bounds[1:] - 1] = self._store.vocabulary.sep
        self._store.read(plan.documents, plan.lengths - SPECIALS, ids, bounds[:-1] + 1)
        streams = stream_keys(plan.mask_key, plan.epochs, plan.documents)
        masked = self._mask(ids, bounds, streams)
        return (
            self._padded(plan, masked)
            if self._batch.layout == "padded"
            else MicroBatch(
                input_ids=torch.from_numpy(masked.input_ids)[None],
                labels=torch.from_numpy(masked.labels)[None],
                cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
                max_seqlen=int(plan.lengths.max()),
                rows=torch.from_numpy(masked.rows),
                documents=plan.documents,
                attention_mask=None,
                tokens=len(ids),
            )
        )

    def _padded(self, plan: Plan, masked: Masked) -> MicroBatch:
        longest = int(plan.lengths.max())
        real = np.arange(longest) < plan.lengths[:, None]
        input_ids = np.full(real.shape, self._store.vocabulary.pad, np.int64)
        labels = np.full(real.shape, IGNORE_INDEX, np.int64)
        input_ids[real], labels[real] = masked.input_ids, masked.labels
        return MicroBatch(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            cu_seqlens=None,
            max_seqlen=longest,
            rows=torch.from_numpy(np.flatnonzero(labels != IGNORE_INDEX)),
            documents=plan.documents,
            attention_mask=torch.from_numpy(real.astype(np.int64)),
            tokens=len(masked.input_ids),
        )


def steps(
    store: Store,
    recipe: Recipe,
    *,
    world: int = 1,
    rank: int = 0,
    state: Mapping[str, Any] | None = None,
    allow_change: bool = False,
) -> Generator[Step, None, None]:
    """The steps of one rank, without end. Close it where workers load: they outlive signals.

    Args:
        world: Ranks; a divisor of ``recipe.batch.bins``. It may differ from the run that made
            ``state``: the steps are the same, only dealt to others.
        rank: Which of them.
        state: Of the last step that was done; None begins.
        allow_change: Go on although settings changed that leave the positions as they are.

    Raises:
        InputError: ``bins`` cannot be dealt evenly, an empty view, or ``state`` of other data.
    """
    require_even(recipe, world)
    assert 0 <= rank < world
    return _steps(Planner(store, recipe, state, allow_change), store, recipe, world, rank)


def require_even(recipe: Recipe, world: int) -> None:
    """Refuse bins that the ranks cannot share evenly."""
    if recipe.batch.bins % world:
        raise error("batch.bins", f"a multiple of the {world} ranks", recipe.batch.bins)


def _steps(
    planner: Planner, store: Store, recipe: Recipe, world: int, rank: int
) -> Generator[Step, None, None]:
    # The loader asks for plans ahead of the batches it gives out.
    planned: deque[tuple[str, dict[str, Any]]] = deque()

    def plans() -> Iterator[Plan]:
        while True:
            view, bins = planner.next_step()
            planned.append((view, planner.state))
            yield from bins[rank::world]

    batches = load(Gather(store, recipe.batch), recipe.batch, plans())
    while True:
        share = [next(batches) for _ in range(recipe.batch.bins // world)]
        view, after = planned.popleft()
        yield Step(share, after, view)


def load(dataset: Dataset[Any], batch: Batch, plans: Iterator[Plan] | None = None) -> Iterator[Any]:
    """The items of a data set through the recipe's workers, in order."""
    return iter(
        DataLoader(
            dataset,
            sampler=plans,
            batch_size=None,
            num_workers=batch.workers,
            prefetch_factor=batch.prefetch if batch.workers else None,
            collate_fn=_as_is,
            worker_init_fn=_outlive_signals if batch.workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or it would draw a seed from the global one
        )
    )


def _outlive_signals(worker: int) -> None:
    """A signal to the whole group of processes is for the trainer, which still needs batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))


def _as_is(batch: Any) -> Any:
    return batch


def held_out(store: Store, recipe: Recipe) -> Iterator[MicroBatch]:
    """The held-out documents once, the same bins and masks in every call and with every seed."""
    count = recipe.data.held_out
    training_documents(store, recipe, "all")  # its checks
    documents = Permutation(len(store), _HELD_OUT)(np.arange(len(store) - count, len(store)))
    yield from once(store, documents, store.lengths(documents), recipe.batch)


def once(
    store: Readable, documents: np.ndarray, lengths: np.ndarray, batch: Batch
) -> Iterator[MicroBatch]:
    """Documents of ``lengths`` tokens in bins, the same in every call and with every seed."""
    lengths = np.minimum(lengths + SPECIALS, batch.max_length)
    chunk = Plan(documents, lengths, np.zeros_like(documents), key(_HELD_OUT))
    yield from map(Gather(store, batch).__getitem__, bins_of(chunk, batch))

"""Batches without a store: texts are read, shuffled and tokenised while training.

The source's parts (files, or ranges of rows) have an order of their own in every epoch. A lane
reads its share: every `lanes`-th part, and of the parts left over every `lanes`-th row. It shuffles
no more than a buffer of `CHUNK_BINS` bins: the buffer's documents are packed as a store's chunk,
and while their bins are given out the next buffer fills. Bin g of a run is the next one of lane
g % lanes, which one rank and one worker has, so that neither number changes the batches. Where
each lane's buffer began, and how many bins of it were given out, is all that a checkpoint keeps.
"""

import itertools
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from neobert.pretraining import batches
from neobert.pretraining.batches import (
    MASK,
    ORDER,
    STATE_VERSION,
    Gather,
    MicroBatch,
    Plan,
    Step,
    bins_of,
    load,
    require_even,
    require_same,
)
from neobert.pretraining.hashing import key
from neobert.pretraining.order import Permutation
from neobert.pretraining.prepare import Tokenizer
from neobert.pretraining.recipe import Recipe
from neobert.pretraining.rules import error
from neobert.pretraining.sources import MAX_CHARACTERS, chosen, open_documents, pieces, texts
from neobert.pretraining.store import SPECIALS, Corpus, Vocabulary
from neobert.readers import InputError

# One call of the tokenizer: small, so that no worker is away for long.
CALL_TEXTS, CALL_CHARACTERS = 64, 1 << 18
# Epochs in a row without a document after which a lane gives up: it may get others in the next.
BARREN_EPOCHS = 3
# A document's number: its part, its row there, and which piece of the row it is.
PART_SHIFT, ROW_SHIFT = 40, 8


class Place(NamedTuple):
    """Where a lane reads: which part of the epoch's order, and how many rows of it are done."""

    epoch: int = 0
    part: int = 0
    row: int = 0


class Loose:
    """Documents in memory under any numbers; what has the same number is the same document."""

    def __init__(self, vocabulary: Vocabulary, numbers: np.ndarray, ids: list[np.ndarray]) -> None:
        self.vocabulary = vocabulary
        self._numbers, first = np.unique(numbers, return_index=True)
        self._ids = [ids[i] for i in first.tolist()]

    def read(
        self, documents: np.ndarray, most: np.ndarray, out: np.ndarray, at: np.ndarray
    ) -> None:
        """As `Store.read`."""
        found = np.searchsorted(self._numbers, documents)
        for number, count, place in zip(found.tolist(), most.tolist(), at.tolist(), strict=True):
            out[place : place + count] = self._ids[number][:count]


class Buffer:
    """Documents in the order in which they came."""

    def __init__(self, begin: Place) -> None:
        self.begin = self.end = begin
        self.numbers: list[int] = []
        self.epochs: list[int] = []
        self.ids: list[np.ndarray] = []
        self.tokens = 0  # [CLS] and [SEP] included

    def add(self, end: Place, first: int, documents: Iterable[np.ndarray]) -> None:
        """What became of the text before ``end``."""
        self.end = end
        for number, ids in enumerate(documents, first):
            self.numbers.append(number)
            self.epochs.append(end.epoch)
            self.ids.append(ids)
            self.tokens += len(ids) + SPECIALS

    @property
    def lengths(self) -> np.ndarray:
        return np.fromiter(map(len, self.ids), np.int64, len(self.ids))


class Stream(Corpus):
    """The texts of a recipe, open to be read on the fly, and the held-out ones among them."""

    def __init__(self, recipe: Recipe) -> None:
        """Read the held-out documents: the first ones.

        Raises:
            InputError: The texts or the tokenizer, or too few documents.
        """
        data, self.most = recipe.data, recipe.batch.max_length - SPECIALS
        if recipe.batch.workers:
            # One thread per worker; forked after threads were used, tokenizers would warn.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.source = open_documents(data)
        if not self.source.parts:
            raise error("data", "at least one text", f"none in {self.source.name}")
        self.place = data.tokenizer
        self.tokenizer = Tokenizer(data)
        self.vocabulary = self.tokenizer.vocabulary
        self.held_out = Buffer(Place())
        self.skip: dict[int, int] = {}  # held-out rows by part
        if data.held_out:
            self._hold_out(data.held_out)

    def _hold_out(self, count: int) -> None:
        for part in range(self.source.parts):
            for place, first, documents in self.documents(self.rows(Place(part=part), part)):
                if len(self.held_out.numbers) >= count:
                    return
                room = count - len(self.held_out.numbers)
                self.held_out.add(place, first, documents[:room])
                self.skip[part] = place.row
        found = len(self.held_out.numbers)
        raise error("data.held_out", f"fewer than the stream's {found:,} documents", count)

    def rows(self, place: Place, part: int) -> Iterator[tuple[Place, int, str]]:
        """Texts of a part from a place on: the place behind each, its number, itself."""
        for row, text in enumerate(texts(self.source.part(part), place.row, None), place.row):
            yield place._replace(row=row + 1), (part << PART_SHIFT) + (row << ROW_SHIFT), text

    def documents(
        self, rows: Iterator[tuple[Place, int, str]]
    ) -> Iterator[tuple[Place, int, list[np.ndarray]]]:
        """Texts tokenised: each gives a document, a very long one several, an empty one none."""
        while some := list(itertools.islice(_call(rows), CALL_TEXTS)):
            cut = [list(pieces(text)) for _, _, text in some]
            ids = iter(self.tokenizer([piece for each in cut for piece in each]))
            for (place, number, _), each in zip(some, cut, strict=True):
                if len(each) > 1 << ROW_SHIFT:
                    rule = f"texts of less than {(MAX_CHARACTERS << ROW_SHIFT) - 1:,} characters"
                    raise error("data", rule, f"a longer one in {self.source.name}")
                made = [np.array(next(ids)[: self.most], np.int32) for _ in each]
                yield place, number, [document for document in made if len(document)]

    def places(self, documents: np.ndarray) -> dict[int, str]:
        """Where documents come from, by their number."""
        parts = documents >> PART_SHIFT
        rows = (documents - (parts << PART_SHIFT) >> ROW_SHIFT) + 1
        names = {part: self.source.part(part).name for part in np.unique(parts).tolist()}
        return {
            number: f"{names[part]}:{row}"
            for number, part, row in zip(
                documents.tolist(), parts.tolist(), rows.tolist(), strict=True
            )
        }


def _call(rows: Iterator[tuple[Place, int, str]]) -> Iterator[tuple[Place, int, str]]:
    """Rows up to the one that reaches the characters of a call."""
    characters = 0
    while characters < CALL_CHARACTERS and (row := next(rows, None)) is not None:
        characters += len(row[2])
        yield row


def held_out(stream: Stream, recipe: Recipe) -> Iterator[MicroBatch]:
    """As `batches.held_out`."""
    apart = stream.held_out
    numbers = np.array(apart.numbers, np.int64)
    kept = Loose(stream.vocabulary, numbers, apart.ids)
    return batches.once(kept, numbers, apart.lengths, recipe.batch)


class Lane:
    """One reader's endless sequence of micro-batches, each with the state after it."""

    def __init__(
        self, stream: Stream, recipe: Recipe, number: int, state: Mapping[str, int] | None
    ) -> None:
        self._stream, self._batch, self._number = stream, recipe.batch, number
        self._lanes = recipe.data.lanes
        seed = recipe.batch.seed
        self._parts_key, self._key = key(ORDER, seed), key(ORDER, seed, number)
        self._mask_key = key(MASK, seed, 0)
        state = state or {"epoch": 0, "part": 0, "row": 0, "buffer": 0, "given": 0}
        self._begin = Place(state["epoch"], state["part"], state["row"])
        self._count, self._given = state["buffer"], state["given"]

    def __iter__(self) -> Iterator[tuple[MicroBatch, dict[str, int]]]:
        documents = self._documents(self._begin)
        buffer = Buffer(self._begin)
        self._fill(buffer, documents, 1.0)
        for count in itertools.count(self._count):
            following = Buffer(buffer.end)
            gather, plans = self._plans(buffer, count)
            for given, plan in enumerate(plans, 1):
                if given > self._given:
                    at = {**buffer.begin._asdict(), "buffer": count, "given": given}
                    yield gather[plan], at
                # Bit by bit, so that training does not wait for a whole buffer.
                self._fill(following, documents, given / len(plans))
            buffer, self._given = following, 0

    def _fill(
        self,
        buffer: Buffer,
        documents: Iterator[tuple[Place, int, list[np.ndarray]]],
        share: float,
    ) -> None:
        packed = self._batch.layout == "packed"
        budget = batches.CHUNK_BINS * (self._batch.tokens if packed else self._batch.rows)
        while (buffer.tokens if packed else len(buffer.ids)) < share * budget:
            buffer.add(*next(documents))

    def _plans(self, buffer: Buffer, count: int) -> tuple[Gather, list[Plan]]:
        numbers = np.array(buffer.numbers, np.int64)
        lengths, epochs = buffer.lengths + SPECIALS, np.array(buffer.epochs, np.int64)
        order = Permutation(len(numbers), self._key, count)(np.arange(len(numbers)))
        chunk = Plan(numbers[order], lengths[order], epochs[order], self._mask_key)
        kept = Loose(self._stream.vocabulary, numbers, buffer.ids)
        return Gather(kept, self._batch), bins_of(chunk, self._batch, self._key, count)

    def _documents(self, place: Place) -> Iterator[tuple[Place, int, list[np.ndarray]]]:
        """This lane's from a place on, one epoch after the other without end."""
        barren = 0
        while barren < BARREN_EPOCHS:
            barren += 1
            for found in self._stream.documents(self._rows(place)):
                barren = 0 if found[2] else barren
                yield found
            place = Place(place.epoch + 1)
        rule = "texts with tokens for every lane, beside the held-out ones"
        raise error("data.lanes", rule, f"none for lane {self._number} of {self._lanes}")

    def _rows(self, place: Place) -> Iterator[tuple[Place, int, str]]:
        """The texts of the epoch from a place on."""
        parts, stream = self._stream.source.parts, self._stream
        order = Permutation(parts, self._parts_key, place.epoch)
        even = parts - parts % self._lanes
        for at in range(place.part, parts):
            if at < even and at % self._lanes != self._number:
                continue
            part = int(order(np.array([at]))[0])
            row = max(stream.skip.get(part, 0), place.row if at == place.part else 0)
            for found in stream.rows(Place(place.epoch, at, row), part):
                if at < even or (found[0].row + at) % self._lanes == self._number:
                    yield found


class Lanes(IterableDataset[Any]):
    """Micro-batches of a rank's lanes in turn, shared by the workers; or what went wrong."""

    def __init__(
        self, stream: Stream, recipe: Recipe, numbers: list[int], states: Mapping[str, Any]
    ) -> None:
        self._stream, self._recipe = stream, recipe
        self._numbers, self._states = numbers, states

    def __iter__(self) -> Iterator[tuple[MicroBatch, int, dict[str, int]] | Exception]:
        worker = get_worker_info()
        mine = self._numbers if worker is None else self._numbers[worker.id :: worker.num_workers]
        lanes = [
            (number, iter(Lane(self._stream, self._recipe, number, self._states.get(str(number)))))
            for number in mine
        ]
        try:
            for number, lane in itertools.cycle(lanes):
                batch, state = next(lane)
                yield batch, number, state
        except (InputError, OSError) as problem:  # raised in a worker it would have its traceback
            yield problem


def steps(
    stream: Stream,
    recipe: Recipe,
    *,
    world: int = 1,
    rank: int = 0,
    state: Mapping[str, Any] | None = None,
    allow_change: bool = False,
) -> Generator[Step, None, None]:
    """As `batches.steps`; a step's state has the lanes of its rank only: `whole_state` has all.

    Raises:
        InputError: Bins or lanes cannot be dealt evenly, or ``state`` is of other data.
    """
    require_even(recipe, world)
    workers, lanes = max(1, recipe.batch.workers), recipe.data.lanes
    if lanes % (world * workers):
        rule = f"a multiple of {world} rank(s) x {workers} worker(s)"
        raise error("data.lanes", rule, lanes)
    now = made_for(stream, recipe)
    if state is not None:
        require_same(state, now, allow_change)
    return _steps(stream, recipe, world, rank, state or {"step": 0, "given": 0, "lanes": {}}, now)


def _steps(
    stream: Stream,
    recipe: Recipe,
    world: int,
    rank: int,
    state: Mapping[str, Any],
    now: dict[str, Any],
) -> Generator[Step, None, None]:
    bins, lanes = recipe.batch.bins, recipe.data.lanes
    # The step's bin k is for rank k % world, and comes from lane (given + k) % lanes.
    numbers = [(state["given"] + rank + i * world) % lanes for i in range(lanes // world)]
    after = {str(n): state["lanes"][str(n)] for n in numbers if str(n) in state["lanes"]}
    items = load(Lanes(stream, recipe, numbers, after.copy()), recipe.batch)
    for count in itertools.count(1):
        share = []
        for _ in range(bins // world):
            item = next(items)
            if isinstance(item, Exception):
                raise item
            batch, number, after[str(number)] = item
            share.append(batch)
        step_state = {
            "version": STATE_VERSION,
            "step": state["step"] + count,
            "given": state["given"] + count * bins,
            "lanes": after.copy(),
            "made_for": now,
        }
        yield Step(share, step_state, "all")


def made_for(stream: Stream, recipe: Recipe) -> dict[str, Any]:
    """All that decides the batches: `batches.made_for`, on the fly."""
    identity = {k: v for k, v in stream.source.identity().items() if k != "input"}
    return {
        "data.on_the_fly": True,
        "data.lanes": recipe.data.lanes,
        **identity,
        **chosen(recipe.data),
        "tokenizer": stream.tokenizer.digest,
        **batches.batch_settings(recipe),
    }


def whole_state(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The state after a step from that of every rank."""
    lanes = [state["lanes"] for state in states]
    return {**states[0], "lanes": {key: value for each in lanes for key, value in each.items()}}

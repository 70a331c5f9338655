"""Texts as token ids, and batches of them: end to end for a patched model, padded for another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Real tokens of one batch in evaluation, where no gradient holds on to memory.
EVALUATION_TOKENS = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids of texts or pairs, end to end.

    Attributes:
        ids: ``[T]`` int64.
        starts: ``[N + 1]`` int64, where each text begins.
        types: ``[T]`` int64, 0 and 1 in the two texts of a pair; None for models without.
        truncated: Texts that were cut.
    """

    ids: np.ndarray
    starts: np.ndarray
    types: np.ndarray | None
    truncated: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)


def tokenize(
    tokenizer: Any, texts: Sequence[Sequence[str]], max_length: int, with_types: bool
) -> Tokens:
    """One column of texts, or two of pairs; of a pair the longer text is cut first."""
    columns = [list(column) for column in texts]
    rows = tokenizer(
        *columns,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=with_types,
    )
    lengths = [len(ids) for ids in rows["input_ids"]]
    types = None
    if with_types:
        types = np.concatenate([np.array(row, np.int64) for row in rows["token_type_ids"]])
    return Tokens(
        ids=np.concatenate([np.array(row, np.int64) for row in rows["input_ids"]]),
        starts=np.cumsum([0, *lengths]),
        types=types,
        truncated=sum(bool(row.overflowing) for row in rows.encodings),
    )


@dataclass(frozen=True)
class Collator:
    """Rows of `Tokens` as a model's inputs on its device."""

    device: torch.device
    packed: bool
    padding: int = 0

    def __call__(self, tokens: Tokens, rows: np.ndarray) -> dict[str, Any]:
        starts, lengths = tokens.starts[rows], tokens.lengths[rows]
        ends = np.cumsum(lengths)
        bounds = np.concatenate([[0], ends])
        # Where each token of the batch stands among all tokens.
        where = np.arange(ends[-1]) + np.repeat(starts - bounds[:-1], lengths)
        columns = {"input_ids": tokens.ids[where]}
        if tokens.types is not None:
            columns["token_type_ids"] = tokens.types[where]
        longest = int(lengths.max())
        if self.packed:
            inputs: dict[str, Any] = {
                name: self.to_device(torch.from_numpy(values)[None])
                for name, values in columns.items()
            }
            bounds_32 = torch.from_numpy(bounds.astype(np.int32))
            return inputs | {"cu_seq_lens_q": self.to_device(bounds_32), "max_length_q": longest}
        real = np.arange(longest) < lengths[:, None]
        inputs = {"attention_mask": self.to_device(torch.from_numpy(real.astype(np.int64)))}
        for name, values in columns.items():
            padded = np.full(real.shape, self.padding if name == "input_ids" else 0)
            padded[real] = values
            inputs[name] = self.to_device(torch.from_numpy(padded))
        return inputs

    def to_device(self, x: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return x
        return x.pin_memory().to(self.device, non_blocking=True)


def shuffled(count: int, batch_size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Rows of each batch of an epoch; the last one may be smaller."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    for start in range(0, count, batch_size):
        yield order[start : start + batch_size]


def by_length(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Rows of each batch, longest texts first, of at most ``budget`` tokens or one text."""
    order = np.argsort(-lengths, kind="stable")
    first, total = 0, 0
    for i, row in enumerate(order):
        if i > first and total + lengths[row] > budget:
            yield order[first:i]
            first, total = i, 0
        total += int(lengths[row])
    if len(order):
        yield order[first:]

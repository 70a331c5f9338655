"""Token ids of texts, cut to the model's length, in memory that does not grow with the texts.

A tokenizer takes a whole text apart before it cuts, at over a hundred bytes a character. Here it
sees the first characters of a long text, and more of them only if those do not settle what is kept.
"""

from collections.abc import Sequence
from typing import Any

from neobert.readers import has_surrogates

# A token rarely takes 32 characters; long runs of spaces, or words that become one [UNK], do.
CHARACTERS_PER_TOKEN = 32
GROWTH = 16

# What follows may change the prefix's last word, and an added token or a letter with its accents
# that the end cuts through: those are far shorter than this many characters.
MARGIN = 1000


def token_ids(
    tokenizer: Any, texts: Sequence[str], max_length: int, start: int = 0
) -> tuple[list[list[int]], int]:
    """What ``tokenizer`` keeps of each text, as if it had read all of it, and how many it cut.

    Args:
        tokenizer: A fast tokenizer of transformers.
        texts: Any strings.
        max_length: Most tokens of a text, special ones included.
        start: Number of the first text, for the error.

    Raises:
        ValueError: A text holds half of a surrogate pair.
    """
    ids: list[list[int]] = [[] for _ in texts]
    cut, pending = 0, list(range(len(texts)))
    longest = max(map(len, texts), default=0)
    size = CHARACTERS_PER_TOKEN * max_length + MARGIN
    if tokenizer.truncation_side != "right":
        size = longest
    for i, text in enumerate(texts):
        # Short texts are left to the tokenizer, which finds surrogates at no cost.
        if len(text) > size:
            _require_unicode([text], start + i)
    while pending:
        try:
            rows = tokenizer(
                [texts[i][:size] for i in pending],
                truncation=True,
                max_length=max_length,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
        except TypeError:
            _require_unicode(texts, start)
            raise
        unsettled = []
        for i, row, kept in zip(pending, rows.encodings, rows["input_ids"], strict=True):
            if len(texts[i]) > size and not _settled(row, texts[i][: size - MARGIN]):
                unsettled.append(i)
                continue
            ids[i] = kept
            cut += bool(row.overflowing)
        pending, size = unsettled, size * GROWTH
    return ids, cut


def _settled(row: Any, text: str) -> bool:
    """Whether the first token that was cut off, and so all before it, stays what it is.

    It does if it ends within ``text``, the prefix without its margin, and is not of the last word.
    Spaces at the end do not count: a ``<mask>`` that begins after them would take them all.
    """
    if not row.overflowing:
        return False
    first, last = row.overflowing[0], row.overflowing[-1]
    words = first.word_ids  # None for [CLS] and the like
    i = next((i for i, word in enumerate(words) if word is not None), None)
    if i is None:
        return False
    final = next((word for word in reversed(last.word_ids) if word is not None), words[i])
    return words[i] != final and first.offsets[i][1] <= len(text.rstrip())


def _require_unicode(texts: Sequence[str], start: int) -> None:
    for i, text in enumerate(texts, start):
        if has_surrogates(text):
            raise ValueError(f"texts: expected valid Unicode, got a lone surrogate in text {i}")

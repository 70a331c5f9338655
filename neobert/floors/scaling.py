"""A corpus on many GPUs: the least time by data sheets, and what has to flow at that pace.

Arithmetic alone. GPUs do not wait for each other when they encode, so N of them need an Nth of
the time of one, if texts, tokens and embeddings keep up: that is what the second table is about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from neobert.floors.gpus import Gpu
from neobert.floors.models import ITEMSIZES, Architecture, forward

COUNTS = (8, 64, 512)
PRECISIONS = ("float32", "float16")  # of embeddings that are stored
BYTES_PER_TOKEN = 4.5  # of English text in UTF-8, about
BYTES_PER_ROW = 16  # of a shard: row and number; the source's name is stored once
DAY, HOUR, MINUTE = 86_400, 3_600, 60


@dataclass(frozen=True)
class Corpus:
    """Texts of one length.

    Attributes:
        texts: How many.
        length: Tokens of each.
    """

    texts: int
    length: int

    @property
    def tokens(self) -> int:
        return self.texts * self.length


def tokens_per_s(
    model: Architecture, on: Gpu, length: int, dtype: str = "bfloat16", tokens: int = 16384
) -> float:
    """What one GPU cannot pass in batches of about ``tokens``."""
    lengths = [length] * max(tokens // length, 1)
    seconds = sum(part.cost.floor_s(on, dtype) for part in forward(model, lengths, dtype))
    return sum(lengths) / seconds


def flows(model: Architecture, corpus: Corpus, rate: float, core: float) -> dict[str, float]:
    """What ``rate`` tokens/s ask of everything else, per second.

    Args:
        model: Its width is that of an embedding.
        corpus: The texts.
        rate: Tokens/s of all GPUs together.
        core: Tokens/s that one core tokenizes.
    """
    texts = rate / corpus.length
    return {
        "texts/s": texts,
        "cores that tokenize": rate / core,
        "MB/s of text read": rate * BYTES_PER_TOKEN / 1e6,
        **{
            f"MB/s of {precision} written": texts * row_bytes(model, precision) / 1e6
            for precision in PRECISIONS
        },
    }


def row_bytes(model: Architecture, precision: str) -> int:
    """Bytes of a text's row in a shard."""
    return ITEMSIZES[precision] * model.width + BYTES_PER_ROW


def stored(model: Architecture, corpus: Corpus) -> tuple[float, list[float]]:
    """TB of text, and of embeddings in each of `PRECISIONS`."""
    text = corpus.tokens * BYTES_PER_TOKEN
    return text / 1e12, [corpus.texts * row_bytes(model, each) / 1e12 for each in PRECISIONS]


def report(
    model: Architecture,
    corpus: Corpus,
    gpus: Sequence[Gpu],
    *,
    dtype: str = "bfloat16",
    counts: Sequence[int] = COUNTS,
    core: float = 500_000,
    tokens: int = 16384,
) -> str:
    """Both tables as text; the second is of the first GPU."""
    rates = {each.name: tokens_per_s(model, each, corpus.length, dtype, tokens) for each in gpus}
    lines = [
        f"{model.name}, forward, {dtype}, {corpus.texts:,} texts of {corpus.length} tokens: "
        "floors by data sheets; measured: not measured",
        "",
        f"{'':18}{'tokens/s of one':>16}" + "".join(f"{f'{n} GPUs':>12}" for n in counts)
        + f"{'GPU hours':>12}",
    ]  # fmt: skip
    for name, rate in rates.items():
        seconds = corpus.tokens / rate
        cells = "".join(f"{_duration(seconds / n):>12}" for n in counts)
        lines.append(f"{name:18}{rate:>16,.0f}{cells}{seconds / HOUR:>12,.0f}")
    text, embeddings = stored(model, corpus)
    sizes = ", ".join(f"{s:.2f} TB in {p}" for s, p in zip(embeddings, PRECISIONS, strict=True))
    first = gpus[0]
    found: Mapping[int, Mapping[str, float]] = {
        n: flows(model, corpus, n * rates[first.name], core) for n in counts
    }
    lines += [
        "",
        f"{text:.2f} TB of text; of embeddings {sizes}.",
        f"At that pace on {first.name}; a core tokenizes {core:,.0f} tokens/s:",
        "",
        f"{'':34}" + "".join(f"{f'{n} GPUs':>14}" for n in counts),
    ]
    for name in found[counts[0]]:
        lines.append(f"{name:34}" + "".join(f"{found[n][name]:>14,.0f}" for n in counts))
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    for unit, name in ((DAY, "days"), (HOUR, "h"), (MINUTE, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:,.1f} s"

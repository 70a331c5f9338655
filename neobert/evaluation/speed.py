"""Speed by length beside the paper's table, from the results files of the benchmarks.

Of every model, length, machine and precision the newest result counts; quick runs do not.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neobert.readers import InputError, one_line
from neobert.tables import Table

# The paper's table (arXiv 2502.19587): thousand tokens per second on one A100, best batch.
LENGTHS = (512, 1024, 2048, 4096, 8192)
PAPER: dict[str, tuple[float, ...]] = {
    "BERT-base": (27.6,),
    "RoBERTa-base": (24.9,),
    "ModernBERT-base": (25.4, 22.6, 17.2, 11.7, 6.8),
    "NeoBERT-4096": (24.5, 22.2, 20.5, 17.2, 13.0),
    "BERT-large": (19.5,),
    "RoBERTa-large": (15.9,),
    "ModernBERT-large": (13.4, 11.4, 9.2, 6.5, 3.8),
}
# Names of the benchmarks' models in the paper's tables.
NAMES = {
    "bert-base": "BERT-base",
    "bert-large": "BERT-large",
    "roberta-base": "RoBERTa-base",
    "roberta-large": "RoBERTa-large",
    "nomic-bert-base": "NomicBERT-2048",
    "modernbert-base": "ModernBERT-base",
    "modernbert-large": "ModernBERT-large",
    "neobert-250m": "NeoBERT-4096",
}
# What takes less than the longest of these.
LONGEST = {"NomicBERT-2048": 2048} | dict.fromkeys(
    ("BERT-base", "BERT-large", "RoBERTa-base", "RoBERTa-large"), 512
)
NOT_MEASURED, NOT_GIVEN, TOO_LONG = "not measured", "not given", "too long"
NOTE = (
    "Thousand real tokens per second, from token ids to hidden states. The paper's are of one "
    "A100, at the batch that suited best, precision not stated; ours are of the machine in the "
    "row, whole batches of one length, as transformers runs the model (SDPA) and patched. Rows of "
    "different machines say nothing about each other."
)


@dataclass(frozen=True)
class Speed:
    """One model at one length.

    Attributes:
        name: As in the paper's tables, else the benchmark's.
        length: Tokens of every document.
        machine: Device and precision.
        patched, plain: Tokens per second; None where it was not measured.
        origin: Date and commit.
    """

    name: str
    length: int
    machine: str
    patched: float | None
    plain: float | None
    origin: str


def collect(*roots: Path) -> list[Speed]:
    """What the results files under ``roots`` say of whole models at a fixed length.

    Raises:
        InputError: A results file is damaged; the message names it.
    """
    newest: dict[tuple[str, int, str], Speed] = {}
    for path, document in sorted(_documents(*roots), key=lambda pair: str(pair[1]["date"])):
        try:
            speeds = [_speed(document, result) for result in document["results"]]
        except (AttributeError, KeyError, TypeError) as error:
            got = one_line(error)
            raise InputError(f"{path}: expected results of the benchmarks, got {got}") from None
        for found in speeds:
            if found is not None:
                newest[found.name, found.length, found.machine] = found
    return list(newest.values())


def _documents(*roots: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    paths = {path.resolve(): path for root in roots for path in sorted(root.rglob("*.json"))}
    for path in paths.values():
        text = path.read_bytes()
        if b'"machine"' not in text or b'"versions"' not in text:
            continue  # other files are not ours to judge
        try:
            document = json.loads(text)
        except (RecursionError, ValueError) as error:
            raise InputError(f"{path}: expected JSON, got {one_line(error)}") from None
        keys = {"machine", "versions", "results", "date"}
        if isinstance(document, dict) and keys <= document.keys() and not document.get("quick"):
            yield path, document


def _speed(document: Mapping[str, Any], result: Mapping[str, Any]) -> Speed | None:
    """Of a case such as "bert-base, fixed 512, ..., float32, cpu"; None for other results."""
    words = str(result["case"]).split(", ")
    length = next((word.removeprefix("fixed ") for word in words if word[:6] == "fixed "), "")
    if not length.isdigit():
        return None
    values = result["values"]
    if result["name"] == "inference":
        patched, plain = values.get("patched_tokens_per_s"), values.get("sdpa_tokens_per_s")
    elif result["name"] == "patch":
        patched, plain = values.get("tokens_per_s"), values.get("baseline_tokens_per_s")
    else:
        return None
    machine = document["machine"]
    place = "" if words[-1] == "cuda" else f", {machine['threads']} threads"
    return Speed(
        NAMES.get(words[0], words[0]),
        int(length),
        f"{machine['device']}{place}, {words[-2]}",
        patched,
        plain,
        f"{document['date']}, commit {str(result.get('commit'))[:10]}",
    )


def table(speeds: Sequence[Speed]) -> Table:
    """Models as rows: the paper's, and ours below, two rows per machine."""
    rows: list[list[str]] = []
    names = {speed.name for speed in speeds}
    for name in [*PAPER, *sorted(names - set(PAPER))]:
        if name in PAPER:
            given = [f"{value:.1f}" for value in PAPER[name]]
            rows.append([name, "paper", *given, *[NOT_GIVEN] * (len(LENGTHS) - len(given))])
        machines = sorted({speed.machine for speed in speeds if speed.name == name})
        if not machines:
            rows.append([name, "ours", *(missing(name, n) for n in LENGTHS)])
        for machine in machines:
            here = {s.length: s for s in speeds if (s.name, s.machine) == (name, machine)}
            plain = {n: here[n].plain for n in here}
            patched = {n: here[n].patched for n in here}
            for who, rates in (("SDPA", plain), ("ours", patched)):
                cells = [shown(rates.get(n)) or missing(name, n) for n in LENGTHS]
                rows.append([name, f"{who}, {machine}", *cells])
    return Table(("model", "from", *(f"{n:,}" for n in LENGTHS)), rows, numbers_from=2)


def missing(name: str, length: int) -> str:
    """What stands for a model that was not measured, or that takes no such length."""
    return NOT_MEASURED if length <= LONGEST.get(name, length) else TOO_LONG


def shown(tokens_per_s: float | None) -> str:
    """In thousands, three digits, zeros too; empty for None."""
    if tokens_per_s is None:
        return ""
    value = tokens_per_s / 1000
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def origins(speeds: Sequence[Speed]) -> str:
    """Which results files the numbers are from."""
    found = sorted({f"{speed.machine}: {speed.origin}" for speed in speeds})
    return f"Measured on {'; '.join(found)}." if found else ""

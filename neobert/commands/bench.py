"""``neobert bench``: the least time a model can take, and reports of what was measured."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from neobert.commands.arguments import DTYPES, positive
from neobert.floors import ARCHITECTURES, GPUS, Gpu, Part, forward, scaling, training_step
from neobert.floors.gpus import gpu
from neobert.floors.models import Architecture, architecture
from neobert.readers import InputError

LENGTHS = (512, 1024, 2048, 4096)
CHECKOUT = Path(__file__).resolve().parents[2]
DESCRIPTION = """\
--floor: bytes, FLOP and the least time of every operator of a model on named GPUs, by their data
sheets. Nothing is run, so no GPU is needed. A real run takes longer; docs/benchmarks.md.

--report: tables, a page and plots of the results in a folder that the benchmarks wrote.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "bench",
        help="the least time a model can take; a report of measured times",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--floor", action="store_true", help="the least time, by data sheets")
    action.add_argument(
        "--report",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="report on the results in FOLDER (default: benchmarks/results of a checkout)",
    )
    floor = parser.add_argument_group("with --floor")
    floor.add_argument("--model", default="neobert-250m", help=f"of {', '.join(ARCHITECTURES)}")
    floor.add_argument(
        "--gpu", action="append", help=f"of {', '.join(GPUS)}; may be repeated (default: all)"
    )
    floor.add_argument(
        "--length",
        action="append",
        type=positive,
        metavar="TOKENS",
        help="tokens of a document; may be repeated (default: 512 to 4096)",
    )
    floor.add_argument(
        "--tokens", type=positive, default=16384, metavar="N", help="of a batch (default: 16384)"
    )
    floor.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default: bfloat16)")
    floor.add_argument(
        "--training", action="store_true", help="a masked-LM step, a fifth of the tokens labelled"
    )
    floor.add_argument(
        "--corpus",
        type=positive,
        metavar="TEXTS",
        help="instead: so many texts of one --length on many GPUs (docs/scaling.md)",
    )
    floor.add_argument(
        "--gpus", action="append", type=positive, metavar="N", help="with --corpus (8, 64, 512)"
    )
    floor.add_argument(
        "--core-rate",
        type=positive,
        default=500_000,
        metavar="N",
        help="with --corpus: tokens/s that one core tokenizes (default: 500000)",
    )
    report = parser.add_argument_group("with --report")
    report.add_argument("--output", metavar="FOLDER", help="where it goes (default: FOLDER/report)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.report is not None:
        return _report(args)
    model = architecture(args.model)
    gpus = [gpu(name) for name in args.gpu or GPUS]
    lengths = args.length or LENGTHS
    for length in lengths:
        if length > args.tokens:
            raise InputError(f"tokens: expected at least the length {length}, got {args.tokens}")
    if args.corpus is not None:
        corpus = scaling.Corpus(args.corpus, lengths[0])
        print(
            scaling.report(
                model, corpus, gpus, dtype=args.dtype, counts=args.gpus or scaling.COUNTS,
                core=args.core_rate, tokens=args.tokens,
            )
        )  # fmt: skip
        return 0
    print(summary(model, gpus, lengths, args.tokens, args.dtype, args.training))
    print()
    print(shares(model, gpus[0], lengths[0], args.tokens, args.dtype, args.training))
    return 0


def _report(args: argparse.Namespace) -> int:
    benchmarks = CHECKOUT / "benchmarks"
    if not (benchmarks / "report.py").is_file():
        raise InputError("report: expected a checkout with benchmarks/, got an installed package")
    sys.path.insert(0, str(benchmarks))
    folder = Path(args.report) if args.report else benchmarks / "results"
    if not folder.is_dir():
        raise InputError(f"report: expected a folder of results, got {folder}")
    output = Path(args.output) if args.output else folder / "report"
    for path in importlib.import_module("report_page").write(folder, output):
        print(path)
    return 0


def parts_of(
    model: Architecture, length: int, tokens: int, dtype: str, training: bool
) -> list[Part]:
    """The parts of a batch of documents of one length; what does not divide is left out."""
    lengths = [length] * (tokens // length)
    return (training_step if training else forward)(model, lengths, dtype)


def summary(
    model: Architecture, gpus: Sequence[Gpu], lengths: Sequence[int], tokens: int, dtype: str,
    training: bool,
) -> str:  # fmt: skip
    """Tokens per second that no run can pass, one line for each GPU."""
    what = "masked-LM step" if training else "forward"
    lines = [f"{model.name}, {what}, {dtype}: at most so many tokens/s, by data sheets", ""]
    lines.append(f"{'':18}" + "".join(f"{length:>12,}" for length in lengths))
    for each in gpus:
        cells = []
        for length in lengths:
            parts = parts_of(model, length, tokens, dtype, training)
            seconds = sum(part.cost.floor_s(each, dtype) for part in parts)
            cells.append(f"{tokens // length * length / seconds:>12,.0f}")
        lines.append(f"{each.name:18}" + "".join(cells))
    return "\n".join(lines)


def shares(
    model: Architecture, on: Gpu, length: int, tokens: int, dtype: str, training: bool
) -> str:
    """Every operator at one length on one GPU, the longest first."""
    parts = parts_of(model, length, tokens, dtype, training)
    total = sum(part.cost.floor_s(on, dtype) for part in parts)
    lines = [
        f"{on.name} ({on.source}), {tokens // length} documents of {length} tokens: "
        f"{1e3 * total:.3f} ms",
        "",
        f"{'operator':36}{'calls':>6}{'GFLOP':>11}{'MB':>11}{'us':>11}{'share':>8}  bound by",
    ]
    for part in sorted(parts, key=lambda part: -part.cost.floor_s(on, dtype)):
        seconds = part.cost.floor_s(on, dtype)
        lines.append(
            f"{part.name:36}{part.calls:>6}{part.cost.flop / 1e9:>11,.2f}"
            f"{part.cost.bytes / 1e6:>11,.1f}{1e6 * seconds:>11,.1f}{seconds / total:>8.1%}"
            f"  {part.cost.bound(on, dtype)}"
        )
    return "\n".join(lines)

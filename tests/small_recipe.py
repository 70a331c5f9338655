"""What the tests of pre-training share: a tiny tokenizer, made-up texts, a small recipe."""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from neobert.pretraining.batches import Step
from neobert.pretraining.recipe import Batch, Data, Recipe
from neobert.pretraining.store import Store

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(95)]


def write_tokenizer(folder: Path, **without: Any) -> Path:
    vocabulary = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{t.strip('[]').lower()}_token": t for t in SPECIAL}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, **without})
    fast.save_pretrained(folder)
    return folder


def document_texts(count: int, longest: int = 60, seed: int = 0) -> list[str]:
    """Documents of 1 to ``longest`` words; some words are unknown."""
    draw = np.random.default_rng(seed)
    lengths = 1 + (draw.random(count) ** 2 * longest).astype(int)
    return [" ".join(f"w{w}" for w in draw.integers(0, 100, n)) for n in lengths]


def recipe(store: Store, held_out: int = 0, **batch: Any) -> Recipe:
    values = {"max_length": 40, "tokens": 128, "bins": 4, "workers": 0}
    return Recipe(
        Data(path="in", store=str(store.folder), held_out=held_out), Batch(**{**values, **batch})
    )


def content(step: Step) -> list[bytes]:
    """All that is in each micro-batch."""
    return [
        b"".join(np.asarray(value).tobytes() for value in vars(batch).values() if value is not None)
        for batch in step.micro_batches
    ]

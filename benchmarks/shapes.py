"""Encoders at the sizes people use, with random weights, and batches of token ids for them.

The one place where a model or a case of lengths has a name; names are those of
`neobert.floors.ARCHITECTURES`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

VOCABULARY = 30_522
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Of a --quick run: small to make, and with the real widths.
SMALL = {"num_hidden_layers": 2, "vocab_size": 2000, "pad_token_id": 1}
LARGE = {
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


@dataclass(frozen=True)
class Model:
    """How to make an encoder with random weights.

    Attributes:
        library: Where the classes are.
        prefix: What their names begin with.
        longest: The longest document it takes, in tokens.
        settings: Of its config, where they are not the defaults.
        base_options: For the base class alone.
    """

    library: str
    prefix: str
    longest: int
    settings: dict[str, Any] = field(default_factory=dict)
    base_options: dict[str, Any] = field(default_factory=dict)

    def make(self, **changes: Any) -> Any:
        """The base model, without a pooler."""
        return self._class("Model")(self.config(**changes), **self.base_options)

    def masked_lm(self, **changes: Any) -> Any:
        return self._class("ForMaskedLM")(self.config(**changes))

    def config(self, **changes: Any) -> Any:
        return self._class("Config")(**(self.settings | changes))

    def _class(self, suffix: str) -> Any:
        return getattr(__import__(self.library), self.prefix + suffix)


_PLAIN = {"base_options": {"add_pooling_layer": False}}
_BERT = NO_DROPOUT
_ROBERTA = NO_DROPOUT | {
    "vocab_size": 50_265,
    "max_position_embeddings": 514,
    "pad_token_id": 1,
    "type_vocab_size": 1,
}
MODELS: dict[str, Model] = {
    "neobert-250m": Model("neobert", "NeoBERT", 4096),
    "modernbert-base": Model("transformers", "ModernBert", 8192),
    "bert-base": Model("transformers", "Bert", 512, _BERT, **_PLAIN),
    "nomic-bert-base": Model(
        "transformers", "NomicBert", 2048, NO_DROPOUT | {"vocab_size": 30_528}
    ),
    "bert-large": Model("transformers", "Bert", 512, _BERT | LARGE, **_PLAIN),
    "roberta-base": Model("transformers", "Roberta", 512, _ROBERTA, **_PLAIN),
    "roberta-large": Model("transformers", "Roberta", 512, _ROBERTA | LARGE, **_PLAIN),
    "modernbert-large": Model(
        "transformers",
        "ModernBert",
        8192,
        LARGE | {"num_hidden_layers": 28, "intermediate_size": 2624},
    ),
    "eurobert-210m": Model(
        "transformers",
        "EuroBert",
        8192,
        {"max_position_embeddings": 8192, "num_key_value_heads": 12},
    ),
}
# Which of them tell most about the package, and which only where there is time.
FIRST = ("neobert-250m", "modernbert-base", "bert-base")
CASES = ("fixed 512", "fixed 1024", "fixed 2048", "fixed 4096", "ragged", "long tail")


def lengths_of(case: str, documents: int, longest: int = 4096) -> list[int]:
    """Token counts of one batch, the same at every call.

    "fixed N"; "ragged", Normal(256, 64) clipped to 16..512; "long tail", a lognormal of median 128
    and sigma 1, clipped to 8..``longest``.

    Raises:
        ValueError: There is no such case; the message lists those that are known.
    """
    kind, _, number = case.partition(" ")
    if kind == "fixed" and number.isdigit():
        return [int(number)] * documents
    drawn = torch.randn(documents, generator=torch.Generator().manual_seed(0))
    if case == "ragged":
        return (drawn * 64 + 256).round().long().clamp(16, 512).tolist()
    if case == "long tail":
        return (drawn.exp() * 128).round().long().clamp(8, longest).tolist()
    raise ValueError(f"case: expected fixed N, ragged or long tail, got {case!r}")


def batch_of(case: str, tokens: int, longest: int) -> list[int]:
    """Token counts of a batch of about ``tokens`` real tokens, of one document at least."""
    many = lengths_of(case, max(64, tokens // 64), longest)
    mean = sum(many) / len(many)
    return lengths_of(case, max(1, math.floor(tokens / mean)), longest)


def longest_of(case: str) -> int:
    """The longest document that a case asks for whatever the model."""
    return int(case.split()[1]) if case.startswith("fixed ") else 512


def padded(
    lengths: Sequence[int], device: str, vocabulary: int = VOCABULARY
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(input_ids, attention_mask)`` of random words, padding on the right."""
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary // 30, vocabulary, real.shape, generator=generator)
    ids = ids.where(real, torch.ones_like(ids))  # 1: RoBERTa's padding, a plain word for the rest
    return ids.to(device), real.long().to(device)

"""Encoders at the sizes people use, with random weights, and batches of token ids for them."""

from collections.abc import Callable
from typing import Any

import torch

VOCABULARY = 30_522
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert_base(**changes: Any) -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**(NO_DROPOUT | changes)), add_pooling_layer=False)


def roberta_base(**changes: Any) -> Any:
    from transformers import RobertaConfig, RobertaModel

    sizes = {"vocab_size": 50_265, "max_position_embeddings": 514, "pad_token_id": 1}
    return RobertaModel(RobertaConfig(**(NO_DROPOUT | sizes | changes)), add_pooling_layer=False)


def nomic_bert_base(**changes: Any) -> Any:
    from transformers import NomicBertConfig, NomicBertModel

    return NomicBertModel(NomicBertConfig(**(NO_DROPOUT | {"vocab_size": 30_528} | changes)))


def modernbert_base(**changes: Any) -> Any:
    from transformers import ModernBertConfig, ModernBertModel

    return ModernBertModel(ModernBertConfig(**changes))


def eurobert_210m(**changes: Any) -> Any:
    from transformers import EuroBertConfig, EuroBertModel

    sizes = {"max_position_embeddings": 8192, "num_key_value_heads": 12}
    return EuroBertModel(EuroBertConfig(**(sizes | changes)))


def neobert_250m(**changes: Any) -> Any:
    from neobert import NeoBERTConfig, NeoBERTModel

    return NeoBERTModel(NeoBERTConfig(**changes))


# Name: how to make it, and the longest document it takes.
MODELS: dict[str, tuple[Callable[..., Any], int]] = {
    "bert-base": (bert_base, 512),
    "roberta-base": (roberta_base, 512),
    "nomic-bert-base": (nomic_bert_base, 2048),
    "modernbert-base": (modernbert_base, 8192),
    "eurobert-210m": (eurobert_210m, 8192),
    "neobert-250m": (neobert_250m, 4096),
}


def lengths_of(case: str, documents: int) -> list[int]:
    """Token counts: "fixed N", or "ragged", Normal(256, 64) clipped to 16..512."""
    if case.startswith("fixed "):
        return [int(case.removeprefix("fixed "))] * documents
    drawn = torch.randn(documents, generator=torch.Generator().manual_seed(0)) * 64 + 256
    return drawn.round().long().clamp(16, 512).tolist()


def padded(lengths: list[int], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``(input_ids, attention_mask)`` of random words, padding on the right."""
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, VOCABULARY - 1000, real.shape, generator=generator)
    ids = ids.where(real, torch.ones_like(ids))  # 1: RoBERTa's padding, a plain word for the rest
    return ids.to(device), real.long().to(device)

"""Ragged texts, and a small tokenizer over the vocabulary of ``encoders``."""

import string
from pathlib import Path

import tokenizers
import transformers as tf
from encoders import ENCODERS, VOCABULARY
from torch import nn

LONGEST = 64
TEXTS = [
    "a",
    "the cat sat on the mat",
    "",
    "Compress a file with gzip. " * 2,
    "x y z",
    "words " * 20,
    "two tokens",
    "hello",
]


def tokenizer(family: str) -> tf.PreTrainedTokenizerFast:
    """One token per character, between [CLS] and [SEP]; padding has the family's id."""
    padding = ENCODERS[family].padding
    names = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, " ", "."]
    names.insert(padding, "[PAD]")
    vocabulary = {name: i for i, name in enumerate(names)}
    assert len(vocabulary) <= VOCABULARY
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.normalizer = tokenizers.normalizers.Lowercase()
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    columns = ["input_ids", "attention_mask"]
    if family == "bert":
        columns.append("token_type_ids")
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=model,
        model_max_length=LONGEST,
        model_input_names=columns,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def save(family: str, model: nn.Module, folder: Path) -> Path:
    """``model`` with its tokenizer in ``folder``."""
    model.save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    return folder

"""Models that the tests of `register_attention` share."""

import pytest
import transformers as tf
from encoders import ENCODERS, VOCABULARY, padded, randomized

NAME, FLASH = "neobert_kernels", "neobert_kernels_flash"
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHERS = {
    "nomic_bert": lambda: tf.NomicBertConfig(**SIZES, max_position_embeddings=64),
    # A window of 4 to each side: shorter than the longest text.
    "modernbert": lambda: tf.ModernBertConfig(
        **SIZES, max_position_embeddings=64, local_attention=8, cls_token_id=1, sep_token_id=2
    ),
    "eurobert": lambda: tf.EuroBertConfig(
        **(SIZES | {"hidden_size": 64, "num_attention_heads": 4}),
        num_key_value_heads=2,
        max_position_embeddings=64,
        mask_token_id=3,
    ),
}
NATIVE = ("bert", "roberta", "xlm_roberta")
FAMILIES = (*NATIVE, *OTHERS)
families = pytest.mark.parametrize("family", FAMILIES)
names = pytest.mark.parametrize("name", [NAME, FLASH])


def config(family):
    return OTHERS[family]() if family in OTHERS else ENCODERS[family].config()


def make(family):
    return randomized(tf.AutoModel.from_config(config(family), attn_implementation="sdpa"))


def batch(family, side="right"):
    return padded(family if family in ENCODERS else "bert", side=side)

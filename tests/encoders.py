"""Tiny random models of every family that `patch` knows, from their native configs."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

import neobert

VOCABULARY = 97
LENGTHS = (9, 1, 17, 5)
HEADS = ("mlm", "sequence", "token", "question", "choice")
_CLASSES = {
    "mlm": "ForMaskedLM",
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "question": "ForQuestionAnswering",
    "choice": "ForMultipleChoice",
}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_SPECIAL_IDS = {f"{name}_token_id": 2 for name in ("bos", "eos", "cls", "sep")}


@dataclass(frozen=True)
class Encoder:
    """A family to test.

    Attributes:
        config: Makes a tiny config; takes changes by name.
        library: Where the classes are.
        prefix: What their names begin with.
        padding: Id of the padding token.
        first_position: Position of a document's first token.
        longest: The most tokens a document may have, or None.
        lora: Names of Linear layers for LoRA.
        eps: The config's name for that of all norms.
    """

    config: Callable[..., Any]
    library: Any
    prefix: str
    lora: tuple[str, ...]
    padding: int = 0
    first_position: int = 0
    longest: int | None = 64
    eps: str = "layer_norm_eps"

    def base(self, **changes: Any) -> nn.Module:
        return getattr(self.library, f"{self.prefix}Model")(self.config(**changes))

    def head(self, kind: str, **changes: Any) -> nn.Module:
        return getattr(self.library, self.prefix + _CLASSES[kind])(self.config(**changes))

    def has(self, kind: str) -> bool:
        if not hasattr(self.library, self.prefix + _CLASSES[kind]):
            return False
        if kind != "choice":
            return True
        # transformers 5.10's XLM-RoBERTa reads a pooler that its own class leaves out.
        model: Any = self.head(kind)
        base = getattr(model, model.base_model_prefix)
        return getattr(base, "pooler", self) is not None


def _config(cls: type, **fixed: Any) -> Callable[..., Any]:
    return lambda **changes: cls(**(_SIZES | fixed | changes))


ENCODERS = {
    "bert": Encoder(
        _config(tf.BertConfig, max_position_embeddings=64, **_NO_DROPOUT),
        tf,
        "Bert",
        lora=("query", "value", "dense"),
    ),
    "roberta": Encoder(
        _config(tf.RobertaConfig, max_position_embeddings=66, pad_token_id=1, **_NO_DROPOUT),
        tf,
        "Roberta",
        lora=("query", "value", "dense"),
        padding=1,
        first_position=2,
    ),
    "xlm_roberta": Encoder(
        _config(tf.XLMRobertaConfig, max_position_embeddings=66, pad_token_id=1, **_NO_DROPOUT),
        tf,
        "XLMRoberta",
        lora=("query", "value", "dense"),
        padding=1,
        first_position=2,
    ),
    "modernbert": Encoder(
        # A radius of 2, two thetas, and first a layer with full attention.
        _config(tf.ModernBertConfig, pad_token_id=0, local_attention=4, **_SPECIAL_IDS),
        tf,
        "ModernBert",
        lora=("Wqkv", "Wo", "Wi"),
        longest=None,
        eps="norm_eps",
    ),
    "nomic_bert": Encoder(
        _config(tf.NomicBertConfig, max_position_embeddings=64),
        tf,
        "NomicBert",
        lora=("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"),
        longest=None,
    ),
    "eurobert": Encoder(
        _config(
            tf.EuroBertConfig,
            num_key_value_heads=1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            mask_token_id=1,
        ),
        tf,
        "EuroBert",
        lora=("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"),
        longest=None,
        eps="rms_norm_eps",
    ),
    "neobert": Encoder(
        _config(neobert.NeoBERTConfig, max_length=64, intermediate_size=96, classifier_dropout=0.0),
        neobert,
        "NeoBERT",
        lora=("qkv", "wo", "w12", "w3"),
        eps="norm_eps",
    ),
}


def head_cases() -> list[tuple[str, str]]:
    return [(name, kind) for name, e in ENCODERS.items() for kind in HEADS if e.has(kind)]


def randomized(model: nn.Module) -> nn.Module:
    """Weights large enough that an error in one place shows in the output."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Not "orm": every name in a "transformer_encoder" has that.
            is_norm = "norm" in name.lower() and name.endswith("weight")
            p.copy_(torch.randn_like(p) * 0.2 + is_norm)
    return model


def _wide_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, num_items_in_batch: Any = None, **_: Any
) -> torch.Tensor:
    logits, labels = logits.flatten(0, -2), labels.flatten()
    if num_items_in_batch is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def widened(model: Any) -> Any:
    """A float64 twin; its masked-LM loss too, which transformers' newer heads round to float32."""
    twin = copy.deepcopy(model).double()
    if type(model).__name__.endswith(_CLASSES["mlm"]):
        twin.loss_function = _wide_loss
    return twin


def padded(
    family: str, lengths: tuple[int, ...] = LENGTHS, side: str = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(input_ids, attention_mask)`` of random documents."""
    ids = torch.full((len(lengths), max(lengths)), ENCODERS[family].padding)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        where = slice(0, n) if side == "right" else slice(max(lengths) - n, None)
        ids[row, where] = torch.randint(2, VOCABULARY, (n,))
        mask[row, where] = 1
    return ids, mask


def with_labels(kind: str, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of a head model, labels included, for a batch of documents."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    B = len(ids)
    if kind == "mlm":
        chosen = (torch.rand(ids.shape) < 0.5) & (mask == 1)
        return inputs | {"labels": torch.where(chosen, ids, -100)}
    if kind == "token":
        classes = torch.randint(0, 3, ids.shape)
        return inputs | {"labels": torch.where(mask == 1, classes, -100)}
    if kind == "sequence":
        return inputs | {"labels": torch.randint(0, 3, (B,))}
    if kind == "question":
        spots = mask.float().multinomial(2, replacement=True)
        return inputs | {"start_positions": spots[:, 0], "end_positions": spots[:, 1]}
    pairs = {key: value.view(B // 2, 2, -1) for key, value in inputs.items()}
    return pairs | {"labels": torch.randint(0, 2, (B // 2,))}

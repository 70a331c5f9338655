"""A checkpoint as a classifier to fine-tune: patched where the family allows, else as it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import neobert_kernels as nk
from neobert import checkpoint
from neobert.loading import load_tokenizer, model_family, quiet_loading, text_length
from neobert.sentence_files import SentenceSettings

# Names that families give the dropout of attention weights, which fused attention never forms.
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")

# Most tokens of a text, or of both of a pair, unless asked otherwise.
MAX_LENGTH = 512


@dataclass(eq=False)
class Classifier:
    """A model for sequence classification with its tokenizer.

    Attributes:
        model: In float32, on its device.
        max_length: Tokens kept of a text or a pair.
        packed: Whether batches go in end to end, without padding.
        with_types: Whether the model tells the two texts of a pair apart by token types.
        notes: What is not the checkpoint's own, one line each.
    """

    model: Any
    tokenizer: Any
    family: str
    max_length: int
    packed: bool
    with_types: bool
    notes: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def classifier_config(folder: Path, patched: bool) -> Any:
    """The config of a checkpoint that can carry a classification head.

    Raises:
        ValueError: The family is not supported (``patched``), or has no such head.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

    import neobert  # noqa: F401  (registers NeoBERT)

    family = model_family(folder, patched)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None) is None:
        rule = "a family with a sequence classification head in transformers"
        raise ValueError(f"model: expected {rule}, got {family!r}")
    return config


def load_classifier(
    folder: Path,
    labels: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    patched: bool = True,
    max_length: int | None = None,
    head: Path | None = None,
) -> Classifier:
    """Load a checkpoint under a head of ``len(labels)`` classes, or of one score for none.

    Weights that the checkpoint lacks are drawn from PyTorch's generator: seed it first. Attention
    dropout is off, patched or not, so that both are the same model.

    Args:
        folder: A model folder.
        labels: Names of the classes.
        device: Where it goes.
        patched: Run on our operators, without padding.
        max_length: Tokens kept; default `MAX_LENGTH`, or what the model takes if that is less.
        head: The folder of a classifier to start from instead, all but its last layer; the
            tokenizer is still ``folder``'s.

    Raises:
        ValueError: The family is not supported (``patched``), has no such head, or the checkpoint
            lacks weights of its encoder.
        OSError: A file cannot be read.
    """
    from transformers import AutoModelForSequenceClassification

    family = model_family(folder, patched)
    source = head or folder
    config = classifier_config(source, patched)
    names = dict(enumerate(labels)) if labels else {0: "score"}
    config.id2label = names
    config.label2id = {name: i for i, name in names.items()}
    config.problem_type = "single_label_classification" if labels else "regression"
    for name in ATTENTION_DROPOUT:
        if getattr(config, name, 0):
            setattr(config, name, 0.0)
    with quiet_loading(), checkpoint.readable(source):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    notes = _check_loaded(model, info, source)
    model.to(device).eval()
    tokenizer = load_tokenizer(folder, config.vocab_size)
    # A sentence encoder's files may ask for shorter texts than its model takes: not here.
    longest = text_length(None, SentenceSettings(), tokenizer, model.base_model)
    if max_length is not None:
        longest = text_length(max_length, SentenceSettings(), tokenizer, model.base_model)
    else:
        longest = min(longest, MAX_LENGTH)
    packed = False
    if patched:
        report = nk.patch(model)
        packed = any(not entry.name for entry in report.replaced)
    types = "token_type_ids" in tokenizer.model_input_names
    return Classifier(
        model=model,
        tokenizer=tokenizer,
        family=family,
        max_length=longest,
        packed=packed,
        with_types=types and (getattr(config, "type_vocab_size", 0) or 0) > 1,
        notes=notes,
    )


def _check_loaded(model: Any, info: Mapping[str, Any], source: Path) -> tuple[str, ...]:
    """Notes on new weights; raises where the encoder itself is incomplete."""
    backbone = f"{model.base_model_prefix}."
    missing = set(info["missing_keys"])
    # Sentence encoders and masked language models are often saved without the pooler.
    pooler = {name for name in missing if name.startswith(f"{backbone}pooler.")}
    misshapen = {entry[0] for entry in info["mismatched_keys"]}
    inside = {name for name in misshapen if name.startswith(backbone)}
    known = {"missing_keys": missing - pooler, "mismatched_keys": []}
    if inside:
        known["mismatched_keys"] = [e for e in info["mismatched_keys"] if e[0] in inside]
    checkpoint.check_loaded(model, known, source)
    fresh = missing | misshapen
    if not fresh:
        return ()
    parts = sorted({name.rpartition(".")[0] for name in fresh})
    return (f"new weights: {', '.join(parts)}",)

"""A checkpoint as a masked language model that is asked for single tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import neobert_kernels as nk
from neobert import checkpoint
from neobert.finetuning.training import autocast
from neobert.loading import load_tokenizer, model_family, quiet_loading, text_length
from neobert.sentence_files import SentenceSettings

IGNORE_INDEX = -100


@dataclass(eq=False)
class MaskedLM:
    """A model in evaluation mode with its tokenizer.

    Attributes:
        max_length: Tokens kept of a document.
        packed: Whether masked copies go in end to end, and the last layer and the head run at the
            masked tokens only.
        precision: "float32", or "bfloat16" for autocast.
    """

    model: Any
    tokenizer: Any
    family: str
    max_length: int
    packed: bool
    precision: str = "float32"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def maskable(self, ids: np.ndarray) -> np.ndarray:
        """Positions of a document's own tokens, without those that frame it."""
        names = ("cls", "sep", "bos", "eos", "pad")
        frame = [getattr(self.tokenizer, f"{name}_token_id") for name in names]
        return np.flatnonzero(~np.isin(ids, [i for i in frame if i is not None]))

    @torch.inference_mode()
    def loss(self, ids: np.ndarray, positions: np.ndarray, max_tokens: int) -> float:
        """Mean cross-entropy of the tokens at ``positions``, each masked alone, in nats.

        Args:
            ids: One document, ``[n]``.
            positions: At least one.
            max_tokens: Tokens of one batch of masked copies, unless a single copy has more.
        """
        document = torch.from_numpy(ids.astype(np.int64)).to(self.device)
        where = torch.from_numpy(positions.astype(np.int64)).to(self.device)
        copies = max(1, max_tokens // len(ids))
        one_batch = self._packed_loss if self.packed else self._padded_loss
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in where.split(copies):
            with autocast(self.device, self.precision):
                total += one_batch(document, part).double()
        return float(total) / len(positions)

    def _packed_loss(self, document: Tensor, where: Tensor) -> Tensor:
        n, copies = len(document), len(where)
        rows = torch.arange(copies, device=document.device) * n + where
        tokens = document.repeat(copies)
        labels = torch.full_like(tokens, IGNORE_INDEX)
        labels[rows] = tokens[rows]
        tokens[rows] = self.tokenizer.mask_token_id
        bounds = torch.arange(copies + 1, dtype=torch.int32, device=document.device) * n
        mean = self.model(
            input_ids=tokens[None],
            cu_seq_lens_q=bounds,
            max_length_q=n,
            labels=labels[None],
            labelled_rows=rows,
        ).loss
        return mean.double() * copies

    def _padded_loss(self, document: Tensor, where: Tensor) -> Tensor:
        copies = torch.arange(len(where), device=document.device)
        tokens = document.repeat(len(where), 1)
        labels = tokens[copies, where]
        tokens[copies, where] = self.tokenizer.mask_token_id
        logits = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        return F.cross_entropy(logits[copies, where].float(), labels, reduction="sum")


def load_masked_lm(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    patched: bool = True,
    max_length: int | None = None,
    precision: str = "float32",
) -> MaskedLM:
    """Load a checkpoint with its masked-LM head.

    Raises:
        ValueError: The family is not supported (``patched``), has no such head, or the checkpoint
            lacks its weights.
        OSError: A file cannot be read.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForMaskedLM

    import neobert  # noqa: F401  (registers NeoBERT)

    family = model_family(folder, patched)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None) is None:
        rule = "a family with a masked-LM head in transformers"
        raise ValueError(f"model: expected {rule}, got {family!r}")
    with quiet_loading(), checkpoint.readable(folder):
        model, info = AutoModelForMaskedLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    # A head that is missing is a fresh one to fine-tune elsewhere; here it would predict noise.
    backbone = f"{model.base_model_prefix}."
    absent = [name for name in info["missing_keys"] if not name.startswith(backbone)]
    if absent:
        raise ValueError(
            f"model: expected a checkpoint with a masked-LM head, got one without {min(absent)}"
        )
    checkpoint.check_loaded(model, info, folder)
    model.to(device).eval()
    tokenizer = load_tokenizer(folder, config.vocab_size)
    if tokenizer.mask_token_id is None:
        raise ValueError(f"model: expected a tokenizer with a mask token, got none in {folder}")
    longest = text_length(max_length, SentenceSettings(), tokenizer, model.base_model)
    packed = False
    if patched:
        report = nk.patch(model, mlm_logits=False, labelled_rows_only=True)
        packed = any(not entry.name for entry in report.replaced)
    return MaskedLM(model, tokenizer, family, longest, packed, precision)

"""`neobert.encode.Encoder` as a model of ``mteb``: its prompts, its similarity, its metadata."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import get_prompt_name
from mteb.models.model_meta import ScoringFunction
from mteb.similarity_functions import cos_sim, pairwise_cos_sim
from torch import Tensor

from neobert.encode import Encoder


class MTEBEncoder:
    """What ``mteb.evaluate`` calls.

    Args:
        encoder: The model.
        name: As results are filed under: "organization/model".
        prompts: By the names that mteb gives tasks, kinds of task, and "query" or "document", what
            is put before a text; texts without one keep the encoder's own.
    """

    def __init__(
        self, encoder: Encoder, name: str, prompts: Mapping[str, str] | None = None
    ) -> None:
        self._encoder, self._prompts = encoder, dict(prompts or {})
        parameters = sum(p.numel() for p in encoder.model.parameters())
        self._meta = ModelMeta.create_empty(
            {
                "name": name if "/" in name else f"local/{name}",
                "revision": str(encoder.fingerprint["revision"] or encoder.fingerprint["files"]),
                "n_parameters": parameters or None,
                "max_tokens": encoder.max_length,
                "embed_dim": encoder.dim,
                "framework": ["PyTorch"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": bool(self._prompts or encoder.settings.prompt),
                "model_type": ["dense"],
                "experiment_kwargs": {"prompts": self._prompts} if self._prompts else None,
            }
        )

    @property
    def mteb_model_meta(self) -> ModelMeta:
        return self._meta

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **_: Any,
    ) -> np.ndarray:
        """``[N, dim]`` float32 for a loader of batches with their texts under "text"."""
        encoder = self._encoder
        name = get_prompt_name(self._prompts, task_metadata, prompt_type)
        if name is not None:
            encoder = replace(
                encoder, settings=replace(encoder.settings, prompt=self._prompts[name])
            )
        return encoder.encode([text for batch in inputs for text in batch["text"]])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        return pairwise_cos_sim(embeddings1, embeddings2)

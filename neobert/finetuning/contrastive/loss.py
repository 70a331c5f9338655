"""`info_nce` as a loss of sentence-transformers, under its gradient cache (GradCache)."""

from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
)
from sentence_transformers.util import all_gather_with_grad, get_rank
from torch import Tensor

import neobert_kernels as nk

# Queries whose similarities to all documents are in memory at once, on a CPU.
CPU_QUERIES = 256


class CachedInfoNCELoss(CachedMultipleNegativesRankingLoss):
    """InfoNCE over cosine similarities: one positive, hard negatives, the batch's other documents.

    As `CachedMultipleNegativesRankingLoss` with ``scale = 1 / temperature``, from which it takes
    the two passes over mini-batches; the loss between them is `neobert_kernels.info_nce`, which
    keeps no similarities in a GPU's memory.

    Args:
        model: The `SentenceTransformer` that is trained.
        temperature: Divides the similarities.
        mini_batch_num_tokens: Tokens of one forward pass.
        gather: Whether documents of all processes are negatives.
    """

    def __init__(
        self,
        model: Any,
        temperature: float = 0.07,
        mini_batch_num_tokens: int = 8192,
        gather: bool = True,
    ) -> None:
        super().__init__(
            model,
            scale=1 / temperature,
            mini_batch_num_tokens=mini_batch_num_tokens,
            gather_across_devices=gather,
        )

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The mean loss of this process's queries over the documents of all; ``labels`` unused."""
        queries, *documents = [torch.cat(parts) for parts in reps]
        first = 0
        if self.gather_across_devices and torch.distributed.is_initialized():
            first = get_rank() * len(queries)
            documents = [all_gather_with_grad(part) for part in documents]
        count = len(queries)
        step = CPU_QUERIES if queries.device.type == "cpu" else count
        total = torch.zeros((), device=queries.device)
        for begin in range(0, count, step):
            own = slice(first + begin, first + min(begin + step, count))
            # Row i of the queries matches row i: its own documents come first.
            rest = (documents[0][: own.start], documents[0][own.stop :], *documents[1:])
            part = queries[begin : begin + step]
            mean = nk.info_nce(
                part, torch.cat([documents[0][own], *rest]).to(part.dtype), self.temperature
            )
            loss = mean * (len(part) / count)
            if with_backward:
                loss.backward()
                loss = loss.detach()
            total = total + loss
        return total

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
            "gather": self.gather_across_devices,
        }

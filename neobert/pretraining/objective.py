"""What one micro-batch gives: the masked-LM loss, summed over its labelled tokens.

`Objective` is the module that DDP, FSDP2 and autocast see. It returns sums, never means: only the
trainer knows how many tokens are labelled in a whole step, over micro-batches and ranks.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import neobert_kernels as nk
from neobert.heads import NeoBERTForMaskedLM
from neobert.pretraining.batches import MicroBatch
from neobert.pretraining.ranks import Ranks
from neobert.pretraining.recipe import Train


class Objective(nn.Module):
    """A masked-LM model, and how it is asked for a loss."""

    def __init__(self, model: NeoBERTForMaskedLM, patch: bool) -> None:
        super().__init__()
        self.model = model
        self.patched = patch
        if patch:
            nk.patch(model, labelled_rows_only=True)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        rows: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """In training the loss, a scalar; in evaluation ``[2]``: loss and right predictions.

        Arguments as in `neobert.pretraining.batches.MicroBatch`. Sums over the labelled tokens.
        """
        layout: dict[str, Any] = {"attention_mask": attention_mask}
        if cu_seqlens is not None:
            layout = {"cu_seq_lens_q": cu_seqlens, "max_length_q": max_seqlen}
        if not self.training:
            return self._evaluate(input_ids, labels, rows, layout)
        if self.patched and cu_seqlens is not None:
            layout["labelled_rows"] = rows
        return self.model(input_ids, labels=labels, num_items_in_batch=1, **layout).loss

    def _evaluate(
        self, input_ids: Tensor, labels: Tensor, rows: Tensor, layout: dict[str, Any]
    ) -> Tensor:
        hidden = self.model.model(input_ids, **layout).last_hidden_state
        head = self.model.decoder
        loss, _, correct = nk.linear_cross_entropy_with_stats(
            hidden.flatten(0, 1)[rows],
            head.weight,
            labels.flatten()[rows],
            head.bias,
            reduction="sum",
            rows=len(rows),
        )
        return torch.stack([loss, correct.sum().to(loss.dtype)])


def inputs(batch: MicroBatch, device: torch.device) -> dict[str, Any]:
    """The arguments of `Objective`, on ``device``; copies from pinned memory wait for nobody."""
    names = ("input_ids", "labels", "rows", "cu_seqlens", "max_seqlen", "attention_mask")
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name in names
        for value in (getattr(batch, name),)
    }


def autocast(train: Train, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in bfloat16, if the recipe says so; weights and sums stay float32."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=train.precision == "bfloat16", cache_enabled=False
    )


def prepare_model(model: NeoBERTForMaskedLM, train: Train, ranks: Ranks) -> tuple[Objective, Any]:
    """The objective on its device, and what to call in training: it, or DDP around it.

    FSDP2 shards the objective in place, layer by layer.
    """
    nn.Module.to(model, ranks.device)
    if train.gradient_checkpointing:
        # The newer name, where transformers has it; the older one warns there.
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    objective = Objective(model, train.patch).train()
    layers = model.model.transformer_encoder
    if train.compile:
        # Layer by layer: one graph serves them all, and checkpointing and sharding work around it.
        for layer in layers:
            layer.compile(dynamic=True)
    if ranks.world == 1:
        return objective, objective
    if train.parallel == "fsdp":
        _shard(objective, ranks)
        return objective, objective
    place = [ranks.device] if ranks.device.type == "cuda" else None
    wrapped = nn.parallel.DistributedDataParallel(
        objective, device_ids=place, gradient_as_bucket_view=True
    )
    return objective, wrapped


def _shard(objective: Objective, ranks: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for layer in objective.model.model.transformer_encoder:
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)


@contextlib.contextmanager
def gradients_stay_local(wrapped: Any, local: bool) -> Iterator[None]:
    """Whether ranks keep this micro-batch's gradient to themselves until the step's last one."""
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        with wrapped.no_sync() if local else contextlib.nullcontext():
            yield
        return
    if hasattr(wrapped, "set_requires_gradient_sync"):  # FSDP2
        wrapped.set_requires_gradient_sync(not local)
    yield

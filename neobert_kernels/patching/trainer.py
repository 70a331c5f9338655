"""`PatchCallback`: one argument for transformers' Trainer, and it trains a patched model."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from neobert_kernels import _check
from neobert_kernels.patching import PatchReport, checked_options, is_patched, patch, unpatch


class PatchCallback(TrainerCallback):
    """Patch a Trainer's model when the Trainer is made, unpatch it when training ends.

    ``Trainer(..., callbacks=[nk.PatchCallback()])``. The model is patched before the Trainer wraps
    it (mixed precision, DDP, FSDP, torch.compile). Evaluation and prediction, before training and
    during it, run patched; a later ``train`` patches again. A ``train`` that raises leaves the
    model patched, because the Trainer has no event for it.

    Args:
        options: As `patch`.

    Attributes:
        report: The last patch's `PatchReport`; None before the first.

    Raises:
        ValueError: As `patch`, when the Trainer is made: also for a model that is patched already.
    """

    def __init__(self, **options: bool | None) -> None:
        self.options = vars(checked_options(**options))
        self.report: PatchReport | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        """The model is still as the caller passed it."""
        self._patch(args, event["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        """For a second ``train``, a model from ``model_init``, a callback that was added later."""
        self._patch(args, event["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        if is_patched(event["model"]):
            unpatch(event["model"])

    def _patch(self, args: Any, model: nn.Module) -> None:
        if args.n_gpu > 1:  # nn.DataParallel's copies would all call the first one's forwards
            raise _check.error("args.n_gpu", "1 (start one process a GPU, torchrun)", args.n_gpu)
        if self.report is None or not is_patched(model):
            self.report = patch(model, **self.options)

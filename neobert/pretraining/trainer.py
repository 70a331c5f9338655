"""The training loop: steps, records, evaluations, checkpoints.

A step is a pure function of the weights, the optimizer's state and the recipe, so a run that is
killed anywhere and resumed from any checkpoint gives the bits of one that was not (on a CPU; on a
GPU as far as torch's own operators do). The device is waited for only where something is read:
every log.every steps, and before a checkpoint.
"""

import dataclasses
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from neobert.heads import NeoBERTForMaskedLM
from neobert.pretraining import evaluation, objective, optimizer, start, state
from neobert.pretraining.batches import Step
from neobert.pretraining.checkpoint import CONFIG, MODEL, OPTIMIZER, Checkpoints, Content
from neobert.pretraining.guard import Guard
from neobert.pretraining.metrics import Metrics
from neobert.pretraining.ranks import Ranks
from neobert.pretraining.recipe import Recipe
from neobert.pretraining.signals import Signals
from neobert.pretraining.store import Store
from neobert.pretraining.stream import Stream, whole_state
from neobert.pretraining.utilisation import model_flops_per_token, peak_flops, utilisation
from neobert.pretraining.watch import Watch

REPORT = "report.json"


class DivergedError(Exception):
    """The guard stopped the run; the message says at which step, why, and what was saved."""


class StoppedError(Exception):
    """A signal stopped the run, which was saved."""

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.number = number


class Trainer:
    """One rank's share of a run, from `done` steps to the recipe's last one."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store | Stream,
        model: NeoBERTForMaskedLM,
        ranks: Ranks,
        signals: Signals,
        watch: Watch | None,
    ) -> None:
        """Put ``model`` to work; ``watch`` is rank 0's."""
        self._recipe, self._store, self._ranks = recipe, store, ranks
        self._signals, self._watch = signals, watch
        self.model = model
        self._objective, self._wrapped = objective.prepare_model(model, recipe.train, ranks)
        self._optimizer = optimizer.build(model, recipe.optimizer)
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._metrics = Metrics(ranks)
        self._guard = Guard(recipe.guard)
        self._checkpoints = checkpoints_of(recipe)
        self.done = 0
        self._first = 0
        self._position: dict[str, Any] = {}
        self.scores: evaluation.Scores | None = None
        self._peak = None
        if recipe.train.precision == "bfloat16":
            self._peak = peak_flops(ranks.device)
        held_out = recipe.data.held_out
        self._frequent = evaluation.most_frequent(store, recipe) if held_out else 0

    def restore(self, done: int, saved: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Go on after step ``done``, with a checkpoint's state and its optimizer's tensors."""
        self.done = self._first = done
        self._metrics = Metrics(self._ranks, saved)
        self._guard.load_state_dict(saved["guard"])
        self._position = saved["data"]
        state.load_optimizer(self.model, self._optimizer, tensors)

    def run(self, steps: Iterator[Step]) -> None:
        """Take the steps that are left.

        Raises:
            DivergedError: A loss that is not finite, or far too high.
            StoppedError: By a signal.
            OutputError: A checkpoint could not be written.
        """
        last, log, saving = self._recipe.schedule.steps, self._recipe.log, self._recipe.checkpoint
        self._began = self._since = time.monotonic()
        self._counted = self._metrics.tokens, self._metrics.masked
        while self.done < last:
            step = next(steps)
            self._step(step)
            self._position = step.state
            self._checkpoints.raise_if_failed()
            at = self.done
            record = at % log.every == 0 or at == last
            evaluate = at == last or (log.evaluate > 0 and at % log.evaluate == 0)
            save = at == last or at % saving.every == 0
            # With several ranks, only where all of them read: they must agree on the step to stop.
            asked = self._signals.asked
            if not (record or evaluate or save or (asked and self._ranks.world == 1)):
                continue
            self._read()
            if record:
                self._record()
            with self._clock_stopped():
                if evaluate and self._recipe.data.held_out:
                    self._evaluate()
                if save or self._metrics.stop:
                    self._save()
            if self._metrics.stop and at < last:
                self._stop()
        self._checkpoints.wait()

    # --- one step

    def _step(self, step: Step) -> None:
        recipe, device = self._recipe, self._ranks.device
        lr = recipe.schedule.lr_at(self.done)
        optimizer.set_lr(self._optimizer, lr)
        batches = step.micro_batches
        # Every labelled token of the step weighs the same, whichever micro-batch or rank has it.
        labelled = float(sum(len(batch.rows) for batch in batches))
        masked = self._ranks.sum(torch.full((), labelled, device=device))
        scale = self._ranks.world / masked.clamp(min=1)  # DDP and FSDP2 average over the ranks
        total = torch.zeros((), device=device)
        for number, batch in enumerate(batches, 1):
            local = number < len(batches)
            with objective.gradients_stay_local(self._wrapped, local):
                with objective.autocast(recipe.train, device):
                    loss = self._wrapped(**objective.inputs(batch, device))
                (loss * scale).backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self._parameters, recipe.optimizer.clip or float("inf"))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self._metrics.add(self.done, total, masked, state.whole(norm), batches)

    # --- what is read and told

    def _read(self) -> None:
        """Fetch the numbers of the steps since the last time, and look at each."""
        for numbers in self._metrics.read(stop=self._signals.asked is not None):
            if reason := self._guard.check(numbers.step, numbers.loss, numbers.grad_norm):
                self._diverge(numbers.step, reason)
            self._norm = numbers.grad_norm

    def _record(self) -> None:
        window, now = self._metrics.close_window(), time.monotonic()
        if self._watch is None:
            return
        seconds = max(now - self._since, 1e-9)
        tokens, masked = self._counted
        rate = (self._metrics.tokens - tokens) / seconds
        flops = model_flops_per_token(
            self.model.config,
            window.context,
            labelled=window.masked / max(window.tokens, 1),
            last_layer_at_labels=self._recipe.train.patch,
        )
        self._watch.record(
            "train",
            self.done,
            self._seconds_left(now),
            tokens=self._metrics.tokens,
            loss=window.mean_loss,
            lr=self._recipe.schedule.lr_at(self.done - 1),
            grad_norm=self._norm,
            tokens_per_s=rate,
            masked_per_s=(self._metrics.masked - masked) / seconds,
            utilisation=utilisation(flops, rate, self._peak, self._ranks.world),
        )
        self._since, self._counted = now, (self._metrics.tokens, self._metrics.masked)

    def _seconds_left(self, now: float) -> float:
        per_step = (now - self._began) / max(self.done - self._first, 1)
        return per_step * (self._recipe.schedule.steps - self.done)

    def _evaluate(self) -> None:
        self.scores = evaluation.evaluate(
            self._objective, self._store, self._recipe, self._ranks, self._frequent
        )
        if self._watch is not None:
            values = self.scores._asdict()
            self._watch.record("eval", self.done, None, tokens=self._metrics.tokens, **values)

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """What happens here does not count as training in a record's rates."""
        before = time.monotonic()
        yield
        self._since += time.monotonic() - before

    # --- what is saved

    def content(self) -> Content:
        """A checkpoint; every rank calls it, rank 0 gets the tensors."""
        main, position = self._ranks.main, self._position
        if isinstance(self._store, Stream):
            position = whole_state(self._ranks.gather(position))
        return Content(
            step=self.done,
            tensors={
                MODEL: state.model_tensors(self.model, main),
                OPTIMIZER: state.optimizer_tensors(self.model, self._optimizer, main),
            },
            texts={CONFIG: start.config_text(self.model.config)},
            state={
                "data": position,
                "guard": self._guard.state_dict(),
                "settings": start.settings(self._recipe),
                **self._metrics.state,
            },
        )

    def _save(self) -> None:
        content = self.content()
        if self._ranks.main:
            background = self._recipe.checkpoint.background and not self._metrics.stop
            self._checkpoints.save(content, background)

    def _stop(self) -> None:
        self._checkpoints.wait()
        name = (self._signals.asked or signal.SIGTERM).name
        text = f"stopped by {name} at step {self.done:,}; saved; --resume goes on"
        if self._watch is not None:
            self._watch.note(self.done, text, say=False)
        raise StoppedError(text, self._signals.asked or signal.SIGTERM)

    def _diverge(self, step: int, reason: str) -> None:
        """Save what there is to look at, away from the checkpoints, and raise."""
        documents = self._ranks.gather([d.tolist() for d in self._metrics.documents[step]])
        content = self.content()
        folder = Path(self._recipe.train.run) / "stopped"
        if self._watch is not None:
            numbers = np.array(sorted({d for rank in documents for some in rank for d in some}))
            report = {
                "step": step,
                "reason": reason,
                "documents by rank and micro-batch": documents,
                **start.described(self._recipe, self._store, numbers),
            }
            texts = {**content.texts, REPORT: json.dumps(report, indent=1) + "\n"}
            content = dataclasses.replace(content, texts=texts)
            self._checkpoints.wait()
            Checkpoints(folder).save(content)
            kept = [path.name for path in self._checkpoints.all()][-1:]
            reason += (
                f"; {folder} has the state after step {self.done:,} and the batches' documents; "
                f"the last checkpoint is {kept[0] if kept else 'none'}"
            )
            self._watch.note(self.done, reason, say=False)
        raise DivergedError(reason)


def checkpoints_of(recipe: Recipe) -> Checkpoints:
    folder = Path(recipe.train.run) / start.CHECKPOINTS
    return Checkpoints(folder, recipe.checkpoint.keep_last, recipe.checkpoint.keep_every)

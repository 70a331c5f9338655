"""Train one point: AdamW, the protocol's schedule, evaluations, early stop; the best state is kept.

Everything random comes from the point's seed, so a point gives the same result whichever points
ran before it in the process.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neobert.finetuning.batches import EVALUATION_TOKENS, Collator, Tokens, by_length, shuffled
from neobert.finetuning.classifier import Classifier
from neobert.finetuning.schedule import Protocol, Setting, steps_of_epoch


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: mean training loss since the one before, and the metrics on the dev set."""

    step: int
    loss: float
    score: float | None
    metrics: dict[str, float | None]
    undefined: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Fit:
    """What training gave.

    Attributes:
        best: The evaluation with the highest score (the first of equals); None without any.
        state: The model's tensors at that moment.
        stopped: "finished", "early" (no gain for ``patience`` evaluations) or "diverged".
    """

    steps: int = 0
    planned_steps: int = 0
    tokens: int = 0
    truncated: int = 0
    training_s: float = 0.0
    seconds: float = 0.0
    stopped: str = "finished"
    best: Evaluation | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """All but the model, for a result's file."""
        best = self.best
        return {
            "status": self.stopped,
            "score": best.score if best else None,
            "metrics": best.metrics if best else {},
            "undefined": best.undefined if best else {},
            "best_step": best.step if best else None,
            "steps": self.steps,
            "planned_steps": self.planned_steps,
            "truncated": self.truncated,
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
            "training_tokens": self.tokens,
            "training_s": round(self.training_s, 3),
            "seconds": round(self.seconds, 3),
        }


Judge = Callable[[], tuple[float | None, dict[str, float | None], dict[str, str]]]
Report = Callable[["Fit", Evaluation], None]


def fit(
    classifier: Classifier,
    tokens: Tokens,
    labels: np.ndarray,
    setting: Setting,
    protocol: Protocol,
    judge: Judge,
    *,
    precision: str = "float32",
    report: Report | None = None,
) -> Fit:
    """Train ``classifier.model`` in place and leave the best evaluation's weights in it.

    Args:
        classifier: The model; its new weights are drawn already.
        tokens, labels: The training set.
        setting, protocol: What to run.
        judge: Score, metrics and reasons for undefined ones, of the model as it is.
        precision: "float32", or "bfloat16" for autocast over float32 weights.
        report: Called after every evaluation.
    """
    model, device = classifier.model, classifier.device
    collate = collator(classifier)
    targets = torch.from_numpy(labels.astype(np.float32 if labels.dtype == np.float64 else "i8"))
    optimizer = make_optimizer(model, setting)
    done = Fit(planned_steps=protocol.steps(len(tokens), setting.batch_size))
    done.truncated = tokens.truncated
    every = protocol.evaluate_every(len(tokens), setting.batch_size)
    last_step = steps_of_epoch(len(tokens), setting.batch_size) * protocol.epochs
    total_loss, counted, without_gain = torch.zeros((), device=device), 0, 0
    began = segment = time.monotonic()
    torch.manual_seed(setting.seed)
    model.train()
    for rows in _all_batches(len(tokens), setting, protocol):
        factor = protocol.factor(done.steps, done.planned_steps)
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * factor
        with autocast(device, precision):
            loss = model(
                **collate(tokens, rows), labels=collate.to_device(targets[torch.from_numpy(rows)])
            ).loss
        loss.backward()
        clip_gradients(model, protocol.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Read back at evaluations only: a read would wait for the device at every step.
        total_loss += loss.detach()
        counted += 1
        done.steps += 1
        done.tokens += int(tokens.lengths[rows].sum())
        if done.steps % every and done.steps != last_step:
            continue
        mean_loss = float(total_loss) / counted
        done.training_s += time.monotonic() - segment
        if not math.isfinite(mean_loss):
            done.stopped = "diverged"
            break
        model.eval()
        evaluation = Evaluation(done.steps, mean_loss, *judge())
        model.train()
        done.evaluations.append(evaluation)
        if _gains(evaluation, done.best):
            done.best, without_gain = evaluation, 0
            _keep(done.state, model)
        else:
            without_gain += 1
        if report is not None:
            report(done, evaluation)
        total_loss.zero_()
        counted, segment = 0, time.monotonic()
        if without_gain >= protocol.patience and done.steps < last_step:
            done.stopped = "early"
            break
    done.seconds = time.monotonic() - began
    if done.state:
        model.load_state_dict(done.state)
    model.eval()
    return done


def _all_batches(count: int, setting: Setting, protocol: Protocol) -> Iterator[np.ndarray]:
    for epoch in range(protocol.epochs):
        yield from shuffled(count, setting.batch_size, setting.seed, epoch)


def _gains(evaluation: Evaluation, best: Evaluation | None) -> bool:
    if best is None or best.score is None:
        return best is None or evaluation.score is not None
    return evaluation.score is not None and evaluation.score > best.score


@torch.no_grad()
def _keep(state: dict[str, Tensor], model: Any) -> None:
    """Copy the model's tensors into ``state``, in place after the first time."""
    for name, value in model.state_dict().items():
        if name in state:
            state[name].copy_(value)
        else:
            state[name] = value.clone()


def make_optimizer(model: Any, setting: Setting) -> torch.optim.AdamW:
    """AdamW that decays matrices, and no bias or norm."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": setting.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=setting.lr, fused=True)


def clip_gradients(model: Any, most: float) -> None:
    """Scale gradients down to the norm ``most``.

    On a CPU the norm is read first: gradients within it need not be written again, and the word
    embedding's alone is larger than all activations of a small batch. On a GPU reading would wait.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm.device.type != "cpu" or norm > most:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)


def collator(classifier: Classifier) -> Collator:
    padding = classifier.tokenizer.pad_token_id or 0
    return Collator(classifier.device, classifier.packed, padding)


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield


@torch.inference_mode()
def predict(classifier: Classifier, tokens: Tokens, precision: str = "float32") -> np.ndarray:
    """Logits ``[N, outputs]`` float32 of every text, rows in order."""
    collate = collator(classifier)
    device = classifier.device
    logits = np.empty((len(tokens), classifier.model.config.num_labels), np.float32)
    parts = []
    for rows in by_length(tokens.lengths, EVALUATION_TOKENS[device.type]):
        with autocast(device, precision):
            parts.append((rows, classifier.model(**collate(tokens, rows)).logits.float()))
    for rows, values in parts:
        logits[rows] = values.cpu().numpy()
    return logits

"""The contract of the operator in plain PyTorch; what the public functions share with it."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

REFERENCE_ROWS = 512  # whose logits exist at once: at V = 30,522 they are 62 MB in float32

Stats = tuple[Tensor, Tensor, Tensor]


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    rows: Tensor | int | None = None,
) -> Tensor:
    """The contract of `linear_cross_entropy`: the CPU path and, in float64, the oracle."""
    stats = linear_cross_entropy_with_stats_reference
    return stats(x, weight, labels, bias, ignore_index, reduction, rows)[0]


def linear_cross_entropy_with_stats_reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    rows: Tensor | int | None = None,
) -> Stats:
    """The contract of `linear_cross_entropy_with_stats`.

    Many rows go through in chunks whose logits the backward forms again, so the peak is that of
    one chunk. A compiler sees one chunk: it plans memory itself.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = row_indices(labels, rows, ignore_index)
    labels = labels[rows.clamp(min=0)].masked_fill(rows < 0, ignore_index)
    with torch.autocast(x.device.type, enabled=False):
        shared = (x, weight.to(wide), None if bias is None else bias.to(wide), ignore_index)
        pieces = [(rows, labels, *shared)]
        if not torch.compiler.is_compiling() and len(rows) > REFERENCE_ROWS:
            parts = zip(rows.split(REFERENCE_ROWS), labels.split(REFERENCE_ROWS), strict=True)
            pieces = [(*part, *shared) for part in parts]
        if len(pieces) > 1 and torch.is_grad_enabled():
            done = [
                checkpoint(_losses, *piece, use_reentrant=False, preserve_rng_state=False)
                for piece in pieces
            ]
        else:
            done = [_losses(*piece) for piece in pieces]
        losses, correct = (torch.cat(parts) for parts in zip(*done, strict=True))
    # Padding in rows goes to a slot past the end.
    slots = torch.where(rows < 0, len(x), rows)
    spread = losses.new_zeros(len(x) + 1).index_copy(0, slots, losses)[:-1]
    right = correct.new_zeros(len(x) + 1).index_copy(0, slots, correct)[:-1]
    count = (labels != ignore_index).sum()
    return reduced(spread, count, reduction), spread.detach(), right


def _losses(
    rows: Tensor,
    labels: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Losses of ``rows``, and whether no other logit is larger than the label's."""
    counted = labels != ignore_index
    # Zeros, because what an ignored row holds (NaN, say) must not reach the gradient of the weight.
    x = x.index_select(0, rows.clamp(min=0)).masked_fill(~counted[:, None], 0.0)
    logits = F.linear(x.to(weight.dtype), weight, bias)
    losses = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    own = logits.detach().gather(1, labels.where(counted, 0)[:, None])
    return losses, (own >= logits.detach().amax(1, keepdim=True)).squeeze(1) & counted


def row_indices(labels: Tensor, rows: Tensor | int | None, ignore_index: int) -> Tensor:
    """Indices of the labelled rows; -1 where a number given by the caller is too large."""
    if isinstance(rows, Tensor):
        return rows
    labelled = labels != ignore_index
    if rows is None:
        return labelled.nonzero().squeeze(1)
    if not len(labels):  # no row for a -1 to stand for
        rows = 0
    return torch.nonzero_static(labelled, size=rows, fill_value=-1).squeeze(1)


def reduced(losses: Tensor, count: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / count.clamp(min=1)

"""From packed token vectors to one vector a document: the mean, or the first token.

A document of length 0 gives zeros. Sums are float32, in the order of the tokens, rounded once.
"""

import torch
from torch import Tensor

from neobert_kernels import _check, _runtime
from neobert_kernels._packed import document_of_token


def mean_pool_reference(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The contract of `mean_pool` in plain PyTorch: the CPU path and, in float64, the oracle."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    lengths = cu_seqlens.diff()
    sums = wide.new_zeros(len(lengths), x.shape[1])
    sums = sums.index_add(0, document_of_token(cu_seqlens, len(x)), wide)
    return (sums / lengths.clamp(min=1)[:, None]).to(x.dtype)


def first_pool_reference(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The contract of `first_pool` in plain PyTorch: the CPU path and, in float64, the oracle."""
    if not len(x):
        return x.new_zeros(len(cu_seqlens) - 1, x.shape[1])
    first = x[cu_seqlens[:-1].long().clamp(max=len(x) - 1)]
    return first.masked_fill((cu_seqlens.diff() == 0)[:, None], 0.0)


def _check_arguments(x: Tensor, cu_seqlens: Tensor) -> None:
    _check.tensor("x", x, ndim=2)
    _check.dtype("x", x)
    _check.cu_seqlens(cu_seqlens, len(x), x.device)


def mean_pool(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Average the token vectors of each document.

    Args:
        x: ``[T, C]``; float32, float16 or bfloat16.
        cu_seqlens: ``[B + 1]`` int32 document boundaries.

    Returns:
        ``[B, C]`` in ``x.dtype``; zeros for an empty document.

    Raises:
        ValueError: A shape, dtype, device or (on CPU) boundary breaks the rules above.
    """
    _check_arguments(x, cu_seqlens)
    return mean_pool_reference(x, cu_seqlens)


def first_pool(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Take the first token vector of each document ([CLS] in BERT-class encoders).

    Args, returns, raises: as `mean_pool`.
    """
    _check_arguments(x, cu_seqlens)
    return first_pool_reference(x, cu_seqlens)


_runtime.operator(mean_pool, mean_pool_reference)
_runtime.operator(first_pool, first_pool_reference)

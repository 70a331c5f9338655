"""InfoNCE: cross-entropy of each query's cosine similarities, its own document being the class.

``loss = mean_i -log softmax_j(cos(q_i, d_j) / temperature)[i]``, in float32.

Source: van den Oord et al. 2018, arXiv:1807.03748, equation 4.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from neobert_kernels import _check, _runtime


def info_nce_reference(queries: Tensor, documents: Tensor, temperature: float) -> Tensor:
    """The contract of `info_nce` in plain PyTorch: the CPU path and, in float64, the oracle."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    q, d = (F.normalize(x.to(wide), dim=-1) for x in (queries, documents))
    own = torch.arange(len(q), device=q.device)
    return F.cross_entropy(q @ d.t() / temperature, own)


def info_nce(queries: Tensor, documents: Tensor, temperature: float) -> Tensor:
    """Contrastive loss over in-batch and extra negatives.

    Args:
        queries: ``[N, C]``, N at least 1; float32, float16 or bfloat16.
        documents: ``[M, C]`` with ``M >= N``, same dtype and device; row i of ``queries`` matches
            row i, and all other rows are its negatives.
        temperature: Divides the cosine similarities; over 0.

    Returns:
        Scalar float32, the mean over queries.

    Raises:
        ValueError: A shape, dtype, device or the temperature breaks the rules above.
    """
    _check.tensor("queries", queries, ndim=2)
    _check.dtype("queries", queries)
    _check.tensor("documents", documents, ndim=2)
    _check.dtype("documents", documents, (queries.dtype,))
    _check.device("documents", documents, queries.device)
    if not len(queries):
        raise _check.error("queries", "at least one row", 0)
    if documents.shape[1] != queries.shape[1] or len(documents) < len(queries):
        rule = f"shape (M, {queries.shape[1]}) with M >= {len(queries)}"
        raise _check.error("documents", rule, tuple(documents.shape))
    _check.positive("temperature", temperature)
    return info_nce_reference(queries, documents, temperature)


_runtime.operator(info_nce, info_nce_reference)

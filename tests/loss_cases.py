"""Inputs that the tests of linear_cross_entropy share."""

import pytest
import torch

from neobert_kernels import _runtime

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
runs_kernel = pytest.mark.skipif(
    not CUDA and not _runtime.INTERPRET, reason="no kernel runs on the CPU"
)

T, C, V = 13, 8, 29
LABELS = torch.tensor([3, -100, 0, 28, -100, -100, 7, 7, 1, -100, 12, 28, -100])
LABELLED = (LABELS != -100).nonzero().squeeze(1)


def make(dtype, device):
    shapes = ((T, C), (V, C), (V,))
    return [torch.randn(s, device=device).to(dtype) for s in shapes], LABELS.to(device, copy=True)


def random(T, C, V, dtype, device, share=0.5, weight=None):
    """x, weight and bias, and labels of which about ``share`` count."""
    x, w, b = (torch.randn(shape, device=device) for shape in ((T, C), (V, C), (V,)))
    labels = torch.randint(V, (T,), device=device)
    labels[torch.rand(T, device=device) > share] = -100
    return [x.to(dtype), w.to(weight or dtype), b.to(weight or dtype)], labels

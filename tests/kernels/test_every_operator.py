"""What every registered operator owes, on the samples that `neobert doctor` checks it with."""

import mmap
import sys

import pytest
import torch

from neobert.selfcheck import SAMPLES, Sample, _converted, _outputs
from neobert_kernels import _runtime

OPERATORS = _runtime.load_operators()
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
runs_kernel = pytest.mark.skipif(
    not CUDA and not _runtime.INTERPRET, reason="no kernel runs on the CPU"
)
every_operator = pytest.mark.parametrize("name", OPERATORS)


def sample(name: str, dtype: torch.dtype) -> Sample:
    return _converted(SAMPLES[name](torch.Generator().manual_seed(0)), dtype, DEVICE)


def empty(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that only its touched pages take; torch would fill it all during tests."""
    if CUDA:
        return torch.zeros(size, dtype=dtype, device=DEVICE)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, flags=flags), dtype=dtype)


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """``x`` with strides that int32 holds, its last row over 2**31 elements behind its first."""
    stride = -(-(2**31) // (len(x) - 1) // 16) * 16 + 16
    far = empty(stride * (len(x) - 1) + x[0].numel(), x.dtype)
    return far.as_strided(x.shape, (stride, *x.stride()[1:])).copy_(x)


@runs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is only promised")
@every_operator
def test_rows_2_to_the_31_elements_apart(name):
    """A product of a row and a stride that overflows int32 reads elsewhere, or nowhere.

    Without a gradient no argument is a leaf, and all are far apart, options as well.
    """
    near = sample(name, torch.float16)

    def moved(value, wanted):
        rows = isinstance(value, torch.Tensor) and value.ndim > 1
        return far_apart(value) if rows and wanted else value

    args = [moved(a, i in near.leaves or not near.leaves) for i, a in enumerate(near.args)]
    options = {key: moved(value, not near.leaves) for key, value in near.options.items()}
    far = Sample(tuple(args), options, near.leaves)
    public = OPERATORS[name].public
    for actual, expected in zip(_outputs(public, far), _outputs(public, near), strict=True):
        assert torch.equal(actual, expected)


@every_operator
def test_the_same_bits_twice(name):
    given = sample(name, torch.float32)
    first, second = (_outputs(OPERATORS[name].public, given) for _ in range(2))
    assert all(map(torch.equal, first, second))


@every_operator
def test_the_same_bits_whether_or_not_a_gradient_is_recorded(name):
    """Without one, plain tensors go another way: past the autograd function and the dispatcher."""
    given, public = sample(name, torch.float32), OPERATORS[name].public
    recorded = _outputs(public, given)
    without = Sample(given.args, given.options, leaves=())
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            plain = _outputs(public, without)
        assert not any(y.requires_grad for y in plain)
        assert all(map(torch.equal, recorded, plain))


@pytest.mark.parametrize("which", ["public", "reference"])
@every_operator
def test_autocast_changes_no_forward(name, which):
    """Only the forward: PyTorch runs no backward under autocast, unless told to."""
    if (name, which) == ("linear_cross_entropy", "public"):
        pytest.skip("casts by contract")
    function = getattr(OPERATORS[name], which)
    given = sample(name, torch.float32)
    without = Sample(given.args, given.options, leaves=())
    plain = _outputs(function, without)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = _outputs(function, without)
    assert all(map(torch.equal, cast, plain))


@pytest.mark.skipif(not CUDA, reason="needs a GPU: captures a CUDA graph")
@pytest.mark.parametrize("name", [n for n in OPERATORS if n != "linear_cross_entropy"])
def test_a_cuda_graph_replays_the_step(name):
    """But for the loss that counts labels, which has a test of its own, with ``rows``."""
    given = sample(name, torch.bfloat16)
    public = OPERATORS[name].public
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = _outputs(public, given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _outputs(public, given)
    graph.replay()
    assert all(map(torch.equal, captured, expected))

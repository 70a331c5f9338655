"""linear_cross_entropy under a compiler, in memory, and on a GPU: what a call takes."""

import pytest
import torch
from loss_cases import CUDA, LABELLED, T, V, every_reduction, make, random, runs_kernel
from parity import assert_parity
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import neobert_kernels as nk
from neobert_kernels.ops import linear_cross_entropy as module
from neobert_kernels.ops.linear_cross_entropy import kernels


@pytest.mark.parametrize("form", ["indices", "number"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph(reduction, form, device):
    tensors, labels = make(torch.float32, device)
    rows = LABELLED.to(device) if form == "indices" else len(LABELLED) + 1

    def of(fn):
        return lambda x, w, b: fn(x, w, labels, b, reduction=reduction, rows=rows)

    torch.compiler.reset()
    compiled = torch.compile(of(nk.linear_cross_entropy), fullgraph=True, backend="aot_eager")
    assert_parity(compiled, of(nk.linear_cross_entropy_reference), tensors)


def test_a_dynamic_number_of_rows_compiles_once(device):
    torch.compiler.reset()
    compiled = torch.compile(
        nk.linear_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager"
    )

    def check(T):
        tensors, labels = random(T, 24, 37, torch.float32, device)
        rows = (labels != -100).nonzero().squeeze(1)

        def of(fn):
            return lambda x, w, b: fn(x, w, labels, b, rows=rows)

        assert_parity(of(compiled), of(nk.linear_cross_entropy_reference), tensors)

    with torch.compiler.set_stance("default"):
        check(20)
    with torch.compiler.set_stance("fail_on_recompile"):
        for T in (33, 50):
            check(T)


@runs_kernel
@pytest.mark.parametrize("wanted", [False, True])
def test_registration(wanted, device):
    (x, weight, bias), labels = make(torch.float32, device)
    rows = LABELLED.to(device)
    options = (-100, torch.float32, wanted, wanted, wanted)
    for upstream in (None, torch.rand(T, device=device)):
        torch.library.opcheck(
            module._losses_and_gradients, (x, weight, labels, bias, rows, upstream, *options)
        )
    scale = torch.rand((), device=device)
    dx = x[rows].float()
    torch.library.opcheck(module._scale, (dx, scale, rows, T, torch.bfloat16))
    torch.library.opcheck(module._scale, (weight, scale, None, V, torch.float32))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("V", [100, 30_522, 256_000])
@pytest.mark.parametrize("R", [0, 1, 127, 128, 3277, 20_000])
def test_every_plan_keeps_its_promise(R, V, itemsize):
    width = -(-V // 64) * 64
    plan = kernels.plan(R, width, itemsize)
    assert plan.step <= plan.chunk <= R + 127
    assert 4 * plan.step * width <= max(32 << 20, 4 * 128 * width)
    assert itemsize * plan.chunk * width <= max(72 << 20, itemsize * 512 * width)
    if plan.chunk < R:  # aligned starts
        assert plan.chunk % 128 == 0
    if plan.step < plan.chunk:
        assert plan.step % 128 == 0


class LiveBytes(TorchDispatchMode):
    """The most that storages made inside take at once; what no tensor holds any more is free."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = pytree.tree_leaves((args, kwargs))
        before = {t.untyped_storage()._cdata for t in filter(of, given)}
        before |= {x._cdata for x in given if isinstance(x, torch.UntypedStorage)}
        out = function(*args, **(kwargs or {}))
        self.held = {key: held for key, held in self.held.items() if not held[0].expired()}
        for t in filter(of, pytree.tree_leaves(out)):
            storage = t.untyped_storage()
            if storage._cdata not in before:
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return out


def of(value):
    return isinstance(value, torch.Tensor)


@runs_kernel
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("labelled", [17, 48])
def test_peak_memory_is_the_stated_formula(labelled, gradients, small_chunks, device):
    T, C, V, s = 60, 40, 1000, 4
    tensors, labels = random(T, C, V, torch.float32, device, share=1)
    labels[labelled:] = -100
    rows = (labels != -100).nonzero().squeeze(1)
    width = -(-V // 64) * 64
    plan = kernels.plan(labelled, width, s)
    stated = 4 * plan.step * width + s * labelled * C
    if gradients:
        stated += s * plan.chunk * width + 4 * V * C + 4 * labelled * C
    with LiveBytes() as live:
        kernels.launch(
            *tensors[:2], labels, tensors[2], rows, None, -100, torch.float32, *(gradients,) * 3
        )
    # Vectors of T and V numbers, which the formula leaves out.
    assert stated <= live.peak <= stated + 32 * T + 16 * width
    assert live.peak < T * V * 4  # float32 logits of all rows


@pytest.mark.skipif(not CUDA, reason="needs a GPU: captures a CUDA graph")
@every_reduction
def test_a_cuda_graph_replays_the_step(reduction, device):
    tensors, labels = make(torch.bfloat16, device)
    leaves = [t.requires_grad_() for t in tensors]

    def step():
        loss = nk.linear_cross_entropy(
            leaves[0], leaves[1], labels, leaves[2], reduction=reduction, rows=T
        )
        return loss, *torch.autograd.grad(loss.sum(), leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].neg_()
    graph.replay()
    assert all(map(torch.equal, captured, step()))


@pytest.mark.skipif(not CUDA, reason="needs a GPU: counts synchronizations")
@pytest.mark.parametrize("form", ["indices", "number"])
def test_known_rows_never_wait_for_the_gpu(form, device):
    tensors, labels = make(torch.bfloat16, device)
    rows = LABELLED.to(device) if form == "indices" else len(LABELLED)
    leaves = [t.requires_grad_() for t in tensors]
    try:
        torch.cuda.set_sync_debug_mode("error")
        nk.linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2], rows=rows).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not CUDA, reason="needs 20 GB of GPU memory")
def test_more_than_two_to_the_31_elements(device):
    T, C, V = 2**31 // 768 + 3, 768, 50
    x = torch.randn(T, C, device=device, dtype=torch.bfloat16)
    weight = torch.randn(V, C, device=device, dtype=torch.bfloat16).requires_grad_()
    labels = torch.full((T,), -100, device=device)
    labels[-2:] = torch.tensor([3, V - 1])
    rows = torch.tensor([T - 2, T - 1], device=device)
    x.requires_grad_()
    loss = nk.linear_cross_entropy(x, weight, labels, rows=rows)
    loss.backward()
    tail = x.detach()[-2:].requires_grad_()
    expected = nk.linear_cross_entropy(tail, weight, labels[-2:])
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(x.grad[-2:], tail.grad)
    assert not x.grad[:-2].any()

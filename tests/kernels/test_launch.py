"""What reaches the driver is what Triton would have sent there, with a GPU that is not there."""

import pytest
import torch
from fake_gpu import fake_gpu

import neobert_kernels as nk
from neobert_kernels import _check, _launch, _runtime
from neobert_kernels.ops import _norms

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(_runtime.INTERPRET, reason="the interpreter has no binaries")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(_runtime, "use_kernel", lambda x: True)
    monkeypatch.setattr(_check, "readable", lambda x: False)
    _norms._prepared_forward.cache_clear()
    with fake_gpu() as launches:
        yield launches


def rows(T, C, dtype=torch.float32, apart=0, shift=0):
    """``[T, C]`` with ``apart`` elements between rows and ``shift`` before the first."""
    memory = torch.zeros(T * (C + apart) + shift, dtype=dtype)
    return memory[shift:].view(T, C + apart)[:, :C]


# Each differs from the first in something that Triton compiles for, or in nothing of that kind.
INPUTS = {
    "first": (rows(5, 32), torch.ones(32)),
    "more rows": (rows(7, 32), torch.ones(32)),
    "rows at odd distances": (rows(5, 32, apart=3), torch.ones(32)),
    "rows at other even distances": (rows(5, 32, apart=32), torch.ones(32)),
    "an address that is not aligned": (rows(5, 32, shift=1), torch.ones(32)),
    "a weight that is not aligned": (rows(5, 32), torch.ones(33)[1:]),
    "another dtype": (rows(5, 32, torch.bfloat16), torch.ones(32)),
    "a weight of another dtype": (rows(5, 32), torch.ones(32, dtype=torch.bfloat16)),
    "another width": (rows(5, 16), torch.ones(16)),
    "a width as 1": (rows(5, 1), torch.ones(1)),
}


def run():
    with torch.no_grad():
        for x, weight in INPUTS.values():
            nk.add_rms_norm(x, x, weight, 1)
        nk.rms_norm(*INPUTS["first"])
        nk.layer_norm(*INPUTS["first"], INPUTS["first"][1])


def described(launches):
    """Binary, grid and arguments; of a result's memory only what a kernel may rely on."""

    def of(argument):
        if not isinstance(argument, torch.Tensor):
            return type(argument), argument
        return argument.dtype, argument.data_ptr() % 16, argument.shape, argument.stride()

    found = [(call.binary, call.grid, *map(of, call.arguments)) for call in launches.calls]
    launches.calls.clear()
    return found


def test_a_binary_that_was_kept_starts_as_triton_would_start_it(gpu, monkeypatch):
    run()
    first = described(gpu)
    run()
    kept = described(gpu)
    monkeypatch.setattr(_launch, "_is_binary", lambda compiled: False)
    _norms._prepared_forward.cache_clear()
    run()
    by_triton = described(gpu)
    assert first == kept == by_triton
    assert len({binary for binary, *_ in first}) >= 10


def counted(monkeypatch):
    """Calls of `norm_forward_kernel` through Triton."""
    calls, run = [], _norms.norm_forward_kernel.run

    def counting(*args, **kwargs):
        calls.append(args)
        return run(*args, **kwargs)

    monkeypatch.setattr(_norms.norm_forward_kernel, "run", counting)
    return calls


def test_triton_is_asked_once_for_a_form(gpu, monkeypatch):
    calls = counted(monkeypatch)
    with torch.no_grad():
        for T in (1, 2, 3, 1000):
            nk.rms_norm(rows(T, 32), torch.ones(32))
    assert len(calls) == 1
    assert len(gpu.calls) == 4


def test_triton_is_asked_always_where_an_address_is_not_aligned(gpu, monkeypatch):
    calls = counted(monkeypatch)
    with torch.no_grad():
        for _ in range(3):
            nk.rms_norm(rows(5, 32, shift=1), torch.ones(32))
    assert len(calls) == 3


def test_a_hook_of_triton_runs(gpu):
    seen = []
    with torch.no_grad():
        nk.rms_norm(rows(5, 32), torch.ones(32))
        _norms.norm_forward_kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(args))
        try:
            nk.rms_norm(rows(5, 32), torch.ones(32))
        finally:
            _norms.norm_forward_kernel.pre_run_hooks.clear()
    assert len(seen) == 1


def test_forms_do_not_fill_memory(gpu, monkeypatch):
    monkeypatch.setattr(_launch, "MOST_FORMS", 2)
    calls = counted(monkeypatch)
    with torch.no_grad():
        for _ in range(2):
            for eps in (1e-5, 1e-6, 1e-7):
                nk.rms_norm(rows(5, 32), torch.ones(32), eps)
    assert len(calls) == 4
    assert len(gpu.calls) == 6


def test_attention_and_swiglu_start_as_triton_would_start_them(gpu, monkeypatch):
    qkv, gated = torch.zeros(20, 2, 3, 16), torch.zeros(20, 64)
    bounds = torch.tensor([0, 20], dtype=torch.int32)
    cos = torch.ones(20, 8)

    def run():
        with torch.no_grad():
            nk.qkv_attention(qkv, bounds, 20, cos=cos, sin=cos, interleaved=True)
            nk.qkv_attention(qkv, bounds, 20, window=4, scale=1)
            nk.swiglu(gated)
        return described(gpu)

    first, kept = run(), run()
    monkeypatch.setattr(_launch.Prepared, "_form", lambda self, args: None)
    assert first == kept == run()

"""Frozen models without a module's call: what reaches a GPU that is not there."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from direct_cases import CUDA, encoder, packed, states
from fake_gpu import fake_gpu
from torch import nn

import neobert_kernels as nk
from neobert_kernels import _check, _driver, _runtime
from neobert_kernels.ops.attention import launch as attention
from neobert_kernels.ops.fused_linear import launch as fused
from neobert_kernels.patching import launches as programs
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.direct import FEW_TOKENS
from neobert_kernels.patching.frozen import PREPARED
from neobert_kernels.patching.launches import Launches

pytestmark = pytest.mark.skipif(CUDA or _runtime.INTERPRET, reason="with a GPU that is not there")


@pytest.fixture
def gpu(monkeypatch):
    """Kernels compile, and launches are written down."""
    monkeypatch.setattr(_runtime, "use_kernel", lambda x: True)
    monkeypatch.setattr(_check, "readable", lambda x: False)
    fused._prepared.cache_clear()
    attention._prepared.cache_clear()
    with fake_gpu() as launches:
        yield launches


def of_layers(gpu, model, *lengths):
    """Who starts the layers' kernels, and these with the last norm.

    Of memory that is no weight's it counts which is the same.
    """
    run, found = Launches.run, []

    def listening(self, x, batch):
        before = len(gpu.calls)
        y = run(self, x, batch)
        found.extend(gpu.calls[before:])
        return y

    with mock.patch.object(Launches, "run", listening):
        states(model, **packed(*lengths))
    products = [p.weight for p in model.__dict__[PREPARED].products if not p.packed]
    weights = {weight.data_ptr() for weight in (*model.parameters(), *products)}
    buffers = {0: 0}

    def of(kind, number):
        own = kind.startswith("*") and number not in weights
        return (kind, buffers.setdefault(number, len(buffers)) if own else number)

    layers = [c for c in found[:-1] if c.name != "_rope_table_kernel"]
    ways = {c.by_driver for c in layers}
    return ways, [
        (c.binary, c.grid, c.block, *map(of, c.kinds, c.numbers)) for c in [*layers, found[-1]]
    ]


BATCHES = [(9, 4), (9, 4), (2, 1, 3), (20, 4), (9, 4), (1,)]
LONG = [(9, 4), (9, 4), (300, 4), (300, 4), (129, 1, 70), (9, 4), (1,)]


@pytest.mark.parametrize("tokens", ["few", "many"])
@pytest.mark.parametrize("family", ["neobert", "bert", "modernbert", "eurobert", "nomic_bert"])
def test_the_driver_starts_what_triton_would(gpu, family, tokens, ran, monkeypatch):
    """The same kernels in the same order, the same weights in the same places, for any batch."""
    longest = "max_length" if family == "neobert" else "max_position_embeddings"
    model = encoder(family, num_hidden_layers=4, **{longest: 512})
    monkeypatch.setenv(FEW_TOKENS, "1" if tokens == "few" else "0")
    nk.patch(model, inference=True)
    batches = BATCHES if tokens == "few" else LONG
    with monkeypatch.context() as patch:
        patch.setattr(_driver, "library", lambda: None)
        expected = [of_layers(gpu, model, *lengths) for lengths in batches]
    assert all(ways == {False} for ways, _ in expected)
    if tokens == "few":
        assert all(len(calls) == 4 * 5 + 1 for _, calls in expected)
    found = [of_layers(gpu, model, *lengths) for lengths in batches]
    assert [calls for _, calls in found] == [calls for _, calls in expected]
    # The first forward starts as Triton does.
    assert [ways for ways, _ in found] == [{False}] + [{True}] * (len(batches) - 1)
    assert len(ran if tokens == "few" else ran.many) == 2 * len(batches)


def test_attention_that_has_not_started_yet_starts_as_triton_does(gpu, ran):
    """As that of a batch with another form."""
    model = encoder()
    nk.patch(model, inference=True)
    before = [of_layers(gpu, model, 9, 4)[0] for _ in range(2)]
    attention._prepared.cache_clear()
    after = [of_layers(gpu, model, 9, 4)[0] for _ in range(2)]
    assert before == [{False}, {True}]
    assert after == [{False, True}, {True}]


@pytest.fixture
def proofs(monkeypatch):
    """Two sizes are looked at; ``same`` is what that says."""

    class Proofs:
        same, seen, capturing, sync = True, 0, False, 0

    def same_bits(x, y):
        Proofs.seen += 1
        return Proofs.same

    monkeypatch.setattr(programs, "PROOFS", 2)
    monkeypatch.setattr(programs, "_same_bits", same_bits)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Proofs.capturing)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: Proofs.sync)
    return Proofs


def ways(gpu, model, *lengths):
    """How many launches of the layers Triton and the driver start."""
    gpu.calls.clear()
    states(model, **packed(*lengths))
    calls = [c for c in gpu.calls if c.name in ("fused_linear_kernel", "attention_forward_kernel")]
    return tuple(sum(c.by_driver is way for c in calls) for way in (False, True))


def test_the_drivers_first_launches_are_compared_with_tritons(gpu, ran, proofs):
    model = encoder()  # two layers of five launches
    nk.patch(model, inference=True)
    batches = [(9, 4), (9, 4), (9, 4), (4, 9), (3,), (20,), (2, 18), (40,), (9, 4)]
    both, alone = (10, 10), (0, 10)
    expected = [(10, 0), both, alone, alone, alone, both, alone, alone, alone]
    assert [ways(gpu, model, *lengths) for lengths in batches] == expected
    assert proofs.seen == 2


@pytest.mark.parametrize("size", [1, 2])
def test_other_bits_than_tritons_leave_everything_to_triton(gpu, ran, proofs, size):
    model = encoder()
    nk.patch(model, inference=True)
    for lengths in [(9, 4), (9, 4)] if size == 2 else [(9, 4)]:
        states(model, **packed(*lengths))
    proofs.same = False
    with pytest.warns(RuntimeWarning, match=r"driver gave other bits than Triton's over 25 tok"):
        assert ways(gpu, model, 23, 2) == (10, 10)
    proofs.same = True
    assert [ways(gpu, model, *lengths) for lengths in [(3, 2), (9, 4), (7,)]] == [(10, 0)] * 3
    assert proofs.seen == size


def test_a_driver_that_refuses_at_first_leaves_everything_to_triton(gpu, ran, proofs, monkeypatch):
    model = encoder()
    nk.patch(model, inference=True)
    states(model, **packed(9, 4))
    refuses = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(lambda *_: 1)
    monkeypatch.setattr(_driver, "library", lambda: _driver.declared(refuses))
    with pytest.warns(RuntimeWarning, match="gave launch: expected success of cuLaunchKernelEx"):
        assert ways(gpu, model, 9, 4) == (10, 0)
    assert ways(gpu, model, 9, 4) == (10, 0)


def test_a_full_gpu_is_no_proof(gpu, ran, proofs, monkeypatch):
    """The forward raises what happened, and the next one is looked at."""
    model = encoder()
    nk.patch(model, inference=True)
    states(model, **packed(9, 4))

    def full(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(programs._Program, "run", full)
        with pytest.raises(torch.OutOfMemoryError):
            states(model, **packed(9, 4))
    assert [ways(gpu, model, 9, 4) for _ in range(2)] == [(10, 0), (10, 10)]


@pytest.mark.parametrize("forbidden", [{"capturing": True}, {"sync": 1}, {"sync": 2}])
def test_nothing_is_compared_where_nobody_may_wait(gpu, ran, proofs, forbidden):
    """While a graph is captured, or in a mode that tells or forbids waiting."""
    model = encoder()
    nk.patch(model, inference=True)
    states(model, **packed(9, 4))
    allowed = dict.fromkeys(forbidden, 0)
    for names, expected in ((forbidden, (10, 0)), (allowed, (10, 10)), (forbidden, (0, 10))):
        for name, value in names.items():
            setattr(proofs, name, value)
        assert ways(gpu, model, 9, 4) == expected


def test_what_an_earlier_forward_left_in_memory_proves_nothing(gpu, ran, proofs, monkeypatch):
    """What the driver does not write is NaN."""
    model = encoder()
    nk.patch(model, inference=True)
    states(model, **packed(9, 4))
    make, run, given = programs._Buffers.of, programs._Program.run, []

    def full(*args):
        to = make(*args)
        for buffer in to[1:]:
            buffer.zero_()
        return to

    def listening(self, to, attend):
        given.extend(buffer.clone() for buffer in to[1:])
        run(self, to, attend)

    monkeypatch.setattr(programs._Buffers, "of", staticmethod(full))
    monkeypatch.setattr(programs._Program, "run", listening)
    states(model, **packed(9, 4))
    assert given
    assert all(buffer.isnan().all() for buffer in given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_are_those_of_nan_too(dtype):
    x = torch.tensor([[1.0, torch.nan], [torch.inf, -0.0]], dtype=dtype)
    assert programs._same_bits(x, x.clone())
    assert not programs._same_bits(x, x.abs())


def test_each_thread_has_its_own_addresses(gpu, ran):
    model = encoder()
    nk.patch(model, inference=True)
    expected = [of_layers(gpu, model, 9, 4) for _ in range(2)]
    with ThreadPoolExecutor(1) as other:
        found = [other.submit(of_layers, gpu, model, 9, 4).result() for _ in range(2)]
    assert found == expected
    assert [ways for ways, _ in found] == [{False}, {True}]


def test_hooks_at_the_first_forward_leave_later_ones_to_the_driver(gpu, ran):
    model = encoder()
    nk.patch(model, inference=True)
    fused.fused_linear_kernel.add_pre_run_hook(lambda *args, **kwargs: None)
    try:
        assert of_layers(gpu, model, 9, 4)[0] == {False}
    finally:
        fused.fused_linear_kernel.pre_run_hooks.clear()
    assert [of_layers(gpu, model, 9, 4)[0] for _ in range(2)] == [{False}, {True}]


def test_one_row_whose_stride_is_another(gpu, ran, monkeypatch):
    """Launches that it made out serve more rows later."""
    monkeypatch.setenv(FEW_TOKENS, "0")
    model = encoder()
    nk.patch(model, inference=True)
    direct, own = model.__dict__[PREPARED].direct, torch.zeros(1, 64)[:, :48]
    assert own.is_contiguous()
    assert own.stride() == (64, 1)
    for x in (own, torch.zeros(9, 48)):
        batch = Batch(
            torch.tensor([0, len(x)], dtype=torch.int32), len(x), torch.arange(len(x)), None
        )
        with torch.no_grad():
            assert direct.run(x, batch) is not None
        norms = [c for c in gpu.calls if c.name == "norm_forward_kernel"]
        rows = [c.numbers[-3:-1] for c in norms]
        assert {number for each in rows for number in each} <= {0, 48}
        gpu.calls.clear()


def test_every_launch_goes_to_the_current_stream(gpu, ran):
    model = encoder()
    nk.patch(model, inference=True)
    for stream in (0, 5, 5, 6, 0):
        gpu.stream = stream
        gpu.calls.clear()
        of_layers(gpu, model, 9, 4)
        assert {c.stream for c in gpu.calls} == {stream}
    assert all(c.by_driver for c in gpu.calls if c.name == "fused_linear_kernel")


@pytest.mark.parametrize("number", [0, 1, 9])
def test_what_the_driver_refuses_is_an_error(gpu, number, ran, monkeypatch):
    """Also attention's launch, the second of a layer, and one of the next layer."""
    model = encoder()
    nk.patch(model, inference=True)
    expected = of_layers(gpu, model, 9, 4)
    left = [number]

    def refusing(*_):
        left[0] -= 1
        return 201 if left[0] == -1 else 0

    refuses = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(refusing)
    with monkeypatch.context() as patch:
        patch.setattr(_driver, "library", lambda: _driver.declared(refuses))
        rule = "^launch: expected success of cuLaunchKernelEx, got its error 201, "
        with pytest.raises(RuntimeError, match=rule):
            of_layers(gpu, model, 9, 4)
    assert left == [-1]
    assert of_layers(gpu, model, 9, 4)[1] == expected[1]


def test_a_profilers_hooks_see_every_launch(gpu, ran):
    from triton import knobs

    model = encoder()
    nk.patch(model, inference=True)
    for _ in range(2):
        states(model, **packed(9, 4))
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        hook.add(print)
        try:
            assert of_layers(gpu, model, 9, 4)[0] == {False}
        finally:
            hook.remove(print)
        assert of_layers(gpu, model, 9, 4)[0] == {True}
    fused.fused_linear_kernel.add_pre_run_hook(lambda *args, **kwargs: None)
    try:
        assert of_layers(gpu, model, 9, 4)[0] == {False}
    finally:
        fused.fused_linear_kernel.pre_run_hooks.clear()
    assert of_layers(gpu, model, 9, 4)[0] == {True}


def test_a_weight_that_is_not_aligned_is_looked_up_each_time(gpu, ran):
    model = encoder()
    norm = model.transformer_encoder[1].ffn_norm
    shifted = torch.cat([norm.weight.new_zeros(1), norm.weight])[1:].detach()
    norm.weight = nn.Parameter(shifted)
    assert norm.weight.data_ptr() % 16
    nk.patch(model, inference=True)
    for _ in range(2):
        states(model, **packed(9, 4))
    assert len(ran) == 2
    given = [c for c in gpu.calls if norm.weight.data_ptr() in c.numbers]
    assert len(given) == 2
    others = {c.binary for c in gpu.calls if norm.weight.data_ptr() not in c.numbers}
    assert given[0].binary == given[1].binary
    assert given[0].binary not in others  # Triton compiles for its alignment


def test_another_dtype_has_its_own_kernels(gpu, ran):
    """Its weights are the same objects."""
    model = encoder()
    nk.patch(model, inference=True)
    binaries = []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for _ in range(2):
            gpu.calls.clear()
            states(model, **packed(9, 4))
        products = [c for c in gpu.calls if c.name == "fused_linear_kernel"]
        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        assert {k for c in products for k in c.kinds if k.startswith("*")} == {f"*{name}"}
        binaries.append({call.binary for call in products})
    assert not binaries[0] & binaries[1]
    assert len(ran) == 4


def test_no_kernel_reads_embeddings_that_are_not_aligned(gpu, ran):
    """What launches was chosen for those of the first call."""
    model = encoder()
    nk.patch(model, inference=True)
    memory = torch.randn(7 * 48 + 1)
    for shift in (0, 0, 1):
        gpu.calls.clear()
        states(model, inputs_embeds=memory[shift : shift + 7 * 48].view(1, 7, 48))
        pairs = [pair for c in gpu.calls for pair in zip(c.kinds, c.numbers, strict=True)]
        addresses = [number for kind, number in pairs if kind == "*fp32"]
        assert addresses
        assert not any(address % 16 for address in addresses)
    assert len(ran) == 3

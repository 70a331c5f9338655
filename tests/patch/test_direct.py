"""Frozen models without a module's call, on few tokens and many: the patched model's numbers."""

import copy
import ctypes
import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from direct_cases import (
    CUDA,
    DEVICE,
    DTYPES,
    ROUNDING,
    both_orders,
    encoder,
    every_family,
    on_a_cpu,
    packed,
    real_states,
    runs_kernel,
    states,
)
from encoders import ENCODERS, padded, randomized, widened, with_labels
from fake_gpu import fake_gpu
from parity import LAYERS, assert_same
from stand_in import StandIn
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import neobert_kernels as nk
from neobert_kernels import _check, _driver, _runtime
from neobert_kernels.ops.attention import launch as attention
from neobert_kernels.ops.attention import tiles
from neobert_kernels.ops.fused_linear import launch as fused
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.direct import DIRECT, FEW_TOKENS, MOST_TOKENS
from neobert_kernels.patching.frozen import PREPARED
from neobert_kernels.patching.graphs import Graphs
from neobert_kernels.patching.launches import Launches

pytestmark = pytest.mark.usefixtures("few_programs")


@runs_kernel
@every_family
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_patched_model(family, dtype, ran):
    model = encoder(family, dtype, num_hidden_layers=LAYERS)
    with nk.patched(model):
        rounded = real_states(model, family)
    assert not ran
    exact = real_states(widened(model), family)
    nk.patch(model, inference=True)
    first = real_states(model, family)
    assert_same(first, rounded, exact)
    assert torch.equal(real_states(model, family), first)  # now by launches that were looked up
    assert ran == [32, 32]


@runs_kernel
@both_orders
def test_a_text_has_its_bits_in_any_batch_of_few_tokens(family, ran, ordered_products):
    model = encoder(family)
    nk.patch(model, inference=True)
    batch = packed(9, 1, 20, 3)
    alone = []
    for low, high in itertools.pairwise(batch["cu_seq_lens_q"].tolist()):
        own = {
            "input_ids": batch["input_ids"][:, low:high],
            "cu_seq_lens_q": torch.tensor([0, high - low], dtype=torch.int32, device=DEVICE),
        }
        alone.append(states(model, **batch | own))
    assert torch.equal(torch.cat(alone, 1), states(model, **batch))
    assert ran == [9, 1, 20, 3, 33]


@runs_kernel
def test_a_longest_document_that_is_longer_than_the_batch(ran):
    """As graphs name it: attention is told no more than there are tokens."""
    model, batch = encoder(max_length=5000), packed(9, 4)
    nk.patch(model, inference=True)
    assert torch.equal(states(model, **batch | {"max_length_q": 4096}), states(model, **batch))
    assert len(ran) == 2


@runs_kernel
def test_an_empty_document_and_no_tokens(ran):
    model = encoder()
    nk.patch(model, inference=True)
    batch = packed(5, 0, 4)
    expected = torch.cat([states(model, **packed(9))[:, :0], states(model, **batch)], 1)
    assert expected.shape == (1, 9, 48)
    bounds = torch.tensor([0, 5, 9], dtype=torch.int32, device=DEVICE)
    assert torch.equal(states(model, **batch | {"cu_seq_lens_q": bounds}), expected)
    assert len(ran) == 3
    none = torch.zeros(1, 0, dtype=torch.int64, device=DEVICE)
    assert states(model, input_ids=none).shape == (1, 0, 48)
    assert len(ran) == 3


def layer_by_layer(model, monkeypatch, compute):
    monkeypatch.setenv(DIRECT, "0")
    nk.patch(model, inference=True)
    found = compute(model)
    nk.unpatch(model)
    monkeypatch.delenv(DIRECT)
    return found


def assert_alike(found, expected):
    """Of the same kernels; PyTorch's products may have other bits in another place."""
    if CUDA:
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)


@runs_kernel
@every_family
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens_have_the_bits_of_the_layers(family, dtype, ran, monkeypatch):
    if _runtime.INTERPRET and dtype != torch.float32 and family not in ("neobert", "bert"):
        pytest.skip("either order of additions is enough in the interpreter")
    monkeypatch.setenv(FEW_TOKENS, "0")
    model = encoder(family, dtype, num_hidden_layers=LAYERS)
    expected = layer_by_layer(model, monkeypatch, lambda model: real_states(model, family))
    assert not ran.many
    nk.patch(model, inference=True)
    for _ in range(2):
        assert_alike(real_states(model, family), expected)
    assert ran.many == [32, 32]
    assert not ran


@runs_kernel
@pytest.mark.parametrize("family", ["neobert", "eurobert"])
def test_many_tokens_that_turn_before_attention(family, ran, monkeypatch):
    """As long documents do."""
    choose = tiles.choose

    def before(*args, **options):
        return dataclasses.replace(choose(*args, **options), turn_inside=False)

    monkeypatch.setattr(tiles, "choose", before)
    monkeypatch.setenv(FEW_TOKENS, "0")
    model = encoder(family)
    expected = layer_by_layer(model, monkeypatch, lambda model: real_states(model, family))
    nk.patch(model, inference=True)
    assert_alike(real_states(model, family), expected)
    assert len(ran.many) == 1


@runs_kernel
def test_one_token_more_than_few(ran, monkeypatch):
    """The first document is the same."""
    model = encoder(max_length=100)
    nk.patch(model, inference=True)
    few, many = packed(MOST_TOKENS), packed(MOST_TOKENS, 1)
    few["input_ids"] = many["input_ids"][:, :MOST_TOKENS]
    alone, both = states(model, **few), states(model, **many)
    assert (ran, ran.many) == ([MOST_TOKENS], [MOST_TOKENS + 1])
    torch.testing.assert_close(alone, both[:, :MOST_TOKENS], **ROUNDING)


@runs_kernel
def test_the_extension_runs_layer_by_layer(ran, monkeypatch):
    """Whoever chose it for an operator gets it there."""
    monkeypatch.setattr(_runtime, "extension_may_run", lambda x: True)
    monkeypatch.setenv(FEW_TOKENS, "0")
    model = encoder()
    nk.patch(model, inference=True)
    states(model, **packed(9, 4))
    assert not ran.many


@runs_kernel
@pytest.mark.parametrize("kind", ["mlm", "labelled mlm", "sequence"])
@both_orders
def test_heads_equal_the_patched_ones(family, kind, ran):
    torch.manual_seed(0)
    labelled, kind = kind.startswith("labelled"), kind.removeprefix("labelled ")
    rows = {"labelled_rows_only": True, "mlm_logits": False} if labelled else {}
    model = randomized(ENCODERS[family].head(kind)).to(DEVICE).eval()
    ids, mask = padded(family)
    inputs = {k: v.to(DEVICE) for k, v in with_labels(kind, ids, mask).items()}
    if kind == "sequence":
        inputs["labels"] %= 2

    @torch.no_grad()
    def outputs():
        return [x for x in model(**inputs).values() if isinstance(x, torch.Tensor)]

    with nk.patched(model, **rows):
        expected = outputs()
    nk.patch(model, inference=True, **rows)
    for ours, like in zip(outputs(), expected, strict=True):
        torch.testing.assert_close(ours, like, **ROUNDING)
    assert len(ran) == 1


@runs_kernel
def test_embeddings_of_any_layout(ran):
    model = encoder()
    nk.patch(model, inference=True)
    embeds = torch.randn(2, 7, 96, device=DEVICE)
    expected = states(model, inputs_embeds=embeds[..., ::2].contiguous())
    assert torch.equal(states(model, inputs_embeds=embeds[..., ::2]), expected)
    shifted = torch.cat([embeds.flatten()[:1], embeds[..., ::2].flatten()])[1:].view(2, 7, 48)
    assert shifted.data_ptr() % 16
    before = shifted.clone()
    assert torch.equal(states(model, inputs_embeds=shifted), expected)
    assert torch.equal(shifted, before)
    assert len(ran) == 3


def of_a_peer(model, monkeypatch):
    monkeypatch.setenv("NEOBERT_ATTENTION", "sdpa_math")
    return {}


def transposed(model, monkeypatch):
    wo = model.transformer_encoder[1].wo
    wo.weight = nn.Parameter(wo.weight.detach().t().contiguous().t())
    return {}


OTHERS = {
    "a peer's attention": of_a_peer,
    "a weight by columns": transposed,
    "batch-invariant": lambda model, monkeypatch: {"batch_invariant": True},
}


@runs_kernel
@pytest.mark.parametrize("why", OTHERS)
def test_what_it_cannot_do_runs_layer_by_layer(why, ran, monkeypatch):
    model = encoder()
    nk.patch(model, inference=True)
    expected = real_states(model, "neobert")
    nk.unpatch(model)
    nk.patch(model, inference=True, **OTHERS[why](model, monkeypatch))
    torch.testing.assert_close(real_states(model, "neobert"), expected, **ROUNDING)
    assert len(ran) == 1


@runs_kernel
def test_rows_too_wide_for_fused_products_run_as_many_do(ran, monkeypatch):
    monkeypatch.setattr(fused, "MOST_CHANNELS", {2: 40, 4: 40})
    model = encoder()
    expected = layer_by_layer(model, monkeypatch, lambda model: states(model, **packed(9, 4)))
    nk.patch(model, inference=True)
    assert_alike(states(model, **packed(9, 4)), expected)
    assert (ran, ran.many) == ([], [13])


@runs_kernel
@pytest.mark.parametrize("width", [20, 36])
def test_many_tokens_of_a_width_that_is_not_aligned_run_layer_by_layer(width, ran, monkeypatch):
    """In float32 four channels are 16 bytes; in bfloat16 eight."""
    monkeypatch.setenv(FEW_TOKENS, "0")
    model = encoder("eurobert", torch.bfloat16, intermediate_size=width)
    nk.patch(model, inference=True)
    real_states(model, "eurobert")
    assert not ran.many
    nk.unpatch(model)
    model = encoder("eurobert", intermediate_size=width)
    nk.patch(model, inference=True)
    real_states(model, "eurobert")
    assert len(ran.many) == 1


@runs_kernel
@pytest.mark.parametrize("some", [False, True])
def test_heads_that_read_some_rows_of_many_run_layer_by_layer(some, ran, monkeypatch):
    """Whose last layer computes only these."""
    monkeypatch.setenv(FEW_TOKENS, "0")
    model = randomized(ENCODERS["bert"].head("mlm")).to(DEVICE).eval()
    inputs = {k: v.to(DEVICE) for k, v in with_labels("mlm", *padded("bert")).items()}
    rows = {"labelled_rows_only": True, "mlm_logits": False} if some else {}
    with nk.patched(model, **rows), torch.no_grad():
        expected = model(**inputs).loss
    nk.patch(model, inference=True, **rows)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, expected, **ROUNDING)
    assert len(ran.many) == (0 if some else 1)


@runs_kernel
def test_a_mode_sees_every_product(ran):
    model = encoder()
    nk.patch(model, inference=True)
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watching():
        states(model, **packed(9, 4))
    assert not ran
    assert seen.count("neobert::qkv_attention") == 2
    states(model, **packed(9, 4))
    assert len(ran) == 1


@runs_kernel
@pytest.mark.parametrize("switch", ["0", "1"])
def test_gradients_of_embeddings_come_from_the_layers(switch, ran, monkeypatch):
    """Where a hook asks for them, of a model that is itself frozen."""
    monkeypatch.setenv(FEW_TOKENS, switch)
    model = encoder().requires_grad_(False)
    nk.patch(model, inference=True)
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    assert model(**packed(9, 4)).last_hidden_state.requires_grad
    handle.remove()
    assert not ran + ran.many
    states(model, **packed(9, 4))
    assert ran + ran.many
    with forward_ad.dual_level():
        states(model, **packed(9, 4))
    assert len(ran) + len(ran.many) == 1


@runs_kernel
@pytest.mark.parametrize("name", ["positions", "cu_seqlens"])
def test_what_is_elsewhere_is_left_to_the_layers(name, ran):
    """Whose operators say so; a kernel would read another device's address."""
    model = encoder()
    nk.patch(model, inference=True)
    direct, x = model.__dict__[PREPARED].direct, torch.zeros(9, 48, device=DEVICE)
    bounds = torch.tensor([0, 9], dtype=torch.int32, device=DEVICE)
    batch = Batch(bounds, 9, torch.arange(9, device=DEVICE), None)
    elsewhere = dataclasses.replace(batch, **{name: getattr(batch, name).to("meta")})
    with torch.no_grad():
        assert direct.run(x, elsewhere) is None
        assert direct.run(x, batch) is not None


@runs_kernel
def test_a_class_that_computes_something_else_is_called(ran, monkeypatch):
    """As a library does that replaces every Linear layer's forward."""
    model = encoder()
    nk.patch(model, inference=True)
    before = states(model, **packed(9, 4))
    linear = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * linear(self, x))
    after = states(model, **packed(9, 4))
    assert not torch.allclose(before, after)
    assert len(ran) == 1


@runs_kernel
def test_hidden_states_are_those_of_the_layers(ran):
    model = encoder()
    nk.patch(model, inference=True)
    with torch.no_grad():
        found = model(**packed(9, 4), output_hidden_states=True)
    assert len(found.hidden_states) == 3
    assert not ran
    last = states(model, **packed(9, 4))
    torch.testing.assert_close(found.hidden_states[-1], last, **ROUNDING)
    assert len(ran) == 1


@runs_kernel
@both_orders
def test_copies_have_their_own(family, ran):
    model = encoder(family)
    nk.patch(model, inference=True)
    expected = real_states(model, family)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(real_states(twin, family), expected)
    assert twin.__dict__[PREPARED].direct is not model.__dict__[PREPARED].direct
    assert len(ran) == 2


@runs_kernel
def test_the_environment_of_patch_switches_it_off(ran, monkeypatch):
    model = encoder()
    monkeypatch.setenv(DIRECT, "0")
    nk.patch(model, inference=True)
    expected = real_states(model, "neobert")
    nk.unpatch(model)
    assert not ran
    monkeypatch.setenv(DIRECT, "1")
    nk.patch(model, inference=True)
    torch.testing.assert_close(real_states(model, "neobert"), expected, **ROUNDING)
    assert len(ran) == 1


@pytest.mark.parametrize("switch", [DIRECT, FEW_TOKENS])
def test_another_value_of_a_switch_is_refused_before_anything_changes(switch, monkeypatch):
    model = encoder()
    monkeypatch.setenv(switch, "off")
    with pytest.raises(ValueError, match=rf"^{switch}: expected 0 or 1, got 'off'$"):
        nk.patch(model, inference=True)
    assert not nk.patching.is_patched(model)


@runs_kernel
@both_orders
def test_a_graph_has_the_bits_of_the_batch_alone(family, ran, monkeypatch, ordered_products):
    """Rows do not know each other, so neither do those that fill its bucket."""
    if not CUDA:
        monkeypatch.setattr(Graphs.__init__, "__defaults__", (StandIn, 4))
    model = encoder(family)
    nk.patch(model, inference=True)
    batches = [packed(9), packed(3, 1, 13)]
    expected = [states(model, **batch) for batch in batches]
    nk.unpatch(model)
    nk.patch(model, inference=True, cuda_graphs=True)
    for batch, like in zip(batches, expected, strict=True):
        assert torch.equal(states(model, **batch), like)
    assert 24 in ran  # the bucket of 17 tokens


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


@on_a_cpu
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


@on_a_cpu
def test_attention_that_has_not_started_yet_starts_as_triton_does(gpu, ran):
    """As that of a batch with another form."""
    model = encoder()
    nk.patch(model, inference=True)
    before = [of_layers(gpu, model, 9, 4)[0] for _ in range(2)]
    attention._prepared.cache_clear()
    after = [of_layers(gpu, model, 9, 4)[0] for _ in range(2)]
    assert before == [{False}, {True}]
    assert after == [{False, True}, {True}]


@on_a_cpu
def test_each_thread_has_its_own_addresses(gpu, ran):
    model = encoder()
    nk.patch(model, inference=True)
    expected = [of_layers(gpu, model, 9, 4) for _ in range(2)]
    with ThreadPoolExecutor(1) as other:
        found = [other.submit(of_layers, gpu, model, 9, 4).result() for _ in range(2)]
    assert found == expected
    assert [ways for ways, _ in found] == [{False}, {True}]


@on_a_cpu
def test_hooks_at_the_first_forward_leave_later_ones_to_the_driver(gpu, ran):
    model = encoder()
    nk.patch(model, inference=True)
    fused.fused_linear_kernel.add_pre_run_hook(lambda *args, **kwargs: None)
    try:
        assert of_layers(gpu, model, 9, 4)[0] == {False}
    finally:
        fused.fused_linear_kernel.pre_run_hooks.clear()
    assert [of_layers(gpu, model, 9, 4)[0] for _ in range(2)] == [{False}, {True}]


@on_a_cpu
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


@on_a_cpu
def test_every_launch_goes_to_the_current_stream(gpu, ran):
    model = encoder()
    nk.patch(model, inference=True)
    for stream in (0, 5, 5, 6, 0):
        gpu.stream = stream
        gpu.calls.clear()
        of_layers(gpu, model, 9, 4)
        assert {c.stream for c in gpu.calls} == {stream}
    assert all(c.by_driver for c in gpu.calls if c.name == "fused_linear_kernel")


@on_a_cpu
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


@on_a_cpu
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


@on_a_cpu
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


@on_a_cpu
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


@on_a_cpu
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

"""Frozen models on few tokens: the numbers of the patched model, in five launches a layer."""

import copy
import functools
import itertools

import pytest
import torch
from encoders import ENCODERS, VOCABULARY, padded, randomized, widened, with_labels
from fake_gpu import fake_gpu
from parity import LAYERS, assert_same
from torch import nn
from torch.nn.utils import parametrize

import neobert_kernels as nk
from neobert_kernels import _check, _runtime
from neobert_kernels.ops import fused_linear
from neobert_kernels.ops.attention import launch
from neobert_kernels.patching.few_tokens import MOST_TOKENS, SWITCH, FewTokens
from neobert_kernels.patching.frozen import PREPARED
from neobert_kernels.patching.graphs import Graphs

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.bfloat16, *((torch.float16,) if CUDA else ()))
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}  # of float32 values up to about 10, through three layers
runs_kernel = pytest.mark.skipif(
    not CUDA and not _runtime.INTERPRET, reason="no kernel runs on the CPU"
)
on_a_cpu = pytest.mark.skipif(CUDA or _runtime.INTERPRET, reason="with a GPU that is not there")
# RoBERTa's layers are BERT's.
every_family = pytest.mark.parametrize(
    "family", [name for name in ENCODERS if CUDA or "roberta" not in name]
)
# NeoBERT adds before its norms and BERT behind them: in the interpreter these stand for all.
both_orders = pytest.mark.parametrize("family", ["neobert", "bert"])


def encoder(family="neobert", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = ENCODERS[family].base(**{"num_hidden_layers": 2} | changes)
    return randomized(model).to(DEVICE, dtype).eval()


def packed(*lengths):
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (1, sum(lengths)), generator=generator)
    inputs = {"input_ids": ids, "cu_seq_lens_q": bounds}
    return {k: v.to(DEVICE) for k, v in inputs.items()} | {"max_length_q": max(lengths)}


@torch.no_grad()
def states(model, **inputs):
    return model(**inputs).last_hidden_state


def real_states(model, family):
    torch.manual_seed(1)
    ids, mask = (x.to(DEVICE) for x in padded(family))
    return states(model, input_ids=ids, attention_mask=mask)[mask == 1]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes its time for each."""
    if _runtime.INTERPRET:
        wide = fused_linear.Choice(128, 2, 32, 1)
        monkeypatch.setattr(fused_linear, "choice", lambda itemsize, held: wide)


@pytest.fixture
def ran(monkeypatch):
    """Numbers of tokens that ran by `FewTokens`."""
    found, run = [], FewTokens.run

    def counting(self, x, batch):
        y = run(self, x, batch)
        if y is not None:
            found.append(len(x))
        return y

    monkeypatch.setattr(FewTokens, "run", counting)
    return found


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


@runs_kernel
def test_more_tokens_run_layer_by_layer(ran):
    model = encoder(max_length=100)
    nk.patch(model, inference=True)
    few, many = packed(MOST_TOKENS), packed(MOST_TOKENS + 1)
    few["input_ids"] = many["input_ids"][:, :MOST_TOKENS]
    alone = states(model, **few)
    assert ran == [MOST_TOKENS]
    with nk.patched(encoder(max_length=100)):
        many["cu_seq_lens_q"] = torch.tensor([0, 64, 65], dtype=torch.int32, device=DEVICE)
        many["max_length_q"] = 64
        both = states(model, **many)
    assert ran == [MOST_TOKENS]
    torch.testing.assert_close(alone, both[:, :MOST_TOKENS], **ROUNDING)


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


PARTS = {
    "layer": lambda model: model.transformer_encoder[1],
    "Linear layer": lambda model: model.transformer_encoder[1].wo,
    "feed-forward": lambda model: model.transformer_encoder[1].ffn,
}


@runs_kernel
@pytest.mark.parametrize("part", PARTS)
def test_a_hook_sees_its_module_called(part, ran):
    model, seen = encoder(), []
    nk.patch(model, inference=True)
    expected = real_states(model, "neobert")
    handle = PARTS[part](model).register_forward_hook(lambda *call: seen.append(call))
    if part == "feed-forward":  # no patched layer calls it
        handle.remove()
        handle = nn.modules.module.register_module_forward_hook(lambda *call: seen.append(call))
    try:
        hooked = real_states(model, "neobert")
    finally:
        handle.remove()
    assert seen
    torch.testing.assert_close(hooked, expected, **ROUNDING)
    assert len(ran) == 1
    assert torch.equal(real_states(model, "neobert"), expected)
    assert len(ran) == 2


@runs_kernel
def test_a_forward_that_somebody_replaced_is_called(ran):
    model, calls = encoder(), []
    nk.patch(model, inference=True)
    real_states(model, "neobert")
    wo = model.transformer_encoder[0].wo
    wo.forward = lambda x: calls.append(1) or nn.Linear.forward(wo, x)
    real_states(model, "neobert")
    assert (len(calls), len(ran)) == (1, 1)


@runs_kernel
def test_a_part_in_training_mode_does_what_it_does_there(ran):
    model = encoder("bert", hidden_dropout_prob=0.5)
    nk.patch(model, inference=True)
    calm = real_states(model, "bert")
    model.encoder.layer[1].output.train()
    assert not torch.allclose(real_states(model, "bert"), calm)
    assert len(ran) == 1


class LoRA(nn.Module):
    """More than a product: as adapters are, it has another class."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + 1


CHANGES = {
    "in place": lambda ffn: ffn.w3.weight.mul_(2),
    "data": lambda ffn: setattr(ffn.w3.weight, "data", ffn.w3.weight * 2),
    "parameter": lambda ffn: setattr(ffn.w3, "weight", nn.Parameter(ffn.w3.weight * 2)),
    "module": lambda ffn: setattr(ffn, "w3", copy.deepcopy(ffn.w3).requires_grad_(False)),
    "another class": lambda ffn: setattr(ffn, "w3", LoRA(ffn.w3)),
}


@runs_kernel
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_those_that_count(change, ran):
    model = encoder()
    nk.patch(model, inference=True)
    real_states(model, "neobert")
    with torch.no_grad():
        CHANGES[change](model.transformer_encoder[1].ffn)
        if change == "module":
            model.transformer_encoder[1].ffn.w3.weight.mul_(2)
    found = real_states(model, "neobert")
    assert len(ran) == (1 if change == "another class" else 2)
    nk.unpatch(model)
    with nk.patched(model):
        torch.testing.assert_close(found, real_states(model, "neobert"), **ROUNDING)


def halve_theta(model):
    rope = getattr(model.config, "rope_parameters", None)
    if rope is None:
        model.config.rope_theta /= 2
    elif "rope_theta" in rope:
        rope["rope_theta"] /= 2
    else:
        rope["sliding_attention"]["rope_theta"] /= 2


def norm_of_another_weight(model):
    norm = nn.LayerNorm(48, device=DEVICE)
    norm.weight.detach().fill_(2)
    model.final_norm = norm


def scale_scores(model):
    for layer in model.encoder.layer:
        layer.attention.self.scaling = 0.1


SETTINGS = {
    "eps": ("neobert", lambda m: setattr(m.layer_norm, "eps", 1.0)),
    "eps of a layer": ("bert", lambda m: setattr(m.encoder.layer[0].output.LayerNorm, "eps", 1.0)),
    "theta": ("neobert", halve_theta),
    "theta of windows": ("modernbert", halve_theta),
    "theta of others": ("eurobert", halve_theta),
    "window": ("modernbert", lambda m: setattr(m.layers[1].attn, "sliding_window", 2)),
    "scale": ("bert", scale_scores),
    "last norm": ("modernbert", norm_of_another_weight),
    "fewer layers": ("bert", lambda m: setattr(m.encoder, "layer", m.encoder.layer[:1])),
    "fewer by config": ("nomic_bert", lambda m: setattr(m.config, "num_hidden_layers", 1)),
}


@runs_kernel
@pytest.mark.parametrize("what", SETTINGS)
def test_what_else_changes_is_seen(what, ran, monkeypatch):
    """As the layers' own forwards see it, which read it at every call."""
    family, change = SETTINGS[what]
    model, by_layer = encoder(family), encoder(family)
    nk.patch(model, inference=True)
    monkeypatch.setenv(SWITCH, "0")
    nk.patch(by_layer, inference=True)
    before = real_states(model, family)
    for each in (model, by_layer):
        change(each)
    found = real_states(model, family)
    assert not torch.allclose(found, before, **ROUNDING)
    torch.testing.assert_close(found, real_states(by_layer, family), **ROUNDING)


@runs_kernel
def test_a_weight_that_is_computed_is_computed_at_every_call(ran):
    model = encoder()
    norm = model.transformer_encoder[1].ffn_norm
    nk.patch(model, inference=True)
    real_states(model, "neobert")

    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    parametrize.register_parametrization(norm, "weight", Twice())
    with torch.no_grad():
        for _ in range(2):
            norm.parametrizations.weight.original.add_(1)
            found = real_states(model, "neobert")
    assert len(ran) == 1
    twin = encoder()
    with torch.no_grad():
        weight = twin.transformer_encoder[1].ffn_norm.weight
        weight.add_(2).mul_(2)
    nk.patch(twin, inference=True)
    torch.testing.assert_close(found, real_states(twin, "neobert"), **ROUNDING)


class Thrice(nn.Module):
    def forward(self, x):
        return x * 3


class LinearAndMore(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3


def of_another_width(model, before):
    if before:
        layer = model.encoder.layer[1]
        layer.intermediate.dense = nn.Linear(48, 40, device=DEVICE)
        layer.output.dense = nn.Linear(40, 48, device=DEVICE)


def pruned_by_views(model, before):
    if not before:
        for layer in model.transformer_encoder:
            layer.ffn.w12.weight.data = layer.ffn.w12.weight.data[:16]
            layer.ffn.w3.weight.data = layer.ffn.w3.weight.data[:, :8]


def transposed_in_place(model, before):
    if not before:
        weight = model.encoder.layer[1].attention.output.dense.weight
        weight.data = weight.data.t()


def steered(model, before):
    if not before:
        model.encoder.layer[0].output.dropout = Thrice()


def steered_before(model, before):
    if before:
        model.encoder.layer[0].output.dropout = Thrice()


def of_another_class(model, before):
    if not before:
        model.encoder.layer[1].attention.output.dense.__class__ = LinearAndMore


def wrapped(model, before):
    if not before:
        layer = model.encoder.layer[0]
        forward = layer.forward
        layer.forward = functools.wraps(forward)(lambda *args: forward(*args) * 3)


def wrapped_then_changed(model, before):
    if not before:
        wrapped(model, before)
        real_states(model, "bert")
        weight = model.encoder.layer[1].attention.output.dense.weight
        weight.data = weight.data.clone()


DIFFERENT = (
    of_another_width, pruned_by_views, transposed_in_place, steered, steered_before,
    of_another_class, wrapped, wrapped_then_changed,
)  # fmt: skip


@runs_kernel
@pytest.mark.parametrize("change", DIFFERENT)
def test_layers_that_differ_are_what_their_own_forwards_make_them(change, ran, monkeypatch):
    """Called as they are, or read again: never with old sizes, old bits or without a part."""
    found = []
    family = "neobert" if change is pruned_by_views else "bert"
    for switch in ("1", "0"):
        monkeypatch.setenv(SWITCH, switch)
        model = encoder(family)
        with torch.no_grad():
            torch.manual_seed(2)
            change(model.eval(), before=True)
            nk.patch(model.eval(), inference=True)
            real_states(model, family)
            change(model, before=False)
            model.eval()
            found.append(real_states(model, family))
    torch.testing.assert_close(*found, **ROUNDING)


@runs_kernel
def test_a_hook_that_is_gone_leaves_one_order_of_pairs(ran):
    """While it was there its layer kept its own rows of q and k; the others were put in order."""
    model = encoder("modernbert")
    handle = model.layers[1].attn.Wqkv.register_forward_hook(lambda *call: None)
    nk.patch(model, inference=True)
    handle.remove()
    found = real_states(model, "modernbert")
    assert not ran
    twin = encoder("modernbert")
    nk.patch(twin, inference=True)
    torch.testing.assert_close(found, real_states(twin, "modernbert"), **ROUNDING)
    assert len(ran) == 1


def wide(model, monkeypatch):
    monkeypatch.setattr(fused_linear, "MOST_CHANNELS", {2: 40, 4: 40})
    return {}


def of_a_peer(model, monkeypatch):
    monkeypatch.setenv("NEOBERT_ATTENTION", "sdpa_math")
    return {}


def transposed(model, monkeypatch):
    wo = model.transformer_encoder[1].wo
    wo.weight = nn.Parameter(wo.weight.detach().t().contiguous().t())
    return {}


OTHERS = {
    "rows too wide for the kernel": wide,
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
    assert twin.__dict__[PREPARED].few_tokens is not model.__dict__[PREPARED].few_tokens
    assert len(ran) == 2


@runs_kernel
def test_the_environment_of_patch_switches_it_off(ran, monkeypatch):
    model = encoder()
    monkeypatch.setenv(SWITCH, "0")
    nk.patch(model, inference=True)
    expected = real_states(model, "neobert")
    nk.unpatch(model)
    assert not ran
    monkeypatch.setenv(SWITCH, "1")
    nk.patch(model, inference=True)
    torch.testing.assert_close(real_states(model, "neobert"), expected, **ROUNDING)
    assert len(ran) == 1


def test_another_value_of_the_switch_is_refused_before_anything_changes(monkeypatch):
    model = encoder()
    monkeypatch.setenv(SWITCH, "off")
    with pytest.raises(ValueError, match=r"^NEOBERT_FEW_TOKENS: expected 0 or 1, got 'off'$"):
        nk.patch(model, inference=True)
    assert not nk.patching.is_patched(model)


class StandIn:
    """Repeats the function on the recorded tensors, into the recorded results."""

    def __init__(self, function, pool):
        self.function, self.outputs = function, function()

    def replay(self):
        for own, new in zip(self.outputs, self.function(), strict=True):
            if own is not None:
                own.copy_(new)


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
    fused_linear._prepared.cache_clear()
    launch._prepared.cache_clear()
    with fake_gpu() as launches:
        yield launches


@on_a_cpu
@pytest.mark.parametrize("family", ["neobert", "bert", "modernbert"])
def test_later_forwards_launch_what_the_first_did(gpu, family, ran):
    """The same kernels in the same order, and the same weights in the same places."""
    model = encoder(family, num_hidden_layers=4)
    nk.patch(model, inference=True)
    products = [p.weight for p in model.__dict__[PREPARED].products if not p.packed]
    weights = {weight.data_ptr() for weight in (*model.parameters(), *products)}

    def of(argument):
        if not isinstance(argument, torch.Tensor):
            return argument
        address = argument.data_ptr()
        return address if address in weights else (argument.dtype, argument.shape)

    forwards = []
    for _ in range(3):
        states(model, **packed(9, 4))
        forwards.append([(c.binary, c.grid, *map(of, c.arguments)) for c in gpu.calls])
        gpu.calls.clear()
    assert forwards[0] == forwards[1] == forwards[2]
    assert len(ran) == 3
    layers = len(forwards[0]) - len(_outside(gpu, model, family))
    assert layers == 4 * 5


def _outside(gpu, model, family):
    """Launches of a forward whose layers launch nothing."""
    few = model.__dict__[PREPARED].few_tokens
    plan = few.plan

    def idle(x, *_):
        return x, x

    idle.kind = plan.steps[0].kind
    few.plan = plan._replace(steps=[idle])
    states(model, **packed(9, 4))
    few.plan = plan
    found = list(gpu.calls)
    gpu.calls.clear()
    return found


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
    given = [c for c in gpu.calls if any(_is(a, norm.weight) for a in c.arguments)]
    assert len(given) == 2
    others = {c.binary for c in gpu.calls if not any(_is(a, norm.weight) for a in c.arguments)}
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
        tensors = [a for c in gpu.calls for a in c.arguments if isinstance(a, torch.Tensor)]
        assert {x.dtype for x in tensors if x.shape[-1:] == (48,)} == {dtype}
        binaries.append(
            {call.binary for call in gpu.calls if any(_wide(a) for a in call.arguments)}
        )
    assert not binaries[0] & binaries[1]
    assert len(ran) == 4


def _wide(argument):
    return isinstance(argument, torch.Tensor) and argument.shape[-1:] == (48,)


@on_a_cpu
def test_no_kernel_reads_embeddings_that_are_not_aligned(gpu, ran):
    """What launches was chosen for those of the first call."""
    model = encoder()
    nk.patch(model, inference=True)
    memory = torch.randn(7 * 48 + 1)
    for shift in (0, 1):
        gpu.calls.clear()
        states(model, inputs_embeds=memory[shift : shift + 7 * 48].view(1, 7, 48))
        addresses = [a.data_ptr() for c in gpu.calls for a in c.arguments if _wide(a)]
        assert addresses
        assert not any(address % 16 for address in addresses)
    assert len(ran) == 2


def _is(argument, tensor):
    return isinstance(argument, torch.Tensor) and argument.data_ptr() == tensor.data_ptr()

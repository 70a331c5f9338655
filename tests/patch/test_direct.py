"""Frozen models without a module's call, on few tokens and many: the patched model's numbers."""

import copy
import dataclasses
import itertools

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
    packed,
    real_states,
    runs_kernel,
    states,
)
from encoders import ENCODERS, padded, randomized, widened, with_labels
from parity import LAYERS, assert_same
from stand_in import StandIn
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels.ops.attention import tiles
from neobert_kernels.ops.fused_linear import launch as fused
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.direct import DIRECT, FEW_TOKENS, MOST_TOKENS
from neobert_kernels.patching.frozen import PREPARED
from neobert_kernels.patching.graphs import Graphs

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

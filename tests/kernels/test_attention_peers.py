"""Peers of attention: the same meaning, nobody else's documents, and never a switch unasked."""

import contextlib
import dataclasses
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from attention_cases import DEVICE, bounds, dense, make, on_the_cpu, table, ulps
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_within_budget, outputs_and_gradients

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels.ops.attention import peers


@pytest.fixture(autouse=True)
def _other_bits_for_cudnn(request):
    """Its attention is not there for who asks PyTorch for the same bits on every run."""
    if "sdpa_cudnn" in request.node.name:
        torch.use_deterministic_algorithms(False)


pytestmark = pytest.mark.skipif(_runtime.INTERPRET, reason="no kernel is involved but rope's")
GPU = DEVICE.type == "cuda"
# Whatever runs on this device: SDPA anywhere, the others where there is a GPU and a package.
HERE = [name for name in peers.PEERS if not peers.missing(name, DEVICE)]
# What a peer of a GPU may refuse; any other error is one of ours.
REFUSED = "implementation: expected"
every_peer = pytest.mark.parametrize("name", HERE)
DTYPE = torch.bfloat16 if GPU else torch.float32
RAGGED, EVEN = (5, 1, 0, 33, 18, 0, 40, 2), (0, 12, 12, 12)
VARIANTS = {
    "plain": {},
    "half-split": {"rope": True},
    "interleaved": {"rope": True, "interleaved": True},
    "grouped": {"heads": 4, "groups": 2, "rope": True},
    "window": {"window": 3, "rope": True},
    "one neighbour": {"window": 0},
    "wide window": {"window": 21},
    "scale": {"scale": 0.3},
}


@contextlib.contextmanager
def unless_refused():
    """Skips where a GPU's peer says that it does not take the input."""
    try:
        yield
    except ValueError as error:
        if GPU and str(error).startswith(REFUSED):
            pytest.skip(str(error))
        raise


def compare(name, lengths, dtype=DTYPE, heads=2, groups=None, rope=False, **options):
    qkv, cu_seqlens, longest = make(lengths, dtype, heads, groups)
    if rope:
        options["cos"], options["sin"] = table(lengths)

    def op(*qkv):
        return nk.attention(*qkv, cu_seqlens, longest + 3, implementation=name, **options)

    on_cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}

    def meaning(*qkv):
        return dense(*qkv, lengths, **on_cpu)

    grad = [torch.randn_like(qkv[0])]
    with unless_refused():
        actual = [x.cpu() for x in outputs_and_gradients(op, qkv, grad)]
    exact, rounded = (on_the_cpu(meaning, qkv, grad, wide) for wide in (torch.double, dtype))
    # Together: a single gradient of a tiny batch may be exact, or all rounding, by luck.
    parts = (torch.cat([x.flatten() for x in values]) for values in (actual, rounded, exact))
    assert_within_budget(*parts, ulps=ulps(*qkv, *grad, options.get("scale")))


@pytest.mark.parametrize("lengths", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("variant", VARIANTS)
@every_peer
def test_matches_the_dense_mask_with_every_gradient(name, variant, lengths):
    compare(name, lengths, **VARIANTS[variant])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_peer
def test_half_precision(name, dtype):
    compare(name, RAGGED, dtype, rope=True)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.lists(st.integers(0, 20), max_size=7), st.sampled_from([None, 1, 5]))
def test_any_ragged_batch(lengths, window):
    for name in ("sdpa_math",) if GPU else HERE:
        compare(name, [*lengths, 3], torch.float32, heads=1, window=window)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("lengths", [RAGGED, EVEN], ids=["ragged", "even"])
@every_peer
def test_a_document_sees_no_other(name, lengths, window):
    """Not even its NaNs: no other document's output or gradient changes."""
    qkv, cu_seqlens, longest = make(lengths, DTYPE)
    third = slice(int(cu_seqlens[3]), int(cu_seqlens[4]))
    grad = [torch.randn_like(qkv[0])]

    def op(*qkv):
        return nk.attention(*qkv, cu_seqlens, longest, window=window, implementation=name)

    with unless_refused():
        before = outputs_and_gradients(op, qkv, grad)
    for x in qkv:
        x[third] = torch.nan
    after = outputs_and_gradients(op, qkv, grad)
    keep = torch.ones(len(qkv[0]), dtype=torch.bool, device=DEVICE)
    keep[third] = False
    for b, a in zip(before, after, strict=True):
        assert torch.equal(b[keep], a[keep])
        assert a[third].isnan().any()


@every_peer
def test_one_projection_and_its_gradient(name):
    lengths = EVEN
    qkv = torch.randn(sum(lengths), 2, 3, 16, device=DEVICE, dtype=DTYPE, requires_grad=True)
    options = dict(zip(("cos", "sin"), table(lengths), strict=True), implementation=name)
    rest = (bounds(lengths), 12)
    with unless_refused():
        outs = [
            nk.qkv_attention(qkv, *rest, **options),
            nk.attention(*qkv.unbind(2), *rest, **options),
        ]
    assert torch.equal(*outs)
    dout = torch.randn_like(outs[0])
    assert torch.equal(*(torch.autograd.grad(out, qkv, dout)[0] for out in outs))


@every_peer
def test_no_documents_and_no_tokens(name):
    leaves = [x.requires_grad_() for x in make((), DTYPE)[0]]
    out = nk.attention(*leaves, bounds([0, 0]), 0, implementation=name)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [g.shape for g in grads] == [x.shape for x in leaves]


@every_peer
def test_training_follows_inference(name):
    """What a peer keeps of a batch from one call to the next must fit both."""
    lengths = (5, 1, 7)
    qkv, cu_seqlens, longest = make(lengths, DTYPE, 2)

    def call(*qkv):
        return nk.attention(*qkv, cu_seqlens, longest, implementation=name)

    peers._padding.cache_clear()
    with unless_refused(), torch.inference_mode():
        before = call(*qkv)
    out = call(*(x.requires_grad_() for x in qkv))
    out.sum().backward()
    torch.testing.assert_close(out.detach(), before)


@every_peer
def test_known_lengths_change_nothing(name):
    (q, k, v), cu_seqlens, longest = make(EVEN, DTYPE)
    with unless_refused():
        out = peers.attend(name, q, k, v, cu_seqlens, longest, lengths=EVEN)
    assert torch.equal(out, nk.attention(q, k, v, cu_seqlens, longest, implementation=name))


def test_autocast_changes_no_peer():
    qkv, cu_seqlens, longest = make(RAGGED)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = nk.attention(*qkv, cu_seqlens, longest, implementation="sdpa_math")
    assert torch.equal(out, nk.attention(*qkv, cu_seqlens, longest, implementation="sdpa_math"))


def test_a_head_size_that_no_kernel_has():
    (q, k, v), cu_seqlens, longest = make((5, 3), dim=12)
    out = nk.attention(q, k, v, cu_seqlens, longest, implementation="sdpa_math")
    torch.testing.assert_close(out, dense(q, k, v, (5, 3)))


@pytest.fixture
def spied(monkeypatch):
    """The names of peers that ran."""
    ran = []
    attend = peers.attend

    def spy(name, *arguments):
        ran.append(name)
        return attend(name, *arguments)

    monkeypatch.setattr(peers, "attend", spy)
    return ran


def test_a_peer_runs_only_where_it_is_asked_for(spied, monkeypatch):
    qkv, cu_seqlens, longest = make(RAGGED)
    plain = nk.attention(*qkv, cu_seqlens, longest)
    assert (spied, nk.implementation("attention", DEVICE) in peers.PEERS) == ([], False)
    nk.attention(*qkv, cu_seqlens, longest, implementation="sdpa_math")
    assert spied == ["sdpa_math"]
    monkeypatch.setenv("NEOBERT_ATTENTION", "sdpa_math")
    nk.attention(*qkv, cu_seqlens, longest)
    nk.qkv_attention(torch.stack(qkv, dim=2), cu_seqlens, longest)
    assert spied == ["sdpa_math"] * 3
    assert nk.implementation("qkv_attention", DEVICE) == "sdpa_math"
    assert nk.implementation("rope", DEVICE) not in peers.PEERS
    # The argument outranks the environment, and an empty variable asks for nothing.
    ours = nk.attention(*qkv, cu_seqlens, longest, implementation="neobert_kernels")
    monkeypatch.setenv("NEOBERT_ATTENTION", "")
    assert torch.equal(ours, plain)
    assert torch.equal(nk.attention(*qkv, cu_seqlens, longest), plain)
    assert len(spied) == 3


def test_a_compiled_model_breaks_its_graph_at_a_peer(monkeypatch):
    torch.compiler.reset()
    (q, k, v), cu_seqlens, longest = make(RAGGED)

    def around(q):
        return nk.attention(q * 2, k, v, cu_seqlens, longest, implementation="sdpa_math") + 1

    compiled = torch.compile(around, backend="aot_eager")
    torch.testing.assert_close(compiled(q), around(q))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="not traced"):
        torch.compile(around, backend="aot_eager", fullgraph=True)(q)


CALL = {"cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32), "max_seqlen": 3}
Q = torch.ones(5, 2, 8)


@pytest.mark.parametrize("name", ["sdpa", "flash-attn", 3])
def test_an_unknown_peer_is_an_error_that_lists_them(name, monkeypatch):
    rule = r"expected one of neobert_kernels, sdpa_flash, .*flash_attn_deterministic, got"
    with pytest.raises(ValueError, match=f"^implementation: {rule} {name!r}"):
        nk.attention(Q, Q, Q, **CALL, implementation=name)
    monkeypatch.setenv("NEOBERT_ATTENTION", str(name))
    for call in (
        lambda: nk.attention(Q, Q, Q, **CALL),
        lambda: nk.qkv_attention(torch.stack([Q] * 3, 2), **CALL),
        lambda: nk.implementation("attention"),
    ):
        with pytest.raises(ValueError, match=f"^NEOBERT_ATTENTION: {rule}"):
            call()


@pytest.mark.parametrize("name", [name for name in peers.PEERS if not peers.PEERS[name].cpu])
def test_a_peer_that_needs_a_gpu_is_an_error_on_a_cpu(name):
    with pytest.raises(ValueError, match=f"^implementation: .*on cpu, got {name}: needs a GPU"):
        nk.attention(Q, Q, Q, **CALL, implementation=name)


def test_arguments_are_checked_for_peers_too():
    with pytest.raises(ValueError, match="max_seqlen: expected at least the longest"):
        nk.attention(Q, Q, Q, CALL["cu_seqlens"], 2, implementation="sdpa_math")


def test_what_torch_refuses_is_an_error(monkeypatch):
    """A pinned backend that cannot: on a CPU there is none such among ours, so one is put there."""
    monkeypatch.setitem(
        peers.PEERS,
        "sdpa_efficient",
        dataclasses.replace(peers.PEERS["sdpa_efficient"], cpu=[Q.dtype]),
    )
    with pytest.raises(ValueError, match="implementation: expected inputs that torch's sdpa_eff"):
        nk.attention(Q, Q, Q, **CALL, implementation="sdpa_efficient")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Peers of a GPU take CPU tensors here."""
    for name, peer in peers.PEERS.items():
        monkeypatch.setitem(peers.PEERS, name, peers.Peer(peer.run, cpu=peer.gpu))


@pytest.mark.parametrize("name", ["torch_varlen", "flash_attn", "flash_attn_deterministic"])
@pytest.mark.parametrize("window", [None, 3])
def test_varlen_peers_get_the_boundaries_and_every_option(name, window, as_on_a_gpu, monkeypatch):
    """With stand-ins of the packages' signatures, which take 16 bits on a GPU only."""
    seen = {}

    def answer(q, k, v, bounds, same, longest, window, scale):
        assert same is bounds
        reach = None if window == (-1, -1) else window[0]
        assert window[0] == window[1]
        return nk.attention_reference(q, k, v, bounds, longest, window=reach, scale=scale)

    def flash(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
              softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
              alibi_slopes=None, deterministic=False):  # fmt: skip
        seen.update(deterministic=deterministic, causal=causal, dropout=dropout_p)
        return answer(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, window_size, softmax_scale)

    def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None,
               window_size=(-1, -1), enable_gqa=False):  # fmt: skip
        assert enable_gqa == (query.shape[1] != key.shape[1])
        return answer(query, key, value, cu_seq_q, cu_seq_k, max_q, window_size, scale)

    from torch.nn.attention import varlen as module

    monkeypatch.setattr(module, "varlen_attn", varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash))
    for groups in (2, 4):
        (q, k, v), cu_seqlens, longest = make(RAGGED, torch.bfloat16, heads=4, groups=groups)
        cos, sin = table(RAGGED)
        options = {"cos": cos, "sin": sin, "window": window, "scale": 0.3}
        out = nk.attention(q, k, v, cu_seqlens, longest, implementation=name, **options)
        turned = (nk.rope(x, cos, sin) for x in (q, k))
        options = {"window": window, "scale": 0.3}
        expected = nk.attention_reference(*turned, v, cu_seqlens, longest, **options)
        assert torch.equal(out, expected)
    if name != "torch_varlen":
        exact = name == "flash_attn_deterministic"
        assert seen == {"deterministic": exact, "causal": False, "dropout": 0.0}


def test_varlen_of_a_torch_without_grouped_heads(monkeypatch):
    """2.11's: every query head gets the k and v of its group."""
    from torch.nn.attention import varlen as module

    def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None,
               window_size=(-1, -1)):  # fmt: skip
        assert query.shape == key.shape == value.shape
        return nk.attention_reference(query, key, value, cu_seq_q, max_q, scale=scale)

    monkeypatch.setattr(module, "varlen_attn", varlen)
    monkeypatch.setattr(peers, "missing", lambda name, device: "")
    monkeypatch.setitem(
        peers.PEERS, "torch_varlen", dataclasses.replace(peers.PEERS["torch_varlen"], cpu=(DTYPE,))
    )
    (q, k, v), cu_seqlens, longest = make(RAGGED, DTYPE, heads=4, groups=2)
    out = nk.attention(q, k, v, cu_seqlens, longest, implementation="torch_varlen")
    torch.testing.assert_close(out, nk.attention_reference(q, k, v, cu_seqlens, longest))


def test_the_stand_ins_have_the_parameters_of_the_installed_torch():
    from torch.nn.attention.varlen import varlen_attn

    assert {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys()


def test_a_dtype_that_a_peer_has_not_is_an_error(as_on_a_gpu):
    with pytest.raises(
        ValueError, match=r"^q: expected dtype float16 or bfloat16 for torch_varlen"
    ):
        nk.attention(Q, Q, Q, **CALL, implementation="torch_varlen")


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "flash_attn", peers.Peer(print, cpu=[Q.dtype], package="no_x"))
    with pytest.raises(ValueError, match="got flash_attn: the package no_x is not installed"):
        nk.attention(Q, Q, Q, **CALL, implementation="flash_attn")


@pytest.mark.skipif(not GPU, reason="a CPU's takes masks")
@pytest.mark.parametrize("case", ["ragged", "window"])
def test_sdpa_flash_takes_no_mask_on_a_gpu(case):
    lengths, window = ((3, 4), None) if case == "ragged" else ((4, 4), 1)
    (q, k, v), cu_seqlens, longest = make(lengths, torch.bfloat16)
    with pytest.raises(ValueError, match="expected documents of one length and no window"):
        nk.attention(q, k, v, cu_seqlens, longest, window=window, implementation="sdpa_flash")


def test_a_patched_model_follows_the_environment(monkeypatch, spied):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=50,
    )  # fmt: skip
    model = BertModel(config).eval().to(DEVICE)
    ids = torch.arange(12, device=DEVICE).view(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3], device=DEVICE)
    with torch.no_grad(), nk.patched(model):
        ours = model(ids, attention_mask=mask).last_hidden_state
        monkeypatch.setenv("NEOBERT_ATTENTION", "sdpa_math")
        theirs = model(ids, attention_mask=mask).last_hidden_state
    assert spied == ["sdpa_math"] * 2
    torch.testing.assert_close(ours, theirs)

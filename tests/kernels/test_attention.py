"""attention: the meaning stated with one dense mask, and what must hold whatever the kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity, assert_within_budget, outputs_and_gradients

import neobert_kernels as nk
from neobert_kernels.ops import attention as module

LENGTHS = (5, 1, 0, 33, 33, 0, 64, 2)


def bounds(lengths, device):
    sums = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return torch.tensor(sums, dtype=torch.int32, device=device)


def make(lengths, device, dtype=torch.float32, heads=4, groups=None, dim=16):
    shapes = [(sum(lengths), h, dim) for h in (heads, groups or heads, groups or heads)]
    qkv = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    return qkv, bounds(lengths, device), max(lengths, default=0)


def table(lengths, device, dim=16):
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    return nk.rope_table(positions, dim)


def rotate(x, cos, sin, interleaved):
    """Each pair as a complex number, turned."""
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    half = x.shape[-1] // 2
    index = torch.arange(x.shape[-1], device=x.device)
    a, b = (index[::2], index[1::2]) if interleaved else (index[:half], index[half:])
    turned = torch.empty_like(x)
    turned[..., a] = x[..., a] * cos - x[..., b] * sin
    turned[..., b] = x[..., a] * sin + x[..., b] * cos
    return turned


def dense(q, k, v, lengths, cos=None, sin=None, interleaved=False, window=None, scale=None):
    """The meaning: one [T, T] mask of who sees whom."""
    T, H, D = q.shape
    if cos is not None:
        q, k = rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    document = torch.tensor([b for b, n in enumerate(lengths) for _ in range(n)], device=q.device)
    i = torch.arange(T, device=q.device)
    sees = document[:, None] == document
    if window is not None:
        sees = sees & ((i[:, None] - i).abs() <= window)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (D**-0.5 if scale is None else scale)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v)


VARIANTS = {
    "plain": {},
    "rope": {"rope": True},
    "interleaved": {"rope": True, "interleaved": True},
    "grouped": {"groups": 2, "rope": True},
    "window": {"window": 3, "rope": True},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_the_dense_mask_with_every_gradient(variant, dtype, device):
    options = dict(VARIANTS[variant])
    qkv, cu_seqlens, longest = make(LENGTHS, device, dtype, groups=options.pop("groups", None))
    if options.pop("rope", False):
        options["cos"], options["sin"] = table(LENGTHS, device)

    def op(*qkv):
        return nk.attention(*qkv, cu_seqlens, longest, **options)

    def meaning(*qkv):
        return dense(*qkv, LENGTHS, **options)

    grad = [torch.randn_like(qkv[0])]
    actual = outputs_and_gradients(op, qkv, grad)
    exact = outputs_and_gradients(meaning, [x.double() for x in qkv], grad)
    rounded = outputs_and_gradients(meaning, [x.float() for x in qkv], grad)
    for i, (a, r, e) in enumerate(zip(actual, rounded, exact, strict=True)):
        assert_within_budget(a, r.to(dtype), e, f"value {i}")
    reference = nk.attention_reference
    assert_parity(op, lambda *qkv: reference(*qkv, cu_seqlens, longest, **options), qkv)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), max_size=8), st.sampled_from([None, 0, 2]))
def test_any_ragged_batch_matches_the_dense_mask(lengths, window):
    (q, k, v), cu_seqlens, longest = make(lengths, "cpu", heads=2, dim=8)
    out = nk.attention(q, k, v, cu_seqlens, longest, window=window)
    exact = dense(q.double(), k.double(), v.double(), lengths, window=window)
    assert_within_budget(out, exact.float(), exact, ulps=4)


def test_a_document_depends_on_no_other(device):
    (q, k, v), cu_seqlens, longest = make(LENGTHS, device)
    before = nk.attention(q, k, v, cu_seqlens, longest)
    touched = slice(int(cu_seqlens[3]), int(cu_seqlens[4]))
    for x in (q, k, v):
        x[touched] += 1.0
    after = nk.attention(q, k, v, cu_seqlens, longest)
    keep = torch.ones(len(q), dtype=torch.bool, device=device)
    keep[touched] = False
    assert torch.equal(before[keep], after[keep])
    assert not torch.equal(before[touched], after[touched])


def test_a_document_alone_gives_the_same_bits_as_packed(device):
    (q, k, v), cu_seqlens, longest = make(LENGTHS, device)
    packed = nk.attention(q, k, v, cu_seqlens, longest)
    for low, high in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        n = high - low
        alone = nk.attention(q[low:high], k[low:high], v[low:high], bounds([n], device), n)
        assert torch.equal(packed[low:high], alone)


@pytest.mark.parametrize(("window", "as_if"), [(0, "identity"), (63, None), (1000, None)])
def test_window_edges(window, as_if, device):
    (q, k, v), cu_seqlens, longest = make((64, 7), device)
    out = nk.attention(q, k, v, cu_seqlens, longest, window=window)
    expected = v if as_if else nk.attention(q, k, v, cu_seqlens, longest)
    torch.testing.assert_close(out, expected)


def test_the_window_is_inclusive(device):
    (q, k, v), cu_seqlens, longest = make((9,), device)
    before = nk.attention(q, k, v, cu_seqlens, longest, window=3)
    v[0] += 1.0
    changed = (nk.attention(q, k, v, cu_seqlens, longest, window=3) != before).flatten(1).any(1)
    assert changed.tolist() == [True] * 4 + [False] * 5


def test_only_relative_positions_count(device):
    (q, k, v), cu_seqlens, longest = make((40,), device)
    near, far = (nk.rope_table(torch.arange(40, device=device) + s, 16) for s in (0, 1000))
    a, b = (nk.attention(q, k, v, cu_seqlens, longest, cos=c, sin=s) for c, s in (near, far))
    # The angles of position 1,000 carry 1,000 times the rounding of those of position 1.
    torch.testing.assert_close(a, b, rtol=0, atol=1000 * torch.finfo(torch.float32).eps)


def test_huge_scores_stay_finite(device):
    (q, k, v), cu_seqlens, longest = make(LENGTHS, device)
    inputs = [t.requires_grad_() for t in (q * 100, k * 100, v)]
    out = nk.attention(*inputs, cu_seqlens, longest)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(t.isfinite().all() for t in (out, *grads))


@pytest.mark.parametrize("layout", ["per head", "blocks"])
def test_one_projection_in_any_layout(layout, device):
    T = sum(LENGTHS)
    flat = torch.randn(T, 4 * 3 * 16, device=device, requires_grad=True)
    blocks = layout == "blocks"
    qkv = flat.view(T, 3, 4, 16).transpose(1, 2) if blocks else flat.view(T, 4, 3, 16)
    cos, sin = table(LENGTHS, device)
    options = {"cos": cos, "sin": sin, "interleaved": True}
    cu_seqlens, longest = bounds(LENGTHS, device), max(LENGTHS)
    out = nk.qkv_attention(qkv, cu_seqlens, longest, **options)
    separate = nk.attention(*qkv.unbind(2), cu_seqlens, longest, **options)
    assert torch.equal(out, separate)
    (grad,) = torch.autograd.grad(out.square().sum(), flat)
    assert grad.shape == flat.shape
    assert grad.view(T, -1).any(1).all()


def test_no_documents_and_no_tokens(device):
    (q, k, v), _, _ = make((), device)
    for boundaries in (bounds([], device), bounds([0, 0], device)):
        assert nk.attention(q, k, v, boundaries, 0).shape == (0, 4, 16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_operator_behind_compile_has_the_same_gradients(variant, device):
    options = dict(VARIANTS[variant])
    qkv, cu_seqlens, longest = make(LENGTHS, device, groups=options.pop("groups", None))
    if options.pop("rope", False):
        options["cos"], options["sin"] = table(LENGTHS, device)
    scale = options.get("scale", 16**-0.5)
    rest = [options.get(name) for name in ("cos", "sin", "interleaved", "window")]
    rest[2] = bool(rest[2])

    def op(*qkv):
        return module._Attention.apply(*qkv, cu_seqlens, longest, *rest, scale)

    assert_parity(
        op, lambda *qkv: nk.attention_reference(*qkv, cu_seqlens, longest, **options), qkv
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph_with_its_backward(dynamic, device):
    compiled = torch.compile(nk.attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ((5, 3), (4, 9)):
        qkv, cu_seqlens, longest = make(lengths, device)
        cos, sin = table(lengths, device)
        leaves = [x.requires_grad_() for x in qkv]
        outs = [f(*leaves, cu_seqlens, longest, cos=cos, sin=sin) for f in (compiled, nk.attention)]
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), leaves) for o in outs))


def test_registration(device):
    qkv, cu_seqlens, longest = make((5, 3), device)
    rest = (cu_seqlens, longest, *table((5, 3), device), False, 2, 0.5)
    torch.library.opcheck(module._forward, (*qkv, *rest))
    torch.library.opcheck(module._backward, (qkv[0], *module._forward(*qkv, *rest), *qkv, *rest))


Q = torch.ones(3, 4, 8)
CU = torch.tensor([0, 3], dtype=torch.int32)
COS = torch.ones(3, 4)
ARGUMENTS = {"q": Q, "k": Q, "v": Q, "cu_seqlens": CU, "max_seqlen": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q[0]}, "q: expected 3 dimensions"),
        ({"q": Q.double()}, "q: expected dtype float32 or float16 or bfloat16, got float64"),
        ({"k": Q.half()}, "k: expected dtype float32, got float16"),
        ({"k": Q[:, :3]}, r"k: expected shape \(3, a divisor of 4, 8\), got \(3, 3, 8\)"),
        ({"v": Q[:, :2]}, r"v: expected shape \(3, 4, 8\)"),
        ({"v": Q.to("meta")}, "v: expected device cpu, got meta"),
        ({"cu_seqlens": CU.long()}, "cu_seqlens: expected dtype int32"),
        ({"cu_seqlens": CU + 1}, "cu_seqlens: expected a first element of 0, got 1"),
        ({"max_seqlen": 2}, r"max_seqlen: expected at least the longest document \(3\), got 2"),
        ({"max_seqlen": 3.0}, "max_seqlen: expected an int of at least 0, got 3.0"),
        ({"cos": COS}, "sin: expected both of cos and sin, or neither, got None"),
        ({"cos": COS, "sin": COS.half()}, "sin: expected dtype float32, got float16"),
        ({"cos": COS[:2], "sin": COS}, r"cos: expected shape \(3, 4\), got \(2, 4\)"),
        ({"window": -1}, "window: expected None or a radius of at least 0, got -1"),
        ({"scale": 0.0}, "scale: expected a finite number over 0, got 0"),
    ],
)
def test_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        nk.attention(**(ARGUMENTS | changes))


def test_rejects_a_projection_without_three_slices():
    with pytest.raises(ValueError, match=r"qkv: expected shape \(T, H, 3, D\), got"):
        nk.qkv_attention(torch.ones(3, 4, 2, 8), CU, 3)

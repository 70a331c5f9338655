"""A Linear layer with its norm and its activation: the numbers of the parts one after the other."""

import pytest
import torch
from covering import OLDEST, covering, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_within_budget, long_sums
from torch.nn import functional as F

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels.ops import fused_linear as module
from neobert_kernels.ops.fused_linear import launch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KERNEL = CUDA or _runtime.INTERPRET
runs_kernel = pytest.mark.skipif(not KERNEL, reason="no kernel runs on the CPU")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def make(M, N, K, dtype=torch.float32, *, norm=None, residual=False, bias=False, activation=None):
    """Arguments of a call by name; ``bias`` is of the product and of a layer_norm."""
    call = {
        "x": normal(M, K, dtype=dtype),
        "weight": normal(N, K, dtype=dtype, scale=K**-0.5),
        "bias": normal(N, dtype=dtype) if bias else None,
        "residual": normal(M, K, dtype=dtype) if residual else None,
        "norm": norm,
        "activation": activation,
    }
    if norm is not None:
        call["norm_weight"] = normal(K, dtype=dtype)
        call["norm_bias"] = normal(K, dtype=dtype) if bias and norm == "layer_norm" else None
    return call


def everything(M, N, K, dtype=torch.float32, **parts):
    """A call with all parts, but for those that ``parts`` names."""
    parts = {"norm": "layer_norm", "residual": True, "bias": True, "activation": "swiglu"} | parts
    return make(M, N, K, dtype, **parts)


def widened(call):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in call.items()}


def compare(call, fused_linear=nk.fused_linear):
    reference = nk.fused_linear_reference
    actual = fused_linear(**call)
    rounded, exact = reference(**call), reference(**widened(call))
    for name, a, r, e in zip("yhu", actual, rounded, exact, strict=True):
        assert_within_budget(a, r, e, name, long_sums(a.dtype))
    return actual


def assert_equal(actual, expected):
    assert [torch.equal(a, e) for a, e in zip(actual, expected, strict=True)] == [True] * 3


@pytest.mark.parametrize("activation", [None, "gelu", "swiglu", "geglu"])
@pytest.mark.parametrize("norm", [None, "rms_norm", "layer_norm"])
def test_reference_is_torchs_own_parts(norm, activation):
    call = everything(7, 6, 9, torch.float64, norm=norm, activation=activation)
    h = call["x"] + call["residual"]
    u = h
    if norm == "rms_norm":
        u = F.rms_norm(h, (9,), call["norm_weight"], 0.1)
    elif norm == "layer_norm":
        u = F.layer_norm(h, (9,), call["norm_weight"], call["norm_bias"], 0.1)
    y = F.linear(u, call["weight"], call["bias"])
    if activation == "gelu":
        y = F.gelu(y)
    elif activation is not None:
        gate, value = y.chunk(2, dim=-1)
        y = {"swiglu": F.silu, "geglu": F.gelu}[activation](gate) * value
    found = nk.fused_linear_reference(**call, eps=0.1)
    for actual, expected in zip(found, (y, h, u), strict=True):
        torch.testing.assert_close(actual, expected)


@covering(
    norm=[None, "rms_norm", "layer_norm"],
    activation=[None, "gelu", "swiglu", "geglu"],
    residual=[False, True],
    bias=[False, True],
    dtype=[torch.float32, torch.bfloat16],
)
def test_any_parts(norm, activation, residual, bias, dtype):
    """Two blocks of rows, two of columns, two chunks, and edges inside all of them."""
    parts = {"norm": norm, "residual": residual, "bias": bias, "activation": activation}
    compare(make(17, 40, 300, dtype, **parts))


@covering(
    shape=[(1, 8, 40), (15, 40, 300), (16, 10, 760), (17, 20, 768), (40, 6, 1000), (2, 34, 1152),
           (5, 16, 2048), (17, 2, 1)],
    activation=[None, "geglu"],
    held=[False, True],
    dtype=DTYPES,
)  # fmt: skip
def test_blocks_and_their_edges(shape, activation, held, dtype):
    """``held``: a norm and a residual, so no more channels than a program keeps."""
    M, N, K = shape
    if held:
        K = min(K, launch.MOST_CHANNELS[dtype.itemsize])
        compare(everything(M, N, K, dtype, activation=activation))
    else:
        compare(make(M, N, K, dtype, activation=activation))


@settings(max_examples=examples(12), deadline=None, derandomize=True)
@given(
    M=st.integers(0, 40),
    N=st.integers(1, 20),
    K=st.integers(1, 384),
    norm=st.sampled_from([None, *module.NORMS]),
    activation=st.sampled_from([None, *module.ACTIVATIONS]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(M, N, K, norm, activation, dtype):
    torch.manual_seed(0)
    parts = {"norm": norm, "residual": bool(K % 2), "bias": bool(M % 2)}
    call = make(M, 2 * N, K, dtype, **parts, activation=activation)
    # A row of one or two channels is its own mean, and what is left of it is all rounding.
    compare(call | {"eps": 1e-5 if K > 8 else 1.0})


def test_every_rounding_is_where_it_is_promised():
    """In bfloat16, with all but a rounding cancelled: 256.5 is 256, and 1 + 2**-9 is 1."""

    def of(x, weight, bias, **options):
        x, weight, bias = (
            torch.tensor(v, device=DEVICE).bfloat16() for v in ([x], [weight], [bias])
        )
        residual = options.pop("residual", None)
        if residual is not None:
            residual = torch.tensor([residual], device=DEVICE).bfloat16()
        return float(nk.fused_linear(x, weight, bias, residual=residual, **options)[0])

    assert of([256.0, 0.5], [1.0, 1.0], -256.0) == 0.5  # y, and that behind the bias
    assert of([256.0, 0.0], [1.0, 1.0], -256.0, residual=[0.5, 0.0]) == 0.0  # h
    scale = torch.tensor([1 + 2**-9, 1.0], device=DEVICE)
    norm = {"norm": "rms_norm", "norm_weight": scale, "eps": 0.0}
    assert of([1.0, 1.0], [1.0, 0.0], -1.0, **norm) == 0.0  # u


@every_dtype
@pytest.mark.parametrize("norm", [None, *module.NORMS])
def test_h_is_the_sum_bit_for_bit_and_as_add_norm_has_it(norm, dtype):
    call = everything(17, 8, 300, dtype, norm=norm)
    x, residual = call["x"], call["residual"]
    _, h, u = nk.fused_linear(**call)
    assert torch.equal(h, x + residual)
    if norm is None:
        assert u is h
    elif not (_runtime.INTERPRET and dtype is torch.bfloat16):  # where add_norm's are truncated
        weights = (w for w in (call["norm_weight"], call["norm_bias"]) if w is not None)
        expected, _ = getattr(nk, f"add_{norm}")(x, residual, *weights)
        exact = nk.fused_linear_reference(**widened(call))[2]
        assert_within_budget(u, expected, exact)


@pytest.mark.parametrize("norm", [None, "rms_norm"])
def test_without_a_residual_h_is_x_itself(norm):
    call = make(3, 4, 20, norm=norm)
    _, h, u = nk.fused_linear(**call)
    assert h is call["x"]
    assert (u is h) == (norm is None)


@runs_kernel
@pytest.mark.parametrize("held", [False, True])
@every_dtype
def test_a_row_has_its_bits_in_any_batch(held, dtype, ordered_products):
    """Alone, among any number of others, at any place, and whatever these are."""
    call = everything(40, 24, 300, dtype) if held else make(40, 24, 300, dtype, bias=True)
    expected = nk.fused_linear(**call)

    def of(rows):
        residual = call["residual"]
        rest = {"x": call["x"][rows], "residual": None if residual is None else residual[rows]}
        return nk.fused_linear(**call | rest)

    for i in range(0, 40, 1 if CUDA else 13):
        assert_equal(of(slice(i, i + 1)), [e[i : i + 1] for e in expected])
    generator = torch.Generator().manual_seed(0)
    for _ in range(examples(100 if CUDA else 4)):
        count = int(torch.randint(1, 200 if CUDA else 40, (), generator=generator))
        places = torch.randint(40, (count,), generator=generator).to(DEVICE)
        assert_equal(of(places), [e[places] for e in expected])
    alone = torch.arange(40, device=DEVICE)[:, None] == 17
    others = nk.fused_linear(**call | {"x": call["x"].where(alone, torch.nan)})
    assert_equal([o[17] for o in others], [e[17] for e in expected])


@runs_kernel
def test_a_column_has_its_bits_beside_any_others(ordered_products):
    """q, k and v in one product, or one by one."""
    call = everything(17, 60, 100, activation=None)
    parts = zip(call["weight"].split(23), call["bias"].split(23), strict=True)
    ys = [nk.fused_linear(**call | {"weight": w, "bias": b})[0] for w, b in parts]
    assert torch.equal(nk.fused_linear(**call)[0], torch.cat(ys, 1))


VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second channel": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "every second row": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "slice of wider rows": lambda x: torch.cat([x, -x], 1)[:, : x.shape[1]],
    "one row repeated": lambda x: x[:1].expand(x.shape),
}


@covering(view=VIEWS, of=["x", "residual", "weight"], dtype=[torch.float32, torch.bfloat16])
def test_strided(view, of, dtype):
    call = everything(17, 40, 24, dtype)
    call[of] = VIEWS[view](call[of])
    plain = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    found = compare(call)
    if KERNEL:  # PyTorch's sums have another order in a view
        assert_equal(found, nk.fused_linear(**plain))


def test_strided_vectors():
    call = everything(3, 6, 24)
    names = ("bias", "norm_weight", "norm_bias")
    views = {name: VIEWS["every second channel"](call[name]) for name in names}
    assert not any(view.is_contiguous() for view in views.values())
    assert_equal(nk.fused_linear(**call | views), nk.fused_linear(**call))


@pytest.mark.parametrize("norm", module.NORMS)
def test_a_norms_weight_has_any_dtype(norm):
    call = everything(5, 8, 100, torch.bfloat16, norm=norm)
    call["norm_weight"] = call["norm_weight"].float() + 2**-12  # of which bfloat16 knows nothing
    call["norm_bias"] = None if norm == "rms_norm" else call["norm_bias"].half()
    compare(call)


def test_leading_dimensions_and_no_rows():
    call = everything(24, 10, 8)
    y, h, u = nk.fused_linear(**call)

    def of(change):
        return nk.fused_linear(**call | {k: change(call[k]) for k in ("x", "residual")})

    assert_equal(of(lambda v: v.view(2, 3, 4, 8)), [v.view(2, 3, 4, -1) for v in (y, h, u)])
    assert [v.shape for v in of(lambda v: v[:0])] == [(0, 5), (0, 8), (0, 8)]
    assert [v.shape for v in of(lambda v: v[:0].view(2, 0, 8))] == [(2, 0, 5), (2, 0, 8), (2, 0, 8)]
    assert [v.shape for v in of(lambda v: v[0])] == [(5,), (8,), (8,)]
    call["x"], call["residual"] = call["x"][0], call["residual"][0]
    compare(call)


@runs_kernel
@pytest.mark.parametrize("held", [False, True])
def test_nothing_is_written_behind_the_results(held):
    M, N, K = 19, 37, 20
    call = everything(M, N, K, activation=None) if held else make(M, N, K)
    sizes = (M * N, M * K, M * K)
    behind = [torch.full((size + 2048,), 7.0, device=DEVICE) for size in sizes]
    y, h, u = (b[:n].view(M, -1) for b, n in zip(behind, sizes, strict=True))
    rest = (call["weight"], call["bias"], y, *((h, u) if held else (None, None)))
    norm = (call.get("norm_weight"), call.get("norm_bias"))
    launch.ready(call["x"], call["residual"], *norm, *rest, 1e-5, None, held).start()
    assert all((b[n:] == 7).all() for b, n in zip(behind, sizes, strict=True))
    expected = nk.fused_linear(**call)  # behind the test: it might write over anything
    assert_equal((y, h, u) if held else (y, *expected[1:]), expected)


@pytest.mark.parametrize("norm", module.NORMS)
@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.5, 3])
def test_every_eps(norm, eps):
    """Also of 0, where the rows past the last one have no spread to divide by."""
    y, h, u = compare(everything(17, 8, 96, norm=norm) | {"eps": eps})
    assert all(v.isfinite().all() for v in (y, h, u))


@every_dtype
@pytest.mark.parametrize("norm", module.NORMS)
def test_a_row_of_zeros_is_the_bias(norm, dtype):
    call = everything(3, 8, 40, dtype, norm=norm)
    call["x"][1], call["residual"][1] = 2.0, -2.0
    _, h, u = compare(call)
    assert not h[1].any()
    assert torch.equal(u[1], h[1] if norm == "rms_norm" else call["norm_bias"])


@every_dtype
@pytest.mark.parametrize(("value", "K"), [(1.5, 96), (1000.0, 318)])
def test_a_layer_norm_of_equal_values_is_the_bias(value, K, dtype):
    """Their sum is exact; a quotient that is not would be far off behind `rsqrt`."""
    if _runtime.INTERPRET and OLDEST:
        pytest.skip("the interpreter of Triton 3.6 rounds twice where fma rounds once")
    call = everything(3, 8, K, dtype)
    call["x"].fill_(value)
    call["residual"].zero_()
    u = nk.fused_linear(**call)[2]
    assert torch.equal(u, call["norm_bias"].expand(3, K))


@covering(residual=[False, True], K=[40, 300, 384], dtype=DTYPES)
def test_a_large_mean_leaves_its_spread(residual, K, dtype):
    """Multiples of 4 about 1,000, so that every dtype holds them and float32 their sums."""
    call = everything(17, 8, K, dtype, residual=residual)
    steps = 4 * torch.randint(-3, 4, (17, K), device=DEVICE)
    if residual:
        call["residual"] = steps.to(dtype)
    call["x"] = (1000 + steps * (not residual)).to(dtype)
    compare(call)


@runs_kernel
@every_dtype
def test_registration(dtype):
    for call in (
        everything(6, 8, 20, dtype),
        make(6, 8, 20, dtype, norm="rms_norm"),
        make(6, 8, 20, dtype),
    ):
        tensors = [call.get(name) for name in ("x", "residual", "norm_weight", "norm_bias")]
        options = (1e-5, call["activation"], call["norm"] == "layer_norm")
        arguments = (*tensors, call["weight"], call["bias"], *options)
        torch.library.opcheck(module._forward, arguments)


@pytest.mark.parametrize("all_parts", [False, True])
def test_compiles_to_one_graph(all_parts):
    torch.compiler.reset()
    call = everything(9, 12, 20) if all_parts else make(9, 12, 20)
    compiled = torch.compile(nk.fused_linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compare(call, compiled)
        assert_equal(compiled(**call), nk.fused_linear(**call))


@pytest.mark.skipif(not CUDA, reason="needs a GPU's memory")
def test_more_than_two_to_the_31_elements():
    """Of y, in a plain product, and of the rows, h and u, with all parts."""
    rows = 2**31 // 1024 + 19
    call = make(rows, 1024, 32, torch.bfloat16)
    y = nk.fused_linear(**call)[0]
    assert torch.equal(y[-19:], nk.fused_linear(call["x"][-19:], call["weight"])[0])
    del y
    call = everything(rows, 16, 1024, torch.bfloat16)
    found = nk.fused_linear(**call)
    last = {"x": call["x"][-19:], "residual": call["residual"][-19:]}
    assert_equal([v[-19:] for v in found], nk.fused_linear(**call | last))


def test_more_channels_than_a_program_keeps():
    """Refused where a kernel would have to run, with a norm or a residual alone."""
    for dtype, most in ((torch.float32, 384), (torch.float16, 1024)):
        compare(make(1, 2, most + 1, dtype))
        for parts in ({"residual": True}, {"norm": "rms_norm"}):
            compare(make(1, 2, most, dtype, **parts))
            call = make(1, 2, most + 1, dtype, **parts)
            if not KERNEL:
                compare(call)
                continue
            name = str(dtype).removeprefix("torch.")
            message = f"x: expected at most {most} channels of {name} with .*, got {most + 1}$"
            with pytest.raises(ValueError, match=message):
                nk.fused_linear(**call)


TENSORS = ["x", "weight", "bias", "residual", "norm_weight", "norm_bias"]


@pytest.mark.parametrize("which", TENSORS)
def test_a_gradient_is_refused(which):
    call = everything(2, 4, 8)
    call[which].requires_grad_()
    with pytest.raises(ValueError, match=rf"^{which}: expected no gradient to record \(.*, got "):
        nk.fused_linear(**call)
    with torch.no_grad():
        expected = nk.fused_linear(**call)
    assert not any(v.requires_grad for v in expected[::2])
    with torch.inference_mode():
        assert_equal(nk.fused_linear(**call), expected)


X, W, V = torch.ones(3, 2), torch.ones(4, 2), torch.ones(2)
RMS = {"norm": "rms_norm", "norm_weight": V}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x: expected a torch.Tensor, got list"),
        ({"x": torch.tensor(1.0)}, "x: expected at least 1 dimension"),
        ({"x": X.double()}, "x: expected dtype float32 or float16 or bfloat16, got float64"),
        ({"x": torch.ones(2, 0)}, "x: expected at least one channel, got 0"),
        ({"weight": V}, r"weight: expected 2 dimensions, got shape \(2,\)"),
        ({"weight": W.half()}, "weight: expected dtype float32, got float16"),
        ({"weight": torch.ones(4, 3)}, r"weight: expected shape \(N, 2\), got \(4, 3\)"),
        ({"weight": torch.ones(0, 2)}, r"weight: expected shape \(N, 2\), got \(0, 2\)"),
        ({"weight": W.to("meta")}, "weight: expected device cpu, got meta"),
        ({"bias": V}, r"bias: expected shape \(4,\), got \(2,\)"),
        ({"bias": torch.ones(4).half()}, "bias: expected dtype float32, got float16"),
        ({"bias": 1.0}, "bias: expected a torch.Tensor, got float"),
        ({"activation": "relu"}, "activation: expected None or one of gelu, swiglu, geglu, got r"),
        (
            {"activation": "geglu", "weight": torch.ones(3, 2)},
            "weight: expected an even number of rows with activation='geglu', got 3",
        ),
        ({"residual": X[0]}, r"residual: expected the shape of x \(\(3, 2\)\), got \(2,\)"),
        ({"residual": X.half()}, r"residual: expected the dtype of x \(float32\), got float16"),
        ({"residual": X.to("meta")}, r"residual: expected the device of x \(cpu\), got meta"),
        ({"residual": 1.0}, "residual: expected a torch.Tensor, got float"),
        ({"norm": "batch_norm"}, "norm: expected None or one of rms_norm, layer_norm, got batch"),
        ({"norm": "rms_norm"}, "norm_weight: expected a tensor with norm='rms_norm', got None"),
        ({"norm_weight": V}, "norm_weight: expected None without a norm, got one"),
        (RMS | {"norm_weight": X[:, 0]}, r"norm_weight: expected shape \(2,\), got \(3,\)"),
        (RMS | {"norm_weight": V.double()}, "norm_weight: expected dtype .*, got float64"),
        (RMS | {"norm_weight": 1.0}, "norm_weight: expected a torch.Tensor, got float"),
        (RMS | {"norm_weight": V.to("meta")}, "norm_weight: expected device cpu, got meta"),
        (RMS | {"norm_bias": V}, "norm_bias: expected None without norm='layer_norm', got one"),
        ({"norm_bias": V}, "norm_bias: expected None without norm='layer_norm', got one"),
        (
            RMS | {"norm": "layer_norm", "norm_bias": X[:, 0]},
            r"norm_bias: expected shape \(2,\), got \(3,\)",
        ),
        (RMS | {"eps": -1e-5}, "eps: expected a finite number, at least 0, got -1e-05"),
        (RMS | {"eps": float("nan")}, "eps: expected .*, got nan"),
        (RMS | {"eps": "1e-5"}, "eps: expected a number, got str"),
    ],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        nk.fused_linear(**{"x": X, "weight": W} | change)

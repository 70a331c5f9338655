"""The CUDA extension's operators, by the budget of all: on a GPU, or their sources on a CPU.

On a CPU the same kernels run with a stand-in for CUDA whose threads take turns (csrc/on_host.h):
arithmetic, indices, masks, strides and the host code are tested, races and what only a GPU does are
not.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import extension
import pytest
import torch
from parity import assert_within_budget
from torch import Tensor

import neobert_kernels as nk
from neobert_kernels import _cuda_build, _runtime, cuda
from neobert_kernels.ops.rope import rope_table_reference

GPU = torch.cuda.is_available()
BUILT = GPU and cuda.find() is not None
HAS_COMPILER = bool(os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++"))
pytestmark = [
    pytest.mark.skipif(_runtime.INTERPRET, reason="no Triton here to interpret"),
    pytest.mark.skipif(GPU and not BUILT, reason="not built: neobert doctor --build"),
    pytest.mark.skipif(not GPU and not HAS_COMPILER, reason="no C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="the extension is for Linux"),
]
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str
)


@pytest.fixture(scope="module")
def loaded() -> extension.Extension:
    return extension.on_gpu() if GPU else extension.on_cpu()


@pytest.fixture
def built(loaded: extension.Extension) -> Iterator[extension.Extension]:
    loaded.use(*cuda.OPERATORS)
    loaded.handed_on.clear()
    yield loaded
    loaded.use()


def call(built: extension.Extension, name: str, *args: Any, taken: bool = True) -> Any:
    """One call that the extension must take, or must hand on."""
    before, handed = built.taken(), len(built.handed_on)
    result = getattr(built.ops, name).default(*args)
    assert built.taken() - before == taken
    if not GPU:
        assert len(built.handed_on) - handed == (not taken)
    return result


def random(built: extension.Extension, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=built.device).to(dtype)


def bounds(built: extension.Extension, *lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], device=built.device).cumsum(0).int()


def tables(built: extension.Extension, tokens: int, D: int) -> tuple[Tensor, Tensor]:
    return rope_table_reference(torch.arange(tokens, device=built.device), D)


def assert_parity(built: extension.Extension, name: str, *args: Any, taken: bool = True) -> None:
    reference = extension.REFERENCES[name]
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    results = [call(built, name, *args, taken=taken), reference(*args), reference(*wide)]
    results = [r if isinstance(r, tuple) else (r,) for r in results]
    for i, (actual, rounded, exact) in enumerate(zip(*results, strict=True)):
        assert actual.is_contiguous() or not taken
        if name == "pool" and i == 1:  # the oracle has no rounded result to keep one for
            exact = reference(*wide)[0][: len(actual)]
        assert_within_budget(actual, rounded, exact, f"{name}, output {i}")


def norm(
    built: extension.Extension, shape: tuple[int, ...], dtype: torch.dtype, weight: torch.dtype
) -> list[Tensor]:
    C = shape[-1]
    rows = [random(built, *shape, dtype=dtype) for _ in range(2)]
    return [*rows, random(built, C, dtype=weight), random(built, C, dtype=weight)]


# One row to a warp (2, 3 and 4 packs of 8 channels a lane), then to a block (1 and 4).
@pytest.mark.parametrize(
    "shape",
    [(7, 8), (1, 384), (5, 760), (9, 768), (2, 3, 1024), (3, 1032), (2, 1152), (1, 4096), (1, 4104),
     (1, 16384), (768,), (199, 64)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("wide", [False, True], ids=["weight as x", "weight float32"])
@every_dtype
def test_norms(
    built: extension.Extension, shape: tuple[int, ...], wide: bool, dtype: torch.dtype
) -> None:
    x, residual, weight, bias = norm(built, shape, dtype, torch.float32 if wide else dtype)
    eps = 1e-5 if shape[-1] > 8 else 1.0
    assert_parity(built, "add_rms_norm", x, residual, weight, eps)
    assert_parity(built, "add_layer_norm", x, residual, weight, bias, eps)
    assert_parity(built, "add_layer_norm", x, residual, weight, None, eps)
    # What is normalized is h as it is stored.
    y, h = call(built, "add_rms_norm", x, residual, weight, eps)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, call(built, "add_rms_norm", h, torch.zeros_like(h), weight, eps)[0])


def test_norms_subtract_the_mean_before_they_square(built: extension.Extension) -> None:
    x, residual, weight, bias = norm(built, (4, 768), torch.float32, torch.float32)
    assert_parity(built, "add_layer_norm", x + 1000, residual, weight, bias, 1e-5)


def test_norms_take_rows_apart(built: extension.Extension) -> None:
    wide = random(built, 2, 6, 1024, dtype=torch.bfloat16)
    weight = random(built, 768, dtype=torch.bfloat16)
    assert_parity(
        built, "add_rms_norm", wide[0, :, :768], wide[1, ::2, 8:776].repeat(2, 1), weight, 1e-5
    )
    assert_parity(built, "add_rms_norm", wide[0, ::2, :768], wide[1, 1::2, 8:776], weight, 1e-5)


@pytest.mark.parametrize("shape", [(7, 16), (3, 5, 2304), (2, 6144), (1, 4112), (32,)], ids=str)
@pytest.mark.parametrize("gelu", [False, True], ids=["swiglu", "geglu"])
@every_dtype
def test_gated_units(
    built: extension.Extension, shape: tuple[int, ...], gelu: bool, dtype: torch.dtype
) -> None:
    x = random(built, *shape, dtype=dtype) * 4
    assert_parity(built, "gated_unit", x, gelu)
    assert_parity(
        built, "gated_unit", torch.cat([x, x]).reshape(2 * x.numel() // shape[-1], -1)[::2], gelu
    )


def test_a_gated_unit_stays_finite(built: extension.Extension) -> None:
    x = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4, -1.0], device=built.device)
    for gelu in (False, True):
        y = call(built, "gated_unit", torch.cat([x, torch.ones_like(x)]), gelu)
        assert y.isfinite().all()
        assert torch.equal(y[4:7], x[4:7])


@pytest.mark.parametrize("D", [16, 64, 96, 128])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@every_dtype
def test_rope(built: extension.Extension, D: int, interleaved: bool, dtype: torch.dtype) -> None:
    qkv = random(built, 9, 5, 3, D, dtype=dtype)
    q, k = qkv[:, :, 0], qkv[:, :3, 1]
    cos, sin = tables(built, 9, D)
    for inverse in (False, True):
        assert_parity(built, "rope", q, cos, sin, interleaved, inverse)
    assert_parity(built, "rope_pair", q, k, cos, sin, interleaved)
    before = qkv.clone()
    expected = call(built, "rope", q, cos, sin, interleaved, False)
    call(built, "rope_into", q, cos, sin, interleaved, q)
    assert torch.equal(q, expected)
    assert torch.equal(qkv[:, :, 1:], before[:, :, 1:])


def test_many_heads_are_more_than_a_block(built: extension.Extension) -> None:
    x, (cos, sin) = random(built, 3, 40, 128), tables(built, 3, 128)
    assert_parity(built, "rope", x, cos, sin, True, False)


LENGTHS = (0, 1, 127, 128, 129, 300, 0, 17)


@pytest.mark.parametrize("C", [8, 384, 768, 1032])
@pytest.mark.parametrize("normalize", [False, True], ids=["mean", "normalized"])
@every_dtype
def test_mean_pool(built: extension.Extension, C: int, normalize: bool, dtype: torch.dtype) -> None:
    cu_seqlens = bounds(built, *LENGTHS)
    assert_parity(
        built, "pool", random(built, sum(LENGTHS), C, dtype=dtype), cu_seqlens, True, normalize
    )


@pytest.mark.parametrize("normalize", [False, True], ids=["mean", "normalized"])
def test_a_pooled_document_has_the_same_bits_in_any_batch(
    built: extension.Extension, normalize: bool
) -> None:
    """Also past 4,096 tokens, where the parts of a document are summed by blocks of their own."""
    x, lengths = random(built, sum(LENGTHS), 264, dtype=torch.bfloat16), LENGTHS
    alone = call(built, "pool", x, bounds(built, *lengths), True, normalize)
    more = torch.cat([random(built, 4001, 264, dtype=torch.bfloat16), x])
    together = (more, bounds(built, 4001, *lengths), True, normalize)
    assert_parity(built, "pool", *together)
    for a, b in zip(alone, call(built, "pool", *together), strict=True):
        assert torch.equal(a, b[1:])


def test_no_rows_are_no_launch(built: extension.Extension) -> None:
    before = built.taken()
    weight, empty = random(built, 768), random(built, 0, 768)
    y, h = built.ops.add_rms_norm(empty, empty, weight, 1e-5)
    assert y.shape == h.shape == (0, 768)
    assert built.ops.gated_unit(empty, True).shape == (0, 384)
    heads = random(built, 0, 2, 64)
    assert built.ops.rope(heads, *tables(built, 0, 64), True, False).shape == (0, 2, 64)
    assert built.taken() == before
    assert not built.handed_on


def test_what_the_kernels_do_not_take_goes_on_untouched(built: extension.Extension) -> None:
    def on(name: str, *args: Any) -> None:
        assert_parity(built, name, *args, taken=False)

    x, weight = random(built, 4, 768), random(built, 768)
    on("add_rms_norm", x[:, :764], x[:, :764], weight[:764], 1e-5)  # no whole packs
    on("add_rms_norm", x[:, 1:761], x[:, :760], weight[:760], 1e-5)  # not aligned
    on("add_rms_norm", x.reshape(2, 2, 768).transpose(0, 1), x.reshape(2, 2, 768), weight, 1e-5)
    on("add_rms_norm", x.half(), x.half(), weight.bfloat16(), 1e-5)
    on("add_layer_norm", x, x, weight, weight.half(), 1e-5)
    on("add_layer_norm", x[:, :764], x[:, :764], weight[:764], None, 1e-5)
    on("gated_unit", x[:, :760], True)  # halves of 380
    on("gated_unit", random(built, 768, 4).t(), False)
    heads = random(built, 4, 2, 40)
    on("rope", heads, *tables(built, 4, 40), True, False)
    on("rope_pair", heads, heads, *tables(built, 4, 40), True)
    on("pool", x, bounds(built, 1, 3), False, False)  # the first token
    on("pool", x[:, :764], bounds(built, 1, 3), True, True)
    odd = random(built, 4, 2, 41)[..., 1:]
    call(built, "rope_into", heads, *tables(built, 4, 40), True, odd, taken=False)
    expected = extension.rope(heads, *tables(built, 4, 40), True, False)
    torch.testing.assert_close(odd, expected)


def test_only_what_is_chosen_runs(built: extension.Extension) -> None:
    x = random(built, 4, 32)
    built.use("geglu")
    call(built, "gated_unit", x, True)
    call(built, "gated_unit", x, False, taken=False)
    call(built, "add_rms_norm", x, x, x[0].clone(), 1e-5, taken=False)
    built.use()
    call(built, "gated_unit", x, True, taken=False)


def test_the_same_bits_twice(built: extension.Extension) -> None:
    x, residual, weight, bias = norm(built, (5, 1152), torch.bfloat16, torch.bfloat16)
    first, second = (
        call(built, "add_layer_norm", x, residual, weight, bias, 1e-5) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_nothing_is_written_beside_the_result(built: extension.Extension) -> None:
    room = torch.full((9, 4, 3, 64), 7.0, device=built.device)
    x = random(built, 7, 2, 64)
    call(built, "rope_into", x, *tables(built, 7, 64), False, room[1:8, 1:3, 1])
    room[1:8, 1:3, 1] = 7.0
    assert (room == 7.0).all()


@pytest.mark.skipif(not GPU, reason="needs a GPU: the public functions run there")
@pytest.mark.parametrize("name", cuda.OPERATORS)
def test_public_functions_run_it(name: str) -> None:
    from operator_cases import TINY, outputs, sample

    for dtype in (torch.float32, torch.bfloat16):
        given = sample(name, "", TINY, "cuda", dtype)
        cuda.use()
        expected = outputs(name, given)
        cuda.use(name)
        before = cuda.taken()
        found = outputs(name, given)
        assert nk.implementation(name, "cuda") == "cuda"
        assert cuda.taken() > before
        cuda.use()
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_the_bits_of_the_choice_are_those_of_the_source() -> None:
    text = (_cuda_build.sources() / _cuda_build.OPERATORS).read_text(encoding="utf-8")
    for name, bit in ((name, cuda.bits([name])) for name in cuda.OPERATORS):
        assert f"  {name.upper()} = {bit}" in text
    assert {s for names in cuda.OPERATORS.values() for s in names} == set(_runtime.extended())

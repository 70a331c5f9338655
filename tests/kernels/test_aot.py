"""Every kernel compiles for every GPU generation, spills nothing and moves 16 bytes at a time."""

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from neobert_kernels import _runtime, _triton, aot
from neobert_kernels._triton import tl, triton

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(_runtime.INTERPRET, reason="the interpreter replaces the compiler"),
    pytest.mark.skipif(not _triton.AVAILABLE, reason="Triton is not installed"),
]


@triton.jit
def _copy_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offset, tl.load(x_ptr + offset, mask=offset < size), mask=offset < size)


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Keeps a whole row while it sums: more values than a warp has registers."""
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset)
    tl.store(y_ptr + offset, x * tl.sum(x * x))


@triton.jit
def _product_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + row * N + column), tl.load(b_ptr + row * N + column)
    tl.store(c_ptr + row * N + column, tl.dot(a, b).to(tl.float16))


@triton.jit
def _bulk_copy_kernel(x_ptr, y_ptr, N: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [N, N], [N, 1], [N, N])
    y = tl.make_tensor_descriptor(y_ptr, [N, N], [N, 1], [N, N])
    y.store([0, 0], x.load([0, 0]))


def launch(kernel: Any, dtype: torch.dtype = torch.float32, **constexprs: int) -> _runtime.Launch:
    signature = _runtime.signature(kernel, dtype)
    aligned = tuple(name for name, kind in signature.items() if kind != "constexpr")
    return _runtime.Launch(kernel, kernel.__name__, "toy", signature, constexprs, aligned=aligned)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Enter a toy operator with these launches, the only one there is during the test."""
    _runtime.load_operators()
    monkeypatch.setattr(_runtime, "OPERATORS", {})

    def enter(*launches: _runtime.Launch) -> None:
        def toy() -> None: ...

        kernels = tuple(one.kernel for one in launches)
        _runtime.operator(toy, toy, kernels, lambda sm: iter(launches))

    return enter


def report_of(register: Any, one: _runtime.Launch, sm: int = 90) -> aot.Report:
    register(one)
    (report,) = aot.reports([sm])
    return report


@pytest.mark.parametrize("sm", aot.DEFAULT_SMS)
def test_every_kernel_keeps_its_promises(sm: int) -> None:
    broken = {
        (report.kernel, report.case): found
        for report in aot.reports([sm])
        if (found := aot.problems(report))
    }
    assert not broken


def test_every_kernel_of_an_operator_has_a_launch() -> None:
    for operator in _runtime.load_operators().values():
        names = {one.kernel for one in operator.launches(90)} if operator.launches else set()
        assert names == set(operator.kernels), operator.name


def test_a_new_operator_joins_by_being_registered(register: Any) -> None:
    assert not list(aot.reports())
    register(launch(_copy_kernel, BLOCK=1024))
    assert [(report.operator, report.sm) for report in aot.reports()] == [
        ("toy", sm) for sm in aot.DEFAULT_SMS
    ]


@pytest.mark.parametrize("sm", aot.SHARED_LIMITS)
def test_a_copy_is_wide_and_clean_on_every_generation(register: Any, sm: int) -> None:
    report = report_of(register, launch(_copy_kernel, BLOCK=1024), sm)
    assert report.load_bytes == report.store_bytes == 16
    assert report.wide_loads == report.wide_stores == 2  # 1024 / (4 warps * 32 lanes * 4 elements)
    assert report.narrow_loads == report.narrow_stores == report.spilled_bytes == 0
    assert 0 < report.registers < 64
    assert not aot.problems(report)


def test_a_spill_is_a_problem(register: Any) -> None:
    spilling = replace(launch(_spilling_kernel, BLOCK=16384), num_warps=1)
    report = report_of(register, spilling)
    assert report.spilled_bytes
    assert report.local_loads
    assert report.local_stores
    assert any("spills" in problem for problem in aot.problems(report))
    assert not aot.problems(report_of(register, replace(spilling, supported=False)))


def test_narrow_accesses_are_a_problem_of_aligned_memory_bound_kernels(register: Any) -> None:
    narrow = replace(launch(_copy_kernel, BLOCK=128), num_warps=4)  # one element for each lane
    report = report_of(register, narrow)
    assert report.load_bytes == report.store_bytes == 4
    assert len(aot.problems(report)) == 2
    assert not aot.problems(report_of(register, replace(narrow, memory_bound=False)))
    assert not aot.problems(report_of(register, replace(narrow, aligned=())))
    assert not aot.problems(report_of(register, replace(narrow, narrow_once=1)))


def test_a_wide_minority_does_not_hide_narrow_accesses(register: Any) -> None:
    report = report_of(register, launch(_copy_kernel, BLOCK=1024))
    mixed = replace(report, narrow_loads=report.wide_loads + 1)
    assert mixed.load_bytes == 16
    assert aot.problems(mixed) == ["3 of 5 global loads under 16 bytes"]


def test_shared_memory_over_the_limit_is_a_problem(register: Any) -> None:
    product = replace(launch(_product_kernel, torch.float16, N=128), memory_bound=False)
    report = report_of(register, product)
    assert report.shared_bytes >= 2 * 128 * 128
    assert not aot.problems(report)
    assert "shared memory" in aot.problems(replace(report, shared_limit=32 << 10))[0]


@pytest.mark.parametrize("sm", aot.DEFAULT_SMS)
def test_tensor_core_instructions_are_counted(register: Any, sm: int) -> None:
    assert report_of(register, launch(_product_kernel, torch.float16, N=64), sm).tensor_core
    assert not report_of(register, launch(_copy_kernel, BLOCK=1024), sm).tensor_core


def test_wgmma_is_told_apart(register: Any) -> None:
    for N, sm, expected in ((64, 90, True), (64, 80, False), (64, 100, False)):
        product = launch(_product_kernel, torch.float16, N=N)
        assert bool(report_of(register, product, sm).wgmma) == expected


@pytest.mark.parametrize(
    ("promise", "kernel", "problem"),
    [
        ("matrix", _copy_kernel, "has no tensor-core instruction"),
        ("tma", _copy_kernel, "asks for TMA and has no TMA instruction"),
        ("warp_specialized", _copy_kernel, "asks for warp specialization and all warps do"),
    ],
)
def test_what_was_asked_for_and_is_not_there_is_a_problem(
    register: Any, promise: str, kernel: Any, problem: str
) -> None:
    one = launch(kernel, BLOCK=1024)
    assert not aot.problems(report_of(register, one))
    (found,) = aot.problems(report_of(register, replace(one, **{promise: True})))
    assert found.startswith(problem)


def test_what_was_asked_for_and_is_there_is_none(register: Any) -> None:
    product = launch(_product_kernel, torch.float16, N=64)
    report = report_of(register, replace(product, matrix=True, memory_bound=False))
    assert not aot.problems(report)
    (found,) = aot.problems(replace(report, wgmma=0))
    assert found.endswith("tensor-core instructions not of sm_90")
    bulk = launch(_bulk_copy_kernel, torch.float16, N=64)
    assert not aot.problems(report_of(register, replace(bulk, tma=True)))


@pytest.mark.parametrize("sm", [90, 100])
def test_tma_instructions_are_counted(register: Any, sm: int) -> None:
    report = report_of(register, launch(_bulk_copy_kernel, torch.float16, N=64), sm)
    assert report.tma == 2
    assert report.load_bytes == report.store_bytes == 16


def test_a_kernel_that_does_not_compile_is_reported(register: Any) -> None:
    report = report_of(register, launch(_copy_kernel, BLOCK=100))
    assert "power of 2" in report.error
    assert "does not compile" in aot.problems(report)[0]


def test_equal_launches_compile_once(register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = launch(_copy_kernel, BLOCK=1024)
    register(one, replace(one, case="again"), replace(one, num_warps=8))
    totals = set()
    found = list(aot.reports([90], progress=lambda done, total: totals.add(total)))
    assert [report.case for report in found] == ["toy", "again", "toy"]
    assert totals == {2}


def test_batches_of_the_disassembler_do_not_mix(
    register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = [launch(_copy_kernel, BLOCK=512 << i) for i in range(3)]
    register(*copies, launch(_copy_kernel, BLOCK=100), launch(_copy_kernel, BLOCK=4096))
    together = list(aot.reports([80, 90]))
    monkeypatch.setattr(aot, "DISASSEMBLED_AT_ONCE", 1)
    assert list(aot.reports([80, 90])) == together
    assert [r.wide_loads for r in together] == [1, 2, 4, 0, 8] * 2


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    aot.add_parser(parser.add_subparsers())
    args = parser.parse_args(["aot", *arguments])
    return args.run(args)


def test_command_prints_every_number(register: Any, capsys: pytest.CaptureFixture[str]) -> None:
    register(launch(_copy_kernel, BLOCK=1024))
    assert run("--sm", "80") == 0
    out, err = capsys.readouterr()
    titles, line = (text.split() for text in out.splitlines()[:2])
    row = dict(zip(titles, line, strict=True))
    assert (row["kernel"], row["sm"], row["spill"], row["load"]) == (
        "_copy_kernel",
        "80",
        "0",
        "16",
    )
    assert {"regs", "shared", "store", "tensor", "tma"} <= set(row)
    assert "compiled 1 of 1" in err


def test_command_fails_on_a_problem(register: Any, capsys: pytest.CaptureFixture[str]) -> None:
    register(launch(_copy_kernel, BLOCK=128))
    assert run("--sm", "80") == 1
    assert "problem: 1 of 1 global loads under 16 bytes" in capsys.readouterr().out
    assert run("--sm", "80", "--json") == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert len(row["problems"]) == 2
    assert row["registers"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sms": [81]}, "sm: expected one of 80, .*100.*, got 81"),
        ({"operators": ["nope"]}, "operator: expected one of .*rms_norm.*, got nope"),
    ],
)
def test_unknown_names_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aot.reports(**arguments)


def test_interpreter_and_missing_triton_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "AVAILABLE", False)
    with pytest.raises(ValueError, match="triton: expected an installed package"):
        aot.reports()
    monkeypatch.setattr(_runtime, "INTERPRET", True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET: expected unset"):
        aot.reports()


def test_leaving_early_stops_the_compilations(
    register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(sm: int, one: _runtime.Launch) -> None:
        time.sleep(0.01)
        raise ValueError("not compiled")

    monkeypatch.setattr(aot, "_compile", slow)
    register(*(launch(_copy_kernel, BLOCK=i) for i in range(1000)))
    finished = []
    found = aot.reports(progress=lambda done, total: finished.append(total))
    next(found)
    found.close()
    assert len(finished) < finished[0] == 3000

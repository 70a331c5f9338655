"""What is handed to CUDA's driver, with one that is not there."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import fake_gpu

from neobert_kernels import _driver, _runtime
from neobert_kernels._launch import Prepared
from neobert_kernels.ops._norms import norm_forward_kernel

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(_runtime.INTERPRET, reason="the interpreter has no binaries"),
]


@pytest.fixture
def gpu():
    with fake_gpu() as launches:
        yield launches


def bind(*call):
    return _driver.Queue().bind(*call)


def started(C):
    """A kernel on rows ``[5, C]``, compiled and started by Triton, and its arguments."""
    x, y = torch.zeros(5, C), torch.zeros(5, C)
    constexprs = {"C": C, "CHUNK": C, "TAIL": 0, "ROWS": 1, "CENTERED": False}
    prepared = Prepared(norm_forward_kernel, constexprs, num_warps=2)
    arguments = (x, None, torch.zeros(C), None, y, None, 5, C, 0, 1e-5)
    prepared((5, 1, 1), *arguments)
    return prepared.binary(*arguments), arguments


@pytest.mark.parametrize("C", [16, 1], ids=["wide", "a stride of 1, which is compiled in"])
def test_the_driver_gets_what_triton_gave_it(gpu, C):
    compiled, arguments = started(C)
    queue = _driver.Queue()
    launch = queue.bind(compiled, (5, 1, 1), arguments)
    queue.run([launch, launch], 0)
    by_triton, *others = gpu.calls
    assert by_triton.numbers == others[0].numbers == others[1].numbers
    assert by_triton.kinds.count("i32") == (3 if C > 1 else 2)
    same = [call._replace(arguments=(), by_driver=False) for call in gpu.calls]
    assert same[0] == same[1] == same[2]
    assert [call.by_driver for call in gpu.calls] == [False, True, True]


def test_launches_go_to_the_stream_of_their_run(gpu):
    """Also those that were bound before, or later."""
    compiled, arguments = started(16)
    queue = _driver.Queue()
    grids = [(5, 1, 1), (5, 1, 1), (6, 1, 1)]
    launches = [queue.bind(compiled, grid, arguments) for grid in grids]
    for stream in (0, 1 << 40, 7, 7):
        gpu.calls.clear()
        queue.run(launches, stream)
        assert [(c.stream, c.grid) for c in gpu.calls] == [(stream, grid) for grid in grids]
        launches.append(queue.bind(compiled, (8, stream + 1 & 7, 1), arguments))
        grids.append((8, stream + 1 & 7, 1))


def test_the_driver_finds_no_scratch_memory(gpu):
    """Triton hands these addresses over behind the arguments, whether or not there is any."""
    compiled, arguments = started(16)
    launch = bind(compiled, (5, 1, 1), arguments)
    taken = _driver.parameters(compiled.asm["ptx"])
    assert taken[-2:] == [8, 8]
    _, addresses, *cells = launch.arguments
    assert len(addresses) == len(cells) == len(taken)
    assert [cell.value for cell in cells[-2:]] == [0, 0]
    assert list(addresses) == list(map(ctypes.addressof, cells))


def test_a_cell_is_read_at_each_start(gpu):
    compiled, arguments = started(16)
    rows, x = _driver.Int(5), _driver.Pointer(1 << 40)
    cells = (x, *arguments[1:6], rows, *arguments[7:])
    queue = _driver.Queue()
    launch = queue.bind(compiled, (5, 1, 1), cells)
    queue.run([launch], 0)
    rows.value, x.value = 3, 1 << 41
    queue.run([launch], 0)
    assert [(c.numbers[0], c.numbers[3]) for c in gpu.calls[1:]] == [(1 << 40, 5), (1 << 41, 3)]


def with_metadata(**changes):
    def change(compiled):
        return {"metadata": compiled.metadata._replace(**changes)}

    return change


def with_ptx(old, new):
    def change(compiled):
        assert old in compiled.asm["ptx"]
        return {"asm": {"ptx": compiled.asm["ptx"].replace(old, new, 1)}}

    return change


OTHERS = {
    "scratch memory": with_metadata(global_scratch_size=16),
    "a profile's memory": with_metadata(profile_scratch_size=16),
    "programs that wait for each other": with_metadata(launch_cooperative_grid=True),
    "a dependent launch": with_metadata(launch_pdl=True),
    "clusters": with_metadata(num_ctas=2),
    "descriptors": with_metadata(tensordesc_meta=[{}]),
    "a number of 64 bits": with_ptx(".param .u32", ".param .u64"),
    "fewer arguments": with_ptx(".param .f32 norm_forward_kernel_param_6,", ""),
    "a structure": with_ptx(".param .u64 .ptr .global .align 1 ", ".param .align 64 .b8 "),
    "more behind them": with_ptx("\n)", ",\n.param .u64 more\n)"),
    "a number behind them": with_ptx("\n)", ",\n.param .u32 more\n)"),
    "a type that we do not hand over": lambda compiled: {
        "src": SimpleNamespace(signature=compiled.src.signature | {"eps": "fp64"})
    },
}


@pytest.mark.parametrize("what", OTHERS)
def test_nothing_is_bound_that_takes_more_than_its_arguments(gpu, what):
    compiled, arguments = started(16)
    parts = {name: getattr(compiled, name) for name in ("metadata", "asm", "src", "function")}
    same = SimpleNamespace(**parts)
    assert bind(same, (5, 1, 1), arguments) is not None
    other = SimpleNamespace(**parts | OTHERS[what](compiled))
    assert bind(other, (5, 1, 1), arguments) is None


def test_a_kernel_that_has_not_started_is_not_bound():
    assert bind(None, (1, 1, 1), ()) is None


def test_an_error_of_the_driver_is_raised(gpu, monkeypatch):
    refusing = ctypes.CFUNCTYPE(ctypes.c_int, *_driver.library().argtypes)(lambda *_: 201)
    compiled, arguments = started(16)
    queue = _driver.Queue()
    launch = queue.bind(compiled, (5, 1, 1), arguments)
    monkeypatch.setattr(_driver, "library", lambda: _driver.declared(refusing))
    rule = "^launch: expected success of cuLaunchKernelEx, got its error 201$"
    with pytest.raises(RuntimeError, match=rule):
        queue.run([launch], 0)

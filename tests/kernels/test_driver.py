"""What is handed to CUDA's driver, with one that is not there."""

import ctypes
from types import SimpleNamespace
from typing import NamedTuple

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


def start(launch):
    assert not _driver.starter()(*launch.call, None)


class Blocks(NamedTuple):
    """Of rows."""

    block: int

    def programs(self, rows):
        return -(-rows // self.block)


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
    launch = bind(compiled, (5, 1, 1), arguments)
    for _ in range(2):
        start(launch)
    by_triton, *others = gpu.calls
    assert by_triton.numbers == others[0].numbers == others[1].numbers
    assert by_triton.kinds.count("i32") == (3 if C > 1 else 2)
    same = [call._replace(arguments=(), by_driver=False) for call in gpu.calls]
    assert same[0] == same[1] == same[2]
    assert [call.by_driver for call in gpu.calls] == [False, True, True]


def test_launches_follow_the_stream_and_the_number_of_rows(gpu):
    """What is scaled, whenever it was bound; others stay where they were."""
    compiled, arguments = started(16)
    queue = _driver.Queue()
    cells = (*arguments[:6], queue.rows, *arguments[7:])
    queue.turn_to(3, 5)
    fixed = queue.bind(compiled, (5, 1, 1), arguments)
    scaled = [queue.bind(compiled, (5, 1, 1), cells, Blocks(1))]
    for stream, rows in ((3, 5), (1 << 40, 5), (1 << 40, 7), (0, 1), (0, 1)):
        gpu.calls.clear()
        queue.turn_to(stream, rows)
        for launch in (fixed, *scaled):
            start(launch)
        first, *others = [(c.stream, c.grid, c.numbers[3]) for c in gpu.calls]
        assert first == (3, (5, 1, 1), 5)
        assert others[0] == (stream, (rows, 1, 1), rows)
        assert others[1:] == [(stream, (-(-rows // 2), 2, 1), rows)] * (len(scaled) - 1)
        scaled.append(queue.bind(compiled, (-(-rows // 2), 2, 1), cells, Blocks(2)))


def test_what_an_interrupt_left_is_done_by_the_next_call(gpu):
    """Even for the same stream and rows."""

    class Interrupted(NamedTuple):
        def programs(self, rows):
            if interrupts:
                raise KeyboardInterrupt
            return rows

    compiled, arguments = started(16)
    queue, interrupts = _driver.Queue(), False
    queue.turn_to(3, 5)
    launch = queue.bind(compiled, (5, 1, 1), arguments, Interrupted())
    interrupts = True
    with pytest.raises(KeyboardInterrupt):
        queue.turn_to(4, 400)
    interrupts = False
    queue.turn_to(4, 400)
    start(launch)
    assert (gpu.calls[-1].grid, gpu.calls[-1].stream) == ((400, 1, 1), 4)


def test_a_launch_keeps_its_kernel_loaded(gpu):
    compiled, arguments = started(16)
    assert any(kept is compiled for kept in bind(compiled, (5, 1, 1), arguments).kept)


def test_the_driver_finds_no_scratch_memory(gpu):
    """Triton hands these addresses over behind the arguments, whether or not there is any."""
    compiled, arguments = started(16)
    launch = bind(compiled, (5, 1, 1), arguments)
    taken = _driver.parameters(compiled.asm["ptx"])
    assert taken[-2:] == [8, 8]
    _, _, addresses, *cells = launch.kept
    assert len(addresses) == len(cells) == len(taken)
    assert [cell.value for cell in cells[-2:]] == [0, 0]
    assert list(addresses) == list(map(ctypes.addressof, cells))


def test_a_cell_is_read_at_each_start(gpu):
    compiled, arguments = started(16)
    rows, x = _driver.Int(5), _driver.Pointer(1 << 40)
    cells = (x, *arguments[1:6], rows, *arguments[7:])
    launch = bind(compiled, (5, 1, 1), cells)
    start(launch)
    rows.value, x.value = 3, 1 << 41
    start(launch)
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

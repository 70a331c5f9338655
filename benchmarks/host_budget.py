"""What a patched forward costs the host, on any machine: launches, allocations, waits, time.

To count, a model is on PyTorch's "meta" device: every operator runs as a shape function of its own
schema, without data, and what would have to wait for data raises. For time, shape functions in
Python are too slow: a narrow model on the CPU runs its small products, and our kernels go to a
driver that starts nothing. In both, operators of ours take the kernels' path, as on a GPU.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from fake_gpu import fake_gpu
from torch.utils._python_dispatch import TorchDispatchMode

import neobert_kernels as nk
from neobert_kernels import _check, _driver, _runtime, patching
from neobert_kernels.ops import _norms, swiglu
from neobert_kernels.ops.attention import launch as attention
from neobert_kernels.ops.attention import tiles
from neobert_kernels.ops.fused_linear import launch as fused
from neobert_kernels.patching import direct, modernbert

GENERATION = 90  # of the GPU whose launch choices are counted
COUNTED = 6  # layers; half as many are taken off
# Operators that hand out memory and start nothing.
SILENT = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}


@dataclass
class Counts:
    """Of one forward.

    Attributes:
        launches: By operator. Ours count what they launch; a view starts nothing.
        allocations: Tensors with memory of their own that operators returned.
        waits: Operators that read data back to the host.
    """

    launches: Counter[str] = field(default_factory=Counter)
    allocations: int = 0
    waits: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.launches.values())


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in WAITING:
            self.counts.waits[name] += 1
        out = func(*args, **(kwargs or {}))
        tensors = [r for r in func._schema.returns if "Tensor" in str(r.type)]
        fresh = [r for r in tensors if r.alias_info is None]
        writes = any(r.alias_info and r.alias_info.is_write for r in tensors)
        idle = name == "aten::dropout" and not args[2]  # in evaluation mode it is its argument
        if idle or not (fresh or writes):
            return out
        self.counts.allocations += len(fresh)
        if name not in SILENT:
            self.counts.launches[name] += _launches(name, args)
        return out


WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::is_nonzero"}


def _launches(name: str, args: tuple[Any, ...]) -> int:
    """Of attention: one, or two where RoPE turns q and k before it."""
    sizes = {"neobert::attention": 3, "neobert::qkv_attention": 1}
    if name not in sizes:
        return 1
    q, (_, max_seqlen, cos) = args[0], args[sizes[name] :][:3]
    if cos is None:
        return 1
    choice = tiles.choose(q.shape[-1], q.dtype, GENERATION, max_seqlen, aligned=True)
    return 1 if choice.turns_inside(backward=False) else 2


def _nothing(*args: Any) -> None:
    """In place of checks that read data."""


def _always(x: torch.Tensor) -> bool:
    return True


def _never(x: torch.Tensor) -> bool:
    return False


@contextmanager
def without_data() -> Iterator[None]:
    """Models on the meta device can be patched, and our operators take the kernels' path there."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(patching, "_check_parameters", _nothing))
        stack.enter_context(mock.patch.object(modernbert, "_check_angles", _nothing))
        stack.enter_context(mock.patch.object(_runtime, "use_kernel", _always))
        yield


@contextmanager
def without_launches() -> Iterator[None]:
    """Our operators on CPU tensors do all that they do on a GPU, but the launch.

    Kernels are compiled, and Triton is called as always: behind it stands a driver that starts
    nothing. Checks that read data, as only a CPU's can be, are off.

    What kernels would have written is whatever was in memory: denormal numbers, with which a CPU's
    products take ten times as long, count as zeros. It is one thread's time: others would add
    their waits for each other to products that are not there on a GPU.
    """
    with ExitStack() as stack:
        stack.callback(torch.set_flush_denormal, False)
        torch.set_flush_denormal(True)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        stack.enter_context(fake_gpu(GENERATION)).keep = False
        stack.enter_context(mock.patch.object(_check, "readable", _never))
        stack.enter_context(mock.patch.object(_runtime, "use_kernel", _always))
        yield


def narrow(make: Any, layers: int, **options: Any) -> Any:
    """A patched model whose products take little time, on the CPU; inside `without_launches`.

    In float32, in which a CPU multiplies small matrices fastest.
    """
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 48}
    small = {"vocab_size": 100, "pad_token_id": 1, "num_hidden_layers": layers}
    config = make(num_hidden_layers=1, vocab_size=100, pad_token_id=1).config
    if hasattr(config, "num_key_value_heads"):
        small["num_key_value_heads"] = 2
    model = make(**sizes, **small).float().eval()
    nk.patch(model, **options)
    return model


def batch(lengths: list[int], device: str = "meta") -> dict[str, Any]:
    """A packed call."""
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {
        "input_ids": torch.full((1, sum(lengths)), 2, device=device),
        "cu_seq_lens_q": bounds.to(device),
        "max_length_q": max(lengths),
    }


def build(make: Any, layers: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """A patched model on the meta device; inside `without_data`."""
    with torch.device("meta"):
        model = make(num_hidden_layers=layers).to(dtype).eval()
    nk.patch(model, **options)
    return model


@contextmanager
def _counted(counts: Counts) -> Iterator[None]:
    """What layers without modules start themselves, which no dispatcher sees."""

    class Started:
        """In place of a launch that is ready."""

        def __init__(self, name: str) -> None:
            self.name = name

        def start(self) -> None:
            counts.launches[self.name] += 1

    def attend(out: Any, lse: Any, turned: Any, *args: Any) -> list[Started]:
        return [Started("neobert::attention")] * _launches("neobert::attention", args)

    with ExitStack() as stack:
        # The counter is itself a mode, under which nothing would go past the dispatcher.
        stack.enter_context(mock.patch.object(direct, "in_a_mode", return_value=False))
        stack.enter_context(mock.patch.object(_driver, "library", return_value=None))
        for module, name in ((fused, "fused_linear"), (_norms, "norm"), (swiglu, "swiglu")):
            launch = Started(f"neobert::{name}")
            stack.enter_context(mock.patch.object(module, "ready", return_value=launch))
        stack.enter_context(mock.patch.object(attention, "ready", attend))
        yield


@torch.inference_mode()
def count(model: Any, lengths: list[int]) -> Counts:
    """Inside `without_data`."""
    recorder = _Recorder()
    with recorder, _counted(recorder.counts):
        model(**batch(lengths))
    return recorder.counts


def per_layer(make: Any, lengths: list[int], **options: Any) -> tuple[Counts, Counts]:
    """``(whole, one layer's share)``, whole of six layers; three of them against the other three.

    ModernBERT's local and global layers launch the same.
    """
    with without_data():
        few, whole = (count(build(make, n, **options), lengths) for n in (COUNTED // 2, COUNTED))
    share = Counts(allocations=(whole.allocations - few.allocations) // 3)
    for name, number in whole.launches.items():
        share.launches[name] = (number - few.launches[name]) // 3
    return whole, Counts(+share.launches, share.allocations, whole.waits)

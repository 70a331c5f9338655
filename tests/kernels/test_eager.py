"""Calls that nobody watches go to the launcher; all others go where they always went."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from neobert_kernels import _eager, _runtime

entered: list[str] = []


def launch(x, factor):
    entered.append("launcher")
    return x * factor


_handle = _runtime.register(
    "probe(Tensor x, float factor) -> Tensor", launch, lambda x, factor: torch.empty_like(x)
)


class Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        entered.append("function")
        ctx.factor = factor
        return _handle(x, factor)

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.factor, None


probe = _runtime.differentiable(Probe, _handle)


@pytest.fixture(autouse=True)
def nothing_entered():
    entered.clear()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
def test_a_call_without_a_gradient_goes_to_the_launcher(kind, mode):
    x = torch.arange(3.0)
    if kind is torch.nn.Parameter:
        x = kind(x, requires_grad=mode is not torch.enable_grad)
    with mode():
        y = probe(x, 2.0)
    assert entered == ["launcher"]
    assert y.tolist() == [0, 2, 4]
    assert y.grad_fn is None
    assert not y.requires_grad
    assert y.is_inference() == (mode is torch.inference_mode)


def test_a_gradient_is_recorded_where_a_tensor_wants_one():
    x = torch.arange(3.0, requires_grad=True)
    y = probe(x, 2.0)
    assert entered == ["function", "launcher"]
    y.sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def under_a_dispatch_mode(x):
    with Names() as names:
        probe(x, 2.0)
    return names.seen


def under_the_profiler(x):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        probe(x, 2.0)
    return [event.name for event in profile.events()]


def in_a_trace(x):
    traced = torch.jit.trace(lambda x: probe(x, 2.0), (x,))
    return ["neobert::probe" for node in traced.graph.nodes() if node.kind() == "prim::PythonOp"]


def compiled(x):
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target).removesuffix(".default") for node in graph.graph.nodes)
        return graph.forward

    torch.compile(lambda x: probe(x, 2.0), backend=backend, fullgraph=True)(x)
    return [name.replace(".", "::") for name in seen]


WATCHERS = [under_a_dispatch_mode, under_the_profiler, in_a_trace, compiled]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("watch", WATCHERS, ids=lambda watch: watch.__name__)
def test_who_watches_sees_the_operator(watch):
    with torch.no_grad():
        assert "neobert::probe" in watch(torch.arange(3.0))


def test_a_device_as_a_context_is_asked():
    with torch.no_grad(), torch.device("cpu"):
        probe(torch.arange(3.0), 2.0)
    assert entered == ["function", "launcher"]


def test_a_subclass_of_tensor_has_its_own_dispatch():
    class Own(torch.Tensor):
        pass

    with torch.no_grad():
        probe(torch.arange(3.0).as_subclass(Own), 2.0)
    assert entered[0] == "function"


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_transforms_and_forward_gradients_are_refused_as_ever():
    x = torch.arange(3.0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(lambda row: probe(row, 2.0))(x[None])
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x, torch.ones(3))
        with pytest.raises(RuntimeError, match="jvp"):
            probe(dual, 2.0)


def test_a_build_without_the_signs_watches_every_call(monkeypatch):
    monkeypatch.setattr(_eager, "_KNOWN", False)
    with torch.no_grad():
        probe(torch.arange(3.0), 2.0)
    assert entered == ["function", "launcher"]


@pytest.mark.parametrize("runs", [True, False])
def test_what_the_extension_may_take_goes_to_the_dispatcher(runs, monkeypatch):
    def dispatcher(x, factor):
        entered.append("dispatcher")
        return x * factor

    monkeypatch.setitem(_runtime._LAUNCHERS, dispatcher, (launch, True))
    monkeypatch.setattr(_runtime, "extension_may_run", lambda x: runs)
    with torch.no_grad():
        assert _runtime.differentiable(Probe, dispatcher)(torch.ones(1), 3.0).item() == 3
    assert entered == ["dispatcher" if runs else "launcher"]

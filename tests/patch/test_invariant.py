"""`batch_invariant=True` where kernels run: one forward for the whole batch, also by a graph."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from encoders import ENCODERS, VOCABULARY, randomized
from stand_in import StandIn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels.ops.attention import tiles
from neobert_kernels.patching import family as families
from neobert_kernels.patching import graphs, invariant
from neobert_kernels.patching.graphs import GRAPHS, Graphs
from neobert_kernels.patching.invariant import INVARIANT

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROUNDS = 100 if CUDA else 2
LENGTHS = (6, 1, 12)  # of the texts that are looked at
# In the interpreter what differs: a pooler, windows, q and k that turn, fewer keys than queries.
CASES = [("bert", False), ("bert", True), ("modernbert", False), ("neobert", True)]
CASES += [("eurobert", True)]
if CUDA:
    CASES = [(family, inference) for family in ENCODERS for inference in (False, True)]
runs_kernel = pytest.mark.skipif(
    not CUDA and not _runtime.INTERPRET, reason="no kernel runs on the CPU"
)


class NoOtherProduct(TorchDispatchMode):
    """On a CPU torch's products of a few rows may have the right bits by chance."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ours = func.namespace == "neobert"
        assert ours or not any(word in str(func) for word in ("mm", "linear", "matmul", "dot"))
        return func(*args, **(kwargs or {}))


pytestmark = pytest.mark.usefixtures("ordered_products")


@pytest.fixture
def recorder(monkeypatch):
    if not CUDA:
        monkeypatch.setattr(Graphs.__init__, "__defaults__", (StandIn, 4))


@pytest.fixture
def together(monkeypatch):
    """No document may run by itself."""
    monkeypatch.setattr(families, "_run_each", None)


@pytest.fixture
def longest(monkeypatch):
    """The longest documents that attention chose its tiles by."""
    seen, choose = set(), tiles.choose

    def spy(D, dtype, sm, longest, aligned):
        seen.add(longest)
        return choose(D, dtype, sm, longest, aligned)

    monkeypatch.setattr(tiles, "choose", spy)
    return seen


def patched_model(family="bert", kind=None, **options):
    torch.manual_seed(0)
    # The first layer of ModernBERT has no window.
    encoder, changes = ENCODERS[family], {"num_hidden_layers": 1 + (family == "modernbert")}
    model = encoder.base(**changes) if kind is None else encoder.head(kind, **changes)
    model = randomized(model).to(DEVICE).eval()
    nk.patch(model, batch_invariant=True, **options)
    return model


def packed(texts):
    lengths = [len(text) for text in texts]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    inputs = {"input_ids": torch.cat(texts)[None], "cu_seq_lens_q": bounds}
    return {k: v.to(DEVICE) for k, v in inputs.items()} | {"max_length_q": max(lengths)}


def batches(rounds):
    """``(texts, places)``: the looked-at texts, then these among others in a random order."""
    generator = torch.Generator().manual_seed(0)

    def draw(lengths):
        return [torch.randint(2, VOCABULARY, (n,), generator=generator) for n in lengths]

    own = draw(LENGTHS)
    yield own, list(range(len(own)))
    for _ in range(rounds - 1):
        count = int(torch.randint(1, 9 if CUDA else 3, (), generator=generator))
        others = draw(torch.randint(1, 60 if CUDA else 9, (count,), generator=generator).tolist())
        order = torch.randperm(len(own) + count, generator=generator).tolist()
        yield [(own + others)[i] for i in order], [order.index(i) for i in range(len(own))]


def rows_of(out, texts, places):
    """What belongs to the looked-at texts."""
    ends = torch.tensor([len(text) for text in texts]).cumsum(0).tolist()
    found = [out.last_hidden_state[0, ends[i] - len(texts[i]) : ends[i]] for i in places]
    if out.get("pooler_output") is not None:
        found += [out.pooler_output[i] for i in places]
    return found


@runs_kernel
@pytest.mark.parametrize(("family", "inference"), CASES)
@torch.no_grad()
def test_a_text_has_its_bits_in_any_batch_and_in_any_graph(
    family, inference, together, recorder, longest
):
    eager = patched_model(family, inference=inference)
    replayed = patched_model(family, inference=inference, cuda_graphs=True)
    expected = None
    for texts, places in batches(1000 if CUDA and family == "neobert" else ROUNDS):
        inputs = packed(texts)
        with nullcontext() if expected else NoOtherProduct():
            out = eager(**inputs)
        found = rows_of(out, texts, places)
        expected = expected or found
        assert all(map(torch.equal, found, expected))
        if len(texts) != len(LENGTHS) or CUDA:  # a graph pads every other batch
            again = replayed(**inputs)
            assert torch.equal(again.last_hidden_state, out.last_hidden_state)
            if out.get("pooler_output") is not None:
                assert torch.equal(again.pooler_output, out.pooler_output)
    assert len(replayed.__dict__[GRAPHS].entries)
    assert len(longest) == 1


@runs_kernel
@pytest.mark.parametrize("kind", ["mlm", "sequence", "token"] if CUDA else ["sequence"])
@torch.no_grad()
def test_heads_too_run_over_the_whole_batch(kind, together, monkeypatch):
    monkeypatch.setattr(families.Packed, "documents", None)
    model = patched_model("neobert", kind)
    expected = None
    for texts, places in batches(ROUNDS):
        with nullcontext() if expected else NoOtherProduct():
            logits = model(**packed(texts)).logits
        if kind == "sequence":
            found = [logits[i] for i in places]
        else:
            parts = logits.view(-1, logits.shape[-1]).split([len(text) for text in texts])
            found = [parts[i] for i in places]
        expected = expected or found
        assert all(map(torch.equal, found, expected))


@runs_kernel
@torch.no_grad()
def test_numbers_are_those_of_the_patched_model(together):
    model = patched_model("modernbert")
    inputs = packed(next(batches(1))[0])
    ours = model(**inputs).last_hidden_state
    nk.unpatch(model)
    nk.patch(model)
    torch.testing.assert_close(ours, model(**inputs).last_hidden_state, rtol=1e-4, atol=1e-4)


@runs_kernel
def test_gradients_are_recorded_as_before(monkeypatch):
    """Document by document; a Linear layer between frozen ones records its own."""
    monkeypatch.setattr(nk, "batch_invariant_linear", None)
    model = patched_model("neobert")
    texts = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    model(**packed(texts)).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@runs_kernel
def test_a_linear_layer_follows_autocast():
    model = patched_model()
    dense = model.encoder.layer[0].intermediate.dense
    x = torch.randn(5, 48, device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        y = dense(x)
    half = [t.detach().bfloat16() for t in (x, dense.weight, dense.bias)]
    assert torch.equal(y, nk.batch_invariant_linear(*half))
    assert dense(x).requires_grad


def test_what_is_not_known_to_keep_rows_apart(monkeypatch):
    model = patched_model()
    assert invariant.why_apart(model) is None
    intermediate = model.encoder.layer[0].intermediate
    hook = intermediate.register_forward_hook(lambda *call: None)
    assert invariant.why_apart(model) == "a hook on encoder.layer.0.intermediate"
    hook.remove()
    dense = intermediate.dense
    for other, name in [
        (nn.Linear(48, 80), "Linear"),  # without our forward
        (type("Scaled", (nn.Linear,), {})(48, 80), "Scaled"),
        (nn.MultiheadAttention(48, 3), "MultiheadAttention"),
    ]:
        intermediate.dense = other
        why = invariant.why_apart(model)
        assert why == f"encoder.layer.0.intermediate.dense, a {name} of its own"
    intermediate.dense = dense
    assert invariant.why_apart(model) is None
    monkeypatch.setenv("NEOBERT_ATTENTION", "sdpa_math")
    assert invariant.why_apart(model) == "a peer's attention"


@runs_kernel
@torch.no_grad()
def test_documents_run_one_by_one_where_it_is_not_known(recorder, monkeypatch):
    model = patched_model(cuda_graphs=True)
    texts = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    model.encoder.layer[0].intermediate.dense = nn.Linear(48, 80, device=DEVICE)
    rule = r"^model: expected layers that keep a row's bits .*, got encoder\.layer\.0\.intermediate"
    with pytest.raises(ValueError, match=rule):
        model(**packed(texts))
    nk.unpatch(model)
    nk.patch(model, batch_invariant=True)
    model.pooler.activation = type("Other", (nn.Tanh,), {})()
    seen = []
    run_each = families._run_each
    monkeypatch.setattr(families, "_run_each", lambda *a: seen.append(a) or run_each(*a))
    expected = model(**packed(texts[:1])).pooler_output
    assert torch.equal(model(**packed(texts)).pooler_output[:1], expected)
    assert len(seen) == 2


def test_every_linear_layer_gets_a_forward_and_loses_it_again():
    model = patched_model("roberta", "sequence")
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    assert all("forward" in m.__dict__ for m in layers)
    twin = copy.deepcopy(model)
    for module in (m for m in twin.modules() if type(m) is nn.Linear):
        assert module.forward.__self__ is module
    plain = pickle.loads(pickle.dumps(twin))
    assert not nk.patching.is_patched(plain)
    invariant.why_apart(model)
    nk.unpatch(model)
    assert not any("forward" in m.__dict__ or INVARIANT in m.__dict__ for m in model.modules())


def test_a_linear_layer_that_somebody_wrapped_stays(monkeypatch):
    torch.manual_seed(0)
    model = ENCODERS["bert"].base().eval()
    dense = model.pooler.dense
    monkeypatch.setattr(dense, "forward", lambda x: x, raising=False)
    report = nk.patch(model, batch_invariant=True)
    assert "pooler.dense" not in [entry.name for entry in report.replaced]
    assert invariant.why_apart(model) == "pooler.dense, a Linear of its own"


def test_graphs_are_as_few_as_one_length_makes_them(recorder):
    model = patched_model(cuda_graphs=True)
    assert model.__dict__[GRAPHS].limits == [64]
    nk.unpatch(model)
    nk.patch(model, cuda_graphs=True)
    assert model.__dict__[GRAPHS].limits == graphs.edges(set())

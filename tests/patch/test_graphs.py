"""`patch(model, cuda_graphs=True)`: buckets, padding, routing; on a GPU the graphs."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from encoders import ENCODERS, VOCABULARY, padded, randomized
from hypothesis import given
from hypothesis import strategies as st
from stand_in import StandIn

import neobert_kernels as nk
from neobert_kernels.patching import graphs
from neobert_kernels.patching.graphs import GRAPHS, Graphs, bucket_of, edges, padded_bounds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: graphs record one")
lengths_of_documents = st.lists(st.integers(0, 700), min_size=1, max_size=40)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(StandIn, "recorded", 0)
    monkeypatch.setattr(Graphs.__init__, "__defaults__", (StandIn, 4))
    return StandIn


def patched_model(family="bert", **options):
    torch.manual_seed(0)
    model = randomized(ENCODERS[family].base()).to(DEVICE).eval()
    nk.patch(model, cuda_graphs=True, **options)
    return model


def packed(lengths, generator=None):
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ids = torch.randint(2, VOCABULARY, (1, sum(lengths)), generator=generator)
    inputs = {"input_ids": ids, "cu_seq_lens_q": bounds}
    return {k: v.to(DEVICE) for k, v in inputs.items()} | {"max_length_q": max(lengths)}


def over_bucket(inputs, limits):
    """The same call with its bucket's padding, for a model without graphs."""
    ids, bounds = inputs["input_ids"], inputs["cu_seq_lens_q"]
    bucket = bucket_of(ids.shape[1], len(bounds) - 1, inputs["max_length_q"], limits)
    more = ids[:, :1].expand(1, bucket.tokens - ids.shape[1])
    return {
        "input_ids": torch.cat([ids, more], 1),
        "cu_seq_lens_q": padded_bounds(bounds, ids.shape[1], bucket),
        "max_length_q": bucket.max_seqlen,
    }


def random_lengths(generator, most=30):
    count = int(torch.randint(1, 6, (), generator=generator))
    return torch.randint(1, most, (count,), generator=generator).tolist()


@given(lengths_of_documents, st.sampled_from([set(), {2}, {64}, {128, 2}]))
def test_a_bucket_takes_its_batch(lengths, windows):
    limits = edges(windows)
    tokens, longest = sum(lengths), max(lengths)
    bucket = bucket_of(tokens, len(lengths), longest, limits)
    assert tokens <= bucket.tokens <= max(graphs.LEAST_TOKENS, 3 * tokens // 2)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    whole = padded_bounds(bounds, tokens, bucket)
    assert whole.dtype == torch.int32
    assert len(whole) == bucket.documents + 1
    assert whole[: len(bounds)].tolist() == bounds.tolist()
    assert int(whole[-1]) == bucket.tokens
    assert 0 <= int(whole.diff().min()) <= int(whole.diff().max()) <= bucket.max_seqlen
    assert bucket.documents < 4 * (len(lengths) + -(-bucket.tokens // bucket.piece))


@given(st.integers(0, 3000), st.sampled_from([set(), {2}, {64}, {1023}, {4000}]))
def test_a_bucket_launches_attention_as_its_batch_does(longest, windows):
    from neobert_kernels.ops.attention import tiles

    recorded = bucket_of(longest, 1, longest, edges(windows)).max_seqlen
    for sm in (80, 90, 100):
        for D, dtype in ((64, torch.bfloat16), (128, torch.float32)):
            one, other = (tiles.choose(D, dtype, sm, n, True) for n in (longest, recorded))
            assert one == other
    assert all((w < longest - 1) == (w < recorded - 1) for w in windows)


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_buckets_grow_with_their_batch_and_are_few(a, b):
    a, b = sorted((a, b))
    sizes = [bucket_of(n, 1, 64, edges(set())).tokens for n in (a, b)]
    assert sizes == sorted(sizes)
    assert all(bucket_of(n, 1, 64, edges(set())).tokens == n for n in sizes)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_replays_give_the_bits_of_eager_over_the_bucket(family, inference, stand_in):
    if DEVICE == "cpu":
        rounds = 8
    else:
        rounds = 1000
        Graphs.__init__.__defaults__ = (graphs.CudaGraph, graphs.MOST_GRAPHS)
    model = patched_model(family, inference=inference)
    limits = model.__dict__[GRAPHS].limits
    eager = patched_model(family, inference=inference)
    nk.unpatch(eager)
    nk.patch(eager, inference=inference)
    generator = torch.Generator().manual_seed(0)
    for number in range(rounds):
        inputs = packed(random_lengths(generator), generator)
        with (
            torch.inference_mode(number % 2 == 0),
            torch.no_grad(),
        ):  # a graph of one mode serves the other
            found, expected = model(**inputs), eager(**over_bucket(inputs, limits))
        T, B = inputs["input_ids"].shape[1], len(inputs["cu_seq_lens_q"]) - 1
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state[:, :T])
        if found.get("pooler_output") is not None:
            assert torch.equal(found.pooler_output, expected.pooler_output[:B])
    if DEVICE == "cpu":
        assert 1 < stand_in.recorded < rounds


@torch.no_grad()
def test_padded_batches_and_heads(stand_in):
    torch.manual_seed(0)
    model = randomized(ENCODERS["roberta"].head("token")).to(DEVICE).eval()
    ids, mask = (x.to(DEVICE) for x in padded("roberta"))
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with nk.patched(model):
        expected = model(**inputs).logits
    with nk.patched(model, cuda_graphs=True):
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        embeds = model.get_input_embeddings()(ids)
        model(inputs_embeds=embeds, attention_mask=mask)
    assert stand_in.recorded == 2


@torch.no_grad()
def test_the_least_recently_used_graph_makes_room(stand_in):
    model = patched_model()
    kept = model.__dict__[GRAPHS].entries
    for lengths in ([16], [24], [32], [48], [16], [60]):
        model(**packed(lengths))
    assert [key[0].tokens for key in kept] == [32, 48, 16, 64]
    assert stand_in.recorded == 5


@torch.no_grad()
def test_moved_weights_are_recorded_again_and_changed_ones_read(stand_in):
    model = patched_model()
    inputs = packed([9, 3])
    model(**inputs)
    model.embeddings.word_embeddings.weight.mul_(2)
    model(**inputs)
    assert stand_in.recorded == 1
    model.embeddings.word_embeddings.weight.data = model.embeddings.word_embeddings.weight + 1
    found = model(**inputs).last_hidden_state
    assert stand_in.recorded == 2
    nk.unpatch(model)
    with nk.patched(model):
        expected = model(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_training_gradients_compilers_and_large_batches_run_without(stand_in):
    model = patched_model("neobert")
    inputs = packed([9, 3])
    model(**inputs).last_hidden_state.sum().backward()
    assert model.layer_norm.weight.grad is not None
    with torch.inference_mode():
        model.train()(**inputs)
        torch.compile(model.eval(), backend="eager")(**inputs)
        model(input_ids=torch.zeros(0, 3, dtype=torch.int64, device=DEVICE))
        many = [64] * (graphs.MOST_TOKENS // 64 + 1)
        model(**packed(many))
    assert not stand_in.recorded


@torch.no_grad()
def test_what_cannot_be_recorded_is_refused(stand_in):
    model = patched_model()
    inputs = packed([9, 3])
    with pytest.raises(ValueError, match=r"^output_hidden_states: expected False with cuda_gra"):
        model(**inputs, output_hidden_states=True)
    hook = model.encoder.layer[1].register_forward_hook(lambda *call: None)
    with pytest.raises(ValueError, match=r"got one on encoder\.layer\.1$"):
        model(**inputs)
    hook.remove()
    model(**inputs)


@pytest.mark.skipif(DEVICE == "cuda", reason="about a CPU")
@torch.no_grad()
def test_a_cpu_is_refused():
    model = patched_model()
    with pytest.raises(ValueError, match=r"^model: expected a CUDA device with cuda_graphs=True"):
        model(**packed([9, 3]))


@torch.no_grad()
def test_copies_record_for_themselves(stand_in):
    model = patched_model()
    inputs = packed([9, 3])
    expected = model(**inputs).last_hidden_state
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).last_hidden_state, expected)
    assert stand_in.recorded == 2
    assert not nk.patching.is_patched(pickle.loads(pickle.dumps(twin)))
    nk.unpatch(model)
    assert GRAPHS not in model.__dict__


def test_threads_and_streams_get_their_own_results(stand_in):
    if DEVICE == "cuda":
        Graphs.__init__.__defaults__ = (graphs.CudaGraph, graphs.MOST_GRAPHS)
    model = patched_model()
    generator = torch.Generator().manual_seed(0)
    calls = [packed(random_lengths(generator), generator) for _ in range(24)]

    @torch.inference_mode()
    def run(inputs):
        if DEVICE == "cpu":
            return model(**inputs).last_hidden_state
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            found = model(**inputs).last_hidden_state
            torch.cuda.current_stream().synchronize()
            return found

    expected = [run(inputs) for inputs in calls]
    started = threading.Barrier(4)
    with ThreadPoolExecutor(4, initializer=started.wait) as pool:
        found = list(pool.map(run, calls * 2))
    assert all(map(torch.equal, found, expected * 2))


@needs_gpu
@torch.no_grad()
def test_memory_stays_bounded():
    model = patched_model()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):  # by now it has as many graphs as it may
        model(**packed(random_lengths(generator, 60), generator))
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for _ in range(300):
        model(**packed(random_lengths(generator, 60), generator))
    torch.cuda.synchronize()
    assert len(model.__dict__[GRAPHS].entries) <= graphs.MOST_GRAPHS
    assert torch.cuda.memory_reserved() - before < 64 << 20

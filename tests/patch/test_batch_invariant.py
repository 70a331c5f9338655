"""`patch(model, batch_invariant=True)`: a text's bits do not depend on what is beside it."""

import pytest
import torch
from encoders import ENCODERS, VOCABULARY, head_cases, randomized

import neobert_kernels as nk

BATCHES = 8
LENGTHS = (1, 2, 5, 17, 31, 48)  # of the texts that are looked at
TOKEN_KINDS = ("mlm", "token", "question")


def patched_model(family, kind=None, **options):
    torch.manual_seed(0)
    make = ENCODERS[family].base if kind is None else lambda: ENCODERS[family].head(kind)
    model = randomized(make()).eval()
    nk.patch(model, batch_invariant=True, **options)
    return model


def packed(texts):
    lengths = [len(text) for text in texts]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ids = torch.cat(texts)[None]
    return {"input_ids": ids, "cu_seq_lens_q": bounds, "max_length_q": max(lengths)}


def padded(texts, family):
    ids = torch.full((len(texts), max(map(len, texts))), ENCODERS[family].padding)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def draw(generator, lengths):
    return [torch.randint(2, VOCABULARY, (n,), generator=generator) for n in lengths]


def batches(seed=0):
    """``(texts, places)``: the looked-at texts among others, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    own = draw(generator, LENGTHS)
    yield own, list(range(len(own)))
    for _ in range(BATCHES):
        count = int(torch.randint(0, 9, (), generator=generator))
        others = draw(generator, torch.randint(1, 60, (count,), generator=generator).tolist())
        order = torch.randperm(len(own) + count, generator=generator).tolist()
        texts = [(own + others)[i] for i in order]
        yield texts, [order.index(i) for i in range(len(own))]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_states_and_pooled_vectors(family, inference):
    model = patched_model(family, inference=inference)
    expected = None
    for texts, places in batches():
        out = model(**packed(texts), output_hidden_states=True)
        ends = torch.tensor([len(text) for text in texts]).cumsum(0).tolist()
        states = torch.cat(out.hidden_states)
        found = [states[:, ends[i] - len(texts[i]) : ends[i]] for i in places]
        if out.get("pooler_output") is not None:
            found += [out.pooler_output[i] for i in places]
        padding = model(**padded(texts, family)).last_hidden_state
        found += [padding[i, : len(texts[i])] for i in places]
        expected = expected or found
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("family", "kind"), [c for c in head_cases() if c[1] != "choice"])
@torch.no_grad()
def test_logits(family, kind):
    model = patched_model(family, kind)
    expected = None
    for texts, places in list(batches())[:4]:
        out = model(**padded(texts, family))
        scores = [out.start_logits, out.end_logits] if kind == "question" else [out.logits]
        cut = (lambda x, i: x[i, : len(texts[i])]) if kind in TOKEN_KINDS else lambda x, i: x[i]  # noqa: B023
        found = [cut(score, i) for score in scores for i in places]
        expected = expected or found
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_numbers_are_those_of_the_patched_model(family):
    model = patched_model(family)
    texts = next(batches())[0]
    ours = model(**packed(texts)).last_hidden_state
    nk.unpatch(model)
    nk.patch(model)
    theirs = model(**packed(texts)).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sparse_predictions_keep_their_rows():
    torch.manual_seed(0)
    model = randomized(ENCODERS["modernbert"].head("mlm", sparse_prediction=True)).eval()
    texts = draw(None, (5, 9))
    inputs = padded(texts, "modernbert")
    inputs["labels"] = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    inputs["labels"][:, 1] = -100
    with nk.patched(model):
        expected = model(**inputs)
    with nk.patched(model, batch_invariant=True):
        found = model(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss)


@torch.no_grad()
def test_an_empty_batch():
    model = patched_model("bert")
    ids = torch.zeros(0, 7, dtype=torch.int64)
    assert model(input_ids=ids).last_hidden_state.shape == (0, 7, 48)

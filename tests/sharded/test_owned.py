"""A folder of shards holds neobert's files alone: others are never touched, whatever the flags."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sharded_runs as runs

from neobert.inputs import overlaps
from neobert.outputs import METADATA_KEY
from neobert.readers import InputError

FLAGS = [{}, {"restart": True}, {"overwrite": True}, {"restart": True, "overwrite": True}]
TEXTS = [f"text {i}" for i in range(20)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    return tmp_path / "in.txt"


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def parquet(path: Path) -> None:
    """A Parquet file of texts, as a user has it."""
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": TEXTS}), path)


def single(path: Path) -> None:
    """What neobert encode writes where the output is one file."""
    schema = pa.schema({"text": pa.string()}, metadata={METADATA_KEY: '{"rows": 20}'})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table([TEXTS], schema=schema), path)


def note(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"mine": true}')


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("part-000001.parquet", parquet),
        ("part-000007.parquet", single),
        ("part-00000.parquet", parquet),
        ("_part-0.new", note),
        ("_job.json.old", note),
        ("_lock", note),
        ("x", Path.mkdir),
    ],
)
def test_a_folder_with_files_of_others_is_refused(
    name: str, make: Any, begun: bool, flags: dict[str, bool], source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    if begun:
        runs.run(source, output)
        (output / name).unlink(missing_ok=True)
    output.mkdir(exist_ok=True)
    make(output / name)
    before = contents(output)
    with pytest.raises(InputError, match=f"earlier run's shards in .*out, got {name}; choose"):
        runs.run(source, output, **flags)
    assert contents(output) == before


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", ["_job.json", "_manifest.json", "_encoder.json"])
def test_our_names_alone_do_not_make_a_folder_ours(
    name: str, flags: dict[str, bool], source: Path, tmp_path: Path
) -> None:
    note(tmp_path / "out" / name)
    (tmp_path / "out" / "part-000000.parquet").write_bytes(b"no footer")
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match="nothing but an earlier run's shards"):
        runs.run(source, tmp_path / "out", **flags)
    assert contents(tmp_path / "out") == before


def test_shards_without_their_job_are_ours(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    runs.run(source, output)
    for name in ("_job.json", "_manifest.json"):
        (output / name).unlink()
    with pytest.raises(InputError, match=r"a readable .*_job\.json.* \(--restart begins anew\)"):
        runs.run(source, output)
    assert runs.run(source, output, restart=True).run.texts == 20


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("output", ["data", "data/out", ".", "data/b/out", "data/a.parquet/.."])
def test_an_output_in_the_way_of_the_input_is_refused(
    output: str, flags: dict[str, bool], tmp_path: Path
) -> None:
    parquet(tmp_path / "data" / "part-000000.parquet")
    (tmp_path / "data" / "b").mkdir()
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"^output: expected a folder apart from the input .*data"):
        runs.run(tmp_path / "data", tmp_path / output, **flags)
    assert contents(tmp_path) == before
    assert not (tmp_path / "data" / "out").exists()


@pytest.mark.parametrize(
    ("pattern", "output", "expected"),
    [
        ("*.txt", "out", False),
        ("*", "out", True),
        ("o*/*.parquet", "out", True),
        ("o*/*.parquet", "a", False),
        ("*/x/*.parquet", "out", False),
        ("**/*.parquet", "out", True),
        ("**/x/*.parquet", "out", False),
        ("**/out/*.parquet", "out", True),
        ("a*", "a/b/c", True),
        ("*/b/?", "a/b", True),
        ("*/b/?/?", "a/b", False),
        ("a/*.txt", "a", True),
        ("a/*.txt", "b", False),
        ("in.txt", "out", False),
        ("in.txt", ".", True),
    ],
)
def test_a_pattern_holds_what_it_can_match(
    pattern: str, output: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").touch()
    assert overlaps(pattern, Path(output)) is expected

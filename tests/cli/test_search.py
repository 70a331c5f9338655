"""Search is exact: the order of float64 scores, ties by row, whatever the blocks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sharded_runs as runs
from fake_encoder import DIM, run_job
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import TEXTS, Killed, stop_after

from neobert.outputs import sidecar
from neobert.readers import InputError
from neobert.search import ArrayIndex, FolderIndex, open_index, search


def by_sorting(index: np.ndarray, queries: np.ndarray, top: int, score: str) -> np.ndarray:
    """Rows in the order of falling float64 scores, each row's score computed on its own."""
    wide, queries = index.astype(np.float64), queries.astype(np.float64)
    if score == "cosine":
        length = np.linalg.norm(wide, axis=1, keepdims=True)
        wide = wide / np.where(length, length, 1)
    scores = np.array([[(row * query).sum() for row in wide] for query in queries])
    return np.argsort(-scores, axis=1, kind="stable")[:, :top]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(1, 25),
    st.sampled_from(["cosine", "dot"]),
    st.randoms(use_true_random=False),
)
def test_the_order_is_that_of_a_full_sort(
    rows: int, distinct: int, top: int, block: int, score: str, random: Any
) -> None:
    """Few distinct rows, so that most scores are ties."""
    generator = np.random.default_rng(random.getrandbits(32))
    kinds = generator.standard_normal((distinct, 37)).astype(np.float32)
    index = kinds[generator.integers(distinct, size=rows)]
    queries = generator.standard_normal((3, 37)).astype(np.float32)
    hits = search(ArrayIndex(index, block), queries, top, score)
    expected = by_sorting(index, queries, top, score)
    np.testing.assert_array_equal(hits.rows, expected)
    assert (np.diff(hits.scores) <= 0).all()
    assert hits.scores.shape == (3, min(top, rows))


def test_scores_closer_than_float32_resolves_keep_their_order() -> None:
    """All scores are 1 but for some 1e-8, far below the rounding of float32 sums."""
    generator = np.random.default_rng(0)
    query = generator.standard_normal((1, 384))
    index = generator.standard_normal((400, 384))
    index += (1 - index @ query.T) * query / (query @ query.T)
    index = index.astype(np.float32)
    for top in (1, 3, 400):
        hits = search(ArrayIndex(index, 50), query, top, "dot")
        assert hits.rows[0].tolist() == by_sorting(index, query, top, "dot")[0].tolist()


def test_scores() -> None:
    index = np.array([[3, 4], [0, 0], [-1, 0]], np.float32)
    query = np.array([[2, 0]], np.float32)
    cosine = search(index, query, 3)
    assert cosine.rows.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(cosine.scores, [[0.6, 0, -1]], rtol=1e-12)
    np.testing.assert_array_equal(search(index, query, 3, "dot").scores, [[6, 0, -2]])
    assert search(index, np.zeros((1, 2)), 3).scores.tolist() == [[0, 0, 0]]


def test_empty_sides() -> None:
    assert search(np.empty((0, 4), np.float32), np.ones((2, 4)), 5).rows.shape == (2, 0)
    assert search(np.ones((3, 4), np.float32), np.empty((0, 4)), 2).scores.shape == (0, 2)


@pytest.mark.parametrize(
    ("index", "queries", "options", "message"),
    [
        (np.ones((3, 4), np.float32), np.ones((1, 5)), {}, r"queries: expected shape \[Q, 4\]"),
        (np.ones((3, 4), np.float32), np.ones(4), {}, r"queries: expected shape \[Q, 4\]"),
        (np.ones((3, 4), np.float32), np.full((1, 4), np.nan), {}, "queries: expected finite"),
        (np.ones((3, 4), np.float32), np.ones((1, 4)), {"top": 0}, "top: expected at least 1"),
        (np.ones((3, 4), np.float32), np.ones((1, 4)), {"score": "l2"}, "score: expected 'cosine'"),
        (np.ones((3, 4), np.int64), np.ones((1, 4)), {}, "index: expected floating-point"),
        (np.ones(4, np.float32), np.ones((1, 4)), {}, "index: expected floating-point"),
        (
            np.array([[1, 2], [1, np.inf]], np.float32),
            np.ones((1, 2)),
            {},
            "index: expected finite numbers, got NaN or infinity in row 1",
        ),
    ],
)
def test_unfit_arguments_are_refused(
    index: np.ndarray, queries: np.ndarray, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        search(index, queries, **options)


@pytest.mark.parametrize("name", ["out.npy", "out.parquet"])
def test_both_formats_give_the_rows_in_blocks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.txt").write_text("".join(f"text {i}\n" for i in range(25)))
    run_job(tmp_path / "in.txt", tmp_path / name)
    monkeypatch.setattr("neobert.search.BLOCK_ROWS", 10)
    index, description = open_index(tmp_path / name)
    if isinstance(index, ArrayIndex):
        assert isinstance(index._array, np.memmap)
        index = ArrayIndex(index._array, 10)
    assert (index.rows, index.dim, description["model"]) == (25, DIM, "fake")
    blocks = list(index.blocks())
    assert [len(block) for block in blocks] == [10, 10, 5]
    run_job(tmp_path / "in.txt", tmp_path / "again.npy")
    np.testing.assert_array_equal(np.concatenate(blocks), np.load(tmp_path / "again.npy"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Every text twice, so that equal scores meet from different shards."""
    (tmp_path / "in.txt").write_text("\n".join(TEXTS * 2))
    return tmp_path / "in.txt"


@pytest.mark.parametrize("score", ["cosine", "dot"])
@pytest.mark.parametrize("top", [1, 7, 100])
def test_a_folder_has_the_hits_of_one_file(
    top: int, score: str, source: Path, tmp_path: Path
) -> None:
    run_job(source, tmp_path / "out.parquet")
    runs.run(source, tmp_path / "out")
    folder, description = open_index(tmp_path / "out")
    one, _ = open_index(tmp_path / "out.parquet")
    assert (folder.rows, folder.dim, description["model"]) == (36, DIM, "fake")
    assert max(map(len, folder.blocks())) <= 8  # a shard's rows
    queries = np.random.default_rng(0).standard_normal((5, DIM))
    expected, hits = (search(index, queries, top, score) for index in (one, folder))
    np.testing.assert_array_equal(hits.rows, expected.rows)
    np.testing.assert_array_equal(hits.scores, expected.scores)


def test_float16_is_searched_as_the_numbers_that_are_stored(source: Path, tmp_path: Path) -> None:
    run_job(source, tmp_path / "out.npy", output_dtype="float16")
    run_job(source, tmp_path / "out.parquet", output_dtype="float16")
    runs.run(source, tmp_path / "out", output_dtype="float16")
    rows = np.load(tmp_path / "out.npy").astype(np.float32)
    queries = np.random.default_rng(0).standard_normal((5, DIM))
    expected = search(rows, queries, 9)
    for name in ("out.npy", "out.parquet", "out"):
        index, description = open_index(tmp_path / name)
        assert description["output_dtype"] == "float16"
        assert {block.dtype for block in index.blocks()} == {np.dtype(np.float32)}
        hits = search(index, queries, 9)
        np.testing.assert_array_equal(hits.rows, expected.rows)
        np.testing.assert_array_equal(hits.scores, expected.scores)


def test_a_folder_that_is_not_whole_is_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def refuses(message: str) -> None:
        with pytest.raises(InputError, match=f"^index: expected {message}"):
            open_index(output)

    output.mkdir()
    refuses(r"a folder that neobert encode has finished, got no _manifest\.json in")
    with pytest.raises(Killed):
        runs.run(source, output, load=lambda *_: stop_after(20))
    refuses(
        r"a folder .* finished, got 2 shards and no _manifest\.json .*; the same neobert encode"
    )
    runs.run(source, output)
    options = runs.OPTIONS | {"dtype": "float16"}
    runs.run(source, tmp_path / "other", options=options)
    shard, manifest = output / "part-000001.parquet", output / "_manifest.json"
    bytes_of = {path: path.read_bytes() for path in (shard, manifest)}
    shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
    refuses(r"shards of one job in .*, got .*part-000001\.parquet")
    shard.write_bytes(bytes_of[shard][:-9])
    refuses(r"a folder .* finished, got no whole .*part-000001\.parquet; the same neobert encode")
    shard.unlink()
    refuses(r"a folder .* finished, got no whole .*part-000001\.parquet; the same neobert encode")
    shard.write_bytes(bytes_of[shard])
    for name in ("dim", "rows"):
        manifest.write_text(json.dumps({**json.loads(bytes_of[manifest]), name: 3}))
        refuses(f"{name} 3 as its description says, got ")
    manifest.write_text("{}")
    refuses("a manifest in")
    pq.write_table(pa.table({"embedding": pa.array([[1.0]], pa.list_(pa.float32(), 1))}), shard)
    with pytest.raises(InputError, match="expected 8 dimensions as in other shards, got 1 in"):
        FolderIndex([output / "part-000000.parquet", shard])


def test_an_array_without_a_description_is_an_index(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.eye(3, dtype=np.float64))
    index, description = open_index(tmp_path / "a.npy")
    assert description == {}
    assert search(index, np.array([[0, 0, 1.0]]), 1).rows.tolist() == [[2]]


def test_unfit_index_files_are_refused(tmp_path: Path) -> None:
    def refuses(path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            open_index(path)

    refuses(tmp_path / "gone.npy", "expected an existing file")
    (tmp_path / "a.csv").touch()
    refuses(tmp_path / "a.csv", r"expected a name ending in \.npy or \.parquet")
    path = tmp_path / "a.npy"
    path.touch()
    refuses(path, r"expected a \.npy array")
    np.save(path, np.array([{}]))
    refuses(path, r"expected a \.npy array")  # objects would need pickle
    np.save(path, np.ones((3, 2), np.float32))
    path.write_bytes(path.read_bytes()[:-1])
    refuses(path, r"expected a \.npy array")
    np.save(path, np.ones((3, 2), np.float32))
    sidecar(path).write_text(json.dumps({"rows": 4}))
    refuses(path, "expected rows 4 as its description says, got 3")
    sidecar(path).write_text("[1")
    refuses(path, "expected a description of")
    table = tmp_path / "a.parquet"
    table.write_bytes(b"no")
    refuses(table, "expected a Parquet file")
    pq.write_table(pa.table({"embedding": [[1.0]]}), table)
    refuses(table, r"expected fixed_size_list<float or halffloat> in column 'embedding', got list")
    pq.write_table(pa.table({"x": [1]}), table)
    refuses(table, r"in column 'embedding', got None")

"""Embedding files that appear whole or not at all, and resume after a kill.

While a job runs, ``<output>.partial/`` holds the rows done so far and a small state file; the state
is replaced only after its rows are on disk, so it never counts a row that could be lost, and rows
beyond it are cut off on resume. The output is built there too and moves to its name in one step.

* ``.npy``: float32 or float16 ``[rows, dim]``, with a description beside it in ``<output>.json``.
* ``.parquet``: ``row`` int64, ``id`` string (if the input has ids), ``embedding``
  fixed_size_list<float32 or float16>[dim], with the same description in the schema's metadata.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from neobert import files
from neobert.files import sync_folder, write_all, write_atomically
from neobert.readers import InputError, escaped, one_line

FORMATS = (".npy", ".parquet")
PRECISIONS = {"float32": "<f4", "float16": "<f2"}  # of what is stored; the first is the default
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
METADATA_KEY = b"neobert"
PARQUET_GROUP_ROWS = 16384

_HEADER_BYTES = 128
_STATE_VERSION = 1
_PARTIAL_NAMES = {
    "lock", "state.json", "state.json.new", "description.json", "description.json.new",
    "rows.npy", "ids.jsonl", "final.parquet",
}  # fmt: skip


class OutputError(OSError):
    """Writing failed; the message says what is kept and how to go on."""


@dataclass
class State:
    """What ``state.json`` holds. `job` is everything that decides the numbers in the output."""

    job: dict[str, Any] = field(default_factory=dict)
    texts: int | None = None
    rows: int = 0
    tokens: int = 0
    truncated: int = 0
    seconds: float = 0.0
    id_bytes: int = 0
    digest: str = ""
    finished: bool = False


def check_output(path: str, overwrite: bool = False, restart: bool = False) -> Path:
    """The output's path, if a job may write there.

    Raises:
        InputError: Unknown format, no such folder, or the file exists and ``overwrite`` is False.
    """
    output = Path(path)
    if output.suffix.lower() not in FORMATS:
        raise InputError(
            f"output: expected a name ending in {' or '.join(FORMATS)}, or for a folder of shards "
            f"one without an ending or with a slash behind it, got {path}"
        )
    if not output.parent.is_dir():
        raise InputError(f"output: expected an existing folder, got {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"output: expected a writable folder, got {output.parent}")
    if output.is_dir():
        raise InputError(f"output: expected a file name, got the folder {path}")
    _check_partial(partial_folder(output))
    # A job killed in its very last steps left both the output and a finished state.
    if output.exists() and not overwrite and (restart or not _published(output)):
        raise InputError(
            f"output: expected a new file, got {path}, which exists (--overwrite replaces it)"
        )
    if output.suffix.lower() == ".parquet":
        require_pyarrow("output")
    return output


def require_pyarrow(argument: str) -> None:
    """Raise `InputError` where pyarrow is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise InputError(
            f"{argument}: expected pyarrow to be installed for .parquet, got none; "
            "pip install 'neobert-kernels[parquet]'"
        ) from None


def _check_partial(folder: Path) -> None:
    """A finished job removes its partial folder, so nothing of anyone else's may be in it."""
    if folder.is_symlink() or not folder.is_dir():
        if os.path.lexists(folder):
            raise InputError(
                f"output: expected nothing or the folder of an earlier run at {folder}, got "
                "something else; move it away or choose another --output"
            )
        return
    others = sorted(path.name for path in folder.iterdir() if path.name not in _PARTIAL_NAMES)
    if others:
        raise InputError(
            f"output: expected nothing but an earlier run's files in {folder}, "
            f"got {escaped(others[0])}; move it away or choose another --output"
        )


def partial_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def interruption(output: Path) -> str:
    """What an interrupted job leaves, and how to go on."""
    folder = partial_folder(output)
    rows = _load_state(folder / "state.json").rows
    if not rows:
        return "interrupted; no rows were finished; run the same command again to begin"
    return f"interrupted; {rows:,} rows are kept in {folder}; run the same command again to resume"


def sidecar(output: Path) -> Path:
    """Where the description of a ``.npy`` output stands."""
    return output.with_name(f"{output.name}.json")


class Partial:
    """The rows of an unfinished job; also the only writer of its output.

    Use `Partial.open`, then `append` in order, then `finish`; `close` in any case.
    """

    def __init__(self, output: Path, folder: Path, lock: BinaryIO, state: State) -> None:
        self.output, self.folder, self.state = output, folder, state
        self._lock = lock
        self._dim, self._precision = 0, "float32"
        self._data: BinaryIO | None = None
        self._ids: BinaryIO | None = None

    @classmethod
    def open(cls, output: Path, restart: bool = False) -> "Partial":
        """Take up the job in ``<output>.partial/``, or begin one there.

        Raises:
            InputError: Another process is writing, or the state cannot be read.
        """
        folder = partial_folder(output)
        with writing(output):
            folder.mkdir(exist_ok=True)
            lock = files.lock(folder)
        try:
            if restart:
                _clear(folder)
            state = _load_state(folder / "state.json")
        except BaseException:
            lock.close()
            raise
        return cls(output, folder, lock, state)

    def require_same(self, job: Mapping[str, Any], trust_input: bool = False) -> None:
        """Refuse to mix rows of two different jobs; ``trust_input`` passes over the files' times.

        Raises:
            InputError: The rows on disk were made with other values; the message names them.
        """
        if not self.state.rows:
            return
        before = files.trusting_input(self.state.job, job, trust_input)
        changed = files.differences(before, job)
        if changed:
            raise InputError(
                f"resume: expected the command that began {self.folder}, got {'; '.join(changed)} "
                f"({files.other_times(changed)}--restart discards its {self.state.rows:,} rows)"
            )

    def begin(
        self, job: Mapping[str, Any], dim: int, with_ids: bool, precision: str = "float32"
    ) -> None:
        """Open the data for appending and cut off what the state does not count."""
        with self._writing():
            self.state.job = dict(job)
            self._dim, self._precision = dim, precision
            size = _HEADER_BYTES + self.state.rows * dim * self._dtype.itemsize
            self._data = _open_at(self._data_path, size, begun=self.state.rows > 0)
            if with_ids and self.output.suffix.lower() == ".parquet":
                self._ids = _open_at(self._ids_path, self.state.id_bytes)
            self._save_state()

    def append(
        self,
        embeddings: np.ndarray,
        ids: Sequence[str] = (),
        *,
        tokens: int = 0,
        truncated: int = 0,
        seconds: float = 0.0,
        digest: str = "",
    ) -> None:
        """Add rows ``[n, dim]`` in the precision that `begin` was given, none of them rounded here.

        When this returns they survive a kill or power cut.
        """
        assert self._data is not None
        assert embeddings.ndim == 2
        assert embeddings.shape[1] == self._dim
        assert embeddings.dtype == self._precision
        state = self.state
        with self._writing():
            rows = np.ascontiguousarray(embeddings, dtype=self._dtype)
            write_all(self._data, memoryview(rows.tobytes()))
            os.fsync(self._data.fileno())
            id_bytes = state.id_bytes
            if self._ids is not None:
                assert len(ids) == len(rows)
                data = "".join(json.dumps(i) + "\n" for i in ids).encode()
                write_all(self._ids, memoryview(data))
                os.fsync(self._ids.fileno())
                id_bytes += len(data)
            self._save_state(
                rows=state.rows + len(rows),
                tokens=state.tokens + tokens,
                truncated=state.truncated + truncated,
                seconds=state.seconds + seconds,
                id_bytes=id_bytes,
                digest=digest,
            )

    def finish(self, description: Mapping[str, Any], overwrite: bool = False) -> None:
        """Build the output, move it to its name and remove the partial folder."""
        assert self._data is not None
        if self.output.exists() and not overwrite:
            raise OutputError(
                f"{self.output} appeared while its rows were made; run again with --overwrite"
            )
        with self._writing():
            if self.output.suffix.lower() == ".npy":
                self._finish_npy(description)
            else:
                self._finish_parquet(description)
            self._save_state(finished=True)
            self.close_files()
            self.publish()

    def publish(self) -> None:
        """The last steps of `finish`; safe to repeat after a kill between any two of them."""
        for staged, name in (
            (self.folder / "description.json", sidecar(self.output)),
            (self._final_path, self.output),
        ):
            if staged.exists():
                os.replace(staged, name)
        sync_folder(self.output.parent)
        self.discard()

    def discard(self) -> None:
        self.close()
        shutil.rmtree(self.folder)

    def close_files(self) -> None:
        for file in (self._data, self._ids):
            if file is not None:
                file.close()

    def close(self) -> None:
        self.close_files()
        self._lock.close()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        if not self.state.rows:
            return writing(self.output)
        return writing(self.output, f"{self.state.rows:,} rows are kept in {self.folder}", "resume")

    @property
    def _dtype(self) -> np.dtype:
        return np.dtype(PRECISIONS[self._precision])

    @property
    def _data_path(self) -> Path:
        return self.folder / "rows.npy"

    @property
    def _ids_path(self) -> Path:
        return self.folder / "ids.jsonl"

    @property
    def _final_path(self) -> Path:
        is_npy = self.output.suffix.lower() == ".npy"
        return self._data_path if is_npy else self.folder / "final.parquet"

    def _save_state(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self.state, name, value)
        content = {"version": _STATE_VERSION, **asdict(self.state)}
        write_atomically(self.folder / "state.json", json.dumps(content, indent=1) + "\n")

    def _finish_npy(self, description: Mapping[str, Any]) -> None:
        assert self._data is not None
        self._data.seek(0)
        write_all(self._data, memoryview(_npy_header(self._precision, self.state.rows, self._dim)))
        os.fsync(self._data.fileno())
        write_atomically(self.folder / "description.json", json.dumps(description, indent=1) + "\n")

    def _finish_parquet(self, description: Mapping[str, Any]) -> None:
        """Copy the rows group by group: a Parquet file's footer cannot be appended to."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [pa.field("row", pa.int64(), nullable=False)]
        if self._ids is not None:
            columns.append(pa.field("id", pa.string(), nullable=False))
        columns.append(embedding_field(self._dim, self._precision))
        schema = pa.schema(columns, metadata={METADATA_KEY: json.dumps(description)})
        with open(self._final_path, "wb") as file:
            with pq.ParquetWriter(
                file, schema, use_dictionary=False, compression="none", write_statistics=["row"]
            ) as writer:
                for start, block, ids in self._groups():
                    values = pa.array(block.reshape(-1))
                    arrays = [pa.array(np.arange(start, start + len(block), dtype=np.int64))]
                    if self._ids is not None:
                        arrays.append(pa.array(ids, pa.string()))
                    arrays.append(pa.FixedSizeListArray.from_arrays(values, self._dim))
                    writer.write_table(pa.table(arrays, schema=schema))
            file.flush()
            os.fsync(file.fileno())

    def _groups(self) -> Iterator[tuple[int, np.ndarray, list[str]]]:
        with contextlib.ExitStack() as stack:
            data = stack.enter_context(open(self._data_path, "rb"))
            data.seek(_HEADER_BYTES)
            lines = stack.enter_context(open(self._ids_path, "rb")) if self._ids else None
            for start in range(0, self.state.rows, PARQUET_GROUP_ROWS):
                count = min(PARQUET_GROUP_ROWS, self.state.rows - start)
                block = np.fromfile(data, self._dtype, count * self._dim).reshape(count, self._dim)
                ids = [json.loads(lines.readline()) for _ in range(count)] if lines else []
                yield start, block, ids


def embedding_field(dim: int, precision: str) -> Any:
    """Arrow's field for embeddings of ``dim`` numbers."""
    import pyarrow as pa

    number = pa.float16() if precision == "float16" else pa.float32()
    return pa.field("embedding", pa.list_(number, dim), nullable=False)


def read_description(output: Path) -> dict[str, Any]:
    """The description of a finished output, or an empty one if it has none.

    Raises:
        InputError: The description is not JSON.
    """
    try:
        if output.suffix.lower() == ".npy":
            path = sidecar(output)
            content = path.read_bytes() if path.exists() else b"{}"
        else:
            import pyarrow.parquet as pq

            content = (pq.read_schema(output).metadata or {}).get(METADATA_KEY, b"{}")
        return dict(json.loads(content))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"index: expected a description of {output}, got {one_line(error)}"
        ) from None


def _published(output: Path) -> bool:
    """True if a killed job had already moved this output into place."""
    try:
        return _load_state(partial_folder(output) / "state.json").finished
    except InputError:
        return False


def _load_state(path: Path) -> State:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return State()
    except (RecursionError, ValueError) as error:
        raise _damaged(path, "an object", one_line(error)) from None
    if not isinstance(content, dict):
        raise _damaged(path, "an object", repr(content))
    if content.pop("version", None) != _STATE_VERSION:
        raise _damaged(path, f"version {_STATE_VERSION}", "another or none")
    for key, value in content.items():
        if key not in _STATE_RULES:
            raise _damaged(path, f"keys {', '.join(_STATE_RULES)}", repr(key))
        rule, holds = _STATE_RULES[key]
        if not holds(value):
            raise _damaged(path, f"{rule} under {key!r}", repr(value))
    state = State(**content)
    if state.finished:
        for key in ("encoder dim", "encoder max_length"):
            if not _is_count(state.job.get(key)):
                raise _damaged(path, f"{_COUNT} under 'job', {key!r}", repr(state.job.get(key)))
        precision = state.job.get("output_dtype")
        if precision not in PRECISIONS:
            rule = f"{' or '.join(PRECISIONS)} under 'job', 'output_dtype'"
            raise _damaged(path, rule, repr(precision))
    return state


def _damaged(path: Path, rule: str, value: str) -> InputError:
    return InputError(
        f"resume: expected a state in {path} with {rule}, got {value[:100]} (--restart begins anew)"
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_seconds(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value < float("inf")  # type: ignore[operator]


_COUNT = "a whole number of at least 0"
_STATE_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "job": ("an object", lambda value: isinstance(value, dict)),
    "texts": (f"{_COUNT} or null", lambda value: value is None or _is_count(value)),
    "rows": (_COUNT, _is_count),
    "tokens": (_COUNT, _is_count),
    "truncated": (_COUNT, _is_count),
    "seconds": ("a finite number of at least 0", _is_seconds),
    "id_bytes": (_COUNT, _is_count),
    "digest": ("a string", lambda value: isinstance(value, str)),
    "finished": ("true or false", lambda value: isinstance(value, bool)),
}


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "lock":
            path.unlink()


def _open_at(path: Path, size: int, begun: bool = True) -> BinaryIO:
    """Open for appending at ``size``, the length that the state vouches for."""
    path.touch()
    file = open(path, "r+b", buffering=0)  # noqa: SIM115
    if begun and os.fstat(file.fileno()).st_size < size:
        file.close()
        raise InputError(
            f"resume: expected at least {size} bytes in {path}, got fewer (--restart discards them)"
        )
    file.truncate(size)
    file.seek(size)
    return file


def _npy_header(precision: str, rows: int, dim: int) -> bytes:
    """Version 1.0 header, padded with spaces to the reserved size: numpy.lib.format."""
    descr = PRECISIONS[precision]
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({rows}, {dim}), }}"
    prefix = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
    return prefix + text.encode().ljust(_HEADER_BYTES - 11) + b"\n"


@contextlib.contextmanager
def writing(path: Path, kept: str = "", goal: str = "begin") -> Iterator[None]:
    """Turn a failed write to ``path`` into one line: what is kept, and what to run again for."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        hint = "make room and " if error.errno in FULL else ""
        raise OutputError(
            f"{path}: {os.strerror(error.errno)}; {kept and kept + ', '}{hint}"
            f"run the same command again to {goal}"
        ) from error

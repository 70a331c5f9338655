"""A folder of shards that many processes fill, and that is resumed after any of them is killed.

Each shard is written under a hidden name, synced, and renamed, so a name promises a whole shard,
and two processes that make the same one leave the same bytes. Names that begin with ``_`` are
passed over by readers of Parquet data sets:

* ``part-000000.parquet``: ``row`` int64 in the whole input, ``id`` string (if the input has ids),
  ``source`` (the file, as seen from the input's folder), ``number`` int64 (its line or Parquet row,
  from 1; 0 for a whole file), ``embedding`` fixed_size_list<float32>[dim] (or
  float16); a row group per window.
* ``_job.json``: what decides the numbers, and the plan. ``_encoder.json``: the model that ran.
* ``_manifest.json``: written when all shards are there: model, options, input, rows of every shard.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from neobert import files, outputs
from neobert.files import sync_folder, write_atomically
from neobert.outputs import METADATA_KEY, OutputError, embedding_field
from neobert.readers import InputError, Row, one_line
from neobert.sharded import checksum, owned
from neobert.sharded.owned import ENCODER, JOB, LOCK, MANIFEST, VERSION
from neobert.sharded.plan import Plan, Shard

CHECKS_AT_A_TIME = 8  # shards that are read; the sum is taken outside of Python's lock

Note = Callable[[str], None]
writing = functools.partial(outputs.writing, kept="finished shards are kept", goal="resume")


class ShardFolder:
    """The output of one job, for the processes that work on it.

    Attributes:
        path: The folder.
        job: What decides the numbers: another value is another job.
        plan: All shards.
    """

    def __init__(self, path: Path, job: dict[str, Any], plan: Plan) -> None:
        self.path, self.job, self.plan = path, job, plan
        self._digest = _digest(job)

    @classmethod
    def open(cls, path: Path) -> "ShardFolder":
        """Take part in a job that `prepared` has begun."""
        record = _read(path / JOB)
        return cls(path, record["job"], Plan.from_record(record["plan"]))

    def part(self, shard: Shard) -> Path:
        return self.path / f"part-{shard.number:06}.parquet"

    def record(self, shard: Shard) -> dict[str, Any] | None:
        """What a finished shard says of itself; None if it is not there, or damaged.

        Raises:
            InputError: It is another job's, or not ours.
        """
        path = self.part(shard)
        found = owned.footer(path)
        if found is None:
            return None
        record, rows = found
        if not record:
            raise owned.foreign(path)
        if (record["job"], record["shard"]) != (self._digest, shard.number):
            raise InputError(f"resume: expected shards of one job in {self.path}, got {path}")
        return record if rows == record["rows"] == shard.rows else None

    def unfinished(self) -> list[int]:
        """Numbers of the shards that are not there, or damaged; every byte of the others is read.

        A damaged one is removed, so that no worker takes it for finished.
        """

        def is_whole(number: int) -> bool:
            shard = self.plan[number]
            if self.record(shard) is None:
                return False
            if not checksum.is_intact(self.part(shard)):
                self.part(shard).unlink()
                return False
            return True

        with ThreadPoolExecutor(CHECKS_AT_A_TIME, "neobert-check") as pool:
            whole = list(pool.map(is_whole, range(len(self.plan))))
        return [number for number, found in enumerate(whole) if not found]

    def attempts(self, shard: Shard) -> int:
        """How often this has been called for the shard, by any process of this run."""
        with writing(self.path), open(self.path / f"_{self.part(shard).name}.tries.new", "ab") as f:
            f.write(b".")
            return f.tell()

    def agree(self, encoder: Mapping[str, Any]) -> None:
        """Compare this process's encoder with the first one that worked on this job.

        Raises:
            InputError: They differ; the message says in what.
        """
        with writing(self.path):
            text = files.write_once(self.path / ENCODER, json.dumps(encoder, indent=1) + "\n")
        changed = files.differences(_flat(json.loads(text)), _flat(encoder))
        if changed:
            raise InputError(
                f"resume: expected the encoder that began {self.path}, got {'; '.join(changed)} "
                "(--restart discards its shards)"
            )

    def writer(self, shard: Shard, dim: int) -> "ShardWriter":
        return ShardWriter(self, shard, dim, self._digest)

    def finish(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest, once every shard is there; what it says.

        Raises:
            OutputError: A shard is missing.
        """
        encoder = _read(self.path / ENCODER)
        parts, tokens, truncated = [], 0, 0
        for number in range(len(self.plan)):
            shard = self.plan[number]
            record = self.record(shard)
            if record is None:
                raise OutputError(
                    f"{self.part(shard)}: expected a whole shard, got none; "
                    "run the same command again to make it"
                )
            parts.append({"file": self.part(shard).name, "first": shard.first, "rows": shard.rows})
            tokens, truncated = tokens + record["tokens"], truncated + record["truncated"]
        manifest: dict[str, Any] = {
            "format": "neobert-embeddings",
            "version": VERSION,
            **{key: self.job[key] for key in ("model", "revision") if key in self.job},
            "rows": self.plan.rows,
            "output_dtype": self.job["output_dtype"],
            "tokens": tokens,
            "truncated": truncated,
            **encoder,
            "options": self.job,
            "input": dict(source),
            "shards": parts,
        }
        with writing(self.path):
            owned.remove_staged(self.path)
            write_atomically(self.path / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        return manifest


@contextlib.contextmanager
def prepared(
    path: Path,
    job: Mapping[str, Any],
    make_plan: Callable[[], Plan],
    *,
    overwrite: bool = False,
    restart: bool = False,
    trust_input: bool = False,
    note: Note = print,
) -> Iterator[ShardFolder]:
    """Begin a job, or take up an unfinished one; one process at a time, as long as this is open.

    A job that fails before its first shard leaves nothing behind.

    Raises:
        InputError: Files that are not ours are there, shards of another job, a finished output, or
            another process.
    """
    owned.check_files(path)
    existed = path.exists()
    with writing(path):
        path.mkdir(exist_ok=True)
        lock = files.lock(path, file_name=LOCK)
    try:
        folder = _begin(path, dict(job), make_plan, overwrite, restart, trust_input, note)
        yield folder
    finally:
        if not any(path.glob("part-*.parquet")):
            owned.clear(path)
        lock.close()
        with contextlib.suppress(OSError):
            (path / LOCK).unlink()
            if not existed:
                path.rmdir()  # unless shards are in it


def finished(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """The manifest of a finished folder, and its shards in the order of their rows.

    Raises:
        InputError: The folder is not finished; a shard is missing, damaged, or another job's.
    """
    rule = "index: expected a folder that neobert encode has finished"
    again = "the same neobert encode makes what is missing"
    if not (path / MANIFEST).exists():
        if not (path / JOB).exists():
            raise InputError(f"{rule}, got no {MANIFEST} in {path}")
        count = sum(1 for _ in path.glob("part-*.parquet"))
        raise InputError(f"{rule}, got {count:,} shards and no {MANIFEST} in {path}; {again}")
    manifest = files.read_object(path / MANIFEST)
    try:
        digest = _digest(manifest["options"])
        sizes = {path / part["file"]: part["rows"] for part in manifest["shards"]}
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"index: expected a manifest in {path}, got {one_line(error)}") from None
    for number, (part, rows) in enumerate(sizes.items()):
        found = owned.footer(part)
        if found is None:
            raise InputError(f"{rule}, got no whole {part}; {again}")
        record, read = found
        if (record.get("job"), record.get("shard"), read) != (digest, number, rows):
            raise InputError(f"index: expected shards of one job in {path}, got {part}")
    return manifest, list(sizes)


def _begin(
    path: Path,
    job: dict[str, Any],
    make_plan: Callable[[], Plan],
    overwrite: bool,
    restart: bool,
    trust_input: bool,
    note: Note,
) -> ShardFolder:
    finished = (path / MANIFEST).exists()
    if restart and finished and not overwrite:
        raise InputError(
            f"output: expected a new folder, got {path}, which is complete "
            "(--overwrite replaces it)"
        )
    if restart or (finished and overwrite):
        owned.clear(path)
    shards = sum(1 for _ in path.glob("part-*.parquet"))
    record = _read(path / JOB) if shards else None
    if record is not None:
        before = files.trusting_input(record["job"], job, trust_input)
        _require_same(path, before, job, shards, finished)
        note(f"resuming: {shards:,} shards are in {path}")
        plan = Plan.from_record(record["plan"])
    else:
        plan = make_plan()
    owned.remove_staged(path)
    content = {"version": VERSION, "job": job, "plan": asdict(plan)}
    with writing(path):
        write_atomically(path / JOB, json.dumps(content) + "\n")
    return ShardFolder(path, job, plan)


def _require_same(
    path: Path, before: dict[str, Any], job: dict[str, Any], shards: int, finished: bool
) -> None:
    # What was read without an error reads the same with errors replaced.
    if (before.get("errors"), job.get("errors")) == ("strict", "replace"):
        before = {**before, "errors": "replace"}
    changed = files.differences(before, job)
    if changed:
        way = "--overwrite replaces" if finished else "--restart discards"
        raise InputError(
            f"resume: expected the command that began {path}, got {'; '.join(changed)} "
            f"({files.other_times(changed)}{way} its {shards:,} shards)"
        )


class ShardWriter:
    """Writes one shard, window by window; `finish` gives it its name, `discard` leaves nothing."""

    def __init__(self, folder: ShardFolder, shard: Shard, dim: int, digest: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path, self._shard, self._digest = folder.part(shard), shard, digest
        self._staged = folder.path / f"_{self._path.name}.{files.process_name()}.new"
        self._rows = self._tokens = self._truncated = 0
        columns = [pa.field("row", pa.int64(), nullable=False)]
        if folder.job["id_column"] is not None or folder.job["whole_files"]:
            columns.append(pa.field("id", pa.string(), nullable=False))
        columns += [
            pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
            pa.field("number", pa.int64(), nullable=False),
            embedding_field(dim, folder.job["output_dtype"]),
        ]
        self._schema = pa.schema(columns)
        with writing(folder.path):
            self._file: BinaryIO = open(self._staged, "w+b")  # noqa: SIM115
            self._writer = pq.ParquetWriter(
                self._file,
                self._schema,
                use_dictionary=["source"],
                compression="none",
                write_statistics=["row"],
            )

    @property
    def next_row(self) -> int:
        """In the whole input, the row that the next `add` begins with."""
        return self._shard.first + self._rows

    def add(
        self,
        rows: Sequence[Row],
        sources: Sequence[str],
        embeddings: np.ndarray,
        tokens: int,
        truncated: int,
    ) -> None:
        """The next rows of the shard, ``embeddings`` ``[n, dim]`` in the precision of the job."""
        import pyarrow as pa

        first = self.next_row
        columns: dict[str, Any] = {
            "row": pa.array(np.arange(first, first + len(rows), dtype=np.int64)),
            "id": pa.array([row.id for row in rows], pa.string()),
            "source": pa.array(sources, pa.string()).dictionary_encode(),
            "number": pa.array([row.number for row in rows], pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(embeddings.reshape(-1)), embeddings.shape[1]
            ),
        }
        arrays = [columns[name] for name in self._schema.names]
        with writing(self._path.parent):
            self._writer.write_table(pa.table(arrays, schema=self._schema))
        self._rows += len(rows)
        self._tokens += tokens
        self._truncated += truncated

    def finish(self) -> None:
        """After this the shard survives a kill or a power cut."""
        assert self._rows == self._shard.rows
        record = {
            "job": self._digest,
            "shard": self._shard.number,
            "first": self._shard.first,
            "rows": self._rows,
            "tokens": self._tokens,
            "truncated": self._truncated,
            checksum.ENTRY: checksum.EMPTY,
        }
        with writing(self._path.parent):
            self._writer.add_key_value_metadata({METADATA_KEY: json.dumps(record)})
            self._writer.close()
            checksum.seal(self._file)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._staged, self._path)
            sync_folder(self._path.parent)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._staged.unlink(missing_ok=True)


def _digest(job: Mapping[str, Any]) -> str:
    decisive = {k: v for k, v in job.items() if k not in ("errors", files.TIMES)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]


def _flat(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Its entries, and those of its fingerprint, under names for a message."""
    flat = {f"encoder {key}": value for key, value in encoder.items() if key != "encoder"}
    return flat | {f"encoder {key}": value for key, value in encoder["encoder"].items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.get("version", VERSION) != VERSION:
            raise ValueError(f"no object of version {VERSION}")
        return content
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(
            f"resume: expected a readable {path}, got {one_line(error)} (--restart begins anew)"
        ) from None

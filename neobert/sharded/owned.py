"""Which files of a folder are ours: no other is ever replaced or removed, whatever the flags.

Shards say so in their footers. Other files and damaged shards go by their exact names, in a folder
with a job, a manifest or a shard of ours. One file that is not ours, and the folder is refused.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from neobert import files
from neobert.inputs import STDIN, overlaps
from neobert.outputs import METADATA_KEY, require_pyarrow
from neobert.readers import InputError, escaped

JOB, ENCODER, MANIFEST, LOCK = "_job.json", "_encoder.json", "_manifest.json", "_lock"
VERSION = 1
_SHARD = re.compile(r"part-\d{6,}\.parquet")
_STAGED = re.compile(
    r"_part-\d{6,}\.parquet\..+\.new|_encoder\.json\..+\.new|_(job|manifest)\.json\.new"
)
_KEYS = {
    JOB: {"version", "job", "plan"},
    ENCODER: {"dim", "pooling", "encoder"},
    MANIFEST: {"version", "options", "shards"},
}
_RECORD = {"job", "shard", "rows", "tokens", "truncated"}


def is_folder(path: str) -> bool:
    """Whether an ``--output`` names a folder of shards: no ending, a slash, or a folder there."""
    return path.endswith(("/", os.sep)) or not Path(path).suffix or Path(path).is_dir()


def check_folder(path: str) -> Path:
    """The folder, if shards may be written there; it need not exist.

    Raises:
        InputError: No name, no parent, or no right to write.
    """
    if not path:
        raise InputError("output: expected a name, got ''")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output: expected a folder, got the file {path}")
    if not folder.exists() and not folder.parent.is_dir():
        raise InputError(f"output: expected an existing folder, got {folder.parent}")
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        raise InputError(f"output: expected a writable folder, got {folder}")
    require_pyarrow("output")
    return folder


def check_apart(output: Path, source: str) -> None:
    """Raise `InputError` if shards in ``output`` are in the way of the input, or become part of it.

    Args:
        output: The folder of shards.
        source: A file, folder or pattern.
    """
    if source != STDIN and overlaps(source, output):
        raise InputError(
            f"output: expected a folder apart from the input {source}, got {output}; "
            "choose another --output"
        )


def footer(path: Path) -> tuple[dict[str, Any], int] | None:
    """What a shard says of itself, and its rows; None if it is not there, or damaged.

    Of a Parquet file that is not ours the first is empty.
    """
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (OSError, ValueError):
        return None
    try:
        record = dict(json.loads((metadata.metadata or {}).get(METADATA_KEY, b"{}")))
    except (TypeError, ValueError):
        return None
    return record if record.keys() >= _RECORD else {}, metadata.num_rows


def check_files(folder: Path) -> None:
    """Raise `InputError` if a folder has files that are not ours."""
    ours, unsure = False, []
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        if path.is_symlink() or path.is_dir():
            raise foreign(path)
        if _SHARD.fullmatch(path.name):
            found = footer(path)
            if found is not None and not found[0]:
                raise foreign(path)
            ours = ours or found is not None  # else damaged
            unsure.append(path)
        elif path.name in _KEYS:
            ours = ours or _is_ours(path)
            unsure.append(path)
        elif not _STAGED.fullmatch(path.name) and (path.name != LOCK or path.stat().st_size):
            raise foreign(path)
    if unsure and not ours:
        raise foreign(unsure[0])


def clear(folder: Path) -> None:
    """Remove all of an earlier run, the manifest first: a half of it must not look complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    remove_staged(folder)
    for path in folder.iterdir():
        if _SHARD.fullmatch(path.name) or path.name in (JOB, ENCODER):
            path.unlink()


def remove_staged(folder: Path) -> None:
    """Remove what killed processes were writing."""
    for path in folder.glob("_*.new"):
        if _STAGED.fullmatch(path.name):
            path.unlink()


def _is_ours(path: Path) -> bool:
    try:
        content = files.read_object(path)
    except (InputError, OSError):
        return False
    return content.keys() >= _KEYS[path.name]


def foreign(path: Path) -> InputError:
    return InputError(
        f"output: expected nothing but an earlier run's shards in {path.parent}, "
        f"got {escaped(path.name)}; choose another --output"
    )

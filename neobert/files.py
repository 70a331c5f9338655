"""Writing that a kill or a full disk cannot leave half done, and what a resumed job must match."""

import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from neobert.readers import InputError, one_line

TIMES = "input times"  # of `neobert.inputs.Source.identity`


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file that a kill leaves either old or new, never half."""
    staged = path.with_name(f"{path.name}.new")
    with open(staged, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
    sync_folder(path.parent)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: It holds something else; the message names it.
    """
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: expected a JSON object, got {one_line(error)}") from None
    return content


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def find_runs(kind: str, *roots: Path) -> list[Path]:
    """Folders below ``roots`` whose ``run.json`` is of this kind: by path, each once."""
    paths = {path.resolve(): path for root in roots for path in sorted(root.rglob("run.json"))}
    return [path.parent for path in paths.values() if read_object(path).get("kind") == kind]


def write_once(path: Path, content: str) -> str:
    """Write a small file unless it is there; the content that stands there, whoever wrote it."""
    if not path.exists():
        staged = path.with_name(f"{path.name}.{process_name()}.new")
        staged.write_text(content, encoding="utf-8")
        try:
            os.link(staged, path)  # fails if another process was first
            staged.unlink()
        except FileExistsError:
            staged.unlink()
        except OSError:  # no hard links here: the last one wins
            os.replace(staged, path)
    return path.read_text(encoding="utf-8")


def process_name() -> str:
    """A name that no other process has at the same time, on any machine."""
    return f"{socket.gethostname()}-{os.getpid()}"


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Unbuffered files may take only a part at a time, and do so on a full disk."""
    while data:
        data = data[file.write(data) :]


def sync_folder(folder: Path) -> None:
    """Make renames durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Out of its name first: no half of a folder stands under a name that promises a whole one."""
    gone = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone)


def replace_folder(new: Path, folder: Path) -> None:
    """Move a finished folder to its name; a kill may leave no folder there, but never a half."""
    if folder.exists():
        remove_folder(folder)
    os.replace(new, folder)
    sync_folder(folder.parent)


def lock(folder: Path, name: str = "output", file_name: str = "lock") -> BinaryIO:
    """Hold the folder until the process ends, however it ends."""
    file = try_lock(folder / file_name)
    if file is None:
        raise InputError(f"{name}: expected one job in {folder}, got a second one")
    return file


def try_lock(path: Path) -> BinaryIO | None:
    """Hold ``path`` until the file is closed or the process ends; None if another one holds it."""
    return _locked(path, wait=False)


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Wait for ``path`` and hold it for a short while, one process after the other."""
    file = _locked(path, wait=True)
    assert file is not None
    with file:
        yield


def _locked(path: Path, wait: bool) -> BinaryIO | None:
    file = open(path, "wb")  # noqa: SIM115
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks: the user takes care
    return file


def trusting_input(
    before: Mapping[str, Any], now: Mapping[str, Any], trust: bool
) -> dict[str, Any]:
    """What a resumed job has to match; with ``trust`` the input's files may have other times."""
    times = {key: now[key] for key in (TIMES,) if trust and key in now}
    return {**before, **times}


def other_times(changed: Sequence[str]) -> str:
    """What a message adds if nothing but the times of the input's files has changed."""
    only = len(changed) == 1 and changed[0].startswith(TIMES)
    return "--trust-input goes on if the texts are the same, " if only else ""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``"key was a, now b"`` for every key of ``now`` that ``before`` has otherwise or not."""
    return [
        f"{key} was {before.get(key)!r}, now {value!r}"
        for key, value in now.items()
        if before.get(key) != value
    ]

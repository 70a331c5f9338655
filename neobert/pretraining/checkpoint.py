"""Checkpoints: whole or not there, checked by their checksums, written beside the training.

    RUN/checkpoints/step-00001000/
        model.safetensors config.json    the model, as published: `from_pretrained` loads the folder
        optimizer.safetensors            AdamW's means by parameter name, and the generators' states
        state.json                       step, position in the data, sha256 of every file

A checkpoint is made in ``step-N.partial`` and renamed when all of it is on disk. One that is
damaged later is passed over for the one before it, with a note.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from neobert import files
from neobert.outputs import FULL, OutputError
from neobert.pretraining.store import sha256
from neobert.readers import InputError, one_line

VERSION = 1
STATE, MODEL, OPTIMIZER, CONFIG = (
    "state.json", "model.safetensors", "optimizer.safetensors", "config.json",
)  # fmt: skip
_NAME = re.compile(r"step-(\d{8,})")

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds: tensors on the CPU that nobody changes any more.

    Attributes:
        step: Optimizer steps done.
        tensors: By file name, then by tensor name.
        texts: Small files by name.
        state: JSON-able.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    texts: Mapping[str, str]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk whose files have their checksums."""

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / name)


class Checkpoints:
    """The checkpoints of one run; `save` in one process at a time."""

    def __init__(self, folder: Path, keep_last: int = 1, keep_every: int = 0) -> None:
        self.folder, self._keep_last, self._keep_every = folder, keep_last, keep_every
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def save(self, content: Content, background: bool = False) -> None:
        """Write a checkpoint, in a thread of its own if asked; waits for the one before it.

        Raises:
            OutputError: The disk is full or fails, now or in the thread of the last `save`.
        """
        self.wait()
        if not background:
            self._write(content)
            return
        self._thread = threading.Thread(target=self._write_beside, args=(content,))
        self._thread.start()

    def raise_if_failed(self) -> None:
        """Raise what the thread of the last `save` met, without waiting for it."""
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def wait(self) -> None:
        """For the thread of the last `save`; raises what it met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_if_failed()

    def newest(self, notice: Notice) -> Saved | None:
        """The last checkpoint that is whole; ``notice`` hears of damaged ones."""
        for folder in reversed(self.all()):
            try:
                return read(folder)
            except InputError as problem:
                notice(f"{problem}; trying the checkpoint before it")
        return None

    def all(self) -> list[Path]:
        """Folders of checkpoints, oldest first; unfinished ones do not count."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)]
        return sorted(found, key=_step_of)

    def clean(self) -> None:
        """Remove what a kill left unfinished."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.suffix in (".partial", ".removed"):
                    shutil.rmtree(path)

    def drop_after(self, step: int) -> None:
        """Remove checkpoints of later steps, which are damaged: the run makes them again."""
        for path in self.all():
            if _step_of(path) > step:
                files.remove_folder(path)

    def _write_beside(self, content: Content) -> None:
        try:
            self._write(content)
        except BaseException as problem:
            self._problem = problem

    def _write(self, content: Content) -> None:
        target = self.folder / f"step-{content.step:08}"
        with writing(target, self):
            write_folder(target, content)
            for path in self._superfluous():
                files.remove_folder(path)

    def _superfluous(self) -> list[Path]:
        every = self._keep_every
        older = self.all()[: -self._keep_last]
        return [p for p in older if not every or _step_of(p) % every]


def write_folder(target: Path, content: Content) -> None:
    """All files of ``content`` under ``target``, or nothing there; an older ``target`` goes."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, tensors in content.tensors.items():
        save_file(dict(tensors), partial / name, {"format": "pt"})
    for name, text in content.texts.items():
        (partial / name).write_text(text, "utf-8")
    known = {}
    for path in sorted(partial.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        known[path.name] = sha256(path)
    body = {"version": VERSION, "step": content.step, "files": known, **content.state}
    stated = json.dumps({"state": body, "sha256": _digest(body)}, indent=1)
    files.write_atomically(partial / STATE, stated + "\n")
    files.replace_folder(partial, target)


def read(folder: Path, *, verify: bool = True) -> Saved:
    """A checkpoint; with ``verify`` every byte of it is checked.

    Raises:
        InputError: A file is missing or damaged; it is named.
    """
    path = folder / STATE
    try:
        stated = json.loads(path.read_bytes())
        body = stated["state"]
        if stated["sha256"] != _digest(body):
            raise ValueError("other content than its sha256 says")
        if body["version"] != VERSION:
            raise ValueError(f"version {body['version']}")
        known: dict[str, str] = body["files"]
    except (KeyError, OSError, TypeError, ValueError) as problem:
        got = "none" if isinstance(problem, FileNotFoundError) else one_line(problem)
        raise InputError(f"checkpoint: expected a state in {path}, got {got}") from None
    for name, digest in known.items() if verify else ():
        try:
            seen = sha256(folder / name)
        except OSError as problem:
            seen = problem.strerror or "nothing"
        if seen != digest:
            rule = f"sha256 {digest[:16]} of {folder / name}"
            raise InputError(f"checkpoint: expected {rule}, got {seen[:32]} (it is damaged)")
    return Saved(folder, int(body["step"]), body)


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


@contextlib.contextmanager
def writing(target: Path, checkpoints: Checkpoints) -> Iterator[None]:
    """Turn a failed write into one line that says what is kept; give the room back."""
    try:
        yield
    except Exception as problem:
        # What tokenizers raises has no type of its own.
        if not isinstance(problem, OSError | SafetensorError) and "(os error " not in str(problem):
            raise
        shutil.rmtree(target.with_name(f"{target.name}.partial"), ignore_errors=True)
        why = one_line(problem)
        # By its text: safetensors gives no number.
        full = next((os.strerror(n) for n in FULL if os.strerror(n) in why), None)
        kept = [path.name for path in checkpoints.all()][-1:]
        raise OutputError(
            f"{target}: {full or why}; {'make room and ' if full else ''}go on with --resume "
            f"from {kept[0] if kept else 'the start'}"
        ) from problem

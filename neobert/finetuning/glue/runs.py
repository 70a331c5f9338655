"""The folder of one model's grid on one task: a JSON file per finished point, the best model.

    RUNS/MODEL/TASK/run.json           what every point here shares
                    points/*.json      one file per finished point, written whole or not at all
                    points/*.lock      held by the process that works on the point
                    best/              the model of the best point, with its point.json
                    predictions/*.tsv  the test set, as the benchmark's site takes it

A killed grid loses the points it was at. Several processes may work in one folder.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neobert import files
from neobert.finetuning.schedule import Setting
from neobert.readers import InputError, one_line

VERSION = 1
KIND = "neobert glue"


@dataclass(frozen=True)
class Point:
    """A finished point: its setting, and what `neobert.finetuning.training.Fit.record` says."""

    setting: Setting
    result: dict[str, Any]

    @property
    def score(self) -> float | None:
        return self.result["score"]


@dataclass(frozen=True)
class Run:
    """One folder and what its points share."""

    folder: Path
    identity: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any], restart: bool = False) -> "Run":
        """Begin a run, or go on with one that was begun in the same way.

        Args:
            folder: Of this model and task.
            identity: What decides the results.
            restart: Throw away what is there.

        Raises:
            InputError: The folder holds results of something else, or other files.
        """
        as_read: dict[str, Any] = json.loads(json.dumps(identity))
        folder.mkdir(parents=True, exist_ok=True)
        with files.turn(folder / "lock"):
            if restart:
                _clear(folder)
            path = folder / "run.json"
            if path.exists():
                changed = files.differences(read_run(folder).identity, as_read)
                if changed:
                    raise InputError(
                        f"output: expected the run that began {folder}, got {'; '.join(changed)} "
                        "(--restart discards its results; or choose another --output)"
                    )
            elif any(entry.name != "lock" for entry in folder.iterdir()):
                raise InputError(
                    f"output: expected an empty folder or an earlier run, got {folder}"
                )
            else:
                content = {"kind": KIND, "version": VERSION, **as_read}
                files.write_object(path, content)
            (folder / "points").mkdir(exist_ok=True)
            _recover_best(folder)
        return cls(folder, as_read)

    @contextmanager
    def claim(self, setting: Setting) -> Iterator[bool]:
        """Hold a point in a with statement: False if it is finished, or another process's."""
        path = self.folder / "points" / f"{setting.name}.lock"
        lock = None if self.find(setting) else files.try_lock(path)
        if lock is None:
            yield False
            return
        with lock:
            # Another process may have finished it between the two lines above.
            yield self.find(setting) is None
        if self.find(setting):  # without a result the file stays, and harms nobody
            with suppress(OSError):
                path.unlink()

    def find(self, setting: Setting) -> Point | None:
        path = self._path(setting)
        return _read_point(path) if path.exists() else None

    def points(self) -> list[Point]:
        """All finished points, of this grid or another, by name."""
        return [_read_point(path) for path in sorted((self.folder / "points").glob("*.json"))]

    def record(self, setting: Setting, result: Mapping[str, Any]) -> None:
        content = {"version": VERSION, "setting": asdict(setting), **result}
        files.write_object(self._path(setting), content)

    def keep_best(
        self, setting: Setting, score: float | None, save: Callable[[Path], None]
    ) -> None:
        """Let ``save`` write the model into ``best`` if no point before it did as well.

        Of equals the first by name stays, so that the order of the processes does not matter.
        """
        if score is None:
            return
        best = self.folder / "best"
        with files.turn(self.folder / "lock"):
            before = read_best(self.folder)
            if before is not None and not _is_better(setting, score, before):
                return
            staged = self.folder / "best.new"
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            save(staged)
            content = {"setting": asdict(setting), "score": score, "name": setting.name}
            files.write_object(staged / "point.json", content)
            for path in staged.iterdir():
                _sync(path)
            if best.exists():
                os.replace(best, self.folder / "best.old")
            os.replace(staged, best)
            files.sync_folder(self.folder)
            shutil.rmtree(self.folder / "best.old", ignore_errors=True)

    def _path(self, setting: Setting) -> Path:
        return self.folder / "points" / f"{setting.name}.json"


def find_runs(*roots: Path) -> list[Run]:
    """Every run under ``roots``, by path."""
    return [read_run(folder) for folder in files.find_runs(KIND, *roots)]


def read_run(folder: Path) -> Run:
    """The run in ``folder``.

    Raises:
        InputError: Its ``run.json`` cannot be read, or is of another kind.
    """
    path = folder / "run.json"
    content = files.read_object(path)
    if content.pop("kind", None) != KIND or content.pop("version", None) != VERSION:
        raise InputError(f"{path}: expected a run of neobert finetune glue, got another file")
    return Run(folder, content)


def read_best(folder: Path) -> dict[str, Any] | None:
    """``name``, ``setting`` and ``score`` of the model in ``best``."""
    path = folder / "best" / "point.json"
    return files.read_object(path) if path.exists() else None


def _read_point(path: Path) -> Point:
    content = files.read_object(path)
    try:
        return Point(Setting(**content.pop("setting")), content)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: expected a point's result, got {one_line(error)}") from None


def _is_better(setting: Setting, score: float, before: Mapping[str, Any]) -> bool:
    if score != before["score"]:
        return bool(score > before["score"])
    return bool(setting.name < before["name"])


def _recover_best(folder: Path) -> None:
    """Finish what a kill between two renames left."""
    old, best = folder / "best.old", folder / "best"
    if old.exists() and not best.exists():
        os.replace(old, best)


def _clear(folder: Path) -> None:
    """Remove a run's own files and nothing else.

    Raises:
        InputError: Another process works on a point.
    """
    locks = [files.try_lock(path) for path in (folder / "points").glob("*.lock")]
    if any(lock is None for lock in locks):
        raise InputError(f"restart: expected no other process in {folder}, got one")
    for name in ("points", "best", "best.new", "best.old", "predictions"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "run.json").unlink(missing_ok=True)
    for lock in locks:
        if lock is not None:
            lock.close()


def _sync(path: Path) -> None:
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())

"""Real text that every machine with Python has: the docstrings of its standard library."""

import ast
import inspect
import os
import random
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
SEED = 0
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Passage:
    """A docstring and the dotted name of what it describes."""

    name: str
    text: str


def standard_library_passages(
    count: int | None = None, root: str | os.PathLike[str] | None = None
) -> list[Passage]:
    """Every different docstring under ``root``, or a sample of ``count`` of them.

    Args:
        count: Passages wanted; None, or more than there are, gives all.
        root: A folder of Python sources; None is the standard library of this interpreter.

    Returns:
        Passages in a random order that is the same on every run with the same library.
    """
    top = Path(root or sysconfig.get_paths()["stdlib"])
    passages: dict[str, Passage] = {}
    for path in _sources(top):
        module = ".".join(path.relative_to(top).with_suffix("").parts).removesuffix(".__init__")
        for name, text in _docstrings(path, module):
            passages.setdefault(text, Passage(name, text))
    found = list(passages.values())
    random.Random(SEED).shuffle(found)
    return found[:count]


def _sources(top: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _docstrings(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Dotted name and cleaned text of each docstring; nothing for a file that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the sources are none of our business
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    pending: list[tuple[str, ast.AST]] = [(module, tree)]
    while pending:
        name, node = pending.pop()
        if isinstance(node, ast.Module | Definition):
            text = ast.get_docstring(node, clean=False)
            if text and (cleaned := inspect.cleandoc(text)):
                yield name, cleaned
        children = [
            (f"{name}.{child.name}" if isinstance(child, Definition) else name, child)
            for child in ast.iter_child_nodes(node)
        ]
        pending.extend(reversed(children))  # popped in the order of the source

"""Real text that every machine with Python has: its standard library, docstrings and code."""

import ast
import inspect
import os
import random
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
SEED = 0
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Parts = Callable[[Path, ast.Module, str], Iterator[tuple[str, str]]]


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
    found = _passages(root, _docstrings)
    random.Random(SEED).shuffle(found)
    return found[:count]


def standard_library_code(root: str | os.PathLike[str] | None = None) -> list[Passage]:
    """Every different top-level definition under ``root``, docstrings included.

    What stands between definitions belongs to the one before it; what stands before the first is a
    passage too. The order is that of `standard_library_passages`: random, and always the same.
    """
    found = _passages(root, _definitions)
    random.Random(SEED).shuffle(found)
    return found


def _passages(root: str | os.PathLike[str] | None, parts: Parts) -> list[Passage]:
    top = Path(root or sysconfig.get_paths()["stdlib"])
    passages: dict[str, Passage] = {}
    for path in _sources(top):
        module = ".".join(path.relative_to(top).with_suffix("").parts).removesuffix(".__init__")
        tree = _parsed(path)
        for name, text in parts(path, tree, module) if tree is not None else ():
            passages.setdefault(text, Passage(name, text))
    return list(passages.values())


def _sources(top: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _parsed(path: Path) -> ast.Module | None:
    """None for a file that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the sources are none of our business
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _definitions(path: Path, tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """Dotted name and text of each top-level part."""
    with tokenize.open(path) as file:
        lines = file.readlines()
    starts = {1: module}
    for node in tree.body:
        if isinstance(node, Definition):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            starts[first] = f"{module}.{node.name}"
    ends = [*list(starts)[1:], len(lines) + 1]
    for (start, name), end in zip(starts.items(), ends, strict=True):
        if text := "".join(lines[start - 1 : end - 1]).strip():
            yield name, text


def _docstrings(path: Path, tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """Dotted name and cleaned text of each docstring."""
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

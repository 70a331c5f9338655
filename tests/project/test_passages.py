"""The demo's text: every docstring once, in an order that never changes."""

from pathlib import Path

import pytest

from neobert.passages import Passage, standard_library_passages

SOURCE = '''"""Module text."""

class Box:
    """Box text.

        indented
    end
    """

    def open(self):
        """Open text."""

    async def shut(self):
        def inner():
            """Inner text."""

def twin():
    """Open text."""

def silent(): pass
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name in ("pack/__init__.py", "site-packages/other.py", "pack/tests/check.py", "test/x.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Text of {name}."""\n', encoding="utf-8")
    (tmp_path / "box.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "broken.py").write_text('"""Never."""\ndef (:\n', encoding="utf-8")
    (tmp_path / "old.py").write_bytes(b'# -*- coding: latin-1 -*-\n"""Caf\xe9."""\n')
    return tmp_path


def test_collects_each_docstring_once_outside_tests_and_other_packages(library: Path) -> None:
    assert set(standard_library_passages(root=library)) == {
        Passage("box", "Module text."),
        Passage("box.Box", "Box text.\n\n    indented\nend"),
        Passage("box.Box.open", "Open text."),
        Passage("box.Box.shut.inner", "Inner text."),
        Passage("old", "Café."),
        Passage("pack", "Text of pack/__init__.py."),
    }


def test_a_sample_is_the_start_of_one_fixed_order(library: Path) -> None:
    everything = standard_library_passages(root=library)
    assert standard_library_passages(root=library) == everything
    assert standard_library_passages(3, library) == everything[:3]
    assert standard_library_passages(10**6, library) == everything
    assert everything != sorted(everything, key=lambda passage: passage.name)

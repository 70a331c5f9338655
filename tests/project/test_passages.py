"""The demo's text: every docstring once, in an order that never changes."""

from pathlib import Path

import pytest

from neobert.passages import Passage, standard_library_code, standard_library_passages

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


def test_code_is_cut_at_top_level_definitions_and_nothing_is_lost(library: Path) -> None:
    found = standard_library_code(library)
    box = {p.name: p.text for p in found if p.name.startswith("box")}
    assert set(box) == {"box", "box.Box", "box.twin", "box.silent"}
    assert box["box.silent"] == "def silent(): pass"
    whole = "\n\n".join(box[name] for name in ("box", "box.Box", "box.twin", "box.silent"))
    assert whole == SOURCE.strip()
    assert Passage("old", '# -*- coding: latin-1 -*-\n"""Café."""') in found
    assert found == standard_library_code(library)


def test_a_decorator_belongs_to_its_definition(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("import x\n@x.a\n@x.b\nclass C: pass\nC.d = 1\n", "utf-8")
    found = {p.name: p.text for p in standard_library_code(tmp_path)}
    assert found == {"one": "import x", "one.C": "@x.a\n@x.b\nclass C: pass\nC.d = 1"}

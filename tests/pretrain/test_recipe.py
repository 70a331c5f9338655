"""A recipe is checked whole before anything is read."""

from pathlib import Path

import pytest

from neobert.pretraining.recipe import Recipe, read_recipe
from neobert.readers import InputError

GOOD = "data: {path: texts, store: runs/tokens}\nbatch: {bins: 8}\n"


def read(tmp_path: Path, *overrides: str, text: str = GOOD) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path, overrides)


def test_values_come_from_the_file_and_then_from_the_command_line(tmp_path: Path) -> None:
    found = read(tmp_path, "batch.tokens=2048", 'batch.views={all: 5e-1, ">=512": 0.5}')
    assert (found.batch.bins, found.batch.tokens) == (8, 2048)
    assert found.batch.views == {"all": 0.5, ">=512": 0.5}
    assert read(tmp_path, "data.path=", "data.dataset=a/b").data.dataset == "a/b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.colum=x", "data: expected one of the keys path, dataset, .*, got 'colum'"),
        ("mode.size=1", "recipe: expected one of the keys data, batch.*, got 'mode'"),
        ("batch.bins=many", "batch.bins: expected a whole number, got 'many'"),
        ("batch.bins=true", "batch.bins: expected a whole number, got True"),
        ("batch.bins=", "batch.bins: expected a whole number, got nothing"),
        ("batch.bins=0", "batch.bins: expected at least 1, got 0"),
        ("batch", "override: expected key=value, got 'batch'"),
        ("batch.bins.x=1", "batch.bins.x: expected a key of a section, got the value batch.bins"),
        ("batch=[1", "batch: expected YAML, got "),
        ("batch=3", "batch: expected keys with values, got 3"),
        ("batch.tokens=1023", r"batch.tokens: expected at least batch.max_length \(1024\), .*1023"),
        ("batch.max_length=2", "batch.max_length: expected at least 3, got 2"),
        ("batch.mask_rate=1", "batch.mask_rate: expected a number between 0 and 1, got 1"),
        ("batch.mask_rate=.nan", "batch.mask_rate: expected a finite number, got nan"),
        ("batch.masking=some", "batch.masking: expected 'mask' or 'bert', got 'some'"),
        ("batch.layout=dense", "batch.layout: expected 'packed' or 'padded', got 'dense'"),
        ("batch.views={}", "batch.views: expected a table of names and values, got {}"),
        ("batch.views={all: 0.5}", "batch.views: expected chances that sum to 1, got 0.5"),
        ("batch.views={all: 0, x: 1}", "batch.views.all: expected a chance over 0"),
        ("batch.views={long: 1}", "batch.views: expected names like .*, got 'long'"),
        ("data.dataset=a/b", "data: expected one of path and dataset, got both"),
        ("data.path=", "data: expected one of path and dataset, got neither"),
        ("data.store=''", "data.store: expected a folder for the tokenised documents"),
        ("data.errors=x", "data.errors: expected 'strict' or 'replace', got 'x'"),
        ("data.subset=x", "data.subset: expected none without data.dataset, got x"),
        ("data.held_out=-1", "data.held_out: expected at least 0, got -1"),
    ],
)
def test_bad_values_are_named(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected sections with keys"),
        ("- 1", "expected sections with keys"),
        ("batch: {bins: 8}", "recipe: expected a section 'data', got none"),
        ("data: !!python/object:os.system {}", "expected YAML"),
        (f"{GOOD}batch: {{seed: 1}}", "expected YAML, got the key 'batch' twice"),
        ("data: {path: a, store: b, path: c}", "expected YAML, got the key 'path' twice"),
    ],
)
def test_bad_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, text=text)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"data: \xff")
    with pytest.raises(InputError, match=r"recipe\.yaml: expected YAML, got bytes that are not"):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_sets_what_it_changes_of_another(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "first.yaml").write_text(GOOD)
    (tmp_path / "base" / "second.yaml").write_text(
        "extends: first.yaml\nbatch: {tokens: 2048, views: {all: 0.5, '>=512': 0.5}}\n"
    )
    found = read(
        tmp_path, "batch.bins=2", text="extends: base/second.yaml\nbatch: {views: {all: 1}}"
    )
    assert found.data == read(tmp_path).data
    assert (found.batch.bins, found.batch.tokens) == (2, 2048)
    assert found.batch.views == {"all": 1.0}


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("recipe.yaml", "recipe.yaml: extends: expected a file that does not lead back here"),
        ("[a, b]", r"recipe.yaml: extends: expected a file name, got \['a', 'b'\]"),
        ("other.yaml", "other.yaml: extends: expected a file that does not lead back here"),
    ],
)
def test_a_recipe_extends_one_other_file(extends: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("extends: recipe.yaml")
    with pytest.raises(InputError, match=message):
        read(tmp_path, text=f"extends: {extends}")

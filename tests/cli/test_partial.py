"""What an earlier run left, damaged or in the way: named, and never deleted unasked."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fake_encoder import DIM, run_job
from jobs import TEXTS, Killed, stop_after

from neobert import outputs
from neobert.inputs import open_source
from neobert.outputs import partial_folder
from neobert.readers import InputError, ReadOptions

BAD_STATES: list[tuple[dict[str, Any], str]] = [
    ({"surprise": 2}, "keys job, .*, got 'surprise'"),
    ({"job": []}, r"an object under 'job', got \[\]"),
    ({"texts": "x"}, "a whole number of at least 0 or null under 'texts', got 'x'"),
    *(
        ({key: value}, f"a whole number of at least 0 under '{key}', got {value!r}")
        for key in ("rows", "tokens", "truncated", "id_bytes")
        for value in ("x", -1, 1.5, True, None)
    ),
    ({"seconds": "x"}, "a finite number of at least 0 under 'seconds', got 'x'"),
    ({"seconds": float("nan")}, "a finite number of at least 0 under 'seconds', got nan"),
    ({"digest": 3}, "a string under 'digest', got 3"),
    ({"finished": 1}, "true or false under 'finished', got 1"),
    ({"finished": True}, "a whole number of at least 0 under 'job', 'encoder dim', got None"),
    (
        {"finished": True, "job": {"encoder dim": 8, "encoder max_length": 5}},
        "float32 or float16 under 'job', 'output_dtype', got None",
    ),
]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "an object, got"),
        ("[]", r"an object, got \[\]"),
        ("\x00", "an object, got"),
        ("[" * 100_000, "an object, got"),
        ("{}", "version 1, got another or none"),
        *((json.dumps({"version": 1, **state}), message) for state, message in BAD_STATES),
    ],
    ids=lambda value: value[:30],
)
def test_an_unreadable_state_is_named(
    content: str, message: str, source: Path, output: Path
) -> None:
    with pytest.raises(Killed):
        run_job(source, output, stop_after(8))
    (partial_folder(output) / "state.json").write_text(content)
    with pytest.raises(
        InputError,
        match=rf"expected a state in .*state\.json with {message}.*--restart begins anew",
    ):
        run_job(source, output)
    assert run_job(source, output, restart=True).texts == 18


def test_lost_ids_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": t, "k": 1}) for t in TEXTS))
    source = lambda: open_source(str(tmp_path / "in.jsonl"), ReadOptions(id_column="k"))  # noqa: E731
    output = tmp_path / "out.parquet"
    with pytest.raises(Killed):
        run_job(source(), output, stop_after(8))
    os.truncate(partial_folder(output) / "ids.jsonl", 8)
    with pytest.raises(InputError, match=r"expected at least 32 bytes in .*ids\.jsonl, got fewer"):
        run_job(source(), output)


def test_lost_rows_are_noticed(source: Path, output: Path) -> None:
    with pytest.raises(Killed):
        run_job(source, output, stop_after(8))
    os.truncate(partial_folder(output) / "rows.npy", 200)
    with pytest.raises(InputError, match=r"expected at least 384 bytes in .*rows\.npy, got fewer"):
        run_job(source, output)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.csv", r"expected a name ending in \.npy or \.parquet"),
        ("out", r"expected a name ending in \.npy or \.parquet"),
        ("gone/out.npy", "expected an existing folder"),
        ("old.npy", r"expected a new file, got .*old\.npy, which exists \(--overwrite"),
        ("folder.npy", "expected a file name, got the folder"),
    ],
)
def test_unfit_outputs_are_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "old.npy").touch()
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(InputError, match=message):
        outputs.check_output(str(tmp_path / name))


def test_restart_does_not_replace_a_published_output(source: Path, output: Path) -> None:
    output.write_bytes(b"whole")
    partial_folder(output).mkdir()
    job = {"encoder dim": DIM, "encoder max_length": 5, "output_dtype": "float32"}
    state = {"version": 1, "job": job, "rows": 18, "finished": True}
    (partial_folder(output) / "state.json").write_text(json.dumps(state))
    assert outputs.check_output(str(output)) == output
    with pytest.raises(InputError, match="which exists"):
        outputs.check_output(str(output), restart=True)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_stands_in_the_way_is_named_and_kept(
    kind: str, existing: bool, source: Path, output: Path
) -> None:
    place = partial_folder(output)
    if existing:
        output.write_bytes(b"old")
    if kind == "folder":
        place.mkdir()
        (place / "thesis.txt").write_text("mine")
    elif kind == "link":
        place.symlink_to(source.parent / "gone")
    else:
        place.write_text("mine")
    rule = {"folder": "nothing but an earlier run's files in"}.get(
        kind, "nothing or the folder of an earlier run at"
    )
    got = {"folder": "thesis.txt"}.get(kind, "something else")
    for restart in (False, True):
        with pytest.raises(
            InputError,
            match=f"output: expected {rule} .*partial, got {got}; move it away or choose",
        ):
            run_job(source, output, overwrite=existing, restart=restart)
    assert os.path.lexists(place)
    if kind != "link":
        assert (place / "thesis.txt" if kind == "folder" else place).read_text() == "mine"

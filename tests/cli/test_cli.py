"""The command: answers at once, one line for an error, an exit code for every end."""

import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from neobert import cli
from neobert.outputs import OutputError
from neobert.readers import InputError

REPORT_HEAVY = """
import sys
from neobert.cli import main
code = main({arguments!r})
heavy = {{"torch", "transformers", "triton", "pyarrow"}}
print(code, *sorted(heavy & set(sys.modules)))
"""


def python(source: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env=environment, **options
    )


def command(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Put a subcommand's module in place of ``neobert encode``."""
    module = ModuleType("stand_in")
    vars(module).update(add_parser=lambda subparsers: subparsers.add_parser("encode"), run=run)
    monkeypatch.setitem(sys.modules, "neobert.commands.encode", module)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["encode", "--help"], 0),
        (["search", "--help"], 0),
        (["doctor", "--help"], 0),
        (["encode", "--model", "m", "--input", "gone.txt", "--output", "out.npy"], 2),
        (["search", "--index", "gone.npy"], 2),
    ],
    ids=str,
)
def test_help_and_bad_input_load_nothing_heavy(arguments: list[str], code: int) -> None:
    done = python(REPORT_HEAVY.format(arguments=arguments))
    assert done.stdout.splitlines()[-1:] == [str(code)], done.stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["encod"], ["encode"], ["encode", "--window", "0"], ["doctor", "--js"], ["--what"]],
    ids=" ".join,
)
def test_a_wrong_command_line_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("neobert: error: ")
    assert err.count("\n") == 1


def test_every_command_has_a_module_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.COMMANDS:
        assert cli.main([name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: neobert {name}")


def raising(error: BaseException) -> Any:
    def run(args: Any) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("input: expected\n  more"), 2, "error: input: expected more"),
        (ValueError("x: expected y"), 2, "error: x: expected y"),
        (FileNotFoundError(2, "No such file", "a.txt"), 2, "error: a.txt: No such file"),
        (OutputError("disk full"), 1, "error: disk full"),
        (
            MemoryError(),
            1,
            "error: out of memory; a smaller --max-tokens or batch.tokens",
        ),
        (RuntimeError("CUDA out of memory. Tried"), 1, "error: out of memory; a smaller"),
        (
            ModuleNotFoundError("No module named 'x.y'", name="x.y"),
            1,
            "error: x: expected it to be",
        ),
        (KeyboardInterrupt("interrupted; 8 rows"), 130, "neobert: interrupted; 8 rows"),
        (KeyboardInterrupt(), 130, "neobert: interrupted"),
    ],
    ids=repr,
)
def test_every_error_has_a_line_and_a_code(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(monkeypatch, raising(error))
    assert cli.main(["encode"]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.strip().count("\n") == 0


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, raising(RuntimeError("unexpected")))
    with pytest.raises(RuntimeError, match="unexpected"):
        cli.main(["encode"])


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, raising(ValueError("x: expected y")))
    with pytest.raises(ValueError, match="expected y"):
        cli.main(["--debug", "encode"])


def test_the_exit_code_is_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, lambda args: 1)
    assert cli.main(["encode"]) == 1
    command(monkeypatch, lambda args: None)
    assert cli.main(["encode"]) == 0


LEFT_ALONE = """
import os, sys
from types import ModuleType
from neobert.cli import main

stand_in = ModuleType("stand_in")
stand_in.add_parser = lambda subparsers: subparsers.add_parser("search")
stand_in.run = lambda args: print("a hit")
sys.modules["neobert.commands.search"] = stand_in
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 1)
sys.exit(main(["search"]))
"""


def test_a_reader_that_leaves_is_no_error() -> None:
    """As in ``neobert search ... | head -1``."""
    done = python(LEFT_ALONE)
    assert (done.returncode, done.stderr) == (141, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from neobert_kernels import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"neobert {__version__}\n"


AUTO = """
{first}
import sys
from transformers import AutoModelForMaskedLM
import neobert
config = neobert.NeoBERTConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
)
assert type(AutoModelForMaskedLM.from_config(config)) is neobert.NeoBERTForMaskedLM
assert not [f for f in sys.meta_path if type(f).__module__ == "neobert._auto"]
"""


def test_the_auto_classes_know_neobert_when_our_module_imports_transformers() -> None:
    """The hard order: a module of ours is half imported when transformers has been loaded."""
    done = python(AUTO.format(first="import neobert.model"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", [str(2**53), "9" * 5000])
def test_numbers_that_nothing_counts_to_are_refused(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["encode", "--model", "m", "--input", "i", "--output", "o", "--window", value]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert f"window: expected a whole number of at least 1 and below 2**53, got '{value}'" in said

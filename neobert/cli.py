"""The ``neobert`` command. A subcommand's module is imported only when it is called."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from neobert import parent
from neobert.readers import InputError, escaped, has_surrogates, one_line

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141

# Each module has add_parser(subparsers) and run(args) -> int.
COMMANDS = {
    "doctor": ("neobert.doctor", "show what was found, what each operator will run, and fixes"),
    "encode": ("neobert.commands.encode", "embed a file, a folder or standard input"),
    "search": ("neobert.commands.search", "find the nearest texts of an encoded file or folder"),
    "pretrain": ("neobert.commands.pretrain", "train NeoBERT on texts"),
    "bench": ("neobert.commands.bench", "the least time a model can take; a report of results"),
    "finetune": ("neobert.commands.finetune", "fine-tune a model on a benchmark"),
    "evaluate": ("neobert.commands.evaluate", "evaluate models, and report results"),
    "aot": ("neobert_kernels.aot", "compile every kernel for a GPU without one"),
    "demo": ("neobert.demo", "embed real text, unpatched and patched, and compare"),
}


class _Parser(argparse.ArgumentParser):
    """Errors in one line; option names in full, so that new options break no script."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"neobert: error: {message} (try: {self.prog} --help)\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from neobert_kernels import __version__

        print(f"neobert {__version__}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    parent.end_with_torchrun()
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_FAILED
    except BrokenPipeError:
        # The reader went away; what Python flushes on exit must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt as stop:
        print(f"\nneobert: {one_line(stop) or 'interrupted'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        message, code = _explain(error)
        if debug or not message:
            raise
        print(f"neobert: error: {message}", file=sys.stderr)
        return code


def _run(arguments: list[str]) -> int:
    parser = _Parser(prog="neobert", description="Fast encoders for text: NeoBERT, BERT and kin.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = next((a for a in arguments if not a.startswith("-")), None)
    run = None
    for name, (module_name, summary) in COMMANDS.items():
        if name == command:
            module = importlib.import_module(module_name)
            module.add_parser(subparsers)
            run = module.run
        else:
            subparsers.add_parser(name, help=summary)
    args, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one stretch; key=value may also follow an option.
    if rest and hasattr(args, "changes") and all("=" in a and a[0] != "-" for a in rest):
        args.changes += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    assert run is not None
    _check_unicode(args)
    return run(args) or 0


def _check_unicode(args: argparse.Namespace) -> None:
    """Bytes that are not UTF-8, in a name or a text, would fail somewhere later, half-way."""
    for name, given in vars(args).items():
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, str) and has_surrogates(value):
                raise InputError(
                    f"{name.replace('_', '-')}: expected valid UTF-8, got {escaped(value)}"
                )


def _explain(error: BaseException) -> tuple[str, int]:
    """One line for the user and the exit code; no line for what only a traceback explains."""
    from neobert.outputs import OutputError

    text = one_line(error)
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if not package or package in ("neobert", "neobert_kernels"):
            return "", EXIT_FAILED
        return f"{package}: expected it to be installed, got {text}; neobert doctor", EXIT_FAILED
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        hint = "a smaller --max-tokens or batch.tokens needs less"
        return f"out of memory; {hint} ({text})", EXIT_FAILED
    if isinstance(error, OutputError):
        return text, EXIT_FAILED
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}", EXIT_BAD_INPUT
    if isinstance(error, RuntimeError):
        return "", EXIT_FAILED
    return text or type(error).__name__, EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())

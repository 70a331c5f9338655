"""``neobert evaluate mteb``: a sentence encoder on MTEB, through ``mteb`` itself."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neobert.commands.arguments import add_model_arguments, load_encoder
from neobert.readers import InputError, one_line

if TYPE_CHECKING:
    from neobert.encode import Encoder

DESCRIPTION = """\
Run tasks of MTEB through the mteb library (pip install mteb) on our packed encoder, with mteb's own
result cache in OUTPUT/results, which is what a submission to the leaderboard holds. Tasks that are
in the cache are not run again. Then print the means by kind of task beside the paper's table.

    neobert evaluate mteb --model MODEL --benchmark "MTEB(eng, v1)"
    neobert evaluate mteb --model MODEL --benchmark STSBenchmark SICK-R
"""


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = kinds.add_parser(
        "mteb",
        help="a sentence encoder on MTEB",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a local model folder or a hub id")
    parser.add_argument(
        "--benchmark", required=True, nargs="+", metavar="NAME", help="a benchmark, or tasks"
    )
    parser.add_argument("--name", help="the model's name in results (default: from --model)")
    parser.add_argument(
        "--output", default="mteb", metavar="DIR", help="folder of the results (default: mteb)"
    )
    parser.add_argument(
        "--prompts", metavar="JSON", help="a file: names of tasks or kinds, query, document to text"
    )
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from neobert.finetuning.glue.paper import NAMES
    from neobert.loading import model_name

    try:
        import mteb
    except ImportError as error:
        raise InputError(
            f"mteb: expected the package mteb, pip install mteb, got {error}"
        ) from None
    from neobert.evaluation.mteb_encoder import MTEBEncoder
    from neobert.evaluation.mteb_report import Result, scores_table, tasks_table

    tasks = _tasks(mteb, args.benchmark)
    name = model_name(args.model, args.name)
    encoder = load_encoder(args)
    model = MTEBEncoder(encoder, name, _prompts(args.prompts))
    cache = mteb.ResultCache(cache_path=args.output)
    result = mteb.evaluate(model, tasks, cache=cache, raise_error=False)
    kinds = {task.metadata.name: task.metadata.type for task in tasks}
    failed = {each.task_name: one_line(each.exception) for each in result.exceptions or []}
    scores = {}
    for each in result.task_results:
        if _is_empty(each):
            # mteb writes the mean of parts that all failed, and would take it for done next time.
            cache.get_task_result_path(each.task_name, model.mteb_model_meta).unlink()
            failed[each.task_name] = "all of its parts failed"
        else:
            scores[each.task_name] = kinds[each.task_name], _score(each.get_score())
    ours = Result(
        NAMES.get(name, name),
        tuple(args.benchmark),
        tuple(kinds),
        scores,
        _settings(args, encoder, mteb.__version__),
    )
    ours.write(Path(args.output))
    for task, reason in failed.items():
        print(f"neobert: {task} failed: {reason}", file=sys.stderr)
    print(scores_table([ours]).markdown())
    print()
    print(tasks_table([ours]).markdown())
    return 1 if failed else 0


def _tasks(mteb: Any, names: list[str]) -> list[Any]:
    """The tasks of one benchmark, or tasks by name.

    Raises:
        InputError: No such name; the message has near ones.
    """
    import difflib

    benchmarks = {benchmark.name for benchmark in mteb.get_benchmarks()}
    if len(names) == 1 and names[0] in benchmarks:
        return list(mteb.get_benchmark(names[0]))
    # Superseded ones too: benchmarks and the paper have them.
    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, benchmarks | known, 5, 0.4)
            rule = f"a benchmark or tasks of mteb ({', '.join(near) or 'MTEB(eng, v2), ...'})"
            raise InputError(f"benchmark: expected {rule}, got {name!r}")
    found = mteb.get_tasks(tasks=list(dict.fromkeys(names)))
    return [_english(task) for task in found]


def _english(task: Any) -> Any:
    """The task with its English parts, else with those that have English in them, else whole."""
    if "eng" not in task.metadata.languages:
        return task
    try:
        return task.filter_languages(["eng"], exclusive_language_filter=True)
    except ValueError:  # mteb's for nothing left
        return task.filter_languages(["eng"])


def _settings(args: argparse.Namespace, encoder: "Encoder", version: str) -> dict[str, Any]:
    """What decides the numbers, for the report."""
    found = {
        "mteb": version,
        "pooling": encoder.pooling,
        "max_length": encoder.max_length,
        "dtype": encoder.fingerprint["dtype"],
        "patched": not args.no_patch,
        "model_files": encoder.fingerprint["files"],
    }
    return found | ({"prompts": _prompts(args.prompts)} if args.prompts else {})


def _is_empty(result: Any) -> bool:
    return all(part["main_score"] is None for parts in result.scores.values() for part in parts)


def _score(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _prompts(path: str | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise InputError(f"prompts: expected JSON, got {one_line(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise InputError(f"prompts: expected an object of strings in {path}, got another")
    return content

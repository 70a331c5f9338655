"""Results beside the paper's table, as Markdown, as one HTML page, as a picture."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from neobert import files
from neobert.finetuning.glue.paper import AVERAGE, PAPER, TEST_SERVER
from neobert.finetuning.glue.runs import Point, Run, find_runs
from neobert.finetuning.glue.sweep import best_points, mean_score
from neobert.finetuning.glue.tasks import AVERAGED, TASKS
from neobert.finetuning.schedule import Setting
from neobert.readers import InputError
from neobert.tables import Section, Table, html_page, markdown_page

NOT_RUN, UNDEFINED = "not run", "undefined"
COLUMNS = ("MNLI", "QNLI", "QQP", "RTE", "SST-2", "MRPC", "CoLA", "STS-B")

NOTE = (
    "Development sets, in percent. A task with two metrics counts as their mean: MRPC and QQP "
    "accuracy and F1, STS-B Pearson and Spearman, MNLI matched and mismatched; CoLA is Matthews' "
    "correlation. Our average is over all eight tasks, and is not given for fewer. The paper's "
    f"{' and '.join(TEST_SERVER)} rows are scores of the test server, whose average counts both "
    "parts of MNLI."
)

assert set(COLUMNS) == set(AVERAGED)


@dataclass(frozen=True)
class Result:
    """One model on one task under one grid."""

    run: Run
    points: list[Point]

    @property
    def best(self) -> list[Point]:
        return best_points(self.points)

    @property
    def percent(self) -> float | None:
        score = mean_score(self.best)
        return None if score is None else 100 * score


# By (model, grid), then by task.
Results = dict[tuple[str, str], dict[str, Result]]


def collect(*roots: Path) -> Results:
    """All results under ``roots``.

    Raises:
        InputError: No such folder, or two folders hold the same model, grid and task.
    """
    for root in roots:
        if not root.is_dir():
            raise InputError(f"runs: expected a folder of neobert finetune glue, got {root}")
    found: Results = {}
    for run in find_runs(*roots):
        key = run.identity["name"], run.identity["grid"]
        task = run.identity["task"]
        tasks = found.setdefault(key, {})
        if task in tasks:
            raise InputError(
                f"runs: expected one folder for {key[0]}, {task} and grid {key[1]}, got "
                f"{tasks[task].run.folder} and {run.folder}"
            )
        tasks[task] = Result(run, run.points())
    return found


def scores_table(results: Results) -> Table:
    """Models as rows: the paper's figures, and below them ours, a row per grid."""
    rows: list[list[str]] = []
    names = [*PAPER, *sorted({name for name, _ in results} - set(PAPER))]
    for name in names:
        if name in PAPER:
            paper = [f"{PAPER[name][column]:.1f}" for column in (*COLUMNS, AVERAGE)]
            rows.append([name, "paper", *paper])
        ours = sorted(grid for other, grid in results if other == name)
        if not ours:
            rows.append([name, "ours", *[NOT_RUN] * (len(COLUMNS) + 1)])
        for grid in ours:
            tasks = results[name, grid]
            cells = [_cell(tasks.get(column)) for column in COLUMNS]
            rows.append([name, f"ours, grid {grid}", *cells, _average(tasks)])
    return Table(("model", "from", *COLUMNS, AVERAGE), rows, numbers_from=2)


def _cell(result: Result | None) -> str:
    if result is None or not result.points:
        return NOT_RUN
    return UNDEFINED if result.percent is None else f"{result.percent:.1f}"


def average(tasks: Mapping[str, Result]) -> tuple[float | None, int]:
    """Of all eight tasks, None for fewer; and how many have a score."""
    percents = [tasks[name].percent for name in COLUMNS if name in tasks]
    known = [value for value in percents if value is not None]
    return (sum(known) / len(known) if len(known) == len(COLUMNS) else None), len(known)


def _average(tasks: Mapping[str, Result]) -> str:
    value, count = average(tasks)
    return f"{count} of {len(COLUMNS)} tasks" if value is None else f"{value:.1f}"


def settings_table(results: Results) -> Table:
    """How each of our numbers was made."""
    columns = (
        "model", "task", "grid", "points", "score", "metrics", "learning rate", "batch",
        "weight decay", "seeds", "best step", "start", "runs as", "made with",
    )  # fmt: skip
    rows = []
    for (name, grid), tasks in sorted(results.items()):
        for task in TASKS:
            if task in tasks:
                count = str(len(tasks[task].points))
                rows.append([name, task, grid, count, *_details(tasks[task])])
    return Table(columns, rows)


def _details(result: Result) -> Iterator[str]:
    identity, best = result.run.identity, result.best
    yield _cell(result)
    if best:
        yield _metrics(best)
        setting: Setting = best[0].setting
        yield f"{setting.lr:.3g}"
        yield str(setting.batch_size)
        yield f"{setting.weight_decay:g}"
        yield " ".join(str(point.setting.seed) for point in best)
        steps = (f"{p.result['best_step']:,} of {p.result['planned_steps']:,}" for p in best)
        yield "; ".join(steps)
    else:
        yield "; ".join(sorted(_reasons(result.points))) or _cell(result)
        yield from [_cell(result)] * 5
    yield identity["start"] or "the model"
    yield f"{'patched' if identity['patched'] else 'not patched'}, {identity['precision']}"
    yield _made_with(best or result.points) or NOT_RUN


def _metrics(points: Sequence[Point]) -> str:
    """Each metric's mean over the seeds."""
    parts = []
    for name in points[0].result["metrics"]:
        values = [point.result["metrics"][name] for point in points]
        parts.append(f"{name} {100 * sum(values) / len(values):.1f}")
    return ", ".join(parts)


def _reasons(points: Sequence[Point]) -> Iterator[str]:
    for point in points:
        for name, why in point.result["undefined"].items():
            yield f"{name}: {why}"


def _made_with(points: Sequence[Point]) -> str:
    machines = {tuple(point.result["machine"].items()) for point in points}
    shown = (", ".join(f"{k} {v}" for k, v in machine) for machine in machines)
    return "; ".join(sorted(shown)).replace("device ", "")


def markdown(results: Results) -> str:
    return markdown_page("GLUE", NOTE, sections(results))


def sections(results: Results, picture: Path | None = None) -> list[Section]:
    """The scores and how they were made, as parts of a page."""
    made = "How our numbers were made"
    if results:
        details = Section(made, table=settings_table(results))
    else:
        details = Section(made, "Nothing has been run.")
    return [Section("", table=scores_table(results), picture=picture), details]


def write(results: Results, folder: Path) -> list[Path]:
    """``glue.md``, ``glue.html`` and, with matplotlib, ``glue.png``; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = draw(results, folder / "glue.png")
    page = html_page("GLUE", NOTE, sections(results, picture))
    files.write_atomically(folder / "glue.md", markdown(results))
    files.write_atomically(folder / "glue.html", page)
    written = [folder / "glue.md", folder / "glue.html"]
    return written + ([picture] if picture else [])


def draw(results: Results, path: Path) -> Path | None:
    """Bars per task: each of our rows, and the paper's where it has the model."""
    from neobert import pictures

    if not results:
        return None
    series: dict[str, list[float | str]] = {}
    for (name, grid), tasks in sorted(results.items()):
        if name in PAPER:
            series.setdefault(f"{name}, paper", [PAPER[name][column] for column in COLUMNS])
        ours = [tasks.get(column) for column in COLUMNS]
        series[f"{name}, ours ({grid})"] = [
            _cell(result) if result is None or result.percent is None else result.percent
            for result in ours
        ]
    return pictures.bars(path, "GLUE, development sets", "score, percent", COLUMNS, series)

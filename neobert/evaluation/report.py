"""One report over all results: GLUE, MTEB, pseudo-perplexity and speed, models as rows.

OUTPUT/comparison.md, comparison.html    everything; the page has the pictures inside
       comparison.png                    the overview
       comparison-*.png                  each benchmark, where there are results
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neobert import files
from neobert.evaluation import mteb_report, pseudo_perplexity, speed
from neobert.finetuning.glue import paper as glue_paper
from neobert.finetuning.glue import report as glue_report
from neobert.finetuning.glue.grid import GRIDS
from neobert.readers import InputError
from neobert.tables import Section, Table, html_page, markdown_page

TITLE = "Encoders compared"
NOTE = (
    "Models as rows, the paper's figures (arXiv 2502.19587) beside ours. An average is given where "
    'every task of it has been run; "not run" and "not measured" are what they say. Of several '
    "grids the overview shows the one with the most tasks, of several machines the newest result, "
    "and pseudo-perplexities of different texts without a bar. "
    "The tables below have everything, and how it was made."
)
NOT_RUN, NO_DOCUMENTS = "not run", "no documents"
SHORT, LONG = 512, 4096  # lengths of the overview
PERPLEXITY_NOTE = (
    "The paper gives a picture, no figures. Numbers of different texts or sets of masked tokens "
    "are not comparable."
)


@dataclass(frozen=True)
class Results:
    """Everything found."""

    glue: glue_report.Results
    mteb: list[mteb_report.Result]
    perplexity: list[pseudo_perplexity.Result]
    speeds: list[speed.Speed]

    @property
    def models(self) -> list[str]:
        """Those of the paper in its order, then others by name."""
        ours = {name for name, _ in self.glue}
        ours |= {result.name for result in self.mteb}
        ours |= {_name(result) for result in self.perplexity}
        ours |= {each.name for each in self.speeds}
        return [*glue_paper.PAPER, *sorted(ours - set(glue_paper.PAPER))]


@dataclass(frozen=True)
class Cell:
    """The paper's number, ours, and what the table shows of ours."""

    paper: float | None
    ours: float | None
    text: str

    @property
    def paper_text(self) -> str:
        return speed.NOT_GIVEN if self.paper is None else f"{self.paper:.1f}"

    @property
    def label(self) -> str:
        """What stands behind our bar in a picture, or in its place."""
        return self.text.partition("; " if self.ours is None else " (")[0]


def collect(roots: Sequence[Path]) -> Results:
    """All results under ``roots``.

    Raises:
        InputError: A folder is missing or holds no result, or a result is damaged or there twice.
    """
    for root in roots:
        if not root.is_dir():
            raise InputError(f"folder: expected a folder of results, got {root}")
        if not any(vars(_collect(root)).values()):
            rule = "results of neobert finetune glue, neobert evaluate or the benchmarks"
            raise InputError(f"folder: expected {rule}, got none in {root}")
    return _collect(*roots)


def _collect(*roots: Path) -> Results:
    return Results(
        glue_report.collect(*roots),
        mteb_report.collect(*roots),
        pseudo_perplexity.collect(*roots),
        speed.collect(*roots),
    )


def _name(result: pseudo_perplexity.Result) -> str:
    return glue_paper.NAMES.get(result.name, result.name)


def overview(results: Results) -> dict[str, dict[str, Cell]]:
    """By benchmark, then by model."""
    models = results.models
    return {
        "GLUE average": {name: _glue(results, name) for name in models},
        "MTEB average": {name: _mteb(results, name) for name in models},
        "pseudo-perplexity": {name: _perplexity(results, name) for name in models},
        f"k tokens/s at {SHORT}": {name: _speed(results, name, SHORT) for name in models},
        f"k tokens/s at {LONG:,}": {name: _speed(results, name, LONG) for name in models},
    }


def _glue(results: Results, name: str) -> Cell:
    paper = glue_paper.PAPER.get(name, {}).get(glue_paper.AVERAGE)
    by_grid = {
        grid: glue_report.average(results.glue[name, grid])
        for grid in GRIDS
        if (name, grid) in results.glue
    }
    if not by_grid:
        return Cell(paper, None, NOT_RUN)
    grid = max(by_grid, key=lambda grid: by_grid[grid][1])  # the first, the paper's, of equals
    value, count = by_grid[grid]
    shown = f"{count} of {len(glue_report.COLUMNS)} tasks" if value is None else f"{value:.1f}"
    return Cell(paper, value, f"{shown} (grid {grid})")


def _mteb(results: Results, name: str) -> Cell:
    paper = mteb_report.PAPER[name][-1] if name in mteb_report.PAPER else None
    ours = [result for result in results.mteb if result.name == name]
    # Another benchmark's mean would not be comparable with the paper's.
    for result in ours:
        if result.asked == (mteb_report.PAPER_BENCHMARK,):
            scores = result.kinds[-1]
            return Cell(paper, mteb_report.mean(scores), mteb_report.shown_mean(scores))
    others = ", ".join(result.label for result in ours)
    return Cell(paper, None, f"{NOT_RUN}; {others} below" if ours else NOT_RUN)


def _perplexity(results: Results, name: str) -> Cell:
    ours = [result for result in results.perplexity if _name(result) == name]
    if not ours:
        return Cell(None, None, NOT_RUN)
    if len(ours) > 1:
        return Cell(None, None, f"{len(ours)} sets of texts below")
    documents = ours[0].measured
    text = f"{pseudo_perplexity.shown_mean(documents)} ({len(documents):,} documents"
    if len({(_texts(result), result.masked) for result in results.perplexity}) > 1:
        return Cell(None, None, f"{text} of {_texts(ours[0])})")  # no bars side by side
    return Cell(None, pseudo_perplexity.mean_perplexity(documents), f"{text})")


def _speed(results: Results, name: str, length: int) -> Cell:
    given = dict(zip(speed.LENGTHS, speed.PAPER.get(name, ()), strict=False))
    ours = [s for s in results.speeds if (s.name, s.length) == (name, length) and s.patched]
    if not ours:
        return Cell(given.get(length), None, speed.missing(name, length))
    newest = max(ours, key=lambda each: each.origin)
    assert newest.patched is not None
    text = f"{speed.shown(newest.patched)} ({newest.machine})"
    return Cell(given.get(length), newest.patched / 1000, text)


def overview_table(results: Results) -> Table:
    found = overview(results)
    with_paper = [
        name for name, cells in found.items() if any(c.paper is not None for c in cells.values())
    ]
    columns = ["model"]
    for name in found:
        columns += [f"{name}: paper", "ours"] if name in with_paper else [f"{name}: ours"]
    rows = []
    for model in results.models:
        row = [model]
        for name, cells in found.items():
            cell = cells[model]
            if name in with_paper:
                row.append(cell.paper_text)
            row.append(cell.text)
        rows.append(row)
    return Table(columns, rows, numbers_from=1)


def perplexity_table(results: Sequence[pseudo_perplexity.Result]) -> Table:
    """Models as rows, lengths as columns."""
    groups = [dict(pseudo_perplexity.by_length(result.documents)) for result in results]
    ends = sorted(set().union(*groups), key=lambda end: (end[:2] != "to", _length(end)))
    rows = []
    for result, by_length in zip(results, groups, strict=True):
        shown = {end: pseudo_perplexity.shown_mean(group) for end, group in by_length.items()}
        means = [shown.get(end, NO_DOCUMENTS) for end in ends]
        documents = result.measured
        row = [_name(result), _texts(result), result.masked, f"{len(documents):,}"]
        rows.append([*row, *means, pseudo_perplexity.shown_mean(documents)])
    columns = ("model", "texts", "masked", "documents", *ends, "all")
    return Table(columns, rows, numbers_from=3)


def _length(end: str) -> int:
    return int(end.rpartition(" ")[2].replace(",", ""))


def _texts(result: pseudo_perplexity.Result) -> str:
    """The last name of the input, and its size, which tells two of the same name apart."""
    given = result.identity["input"]
    return f"{Path(given['input']).name}, {given['input bytes']:,} bytes"


def sections(results: Results, pictures: dict[str, Path | None]) -> list[Section]:
    """All parts of the report; ``pictures`` by the names of `draw`."""
    found = [
        Section("Overview", table=overview_table(results), picture=pictures.get("overview")),
        Section(
            "GLUE",
            glue_report.NOTE,
            glue_report.scores_table(results.glue),
            pictures.get("glue"),
        ),
    ]
    if results.glue:
        made = glue_report.settings_table(results.glue)
        found.append(Section("GLUE: how our numbers were made", table=made))
    note = f"The paper's figures are of {mteb_report.PAPER_BENCHMARK}, in percent."
    scores = mteb_report.scores_table(results.mteb)
    found.append(Section("MTEB", note, scores, pictures.get("mteb")))
    if results.mteb:
        found.append(Section("MTEB by task", table=mteb_report.tasks_table(results.mteb)))
        made = mteb_report.settings_table(results.mteb)
        found.append(Section("MTEB: how our numbers were made", table=made))
    note = f"{pseudo_perplexity.NOTE} {PERPLEXITY_NOTE}"
    if results.perplexity:
        table = perplexity_table(results.perplexity)
        found.append(
            Section(pseudo_perplexity.TITLE, note, table, pictures.get("pseudo-perplexity"))
        )
    else:
        found.append(Section(pseudo_perplexity.TITLE, f"{note} Ours: {NOT_RUN}."))
    note = f"{speed.NOTE} {speed.origins(results.speeds)}".strip()
    found.append(Section("Speed by length", note, speed.table(results.speeds)))
    return found


def markdown(results: Results) -> str:
    return markdown_page(TITLE, NOTE, sections(results, {}))


def write(results: Results, folder: Path) -> list[Path]:
    """The report, and its pictures where matplotlib is installed; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(results, folder)
    text, page = folder / "comparison.md", folder / "comparison.html"
    files.write_atomically(text, markdown(results))
    files.write_atomically(page, html_page(TITLE, NOTE, sections(results, pictures)))
    return [text, page, *(path for path in pictures.values() if path is not None)]


def draw(results: Results, folder: Path) -> dict[str, Path | None]:
    from neobert import pictures

    values: dict[str, dict[str, list[float | None]]] = {}
    labels: dict[str, dict[str, list[str]]] = {}
    for name, by_model in overview(results).items():
        cells = by_model.values()
        values[name] = {"paper": [c.paper for c in cells], "ours": [c.ours for c in cells]}
        labels[name] = {
            "paper": ["" if c.paper is None else c.paper_text for c in cells],
            "ours": [c.label for c in cells],
        }
    curves = {_name(result): result for result in results.perplexity}
    if len(curves) < len(results.perplexity):
        curves = {f"{_name(r)}, {_texts(r)}, {r.masked}": r for r in results.perplexity}
    perplexity = folder / "comparison-pseudo-perplexity.png"
    return {
        "overview": pictures.panels(
            folder / "comparison.png", TITLE, results.models, values, labels
        ),
        "glue": glue_report.draw(results.glue, folder / "comparison-glue.png"),
        "mteb": mteb_report.draw(results.mteb, folder / "comparison-mteb.png"),
        "pseudo-perplexity": pseudo_perplexity.draw(curves, perplexity) if curves else None,
    }

"""Loss curves of one or several runs as a PNG, from their logs.

A run that began from another one of the picture (``model.init_from``) continues its curve.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from neobert.files import write_atomically
from neobert.pretraining import log
from neobert.pretraining.rules import error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, float]]

RECIPE = "recipe.yaml"
# Records that one point of a smoothed curve is the mean of, as a share of all.
WINDOW = 1 / 25
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


@dataclass(frozen=True)
class Curves:
    """What a picture shows of one run: points over tokens."""

    name: str
    train: Points
    eval: Points
    accuracy: Points
    unigram: Points

    @property
    def end(self) -> float:
        return max((points[-1][0] for points in (self.train, self.eval) if points), default=0.0)


def plot(folders: Sequence[str | Path], output_png: str | Path) -> Path:
    """Draw the runs' training losses, smoothed, and evaluations over tokens.

    Returns:
        The path of the picture, written whole or not at all.

    Raises:
        InputError: A folder without a log, nothing in the logs to draw, or no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, PercentFormatter
    except ImportError:
        rule = "the package matplotlib to be installed"
        raise error("plot", rule, "none; pip install 'neobert-kernels[plot]'") from None
    output = Path(output_png)
    if output.suffix.lower() != ".png":
        raise error("plot output", "a .png file", output)
    runs = curves([Path(folder) for folder in folders])
    evaluated = any(run.accuracy for run in runs)
    panels = 2 if evaluated else 1
    figure = Figure(figsize=(6.4 * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        _draw_loss(axes[0], run, colour)
        if evaluated:
            _draw_accuracy(axes[1], run, colour, "most frequent token" if number == 0 else None)
    for axis, title in zip(
        axes, ("masked-LM loss", "held-out masked-token accuracy"), strict=False
    ):
        axis.set_title(title, loc="left")
        axis.set_xlabel("tokens")
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.has_data():
            axis.legend(frameon=False)
    if evaluated:
        axes[1].yaxis.set_major_formatter(PercentFormatter(1))
        axes[1].set_ylim(bottom=0)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomically(output, picture.getvalue())
    return output


def curves(folders: Sequence[Path]) -> list[Curves]:
    """The runs' points; a run that continues another one begins at that one's last token."""
    if not folders:
        raise error("plot", "at least one run folder", "none")
    records = {folder.resolve(): log.read(folder) for folder in folders}
    names = _names(list(records))
    found: dict[Path, Curves] = {}

    def add(folder: Path, before: tuple[Path, ...]) -> None:
        origin = _began_from(folder)
        parent = next((path for path in origin if path in records), None)
        start = 0.0
        if parent is not None and parent not in before:
            if parent not in found:
                add(parent, (*before, folder))
            start = found[parent].end
        found[folder] = _curves(names[folder], records[folder], start)

    for folder in records:
        if folder not in found:
            add(folder, (folder,))
    if not any(run.train or run.eval for run in found.values()):
        raise error("plot", "a run with losses in its log", ", ".join(map(str, folders)))
    return [found[folder] for folder in records]


def smoothed(points: Points) -> Points:
    """A centred moving mean over `WINDOW` of the points, fewer at the ends."""
    half = round(len(points) * WINDOW / 2)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    found = []
    for i, (at, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        low, high = i - reach, i + reach + 1
        found.append((at, (sums[high] - sums[low]) / (high - low)))
    return found


def _curves(name: str, records: list[dict[str, Any]], start: float) -> Curves:
    def points(kind: str, key: str) -> Points:
        return [
            (start + record["tokens"], record[key])
            for record in records
            if record["kind"] == kind and _drawable(record, "tokens", key)
        ]

    return Curves(
        name,
        points("train", "loss"),
        points("eval", "loss"),
        points("eval", "accuracy"),
        points("eval", "unigram_accuracy"),
    )


def _drawable(record: Mapping[str, Any], *keys: str) -> bool:
    return all(isinstance(record.get(key), int | float) for key in keys)


def _began_from(folder: Path) -> Sequence[Path]:
    """What the recipe beside the log begins from, and the folders that it is in."""
    try:
        recipe = yaml.safe_load((folder / RECIPE).read_text("utf-8"))
        path = Path(recipe["model"]["init_from"]).resolve()
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return ()
    return (path, *path.parents)


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Every folder's last parts, as many as tell all of them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = {folder: "/".join(folder.parts[-parts:]) for folder in folders}
        if len(set(names.values())) == len(folders):
            break
    return names


def _draw_loss(axis: "Axes", run: Curves, colour: str) -> None:
    if run.train:
        axis.plot(*zip(*run.train, strict=True), color=colour, alpha=0.25, linewidth=0.8)
        curve = smoothed(run.train)
        axis.plot(*zip(*curve, strict=True), color=colour, linewidth=1.8, label=run.name)
    if run.eval:
        label = "held out" if run.train else f"{run.name}, held out"
        axis.plot(*zip(*run.eval, strict=True), "o", color=colour, markersize=4, label=label)


def _draw_accuracy(axis: "Axes", run: Curves, colour: str, baseline: str | None) -> None:
    for points, style, label in (
        (run.accuracy, "o-", run.name),
        (run.unigram, ".:", baseline),
    ):
        if points:
            axis.plot(*zip(*points, strict=True), style, color=colour, markersize=4, label=label)

"""Pictures of results, through matplotlib where that is installed."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def bars(
    path: Path,
    title: str,
    unit: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | str]],
) -> Path | None:
    """Bars side by side in every group. None without matplotlib.

    Args:
        path: A ``.png`` to write.
        title, unit: Over the picture, along its height.
        groups: Names along its width.
        series: Per group a value, or what stands in place of its bar, under the name of each
            series.
    """
    figure = _figure(2 + 1.2 * len(groups))
    if figure is None:
        return None
    axes = figure.subplots()
    width = 0.8 / max(len(series), 1)
    for number, (name, values) in enumerate(series.items()):
        at = [i + (number + 0.5) * width - 0.4 for i in range(len(groups))]
        # A bar of no length where there is no value: the legend takes a bar's color.
        lengths = [0.0 if isinstance(value, str) else value for value in values]
        drawn = axes.bar(at, lengths, width, color=f"C{number % 10}", label=name)
        missing = [value if isinstance(value, str) else "" for value in values]
        axes.bar_label(drawn, missing, padding=2, fontsize="x-small", rotation=90)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    return _write(figure, axes, path, title, "", unit)


def panels(
    path: Path,
    title: str,
    rows: Sequence[str],
    values: Mapping[str, Mapping[str, Sequence[float | None]]],
    labels: Mapping[str, Mapping[str, Sequence[str]]],
) -> Path | None:
    """Panels side by side with a bar per row and series. None without matplotlib.

    Args:
        path: A ``.png`` to write.
        title: Over the picture.
        rows: Their names, from the top.
        values: By panel and series, a value per row.
        labels: What stands behind each bar, or in its place.
    """
    figure = _figure(2 + 3 * len(values), 1.5 + 0.45 * len(rows))
    if figure is None:
        return None
    for axes, (name, series) in zip(
        figure.subplots(1, len(values), sharey=True), values.items(), strict=True
    ):
        height = 0.8 / len(series)
        for number, (label, row_values) in enumerate(series.items()):
            at = [i + (number + 0.5) * height - 0.4 for i in range(len(rows))]
            lengths = [0.0 if value is None else value for value in row_values]
            drawn = axes.barh(at, lengths, height, color=f"C{number}", label=label)
            axes.bar_label(drawn, labels[name][label], padding=2, fontsize="x-small")
        axes.set_title(name, fontsize="medium")
        largest = max((v for row in series.values() for v in row if v is not None), default=1.0)
        axes.set_xlim(0, 1.2 * largest)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    figure.suptitle(title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return _save(figure, path)


def curves(
    path: Path,
    title: str,
    x_unit: str,
    y_unit: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    points: Mapping[str, Sequence[tuple[float, float]]],
) -> Path | None:
    """Lines through ``(x, y)``, and faint points under the same names. None without matplotlib."""
    figure = _figure(9)
    if figure is None:
        return None
    axes = figure.subplots()
    for number, name in enumerate(lines):
        color = f"C{number % 10}"
        axes.plot(*zip(*lines[name], strict=True), marker="o", color=color, label=name)
        if points.get(name):
            axes.scatter(*zip(*points[name], strict=True), s=8, alpha=0.3, color=color)
    return _write(figure, axes, path, title, x_unit, y_unit)


def _figure(width: float, height: float = 5) -> Any:
    try:
        # The figure's own canvas: pyplot would look for a display and keep every figure.
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: Any, axes: Any, path: Path, title: str, x_unit: str, y_unit: str) -> Path:
    axes.set_title(title)
    axes.set_xlabel(x_unit)
    axes.set_ylabel(y_unit)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    staged = path.with_name(f"{path.name}.new")
    figure.savefig(staged, format="png", dpi=120)
    os.replace(staged, path)
    return path

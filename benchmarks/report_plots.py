"""The plots of a report, as PNG bytes: nothing is shown, and no global state of matplotlib."""

import io
import math
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from report_data import Group, Result, batch_series, length_of, length_series, model_of, speed_up

STYLE = {
    "patched": {"color": "#1f77b4", "marker": "o", "label": "patched"},
    "sdpa": {"color": "#888888", "marker": "s", "label": "unpatched, SDPA"},
    "limit": {"color": "#d62728", "linestyle": "--", "label": "ceiling"},
}

# Of results that carry a ratio and not the baseline's name.
BASELINES = {"encode": "sentence-transformers", "finetune": "trainer", "neobert_ragged": "padded"}
RATE, LENGTH = "tokens_per_s", "tokens of a document"
Series = dict[str, dict[str, list[tuple[int, float]]]]


def plots(group: Group) -> dict[str, bytes]:
    """Name and PNG of every plot that the group has results for, under its machine and commits."""
    drawn: dict[str, tuple[Callable[[Group], Any], Callable[[Result], bool]]] = {
        "throughput": (
            lambda g: _lines(length_series(g, RATE), LENGTH, "real tokens/s"),
            _at_length,
        ),
        "memory": (
            lambda g: _lines(length_series(g, "peak_bytes"), LENGTH, "peak memory, MB", 1e6),
            _at_length,
        ),
        "models": (_models, lambda result: result.name == "inference"),
        "batch": (
            lambda g: _lines(batch_series(g, RATE), "documents of a batch", "real tokens/s"),
            lambda result: result.name == "curve_batch",
        ),
        "roofline": (_roofline, _under_a_roof),
        "speed-up": (_speed_ups, lambda result: not result.name.startswith("curve")),
        "history": (_history, lambda result: False),  # its axis has the commits
    }
    found = {}
    for name, (draw, uses) in drawn.items():
        figure = draw(group)
        if figure is not None:
            origins = dict.fromkeys(result.origin for result in group.newest if uses(result))
            commits = f"; commit{'s' * (len(origins) > 1)} {', '.join(origins)}" if origins else ""
            figure.suptitle(textwrap.fill(group.title + commits, 110), fontsize="small")
            buffer = io.BytesIO()
            # Without the version of matplotlib in it, equal plots are equal files.
            figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
            found[name] = buffer.getvalue()
    return found


def _at_length(result: Result) -> bool:
    return result.name in ("inference", "curve_length")


def _under_a_roof(result: Result) -> bool:
    return bool(result.values.get("flop")) and "ours_median_s" in result.values


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _lines(measured: Series, over: str, label: str, unit: float = 1.0) -> Any:
    """One small plot for every model: what each way reaches, in so many of ``unit``."""
    series = {model: ways for model, ways in measured.items() if ways.get("patched")}
    if not series:
        return None
    columns = min(3, len(series))
    rows = math.ceil(len(series) / columns)
    figure, axes = _figure(4.2 * columns, 3.2 * rows, rows, columns)
    for axis in axes.flat[len(series) :]:
        axis.set_axis_off()
    for axis, (model, ways) in zip(axes.flat, series.items(), strict=False):
        for way in sorted(ways, key=list(STYLE).index):
            x, y = zip(*ways[way], strict=True)
            axis.plot(x, [value / unit for value in y], **STYLE[way])
        axis.set(xlabel=over, ylabel=label)
        axis.set_title(model, fontsize="medium")
        _finish(axis, ways.values(), unit)
    handles = dict(zip(*reversed(axes.flat[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _finish(axis: Any, lines: Iterable[list[tuple[int, float]]], unit: float = 1.0) -> None:
    """A logarithmic axis with the measured numbers on it, against one that begins at 0."""
    points = [point for line in lines for point in line]
    measured = sorted({x for x, _ in points})
    axis.set_xscale("log")
    axis.set_xticks(measured, [str(x) for x in measured])
    axis.minorticks_off()
    axis.set_ylim(0, 1.08 * max(y for _, y in points) / unit)
    axis.grid(alpha=0.3)


def _models(group: Group) -> Any:
    """All models together, each at its best batch: patched, and as it is."""
    series: Series = {}
    for result in group.named("inference"):
        length = length_of(result.case)
        for way in ("patched", "sdpa"):
            if length is not None and f"{way}_{RATE}" in result.values:
                ways = series.setdefault(model_of(result.case), {})
                ways.setdefault(way, []).append((length, result.values[f"{way}_{RATE}"]))
    if len(series) < 2:
        return None
    figure, ((axis,),) = _figure(8.5, 5)
    for (model, ways), color in zip(series.items(), _colors(len(series)), strict=True):
        for way, points in ways.items():
            line = {"linestyle": "-", "marker": "o", "label": model}
            if way == "sdpa":
                line = {"linestyle": ":", "marker": "s", "fillstyle": "none"}
            axis.plot(*zip(*sorted(points), strict=True), color=color, **line)
    axis.plot([], [], color="black", linestyle=":", label="dotted: unpatched, SDPA")
    axis.set(xlabel=LENGTH, ylabel="real tokens/s at the best batch")
    _finish(axis, [points for ways in series.values() for points in ways.values()])
    axis.legend(fontsize="small")
    return figure


def _roofline(group: Group) -> Any:
    found = [result for result in group.newest if _under_a_roof(result)]
    if not found:
        return None
    figure, ((axis,),) = _figure(7.5, 5)
    copy, gemm = (
        max(r.values[key] for r in found) for key in ("copy_bytes_per_s", "gemm_flop_per_s")
    )
    names = sorted({r.name for r in found})
    colors = _colors(len(names))
    for name, color in zip(names, colors, strict=True):
        points = [
            (r.values["flop"] / r.values["bytes"], r.values["flop"] / r.values["ours_median_s"])
            for r in found
            if r.name == name
        ]
        axis.scatter(*zip(*points, strict=True), color=color, label=name, s=28, zorder=3)
    ends = [r.values["flop"] / r.values["bytes"] for r in found]
    left, ridge = min(ends) / 2, gemm / copy
    right = max(*ends, ridge) * 2
    axis.plot([left, ridge, right], [left * copy, gemm, gemm], color="#d62728", linestyle="--")
    axis.annotate("copy", (left * 1.2, left * copy * 2.5), color="#d62728")
    axis.annotate("matrix product", (ridge * 1.1, gemm * 1.15), color="#d62728")
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="FLOP/s of ours")
    axis.legend(fontsize="x-small", ncols=2)
    axis.grid(alpha=0.3)
    return figure


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    name, size = ("tab10", 10) if count <= 10 else ("tab20", 20)
    return [colormaps[name](i % size) for i in range(count)]


def comparisons(group: Group) -> list[tuple[str, float, float, float]]:
    """Label, ratio and its range: ours against the baseline that people have today.

    Of results without both ends of the range, and of curves, there is no bar.
    """
    found = []
    for result in group.newest:
        v = result.values
        if result.name.startswith("curve"):
            continue  # the same models at a batch that suits neither
        label = f"{result.name}: {result.case}"
        if {"ratio", "ratio_low", "ratio_high"} <= v.keys():
            against = v.get("best_other", BASELINES.get(result.name, "sdpa"))
            label = f"{label} / {against}"
            found.append((label, v["ratio"], v["ratio_low"], v["ratio_high"]))
            continue
        ours = next((name for name in ("ours", "patched") if name in result.variants), None)
        others = ("eager", "dense", "sdpa", "sdpa_math", "unpatched", "padded")
        other = next((name for name in others if name in result.variants), None)
        if ours and other:
            found.append((f"{label} / {other}", *speed_up(v, ours, other)))
    return found


def _verdict(low: float, high: float) -> str:
    """The color of a bar: faster, slower, or neither beyond the spread."""
    return "#1f77b4" if low > 1 else "#d62728" if high < 1 else "#999999"


def _speed_ups(group: Group) -> Any:
    found = sorted(comparisons(group), key=lambda row: row[1])
    if not found:
        return None
    figure, ((axis,),) = _figure(12, 1.2 + 0.24 * len(found))
    labels, ratios, lows, highs = zip(*found, strict=True)
    errors = [
        [max(0.0, r - low) for r, low in zip(ratios, lows, strict=True)],
        [max(0.0, high - r) for r, high in zip(ratios, highs, strict=True)],
    ]
    color = [_verdict(low, high) for low, high in zip(lows, highs, strict=True)]
    axis.barh(range(len(found)), ratios, xerr=errors, color=color, ecolor="#444444", capsize=2)
    axis.set_yticks(range(len(found)), labels, fontsize="x-small")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(
        xlabel="times as fast as the baseline behind the /; lines: opposite quartiles; "
        "gray: they reach 1"
    )
    axis.set_xlim(0, min(1.05 * max(*ratios, *highs), 1.5 * max(ratios)))
    axis.set_ylim(-1, len(found))
    axis.grid(alpha=0.3, axis="x")
    return figure


def _time_of(result: Result) -> float | None:
    for key in ("ours_median_s", "patched_median_s"):
        if key in result.values:
            return float(result.values[key])
    rate = result.values.get("patched_tokens_per_s") or result.values.get("tokens_per_s")
    return 1 / rate if rate else None


def _history(group: Group) -> Any:
    """The time of ours at every commit over that at the first, for what two commits measured."""
    commits = list(dict.fromkeys(result.commit for result in group.history))
    lines: dict[tuple[str, str], dict[str, float]] = {}
    for result in group.history:
        seconds = _time_of(result)
        if seconds is not None:
            lines.setdefault((result.name, result.case), {})[result.commit] = seconds
    lines = {key: times for key, times in lines.items() if len(times) > 1}
    if not lines:
        return None
    figure, ((axis,),) = _figure(8, 4.5)
    names = sorted({name for name, _ in lines})
    dashes = ["-" if i < 20 else ":" for i in range(len(names))]  # there are 20 colors
    looks = [{"color": c, "linestyle": d} for c, d in zip(_colors(len(names)), dashes, strict=True)]
    styles = dict(zip(names, looks, strict=True))
    for (name, _), times in lines.items():
        points = [(commits.index(commit), seconds) for commit, seconds in times.items()]
        points.sort()
        x, y = zip(*points, strict=True)
        axis.plot(x, [value / y[0] for value in y], **styles[name], marker=".", alpha=0.7)
    for name in names:
        axis.plot([], [], **styles[name], label=name)
    axis.set_xticks(range(len(commits)), [commit[:7] for commit in commits], rotation=45)
    axis.set(ylabel="time of ours over the first commit's")
    axis.axhline(1, color="black", linewidth=0.8)
    figure.legend(fontsize="x-small", loc="outside right center")
    axis.grid(alpha=0.3)
    return figure

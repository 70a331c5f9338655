"""A report of a folder of results: report.md, report.html with everything in it, and the plots.

`neobert bench --report` writes it. A number that varied by more than a fifth between the quartiles
is marked with ~, one whose GPU waited for the host with *.
"""

import base64
import html
import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evidence
from report_data import Group, Result, groups, model_of, noisy_of, speed_up

from neobert.files import write_atomically
from neobert.floors import ARCHITECTURES, GPUS, Gpu, forward
from neobert.tables import Table

NOT_MEASURED = "not measured"
PICTURE = re.compile(r"\]\(([\w.-]+\.png)\)")  # as report.md shows one
MARKS = "~: quartiles more than a fifth of the median apart. *: the GPU waited for the host."


@dataclass
class Section:
    """A title, a table as its header and rows of ready text, and what stands below it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]
    numbers_from: int | None = 1

    @property
    def table(self) -> Table:
        return Table(self.header, self.rows, self.numbers_from)


def write(folder: Path, output: Path) -> list[Path]:
    """Report on ``folder``; returns the files written.

    Raises:
        ValueError: There is no results file in it, or one of them is damaged.
    """
    found = groups(folder)
    if not found:
        raise ValueError(f"report: expected results in {folder}, got none")
    output.mkdir(parents=True, exist_ok=True)
    written, images = [], {}
    drawing = importlib.util.find_spec("matplotlib") is not None
    if drawing:
        from report_plots import plots

        seen: Counter[str] = Counter()
        for number, group in enumerate(found):
            device = evidence.slug(group.title)
            stem = device + f"-{seen[device]}" * (seen[device] > 0)
            seen[device] += 1
            for name, png in plots(group).items():
                path = output / f"{stem}-{name}.png"
                path.write_bytes(png)
                images[number, name] = path
                written.append(path)
    markdown = [_markdown(group, number, images, drawing) for number, group in enumerate(found)]
    pages = [_html(group, number, images, drawing) for number, group in enumerate(found)]
    text, page = output / "report.md", output / "report.html"
    if drawing and text.exists():  # pictures of the last report that this one does not have
        for name in set(PICTURE.findall(text.read_text(encoding="utf-8"))):
            if output / name not in written:
                (output / name).unlink(missing_ok=True)
    write_atomically(text, f"# Benchmarks\n\n{MARKS}\n\n" + "\n".join(markdown))
    write_atomically(page, _PAGE.format(marks=MARKS, body="\n".join(pages)))
    return [text, page, *written]


def tables(group: Group) -> list[Section]:
    """Everything measured, one table for each kind of result."""
    found = []
    special: dict[str, Callable[[list[Result]], Section]] = {
        "inference": _inference,
        "ways": _ways,
        "training": _training,
        "latency": _latency,
        "curve_length": _curve,
        "curve_batch": _curve,
    }
    for name in dict.fromkeys(result.name for result in group.newest):
        results = group.named(name)
        if name in special:
            table = special[name](results)
        elif all(result.variants for result in results):
            table = _operator(name, results)
        else:
            table = _plain(name, results)
        table.notes.append(origins(results))
        found.append(table)
    floors = _floors(group)
    return found + ([floors] if floors else [])


def origins(results: Iterable[Result]) -> str:
    """Which commits the rows are from; with several, each with its cases."""
    by_origin: dict[str, list[str]] = {}
    for result in results:
        by_origin.setdefault(f"{result.origin}, {result.date}", []).append(result.case)
    if len(by_origin) == 1:
        return f"Commit {next(iter(by_origin))}."
    parts = [f"{origin}: {'; '.join(cases)}" for origin, cases in by_origin.items()]
    return "From several commits. " + ". ".join(parts) + "."


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _marks(values: dict[str, Any], name: str) -> str:
    noisy, starved = noisy_of(values), values.get("starved") or ()
    return "~" * (name in noisy) + "*" * (name in starved)


def _operator(name: str, results: list[Result]) -> Section:
    """Times of all variants; rates and the share of the floor of ours; who is absent and why."""
    others = list(dict.fromkeys(v for r in results for v in r.variants[1:]))
    header = ["case", "ours", "GB/s", "TFLOP/s", "of the floor"]
    header += [f"{other} / ours" for other in others]
    rows = []
    for result in results:
        v, ours = result.values, result.variants[0]
        flop = v.get(f"{ours}_flop_per_s")
        row = [result.case, _time(v[f"{ours}_median_s"]) + _marks(v, ours)]
        row.append(_number(v.get(f"{ours}_bytes_per_s"), 1e9))
        row.append(_number(flop, 1e12))
        share = v.get(f"{ours}_share_of_floor")
        row.append("" if share is None else f"{share:.0%}")
        for other in others:
            if other in result.variants:
                median, low, high = speed_up(v, ours, other)
                row.append(f"{median:.2f} x ({low:.2f} to {high:.2f}){_marks(v, other)}")
            else:
                row.append(NOT_MEASURED)
        rows.append(row)
    shown = [i for i in range(len(header)) if any(row[i] for row in rows)]
    rows = [[row[i] for i in shown] for row in rows]
    return Section(name, [header[i] for i in shown], rows, _absent(results))


def _absent(results: list[Result]) -> list[str]:
    """Who is missing and why, once for each reason; the cases where it is not all of them."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for key, why in result.values.items():
            if key.endswith("_absent"):
                found.setdefault((key.removesuffix("_absent"), why), []).append(result.case)
    return [
        f"Absent: {peer} ({why})"
        + ("." if len(cases) == len(results) else f": {'; '.join(cases)}.")
        for (peer, why), cases in found.items()
    ]


def _number(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:,.3g}"


def _inference(results: list[Result]) -> Section:
    header = ["case", "SDPA, tokens/s", "patched, tokens/s", "ratio", "of the limit"]
    header += ["SDPA, memory", "patched, memory", "batch of each, tokens"]
    rows, notes = [], []
    for result in results:
        v = result.values
        row = [result.case]
        row += [_rate(v, way) for way in ("sdpa", "patched")]
        row.append(_ratio(v))
        row.append(f"{v['share_of_limit']:.0%}" if "share_of_limit" in v else "")
        row += [_bytes(v.get(f"{way}_peak_bytes")) for way in ("sdpa", "patched")]
        batches = [v.get(f"{way}_batch_tokens") for way in ("sdpa", "patched")]
        row.append(" / ".join("-" if n is None else f"{n:,}" for n in batches))
        rows.append(row)
        notes += _unfinished(result)
    return Section("Inference", header, rows, notes)


def _unfinished(result: Result) -> list[str]:
    """What did not fit into the memory, and what a deadline cut short."""
    notes = [
        f"Out of memory: {result.case}, {p['variant']}, {p['tokens']:,} tokens."
        for p in result.values.get("points", ())
        if "out_of_memory" in p
    ]
    notes += [
        f"Out of memory: {result.case}, {key.removesuffix('_out_of_memory')}."
        for key in result.values
        if key.endswith("_out_of_memory")
    ]
    if result.values.get("cut_short"):
        notes.append(f"Cut short by the deadline: {result.case}.")
    return notes


def _rate(values: dict[str, Any], way: str) -> str:
    rate = values.get(f"{way}_tokens_per_s")
    return NOT_MEASURED if rate is None else f"{rate:,.0f}{_marks(values, way)}"


def _ratio(values: dict[str, Any]) -> str:
    if "ratio" not in values:
        return ""
    if "ratio_low" not in values:
        return f"{values['ratio']:.2f} x"
    return f"{values['ratio']:.2f} x ({values['ratio_low']:.2f} to {values['ratio_high']:.2f})"


def _bytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:,.0f} MB"


def _ways(results: list[Result]) -> Section:
    """Every way to run the model on the same batch."""
    names = list(
        dict.fromkeys(p["variant"] for r in results for p in r.values["points"])
    )  # in the order they ran in
    rows, notes = [], []
    for result in results:
        v = result.values
        rows.append([result.case, *(_rate(v, name) for name in names)])
        notes += _unfinished(result)
    notes = _absent(results) + notes
    return Section("Ways to run a model, real tokens/s", ["case", *names], rows, notes)


def _training(results: list[Result]) -> Section:
    header = ["case", "unpatched, tokens/s", "patched, tokens/s", "ratio", "unpatched, memory"]
    header += ["patched, memory", "unpatched, utilisation", "patched, utilisation"]
    rows = []
    for result in results:
        v = result.values
        row = [result.case, *(_rate(v, way) for way in ("sdpa", "patched")), _ratio(v)]
        row += [_bytes(v.get(f"{way}_peak_bytes")) for way in ("sdpa", "patched")]
        for way in ("sdpa", "patched"):
            share = v.get(f"{way}_flop_utilisation")
            row.append(NOT_MEASURED if share is None else f"{share:.0%}")
        rows.append(row)
    return Section("Training step", header, rows, [n for r in results for n in _unfinished(r)])


def _latency(results: list[Result]) -> Section:
    header = ["case", "SDPA p50, ms", "SDPA p99, ms", "patched p50, ms", "patched p99, ms", "ratio"]
    rows = []
    for result in results:
        v, row = result.values, [result.case]
        for way in ("sdpa", "patched"):
            row += [f"{v[f'{way}_p50_ms']:.2f}{_marks(v, way)}", f"{v[f'{way}_p99_ms']:.2f}"]
        rows.append([*row, _ratio(v)])
    return Section("Latency of one text", header, rows, [])


def _curve(results: list[Result]) -> Section:
    """One line for every point of every model."""
    axis = results[0].name.removeprefix("curve_")
    header = ["model", "documents", "tokens of each", "SDPA, tokens/s", "patched, tokens/s"]
    rows = []
    for result in results:
        cells: dict[tuple[int, int], dict[str, str]] = {}
        for p in result.values["points"]:
            rate = p.get("tokens_per_s")
            shown = p.get("wrong", "out of memory") if rate is None else f"{rate:,.0f}"
            cells.setdefault((p["documents"], p["longest"]), {})[p["variant"]] = shown
        for (documents, longest), by_way in cells.items():
            ways = [by_way.get(way, NOT_MEASURED) for way in ("sdpa", "patched")]
            rows.append([model_of(result.case), f"{documents:,}", f"{longest:,}", *ways])
    notes = [note for result in results for note in _unfinished(result)]
    return Section(f"Cost over the {axis}", header, rows, notes)


def _plain(name: str, results: list[Result]) -> Section:
    """What has no times of variants: every number under its own name."""
    rows = []
    for result in results:
        shown = [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in result.values.items()
            if isinstance(value, str | int | float)
        ]
        rows.append([result.case, ", ".join(shown)])
    return Section(name, ["case", "values"], rows, [], numbers_from=None)


def gpu_of(group: Group) -> Gpu | None:
    """The data sheet of the group's GPU, if there is one."""
    device = str(group.machine["device"]).lower().replace("-", " ")
    if any(word in device for word in ("pcie", "nvl", "mig", "laptop")):
        return None  # slower parts that share a name with those in the list
    names = {key: key.replace("-", " ") for key in GPUS}
    return next((GPUS[key] for key, name in names.items() if name in device), None)


def _floors(group: Group) -> Section | None:
    """What was measured against the cost model at the data sheet's rates, where there is one."""
    on = gpu_of(group)
    results = [r for r in group.named("inference") if model_of(r.case) in ARCHITECTURES]
    if on is None or not results or group.quick:
        return None
    rows = []
    for result in results:
        best = max(
            (p for p in result.values["points"] if p["variant"] == "patched" and "peak_bytes" in p),
            key=lambda p: p["tokens_per_s"],
            default=None,
        )
        if best is None or best["tokens"] != best["documents"] * best["longest"]:
            continue
        parts = forward(ARCHITECTURES[model_of(result.case)], [best["longest"]] * best["documents"])
        seconds = [part.cost.floor_s(on) for part in parts]
        limit = best["tokens"] / sum(seconds)
        slowest = parts[seconds.index(max(seconds))]
        share = f"{best['tokens_per_s'] / limit:.0%}"
        row = [result.case, f"{limit:,.0f}", f"{best['tokens_per_s']:,.0f}", share]
        rows.append([*row, f"{slowest.name}, {max(seconds) / sum(seconds):.0%}"])
    header = ["case", "limit, tokens/s", "patched, tokens/s", "of the limit", "largest part"]
    return Section(f"Against the data sheet of {on.name}", header, rows, [f"Rates: {on.source}."])


def _about(group: Group) -> list[str]:
    lines = [", ".join(f"{key} {value}" for key, value in group.machine.items()) + "."]
    lines.append(", ".join(f"{key} {value}" for key, value in group.versions.items()) + ".")
    if group.quick:
        lines.append("A quick run shows that everything works; its numbers say nothing on speed.")
    if group.not_reached:
        lines.append(f"Not reached in the time given: {', '.join(group.not_reached)}.")
    return lines


NO_PLOTS = "No plots: matplotlib is not installed (the extra `plot`)."


def _markdown(group: Group, number: int, images: dict[tuple[int, str], Path], drawing: bool) -> str:
    lines = [f"## {group.title}", "", *_about(group), ""]
    lines += [f"![{name}]({path.name})" for (n, name), path in images.items() if n == number]
    lines += [] if drawing else [NO_PLOTS]
    for section in tables(group):
        lines += ["", f"### {section.title}", "", section.table.markdown(), "", *section.notes]
    return "\n".join(lines) + "\n"


def _html(group: Group, number: int, images: dict[tuple[int, str], Path], drawing: bool) -> str:
    escape = html.escape
    parts = [f"<h2>{escape(group.title)}</h2>"]
    parts += [f"<p>{escape(line)}</p>" for line in _about(group)]
    parts += [] if drawing else [f"<p>{escape(NO_PLOTS)}</p>"]
    for (n, name), path in images.items():
        if n == number:
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append(f'<figure><img alt="{name}" src="data:image/png;base64,{data}"></figure>')
    for section in tables(group):
        notes = "".join(f"<p class=note>{escape(note)}</p>" for note in section.notes)
        parts += [f"<h3>{escape(section.title)}</h3>", section.table.html(), notes]
    return "\n".join(parts)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Benchmarks</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem;
       padding: 0 1rem }}
img {{ max-width: 100% }} figure {{ margin: 1rem 0 }}
table {{ border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }}
th, td {{ border-bottom: 1px solid #ccc; padding: .25rem .6rem; white-space: nowrap }}
th {{ text-align: left }} .number {{ text-align: right }} .note {{ color: #555; font-size: 13px }}
</style></head><body><h1>Benchmarks</h1>
<p>{marks}</p>
{body}
</body></html>
"""

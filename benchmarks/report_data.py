"""Results files as a report reads them: grouped by machine, versions and kind of run, never mixed.

Within a group the newest result of every name and case is shown, and each table says which commits
its rows are from.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CEILINGS = ("copy", "gemm")
NOISY = 0.2  # a larger share of the median between the quartiles is flagged


@dataclass(frozen=True)
class Result:
    """One measurement, and the file's date."""

    name: str
    case: str
    values: dict[str, Any]
    commit: str
    clean: bool
    date: str
    at: str = ""

    @property
    def variants(self) -> list[str]:
        """Whose times are here, ours first; ceilings are none of them."""
        found = [k.removesuffix("_median_s") for k in self.values if k.endswith("_median_s")]
        found = [name for name in found if name not in CEILINGS]
        return sorted(found, key=lambda name: name not in ("ours", "patched"))

    @property
    def origin(self) -> str:
        return self.commit[:10] + ("" if self.clean else " (changed)")


@dataclass
class Group:
    """All results of one machine, one set of versions, and full or quick runs."""

    machine: dict[str, Any]
    versions: dict[str, str]
    quick: bool
    history: list[Result] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return str(self.machine["device"]) + (" (quick run)" if self.quick else "")

    @property
    def newest(self) -> list[Result]:
        """The newest of every name and case, in the order of their files."""
        latest: dict[tuple[str, str], Result] = {}
        for result in self.history:
            latest[result.name, result.case] = result
        return list(latest.values())

    def named(self, name: str) -> list[Result]:
        return [result for result in self.newest if result.name == name]


def groups(folder: Path) -> list[Group]:
    """The results under ``folder``, newest group first.

    Raises:
        ValueError: A file is no results file; the message names it.
    """
    found: dict[str, Group] = {}
    newest: dict[str, str] = {}
    for path, document in _documents(folder):
        quick = bool(document.get("quick"))
        key = json.dumps([document["machine"], document["versions"], quick], sort_keys=True)
        group = found.setdefault(key, Group(document["machine"], document["versions"], quick))
        newest[key] = max(newest.get(key, ""), document["date"])
        for result in document["results"]:
            commit, clean = result.get("commit"), result.get("clean")
            if commit is None:
                raise ValueError(f"{path}: expected a commit with every result, got none")
            group.history.append(
                Result(
                    result["name"],
                    result["case"],
                    result["values"],
                    commit,
                    bool(clean),
                    document["date"],
                    result.get("at", ""),
                )
            )
        group.not_reached = document.get("not_reached", [])
    for group in found.values():
        group.history.sort(key=lambda result: (result.date, result.at))
    return [found[key] for key in sorted(found, key=lambda k: (newest[k], k), reverse=True)]


def _documents(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Results files, oldest first."""
    read = []
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, got {error}") from error
        if isinstance(document, dict) and {"machine", "versions", "results"} <= document.keys():
            if "date" not in document or not all(map(_is_whole, document["results"])):
                raise ValueError(f"{path}: expected a whole results file, got a part of one")
            read.append((path, document))
    return iter(sorted(read, key=lambda pair: (pair[1]["date"], str(pair[0]))))


def _is_whole(result: Any) -> bool:
    return isinstance(result, dict) and {"name", "case", "values"} <= result.keys()


def model_of(case: str) -> str:
    """The model that a case of a whole model begins with."""
    return case.partition(",")[0]


def length_of(case: str) -> int | None:
    """The documents' length in a case of a fixed one."""
    words = case.replace(",", "").split()
    return int(words[words.index("fixed") + 1]) if "fixed" in words else None


def spread(values: dict[str, Any], name: str) -> float:
    """Distance of the quartiles as a share of the median; 0 where there are none."""
    ends = [values.get(f"{name}_{end}_s", 0.0) for end in ("low", "high")]
    median = float(values[f"{name}_median_s"])
    return (ends[1] - ends[0]) / median if median and all(ends) else 0.0


def noisy_of(values: dict[str, Any]) -> list[str]:
    """Whose time varied too much to be believed, as listed there or by the quartiles."""
    listed = set(values.get("noisy") or ())
    timed = {key.removesuffix("_median_s") for key in values if key.endswith("_median_s")}
    return sorted(listed | {name for name in timed if spread(values, name) > NOISY})


def speed_up(values: dict[str, Any], ours: str, other: str) -> tuple[float, float, float]:
    """How many times as long the other takes: of the medians, and of opposite quartiles."""
    median = values[f"{other}_median_s"] / values[f"{ours}_median_s"]
    low = values[f"{other}_low_s"] / values[f"{ours}_high_s"]
    return median, low, values[f"{other}_high_s"] / values[f"{ours}_low_s"]


def length_series(group: Group, key: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By model and way: ``key`` at every length.

    A throughput is that of the batch that suits the way best, if more than one length has one. All
    else, memory above all, compares at equal batches: the curve at a fixed number of tokens, if the
    model has one. The title says which it is.
    """
    best: dict[str, dict[str, dict[int, float]]] = {}
    for result in group.named("inference"):
        length = length_of(result.case)
        if length is None:
            continue
        ways = best.setdefault(f"{model_of(result.case)}, best batch", {})
        for way in ("patched", "sdpa"):
            if f"{way}_{key}" in result.values:
                ways.setdefault(way, {})[length] = result.values[f"{way}_{key}"]
        if key == "tokens_per_s" and "limit_tokens_per_s" in result.values:
            ways.setdefault("limit", {})[length] = result.values["limit_tokens_per_s"]
    for result in group.named("curve_length"):
        title = f"{model_of(result.case)}, best batch"
        enough = len(best.get(title, {}).get("patched", {})) > 1
        if result.values["points"] and not (enough and key == "tokens_per_s"):
            best.pop(title, None)
            tokens = max(point["tokens"] for point in result.values["points"])
            title = f"{model_of(result.case)}, {tokens:,} tokens at once"
            best[title] = _curve(result, "longest", key)
    return {
        title: {way: sorted(points.items()) for way, points in ways.items()}
        for title, ways in best.items()
    }


def batch_series(group: Group, key: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By model and way: ``key`` at every number of documents in a batch."""
    return {
        f"{model_of(result.case)}, documents of {result.values['points'][0]['longest']:,} tokens": {
            way: sorted(points.items()) for way, points in _curve(result, "documents", key).items()
        }
        for result in group.named("curve_batch")
        if result.values["points"]
    }


def _curve(result: Result, axis: str, key: str) -> dict[str, dict[int, float]]:
    """By way: ``key`` over ``axis`` of a result's points, with the ceiling of a throughput."""
    ways: dict[str, dict[int, float]] = {}
    for point in result.values["points"]:
        if point.get(key) is not None:
            ways.setdefault(point["variant"], {})[point[axis]] = point[key]
        if key == "tokens_per_s" and "limit_tokens_per_s" in point:
            ways.setdefault("limit", {})[point[axis]] = point["limit_tokens_per_s"]
    return ways

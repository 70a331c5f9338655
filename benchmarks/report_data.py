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
MOMENTS = ("rounds", "noisy", "starved", "points", "implementation")


@dataclass(frozen=True)
class Result:
    """One measurement, and the file's date."""

    name: str
    case: str
    values: dict[str, Any]
    commit: str
    clean: bool
    date: str

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
                )
            )
        group.not_reached = document.get("not_reached", [])
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
            read.append((path, document))
    return iter(sorted(read, key=lambda pair: (pair[1]["date"], str(pair[0]))))


def model_of(case: str) -> str:
    """The model that a case of a whole model begins with."""
    return case.partition(",")[0]


def length_of(case: str) -> int | None:
    """The documents' length in a case of a fixed one."""
    words = case.replace(",", "").split()
    return int(words[words.index("fixed") + 1]) if "fixed" in words else None


def spread(values: dict[str, Any], name: str) -> float:
    """Distance of the quartiles as a share of the median."""
    return (values[f"{name}_high_s"] - values[f"{name}_low_s"]) / values[f"{name}_median_s"]


def speed_up(values: dict[str, Any], ours: str, other: str) -> tuple[float, float, float]:
    """How many times as long the other takes: of the medians, and of opposite quartiles."""
    median = values[f"{other}_median_s"] / values[f"{ours}_median_s"]
    low = values[f"{other}_low_s"] / values[f"{ours}_high_s"]
    return median, low, values[f"{other}_high_s"] / values[f"{ours}_low_s"]


def length_series(group: Group, key: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By model and way: ``key`` at every fixed length, at the batch that suits the way best.

    Where only one length was measured at the best batch, the curve at a fixed number of tokens.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for result in group.named("inference"):
        length = length_of(result.case)
        if length is None:
            continue
        ways = found.setdefault(model_of(result.case), {})
        for way in ("patched", "sdpa"):
            if f"{way}_{key}" in result.values:
                ways.setdefault(way, {})[length] = result.values[f"{way}_{key}"]
        if key == "tokens_per_s" and "limit_tokens_per_s" in result.values:
            ways.setdefault("limit", {})[length] = result.values["limit_tokens_per_s"]
    for result in group.named("curve_length"):
        model = model_of(result.case)
        if len(found.get(model, {}).get("patched", {})) > 1:
            continue
        ways = {}
        for point in result.values["points"]:
            if point.get(key) is not None:
                ways.setdefault(point["variant"], {})[point["longest"]] = point[key]
            if key == "tokens_per_s" and "limit_tokens_per_s" in point:
                ways.setdefault("limit", {})[point["longest"]] = point["limit_tokens_per_s"]
        found[model] = ways
    return {
        model: {way: sorted(points.items()) for way, points in ways.items()}
        for model, ways in found.items()
    }

"""How benchmarks take time: a filled queue on a GPU, flags for what is not to be trusted."""

import json
import subprocess
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evidence
import pytest
import timing
import torch
from ceilings import Ceilings
from timing import DeviceClock, Timing, columns, interleaved, ratios, summarize

from neobert.floors import Cost


class Gpu:
    """torch.cuda with a clock of its own: a queue of ``depth`` launches, a host that takes time."""

    def __init__(self, kernel_s: float, host_s: float, depth: int = 1000) -> None:
        self.kernel_s, self.host_s, self.depth = kernel_s, host_s, depth
        self.host = self.free_at = 0.0
        self.queued: deque[float] = deque(maxlen=depth)  # when each launch ends

    def launch(self, seconds: float) -> float:
        self.host += self.host_s
        if len(self.queued) == self.depth:  # full: the host waits for the oldest to end
            self.host = max(self.host, self.queued[0])
        self.free_at = max(self.free_at, self.host) + seconds
        self.queued.append(self.free_at)
        return self.free_at

    def _sleep(self, cycles: int) -> None:
        self.launch(cycles / 2e9)

    def synchronize(self) -> None:
        self.host = max(self.host, self.free_at)

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        event = SimpleNamespace(at=0.0)

        def record() -> None:
            event.at = max(self.free_at, self.host)

        event.record = record
        event.query = lambda: event.at <= self.host
        event.elapsed_time = lambda other: 1000 * (other.at - event.at)
        return event


def taken(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, calls: int, launches: int = 1) -> DeviceClock:
    monkeypatch.setattr(timing.torch, "cuda", gpu)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: gpu.host)
    clock = DeviceClock()
    clock.seconds = clock.take(  # type: ignore[attr-defined]
        lambda _: [gpu.launch(gpu.kernel_s) for _ in range(launches)], calls
    )
    return clock


def test_a_slow_host_does_not_show_in_device_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 kernels of 5 us by a host that takes 40 us for each: the wait in front grows."""
    clock = taken(Gpu(5e-6, 40e-6), monkeypatch, calls=500)
    assert clock.seconds == pytest.approx(5e-6, rel=0.01)  # type: ignore[attr-defined]
    assert clock.cycles > timing.BACKLOG_CYCLES
    assert not clock.starved


def test_a_short_queue_is_no_starvation_while_the_gpu_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = taken(Gpu(50e-6, 5e-6, depth=100), monkeypatch, calls=4, launches=400)
    assert clock.seconds == pytest.approx(400 * 50e-6, rel=0.05)  # type: ignore[attr-defined]
    assert clock.limited
    assert not clock.starved


def test_a_starved_gpu_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    """More launches than the queue holds, each shorter than the host takes to make it."""
    clock = taken(Gpu(2e-6, 20e-6, depth=100), monkeypatch, calls=4, launches=4000)
    assert clock.starved


def test_variants_take_turns_and_noise_is_flagged() -> None:
    order: list[str] = []
    times = interleaved(
        {name: lambda _, name=name: order.append(name) for name in "ab"},
        rounds=3, at_least_s=0, warm_up=1,
    )  # fmt: skip
    assert order == ["a"] * 2 + ["b"] * 2 + ["a", "b", "b", "a", "a", "b"]
    assert {len(t.samples) for t in times.values()} == {3}
    steady, wild = summarize([1.0, 1.0, 1.1]), summarize([1.0, 2.0, 9.0])
    found = columns({"ours": steady, "eager": wild, "other": Timing(1, 1, 1, starved=True)})
    assert (found["noisy"], found["starved"]) == (["eager"], ["other"])
    assert "noisy" not in columns({"ours": steady})


def test_ceilings_are_no_peers_and_bound_every_rate() -> None:
    ceilings = Ceilings("cpu", torch.float32, quick=True)
    ceilings.bytes, ceilings.size = 500, 10
    times = {"ours": Timing(4.0, 4, 4), "copy": Timing(1.0, 1, 1), "gemm": Timing(2.0, 2, 2)}
    assert ratios(times) == {}
    moved = ceilings.against(Cost(bytes=2000, flop=10), times)
    assert (moved["copy_bytes_per_s"], moved["gemm_flop_per_s"]) == (1000, 1000)
    assert (moved["ours_bytes_per_s"], moved["ours_share_of_floor"]) == (500, 0.5)
    product = ceilings.against(Cost(bytes=1, flop=3000, matrix=True), times)
    assert (product["ours_flop_per_s"], product["ours_share_of_floor"]) == (750, 0.75)


def result(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "case": "c", "item": name, "values": {}, **more}


def test_a_killed_run_keeps_what_it_measured(tmp_path: Path) -> None:
    journal = evidence.Journal(tmp_path)
    journal.add(result("a"))
    assert [r["name"] for r in json.loads(journal.path.read_text())["results"]] == ["a"]
    again = evidence.Journal(tmp_path, resume=True)
    assert again.done == {"a"}
    assert evidence.Journal(tmp_path).done == set()


def test_a_run_goes_on_the_day_after(tmp_path: Path) -> None:
    journal = evidence.Journal(tmp_path)
    journal.add(result("a"))
    journal.path.rename(journal.path.with_name("2000-01-01.json"))
    assert evidence.Journal(tmp_path, resume=True).done == {"a"}


def test_what_a_deadline_cut_short_is_measured_again(tmp_path: Path) -> None:
    journal = evidence.Journal(tmp_path)
    journal.add(result("a", values={"cut_short": True}))
    assert evidence.Journal(tmp_path, resume=True).done == set()
    journal.add(result("a"))
    assert evidence.Journal(tmp_path, resume=True).done == {"a"}


def test_a_result_takes_the_place_of_one_of_its_own_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for commit, seconds in (("a", 1), ("b", 2), ("b", 3)):
        monkeypatch.setattr(evidence, "commit", lambda value=commit: value)
        journal = evidence.Journal(tmp_path)
        journal.add(result("x", values={"ours_median_s": seconds}))
    found = json.loads(journal.path.read_text())["results"]
    assert [(r["commit"], r["values"]["ours_median_s"]) for r in found] == [("a", 1), ("b", 3)]
    assert all(r["at"].startswith(journal.date) and r["command"] for r in found)


def test_one_run_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    first, second = evidence.Journal(tmp_path), evidence.Journal(tmp_path)
    first.hold()
    with pytest.raises(ValueError, match=r"one run at a time in .*, got a second one"):
        second.hold()
    first.release()
    second.hold()
    second.release()


@pytest.mark.parametrize("text", ['{"results": ', "[]", '{"results": 3}', "\xff"], ids=str)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = evidence.Journal(tmp_path).path
    path.parent.mkdir()
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{path.name}: expected (JSON|a results file), got"):
        evidence.Journal(tmp_path)


def test_what_was_not_reached_stays_listed_until_it_is(tmp_path: Path) -> None:
    first = evidence.Journal(tmp_path)
    for name in ("a", "b", "a"):
        first.reached(name, False)
    first.write()
    second = evidence.Journal(tmp_path)
    assert second.not_reached == ["b", "a"]
    second.reached("b")
    second.write()
    assert json.loads(second.path.read_text())["not_reached"] == ["a"]


def test_other_code_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence.Journal(tmp_path).add(result("a"))
    monkeypatch.setattr(evidence, "source", lambda: "other")
    assert evidence.Journal(tmp_path, resume=True).done == set()


@pytest.mark.parametrize("part", ["machine", "versions"])
def test_a_file_never_mixes_machines_or_versions(tmp_path: Path, part: str) -> None:
    first = evidence.Journal(tmp_path)
    first.add(result("a"))
    document = json.loads(first.path.read_text())
    document[part]["torch"] = "another"
    first.path.write_text(json.dumps(document))
    second = evidence.Journal(tmp_path, resume=True)
    assert second.path.name == f"{second.date}-2.json"
    assert second.results == []
    assert second.done == set()


def test_quick_runs_have_files_of_their_own(tmp_path: Path) -> None:
    evidence.Journal(tmp_path).add(result("a"))
    quick = evidence.Journal(tmp_path, quick=True, resume=True)
    quick.add(result("b"))
    document = json.loads(quick.path.read_text())
    assert document["quick"]
    assert [r["name"] for r in document["results"]] == ["b"]


def test_results_alone_leave_the_tree_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on in the committed folder is of the same commit as its beginning."""
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    results, code = tmp_path / "benchmarks" / "results" / "x.json", tmp_path / "a.py"
    results.parent.mkdir(parents=True)
    for path in (results, code):
        path.write_text("1")
    git = ("git", "-c", "user.name=n", "-c", "user.email=e", "-c", "core.hooksPath=/dev/null")
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "x")):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    results.write_text("2")
    assert evidence.clean()
    code.write_text("2")
    assert not evidence.clean()


def test_the_digest_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "SOURCES", ("package", "one.py"))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("1")
    (tmp_path / "one.py").write_text("2")
    before = evidence.source()
    assert evidence.source() == before
    (tmp_path / "package" / "a.py").write_text("3")
    assert evidence.source() != before

"""What runs on a lent GPU is tried out here: stages, deadlines, sweeps, comparisons of commits."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_models
import bench_training
import compare_commits
import gpu_profile
import gpu_test
import gpu_tune
import pytest
import torch
import tuning
from compare_commits import Row, Side
from gpu_test import Stage
from operator_cases import CASES
from timing import Timing

from neobert import NeoBERTConfig
from neobert_kernels import _runtime

ROOT = Path(__file__).resolve().parents[2]
SAY = (sys.executable, "-c")


def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *listed: Stage, **options: Any) -> Any:
    """Run these stages in place of the real ones: exit code and the file."""
    monkeypatch.setattr(gpu_test, "stages", lambda *_: list(listed))
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    arguments = ["--output", str(tmp_path), "--stand-in"]
    arguments += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    code = gpu_test.main(arguments)
    return code, json.loads((tmp_path / "gpu-test.json").read_text())


def test_every_stage_has_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = stages(
        tmp_path, monkeypatch,
        Stage("good", (*SAY, "print('fine')")),
        Stage("bad", (*SAY, "raise SystemExit(3)")),
        Stage("missing", ("no-such-program",), needed=False),
        Stage("refused", (*SAY, "print('Device not supported'); raise SystemExit(1)"), False),
    )  # fmt: skip
    assert code == 1
    outcomes = {name: result["outcome"] for name, result in found["stages"].items()}
    assert outcomes == {"good": "passed", "bad": "failed", "missing": "absent", "refused": "absent"}
    assert found["stages"]["good"]["summary"] == "fine"
    assert "fine" in (tmp_path / "gpu-test.log").read_text()


def _free(path: Path) -> bool:
    """Whether nobody holds ``path``; looks again a little later before it says no."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
            return False
    return True


def test_a_stage_ends_by_the_deadline_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_test, "LEAST_S", 0.5)
    held = tmp_path / "held"
    # A child inherits the lock and keeps it as long as it lives.
    spawn = (
        f"import fcntl, subprocess, sys; file = open({str(held)!r}, 'w'); "
        "fcntl.flock(file, fcntl.LOCK_EX); subprocess.run([sys.executable, '-c', "
        "'import time; time.sleep(600)'], pass_fds=[file.fileno()])"
    )
    code, found = stages(
        tmp_path, monkeypatch, Stage("slow", (*SAY, spawn)), Stage("late", SAY),
        **{"deadline-s": 3.0},
    )  # fmt: skip
    assert held.exists()
    assert any(_free(held) for _ in range(100))
    assert found["stages"]["slow"]["outcome"] == "out of time"
    assert found["not_reached"] == ["late"]
    assert code == 0


def test_stages_run_side_by_side_and_after_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two wait for each other, which one after the other could not; a third for the second."""
    monkeypatch.setattr(gpu_test, "LEAST_S", 0.5)
    files = [str(tmp_path / name) for name in "ab"]
    meet = (
        "import pathlib, time; pathlib.Path({!r}).touch(); p = pathlib.Path({!r})\n"
        "for _ in range(600): p.exists() or time.sleep(0.05)\nprint(p.exists())"
    )
    stage_a, stage_b = (
        Stage(name, (*SAY, meet.format(*pair))) for name, pair in (("a", files), ("b", files[::-1]))
    )
    last = Stage("last", (*SAY, "print('last')"), after="b")
    code, found = stages(
        tmp_path, monkeypatch, last, stage_a, stage_b, lanes=3, **{"deadline-s": 60}
    )
    assert code == 0
    summaries = {name: result["summary"] for name, result in found["stages"].items()}
    assert summaries == {"a": "True", "b": "True", "last": "last"}
    log = (tmp_path / "gpu-test.log").read_text()
    assert log.index("===== b:") < log.index("===== last:")
    assert not list(tmp_path.glob("*.part"))


def test_a_second_run_keeps_what_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    append = f"open({str(mark)!r}, 'a').write('x'); raise SystemExit({{}})"
    listed = [Stage(name, (*SAY, append.format(code))) for name, code in (("a", 0), ("b", 1))]
    for _ in range(2):
        _, found = stages(tmp_path, monkeypatch, *listed)
    assert mark.read_text() == "xxx"  # the failed one ran twice
    assert found["stages"]["a"]["resumed"]
    monkeypatch.setattr(gpu_test.evidence, "source", lambda: "other")
    stages(tmp_path, monkeypatch, *listed)
    assert mark.read_text() == "xxxxx"


def test_the_real_stages_name_files_that_exist() -> None:
    for stage in gpu_test.stages(4, 1000, False):
        for part in stage.command:
            if part.startswith(("tests/", "benchmarks/")):
                assert (ROOT / part).exists(), part


@pytest.mark.parametrize("knob", tuning.KNOBS, ids=lambda knob: knob.title)
def test_every_knob_is_where_it_is_said_to_be(knob: tuning.Knob) -> None:
    pytest.importorskip("triton")
    original = getattr(knob.owner, knob.name)
    with tuning.replaced(knob, "other"):
        assert getattr(knob.owner, knob.name) == "other"
    assert getattr(knob.owner, knob.name) is original
    assert set(knob.operators) <= set(_runtime.load_operators())


def test_every_operator_with_a_kernel_has_a_knob() -> None:
    pytest.importorskip("triton")
    tuned = {name for knob in tuning.KNOBS for name in knob.operators}
    kernels = {name for name, op in _runtime.load_operators().items() if op.kernels}
    assert kernels - tuned <= {"rope_table"}  # a table is made once for a batch


def test_candidates_differ_in_one_number_and_keep_what_the_shape_decides() -> None:
    pytest.importorskip("triton")
    from neobert_kernels.ops import swiglu
    from neobert_kernels.ops.attention import tiles

    choice = swiglu.choice(2048, 2)
    knob = next(k for k in tuning.KNOBS if k.module == "swiglu")
    near = tuning.candidates(knob, choice)
    assert {f"warps={n}" for n in (2, 8)} <= near.keys()
    for value in near.values():
        assert sum(vars(value)[key] != vars(choice)[key] for key in vars(choice)) == 1
    tile = tiles.choose(64, torch.bfloat16, 90, 4096, True)
    labels = {
        label: value
        for knob in tuning.KNOBS
        if knob.name == "choose"
        for label, value in tuning.candidates(knob, tile).items()
    }
    assert {"forward.stages=4", "turn_inside=True"} <= labels.keys()
    assert {"dq.inner=128", "dkv.registers=128"} <= labels.keys()
    assert not any("search" in label for label in labels)
    assert all(isinstance(value, tiles.Tiles) and value != tile for value in labels.values())


def test_a_sweep_measures_proposes_and_changes_nothing(tmp_path: Path) -> None:
    """One operator in the interpreter, in a process of its own; a second run has nothing to do."""
    pytest.importorskip("triton")
    before = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True).stdout
    command = [sys.executable, "benchmarks/gpu_tune.py", "--stand-in", "--operator", "rope"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("tune-*.json")
    document = json.loads(path.read_text())
    knobs = {sweep["knob"] for sweep in document["cases"]["rope"]}
    assert knobs == {k.title for k in tuning.KNOBS if "rope" in k.operators}
    tried = [m for s in document["cases"]["rope"] for m in s["tried"].values()]
    assert any("gain" in m for m in tried)
    assert document["not_reached"] == []
    assert "| rope |" in path.with_suffix(".md").read_text()
    after = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True).stdout
    assert after == before


def test_a_value_is_proposed_only_beyond_the_spread() -> None:
    def verdict(median: float, low: float, high: float, forward: float = 1.0) -> bool:
        mine = Timing(median, low, high)
        default = Timing(1.0, 0.95, 1.05)
        both = {"default": default, "x": mine}
        first = {"default": default, "x": Timing(forward, forward, forward)}
        return gpu_tune.verdict({"forward": first, "both": both}, "x")["proposed"]

    assert verdict(0.8, 0.75, 0.85)
    assert not verdict(0.8, 0.7, 0.96)
    assert not verdict(0.8, 0.75, 0.85, forward=1.2)  # pays for itself in the forward alone


def test_a_profile_names_what_takes_the_time(tmp_path: Path) -> None:
    """Here by operator: a GPU's kernels are seen on one alone."""
    arguments = ["--output", str(tmp_path), "--quick", "--case", "fixed 512"]
    assert gpu_profile.main([*arguments, "--case", gpu_profile.ONE_TEXT]) == 0
    (path,) = tmp_path.glob("profile-*.json")
    found = json.loads(path.read_text())["found"]
    assert [(e["case"], e["way"]) for e in found] == [
        (case, way) for case in ("fixed 512", gpu_profile.ONE_TEXT) for way in gpu_profile.WAYS
    ]
    for entry in found:
        names = {row["name"] for row in entry["kernels"]}
        assert {"aten::addmm", "aten::mm", "mkldnn::_linear_pointwise"} & names
        assert 0 < entry["host_s"] <= entry["back_to_back_s"]
    text = path.with_suffix(".md").read_text()
    assert "## neobert-250m, fixed 512, patched" in text
    assert text.count("| kernel | calls | ms | share |") == len(found)


def test_the_replay_of_a_graph_is_found() -> None:
    calls: list[str] = []
    recorder = SimpleNamespace(replay=lambda: calls.append("replay"))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert gpu_profile.replay_of(model) is None
    entries = {"old": None, "new": SimpleNamespace(recorder=recorder)}
    model[0].__dict__[gpu_profile.GRAPHS] = SimpleNamespace(entries=entries)
    replay = gpu_profile.replay_of(model)
    assert replay is not None
    replay()
    assert calls == ["replay"]


def test_far_tiles_are_tried_and_none_twice() -> None:
    pytest.importorskip("triton")
    from neobert_kernels.ops.attention import tiles

    default = tiles.choose(64, torch.bfloat16, 90, 4096, True)
    for part, far in tuning.FAR.items():
        knob = next(k for k in tuning.KNOBS if k.part == part)
        tried = [getattr(value, part) for value in tuning.candidates(knob, default).values()]
        assert set(far) - {getattr(default, part)} <= set(tried)
        assert len(set(tried)) == len(tried)
        assert len(tried) <= gpu_tune.MOST_CANDIDATES


def test_processes_compile_their_parts_and_late_ones_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib, sys, time\n"
        "part = sys.argv[-1]\n"
        "pathlib.Path(sys.argv[1], part.replace('/', 'of')).touch()\n"
        "time.sleep(600 if part == '1/2' else 0)\n"
    )
    monkeypatch.setattr(gpu_tune, "__file__", str(program))
    began = time.monotonic()
    gpu_tune.compile_side_by_side([str(tmp_path)], 2, 5.0)
    assert time.monotonic() - began < 60
    assert {path.name for path in tmp_path.glob("?of2")} == {"0of2", "1of2"}


def test_unknown_operators_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_tune.main(["--output", "x", "--operator", "nothing"])
    assert capsys.readouterr().err


def row(before: tuple[float, float, float], now: tuple[float, float, float]) -> Row:
    return Row("rms_norm", "x", Side(*before), Side(*now))


def test_slower_means_five_percent_beyond_the_spread() -> None:
    assert row((1.0, 0.99, 1.01), (1.1, 1.09, 1.11)).slower
    assert not row((1.0, 0.99, 1.01), (1.04, 1.03, 1.05)).slower
    assert not row((1.0, 0.9, 1.2), (1.1, 1.0, 1.3)).slower
    assert row((1.0, 0.99, 1.01), (0.9, 0.89, 0.91)).faster


def turn(folder: Path, name: str, ours: float) -> Path:
    path = folder / name / "device" / "2026-01-01.json"
    path.parent.mkdir(parents=True)
    values = {"ours_median_s": ours, "ours_low_s": 0.99 * ours, "ours_high_s": 1.01 * ours}
    rate = {f"patched_{k}tokens_per_s": 1 / ours for k in ("", "low_", "high_")}
    results = [
        {"name": "rms_norm", "case": "x", "values": values},
        {"name": "inference", "case": "y", "values": rate},
        {"name": "import", "case": "z", "values": {"added_s": 1.0}},
    ]
    path.write_text(json.dumps({"results": results}))
    return folder / name


def test_turns_are_taken_together(tmp_path: Path) -> None:
    base = [turn(tmp_path, f"base{i}", seconds) for i, seconds in enumerate((1.0, 1.02))]
    head = [turn(tmp_path, f"head{i}", seconds) for i, seconds in enumerate((1.2, 1.22))]
    found = compare_commits.rows(base, head)
    assert [(r.name, r.slower) for r in found] == [("rms_norm", True), ("inference", True)]
    assert found[0].base.low_s == pytest.approx(0.99)
    assert found[0].head.high_s == pytest.approx(1.22 * 1.01)
    text = compare_commits.markdown(found, "b" * 40, "h" * 40, ["a note."])
    assert "2 slower by over 5%" in text
    assert "| rms_norm: x | 1.01e+06 us | 1.21e+06 us | 1.198 **slower** |" in text
    (empty := tmp_path / "empty").mkdir()
    assert compare_commits.rows([empty], head[:1]) == []


def test_a_commit_is_asked_for_the_suites_that_it_has(tmp_path: Path) -> None:
    assert compare_commits.suites(ROOT) == list(compare_commits.SUITES)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "bench_rope.py").touch()
    assert compare_commits.suites(tmp_path) == ["rope"]


def test_what_was_not_compared_is_no_pass() -> None:
    same = row((1.0, 0.99, 1.01), (1.0, 0.99, 1.01))
    assert compare_commits.verdict([same], ["base, turn 1: some benchmarks failed."]) == 0
    assert compare_commits.verdict([same], ["head, turn 1: some benchmarks failed."]) == 1
    assert compare_commits.verdict([], []) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-k", "gpu-bench", "gpu-compare", "NOINSTALL=1", f"PYTHON={sys.executable}",
         f"OUT={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr.count("gpu: expected one that torch can use, got none\n") == 2
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_cases_of_operators_are_all_registered() -> None:
    assert {operator for operator, _ in CASES} <= set(_runtime.load_operators())


class Stub:
    """The ways of a model that needs no model; "greedy" has no room for more than 20 tokens."""

    dtype = torch.float32
    plain = SimpleNamespace(config=NeoBERTConfig(num_hidden_layers=1))
    tokens = 0

    def batch(self, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        self.tokens = sum(lengths)
        return torch.zeros(self.tokens), torch.zeros(0)

    def working(self, name: str) -> tuple[Any, str]:
        if name == "absent":
            return None, "not installed"

        def way(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            if name == "greedy" and len(ids) > 20:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")
            return ids

        return way, ""

    def timings(self, calls: Any, **_: Any) -> dict[str, Timing]:
        """A tenth of a second for any batch, but for "quadratic" as the square of its tokens."""
        found = {n: 1e-3 * self.tokens**2 if n == "quadratic" else 0.1 for n in calls}
        return {name: Timing(seconds, seconds, seconds) for name, seconds in found.items()}


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Any:
    ways: Any = Stub()
    monkeypatch.setattr(bench_models, "interleaved", ways.timings)
    monkeypatch.setattr(
        bench_models, "fitting_peak", lambda call, _: bench_models.fits(lambda: call(0))
    )
    bench = bench_models.Bench("m", ways, "cpu", True, lambda f: f(), lambda: 1.0)
    batches = [[10], [10] * 2, [10] * 4, [10] * 8]

    def run(*names: str, **options: Any) -> Any:
        return bench.sweep(names, batches, **options)

    return SimpleNamespace(bench=bench, run=run)


def test_a_batch_that_does_not_fit_is_recorded_and_the_sweep_goes_on(sweep: Any) -> None:
    points, absent = sweep.run("patched", "greedy", "absent")
    assert absent == {"absent": "not installed"}
    full = [p for p in points if "out_of_memory" in p]
    assert [(p["variant"], p["tokens"]) for p in full] == [("greedy", 40)]
    assert full[0]["out_of_memory"] == "CUDA out of memory. Tried to allocate 9 GiB."
    assert [p["tokens"] for p in points if p["variant"] == "patched"] == [10, 20, 40, 80]
    values = bench_models.summary(points, absent)
    assert values["patched_batch_tokens"] == 80
    assert values["greedy_batch_tokens"] == 20
    assert values["absent_absent"] == "not installed"


def test_a_sweep_without_time_says_that_it_was_cut_short(sweep: Any) -> None:
    times = iter([1.0, 1.0, 0.0])
    sweep.bench.left_s = lambda: next(times)
    points, _ = sweep.run("patched")
    assert [p["tokens"] for p in points] == [10, 20]
    assert sweep.bench.cut_short


def test_a_training_step_that_does_not_fit_is_recorded() -> None:
    def losses(full_after: int) -> Any:
        """A model whose memory is full at its call of this number."""
        model = torch.nn.Linear(2, 1)
        calls = iter(range(100))

        def forward(x: torch.Tensor) -> Any:
            if next(calls) >= full_after:
                raise torch.OutOfMemoryError("out of memory\nmore")
            return SimpleNamespace(loss=(x @ weight.T).mean())

        weight = model.weight
        model.forward = forward
        return model

    inputs = {"x": torch.ones(3, 2)}
    torch.manual_seed(0)
    patched, plain = losses(100), losses(1)
    plain.load_state_dict(patched.state_dict())
    steps, values = bench_training.fitting_steps({"patched": patched, "sdpa": plain}, inputs, "cpu")
    assert list(steps) == ["patched"]
    assert values["sdpa_out_of_memory"] == "out of memory"
    steps, values = bench_training.fitting_steps({"patched": patched, "sdpa": plain}, inputs, "cpu")
    assert not steps
    assert set(values) == {"patched_out_of_memory", "sdpa_out_of_memory"}


def test_a_compiled_model_that_is_wrong_gets_no_number(
    sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stub, "agrees", lambda *_: False, raising=False)
    points, absent = sweep.run("patched", "compile")
    assert [p["wrong"] for p in points if p["variant"] == "compile"] == [bench_models.WRONG]
    values = bench_models.summary(points, absent)
    assert values["compile_absent"] == bench_models.WRONG
    assert "compile_tokens_per_s" not in values


def test_a_way_past_its_best_is_not_run_on_larger_batches(sweep: Any) -> None:
    points, _ = sweep.run("patched", "quadratic", to_best=True)
    assert [p["tokens"] for p in points if p["variant"] == "quadratic"] == [10, 20]
    assert [p["tokens"] for p in points if p["variant"] == "patched"] == [10, 20, 40, 80]

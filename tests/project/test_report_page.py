"""A report shows what was measured, where and from which commit, and mixes nothing."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import report
import report_data
import report_page

from neobert.cli import main

CPU = {"device": "Some CPU", "cores": 2}
H200 = {"device": "NVIDIA H200", "driver": "1"}
VERSIONS = {"torch": "2.13.0", "transformers": "5.24.0"}


def times(**medians: float) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, median in medians.items():
        values |= {f"{name}_median_s": median, f"{name}_low_s": 0.9 * median}
        values[f"{name}_high_s"] = 1.1 * median
    return values


OPERATOR = times(ours=1e-3, eager=2e-3, copy=1e-3, gemm=1e-3) | {
    "bytes": 10**6, "flop": 10**6, "copy_bytes_per_s": 2e9, "gemm_flop_per_s": 4e9,
    "ours_bytes_per_s": 1e9, "ours_share_of_floor": 0.5,
    "liger_absent": "liger-kernel is not installed", "noisy": ["eager"], "starved": ["ours"],
}  # fmt: skip


def unfinished() -> dict[str, Any]:
    """A sweep that the deadline cut short, of which SDPA fitted no batch."""
    full = {"variant": "sdpa", "documents": 8, "tokens": 4096, "longest": 512}
    values = {"patched_tokens_per_s": 2000.0, "patched_batch_tokens": 4096, "cut_short": True}
    return values | {"points": [point("patched", 512, 2000.0), full | {"out_of_memory": "no"}]}


def point(way: str, length: int, rate: float, documents: int = 8) -> dict[str, Any]:
    return {
        "variant": way, "documents": documents, "tokens": documents * length, "longest": length,
        "tokens_per_s": rate, "low_tokens_per_s": rate, "high_tokens_per_s": rate,
        "limit_tokens_per_s": 4000.0, "peak_bytes": 10**9, "noisy": False,
    }  # fmt: skip


def inference(length: int) -> dict[str, Any]:
    values: dict[str, Any] = {"limit_tokens_per_s": 4000.0, "share_of_limit": 0.5}
    values |= {"ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1}
    for way, rate in (("patched", 2000.0), ("sdpa", 1000.0)):
        values |= {f"{way}_tokens_per_s": rate, f"{way}_peak_bytes": 1e9}
        values[f"{way}_batch_tokens"] = 8 * length
    oom = {"variant": "sdpa", "documents": 64, "tokens": 64 * length, "longest": length}
    oom["out_of_memory"] = "no room"
    points = [point("patched", length, 2000.0), point("sdpa", length, 1000.0), oom]
    return values | {"points": points}


def entry(name: str, case: str, values: dict[str, Any], commit: str = "a" * 40) -> dict[str, Any]:
    return {"name": name, "case": case, "values": values, "commit": commit, "clean": True}


def file(
    folder: Path, name: str, results: list[dict[str, Any]], *, machine: dict[str, Any] = CPU,
    date: str = "2026-01-02", **more: Any,
) -> Path:  # fmt: skip
    path = folder / "device" / name
    path.parent.mkdir(exist_ok=True)
    document = {"schema": 1, "date": date, "machine": machine, "versions": VERSIONS, **more}
    path.write_text(json.dumps(document | {"results": results}))
    return path


def everything(folder: Path) -> None:
    points = [point("patched", n, 2000.0) for n in (64, 128)]
    batches = [point("patched", 512, 2000.0, n) for n in (1, 2)]
    latency = {f"{w}_{p}_ms": 1.5 for w in ("patched", "sdpa") for p in ("p50", "p99")}
    training = inference(1024) | {"patched_flop_utilisation": 0.4}
    file(
        folder, "all.json",
        [
            entry("rms_norm", "forward, 64 x 768", OPERATOR),
            entry("inference", "neobert-250m, fixed 512, bfloat16", inference(512)),
            entry("inference", "neobert-250m, fixed 1024, bfloat16", inference(1024)),
            entry("ways", "neobert-250m, ragged", inference(512) | {"flex_attention_absent": "no"}),
            entry("curve_length", "bert-base, bfloat16", {"points": points}),
            entry("curve_batch", "bert-base, bfloat16", {"points": batches}),
            entry("inference", "bert-base, fixed 512, bfloat16", inference(512)),
            entry("latency", "neobert-250m, 16 tokens", latency | {"ratio": 1.0}),
            entry("training", "neobert-250m, fixed 1024", training),
            entry("import", "after torch", {"added_s": 0.001}),
        ],
        machine=H200, not_reached=["bench_x.py::test_y"],
    )  # fmt: skip


def test_a_report_shows_every_kind_of_result(tmp_path: Path) -> None:
    everything(tmp_path)
    written = report_page.write(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| forward, 64 x 768 | 1 ms* | 1 | 50% | 2.00 x (1.64 to 2.44)~ |" in text
    assert "Absent: liger (liger-kernel is not installed)." in text
    assert "1,000 | 2,000 | 2.00 x (1.90 to 2.10) | 50%" in text
    assert "Out of memory: neobert-250m, fixed 512, bfloat16, sdpa, 32,768 tokens." in text
    assert "Absent: flex_attention (no)." in text
    assert "Not reached in the time given: bench_x.py::test_y." in text
    assert "Against the data sheet of H200 SXM" in text
    assert "not measured" in text  # the curve has no SDPA
    assert all(path.stat().st_size for path in written)


def test_what_is_not_whole_says_so(tmp_path: Path) -> None:
    without = {"sdpa_out_of_memory": "no room", "patched_tokens_per_s": 100.0}
    results = [
        entry("inference", "bert-base, fixed 512", unfinished()),
        entry("training", "bert-base, fixed 512", without),
    ]
    file(tmp_path, "one.json", results)
    found = {s.title: s for s in report_page.tables(report_data.groups(tmp_path)[0])}
    assert found["Inference"].rows[0][-1] == "- / 4,096"
    assert found["Inference"].notes[:2] == [
        "Out of memory: bert-base, fixed 512, sdpa, 4,096 tokens.",
        "Cut short by the deadline: bert-base, fixed 512.",
    ]
    assert found["Training step"].notes[0] == "Out of memory: bert-base, fixed 512, sdpa."


def test_a_wide_spread_is_flagged_whatever_the_result_says_of_itself(tmp_path: Path) -> None:
    values = times(ours=1e-3, eager=2e-3) | {"ours_low_s": 0.85e-3}
    file(tmp_path, "one.json", [entry("op", "x", values)])
    (table,) = report_page.tables(report_data.groups(tmp_path)[0])
    assert table.header == ["case", "ours", "eager / ours"]  # no column without a number
    assert table.rows[0][1:] == ["1 ms~", "2.00 x (1.64 to 2.59)"]


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    everything(tmp_path)
    report_page.write(tmp_path, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "https://" not in page
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert ("data:image/png;base64," in page) == drawn
    assert (report_page.NO_PLOTS in page) == (not drawn)


def test_every_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    everything(tmp_path)
    later = {"machine": H200, "date": "2026-02-01"}
    slower = OPERATOR | times(ours=2e-3)
    file(
        tmp_path, "later.json", [entry("rms_norm", "forward, 64 x 768", slower, "b" * 40)], **later
    )
    paths = report_page.write(tmp_path, tmp_path / "out")
    plots = {path.stem.removeprefix("nvidia-h200-") for path in paths if path.suffix == ".png"}
    wanted = {"throughput", "memory", "models", "batch", "roofline", "speed-up", "history"}
    assert plots == wanted
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths if p.suffix == ".png")


def test_a_new_report_leaves_no_picture_of_the_last_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    everything(tmp_path)
    out = tmp_path / "out"
    before = {path.name for path in report_page.write(tmp_path, out)}
    (out / "own.png").touch()  # nobody's but the reader's
    (tmp_path / "device" / "all.json").unlink()
    file(tmp_path, "few.json", [entry("rms_norm", "x", OPERATOR)], machine=H200)
    after = {path.name for path in report_page.write(tmp_path, out)}
    assert after < before
    assert {path.name for path in out.iterdir()} == after | {"own.png"}


@pytest.mark.parametrize("other", [{"machine": H200}, {"quick": True}], ids=["machine", "quick"])
def test_machines_and_quick_runs_are_apart(tmp_path: Path, other: dict[str, Any]) -> None:
    file(tmp_path, "one.json", [entry("rms_norm", "x", OPERATOR)])
    file(tmp_path, "two.json", [entry("rms_norm", "x", OPERATOR)], **other)
    found = report_data.groups(tmp_path)
    assert [len(group.newest) for group in found] == [1, 1]


def test_rows_of_several_commits_say_so(tmp_path: Path) -> None:
    results = [entry("rms_norm", "x", OPERATOR), entry("rms_norm", "y", OPERATOR, "b" * 40)]
    file(tmp_path, "one.json", results)
    (table,) = report_page.tables(report_data.groups(tmp_path)[0])
    assert table.notes[-1] == (
        "From several commits. aaaaaaaaaa, 2026-01-02: x. bbbbbbbbbb, 2026-01-02: y."
    )


def test_the_newest_result_of_a_case_is_shown(tmp_path: Path) -> None:
    slow = OPERATOR | times(ours=5e-3)
    file(tmp_path, "z.json", [entry("rms_norm", "x", slow)], date="2026-01-01")
    file(tmp_path, "a.json", [entry("rms_norm", "x", OPERATOR)], date="2026-01-03")
    (shown,) = report_data.groups(tmp_path)[0].named("rms_norm")
    assert shown.values["ours_median_s"] == 1e-3


def test_curves_are_read_along_their_own_axis(tmp_path: Path) -> None:
    points = [point("patched", n, 100.0 * n, documents=2) for n in (64, 128)]
    batches = [point("patched", 32, 100.0 * n, documents=n) for n in (4, 2)]
    results = [
        entry("curve_length", "bert-base, float32", {"points": points}),
        entry("curve_batch", "bert-base, float32", {"points": batches}),
        entry("curve_batch", "cut, float32", {"points": []}),
    ]
    file(tmp_path, "one.json", results)
    (group,) = report_data.groups(tmp_path)
    assert report_data.length_series(group, "tokens_per_s") == {
        "bert-base, 256 tokens at once": {
            "patched": [(64, 6400.0), (128, 12800.0)],
            "limit": [(64, 4000.0), (128, 4000.0)],
        }
    }
    assert report_data.batch_series(group, "peak_bytes") == {
        "bert-base, documents of 32 tokens": {"patched": [(2, 10**9), (4, 10**9)]}
    }


def test_memory_is_compared_at_equal_batches(tmp_path: Path) -> None:
    points = [point("patched", n, 2000.0) for n in (64, 128)]
    results = [entry("inference", f"bert-base, fixed {n}, x", inference(n)) for n in (512, 1024)]
    results.append(entry("curve_length", "bert-base, x", {"points": points}))
    file(tmp_path, "one.json", results)
    (group,) = report_data.groups(tmp_path)
    (title,) = report_data.length_series(group, "tokens_per_s")
    assert title == "bert-base, best batch"
    (title,) = report_data.length_series(group, "peak_bytes")
    assert title == "bert-base, 1,024 tokens at once"


@pytest.mark.parametrize(
    ("ours", "eager", "color"),
    [(1.0, 2.0, "#1f77b4"), (2.0, 1.0, "#d62728"), (1.0, 1.05, "#999999")],
)
def test_a_bar_takes_sides_only_beyond_the_spread(
    tmp_path: Path, ours: float, eager: float, color: str
) -> None:
    import report_plots

    file(tmp_path, "a.json", [entry("rope", "x", times(ours=ours, eager=eager))])
    ((label, _, low, high),) = report_plots.comparisons(report_data.groups(tmp_path)[0])
    assert label == "rope: x / eager"
    assert report_plots._verdict(low, high) == color


def test_no_bar_is_left_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import report_plots

    slow = OPERATOR | times(ours=9e-3)
    file(tmp_path, "a.json", [entry("rms_norm", str(i), slow) for i in range(60)])
    assert len(report_plots.comparisons(report_data.groups(tmp_path)[0])) == 60


def test_the_readme_shows_no_quick_run(tmp_path: Path) -> None:
    file(tmp_path, "q.json", [entry("import", "x", {"added_s": 1.0})], quick=True)
    assert "Nothing has been measured yet." in report.table(tmp_path)


def test_bad_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--report", str(tmp_path / "none")]) == 2
    assert "report: expected a folder of results, got" in capsys.readouterr().err
    assert main(["bench", "--report", str(tmp_path)]) == 2
    assert f"report: expected results in {tmp_path}, got none" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("{")
    assert main(["bench", "--report", str(tmp_path)]) == 2
    assert "broken.json: expected JSON, got" in capsys.readouterr().err
    part = {"machine": CPU, "versions": VERSIONS, "date": "2026-01-01", "results": [{"name": "x"}]}
    (tmp_path / "broken.json").write_text(json.dumps(part))
    assert main(["bench", "--report", str(tmp_path)]) == 2
    assert "broken.json: expected a whole results file, got a part" in capsys.readouterr().err

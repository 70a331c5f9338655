"""Numbers reach the README only from a committed results file."""

import json
from pathlib import Path
from typing import Any

import evidence
import pytest
import report

ENCODE = {
    "ratio": 1.7,
    "ratio_low": 1.6,
    "ratio_high": 1.8,
    "tokens_per_s": 5100.0,
    "baseline_tokens_per_s": 3000.0,
    "share_of_gemm_limit": 0.87,
    "baseline_share_of_gemm_limit": 0.51,
    "peak_bytes": 600_000_000,
    "baseline_peak_bytes": 800_000_000,
}


def result(name: str, case: str, **values: Any) -> dict[str, Any]:
    return {"name": name, "case": case, "values": values}


def rows(folder: Path) -> dict[str, list[str]]:
    lines = [line for line in report.table(folder).splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[2:5] for line in lines}


def test_without_results_every_row_says_so(tmp_path: Path) -> None:
    shown = rows(tmp_path)
    del shown["what"]
    assert len(shown) == len(report.ROWS)
    assert all(cells[1] == report.NOT_MEASURED for cells in shown.values())


def test_table_shows_what_was_written(tmp_path: Path) -> None:
    path = evidence.write(tmp_path, [result("encode", "MiniLM", **ENCODE)])
    assert path.parent.name == evidence.slug(evidence.device_name())
    shown = rows(tmp_path)
    assert shown["embed real text, MiniLM, real tokens/s"] == [
        "3,000",
        "5,100",
        "1.70 x (1.60 to 1.80)",
    ]
    assert shown["... share of the float32 GEMM limit"] == ["51%", "87%", ""]
    assert shown["... peak memory"] == ["800 MB", "600 MB", "0.75 x"]
    assert shown["`rms_norm` forward, 16384 x 768 bfloat16, GPU"][1] == report.NOT_MEASURED


def test_a_second_run_replaces_only_what_it_measured_again(tmp_path: Path) -> None:
    evidence.write(tmp_path, [result("encode", "a", x=1), result("import", "b", x=2)])
    path = evidence.write(tmp_path, [result("encode", "a", x=3)])
    document = json.loads(path.read_text(encoding="utf-8"))
    found = {(r["name"], r["case"]): r["values"]["x"] for r in document["results"]}
    assert found == {("encode", "a"): 3, ("import", "b"): 2}
    assert {"machine", "versions", "commit", "date"} <= document.keys()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_newest_result_is_shown(tmp_path: Path) -> None:
    path = evidence.write(tmp_path, [result("encode", "a", **{**ENCODE, "ratio": 9.0})])
    document = json.loads(path.read_text(encoding="utf-8"))
    document["date"] = "2000-01-01"
    document["results"][0]["values"]["ratio"] = 1.0
    path.with_name("2000-01-01.json").write_text(json.dumps(document), encoding="utf-8")
    assert rows(tmp_path)["embed real text, MiniLM, real tokens/s"][2].startswith("9.00 x")


def test_every_row_says_which_run_it_is_from(tmp_path: Path) -> None:
    path = evidence.write(tmp_path, [result("encode", "a", **ENCODE)])
    document = json.loads(path.read_text(encoding="utf-8"))
    noisy = {"added_us": 2.0, "ours_median_s": 1.0, "ours_low_s": 0.7, "ours_high_s": 1.1}
    other = result("op_call", "x, inference, cpu", **noisy) | {"commit": "b" * 40}
    document["results"].append(other)
    path.write_text(json.dumps(document), encoding="utf-8")
    lines = report.table(tmp_path).splitlines()
    ends = {line.split(" | ")[0]: line.split(" | ")[-3:] for line in lines if line[:2] == "| "}
    assert ends["| embed real text, MiniLM, real tokens/s"][2] == "1 |"
    assert ends["| checks around one `rms_norm` call, CPU"] == ["~", "17 us", "2 |"]
    assert ends["| `rms_norm` forward, 16384 x 768 bfloat16, GPU"][2] == " |"
    (second,) = (line for line in lines if line.startswith("2. Measured on "))
    assert second.endswith("commit bbbbbbbbbb.")
    assert lines[-1] == "~: quartiles more than a fifth of the median apart."


def test_of_one_day_the_later_result_is_shown(tmp_path: Path) -> None:
    path = evidence.write(tmp_path, [result("encode", "a", **{**ENCODE, "ratio": 1.0})])
    document = json.loads(path.read_text(encoding="utf-8"))
    document["results"][0] |= {"at": f"{document['date']}T23:59:59"}
    document["results"][0]["values"]["ratio"] = 9.0
    path.with_name(f"{path.stem}-3.json").write_text(json.dumps(document), encoding="utf-8")
    path.with_name(f"{path.stem}-2.json").write_text(path.read_text(), encoding="utf-8")
    assert rows(tmp_path)["embed real text, MiniLM, real tokens/s"][2].startswith("9.00 x")


def test_only_the_part_between_the_markers_changes(tmp_path: Path) -> None:
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    changed = report.with_table(readme, tmp_path)
    assert changed.startswith(f"before\n{report.BEGIN}\n| what |")
    assert changed.endswith(f"\n{report.END}\nafter\n")
    assert report.with_table(changed, tmp_path) == changed
    with pytest.raises(ValueError, match=r"README\.md: expected the markers"):
        report.with_table("no markers", tmp_path)


def test_readme_shows_the_committed_results() -> None:
    assert report.main(["--check"]) == 0


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*/*.json")), ids=lambda p: p.stem)
def test_committed_results_come_from_a_clean_commit(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["schema"] == evidence.SCHEMA
    assert all(r["clean"] and r["commit"] != "unknown" for r in document["results"])

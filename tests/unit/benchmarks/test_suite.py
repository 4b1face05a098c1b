"""The table of ratios: its rows, a row that cannot be taken, its place in a page."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, suite, table

REPO = Path(__file__).resolve().parents[3]
ROWS = [f"B{number}" for number in range(1, 13)]


def line(row: str, ratio: float, goal: float) -> dict[str, Any]:
    made = report.Row("a clip", 2.0, 2.0 * ratio, "ms", ratio, ratio - 0.5, ratio + 0.5, goal)
    return {"row": row, **report.record_of(made)}


def record(*lines: dict[str, Any], not_taken: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {"notes": [], "versions": {"torch": "2"}, "seconds": 60, "load": [1, 2]}
    benchmarks = {one["row"]: dict(found) for one in lines}
    if not_taken:
        benchmarks["B3"] = {**found, "not_taken": not_taken}
    return {"rows": list(lines), "benchmarks": benchmarks, "cores": 2, "seconds": 60}


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch", "bench", *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_row_has_its_script() -> None:
    assert [row for row in suite.BENCHMARKS if row.startswith("B")] == ROWS
    for row, entry in suite.BENCHMARKS.items():
        assert (REPO / "benchmarks" / f"{entry.module}.py").exists(), row
        assert entry.module.startswith(row.lower() if row[0] == "G" else f"b{int(row[1:]):02d}")


def test_a_pair_is_a_ratio_and_its_range() -> None:
    clock = iter(range(1000))

    def takes(ticks: int) -> None:
        for _ in range(ticks):
            next(clock)

    sides = (lambda: takes(1), lambda: takes(5))
    row = report.compare("", *sides, goal=2.5, pairs=3, clock=lambda: float(next(clock)))
    assert (row.ours, row.peer, row.ratio, row.low, row.high) == (2000.0, 6000.0, 3.0, 3.0, 3.0)
    assert row.passed
    assert not report.Row("", 1, 2, "", 2.0, 2.0, 2.0, 2.5).passed


def test_pairs_are_taken_until_their_median_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(values: Iterator[float]) -> int:
        return len(report._until_known(lambda: next(values), 5))

    assert taken(itertools.repeat(3.0)) == 5
    # One in twenty is an outlier: soon known. Alternating values: known at no number of them.
    assert 5 < taken(itertools.cycle([9.0] + [3.0] * 19)) < 20
    monkeypatch.setattr(report, "MOST_S", 0.2)
    started = time.monotonic()
    taken(itertools.cycle([3.0, 4.0]))
    assert time.monotonic() - started < 5


def test_unknown_rows_are_refused_by_name() -> None:
    done = start("B1", "B99")
    assert done.returncode == 2
    assert "there is no row B99; one of B1, B2" in done.stderr


def test_what_cannot_be_taken_says_why(tmp_path: Path) -> None:
    """B3 needs torchvision, which is not among this project's packages."""
    done = start("B3", "--json", "--out", str(tmp_path / "out.json"))
    assert done.returncode == report.NOT_TAKEN
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert "needs torchvision" in found["benchmarks"]["B3"]["not_taken"]
    assert found["rows"] == []


def script(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


def test_what_a_peer_prints_is_not_taken_for_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = ["echo '[INFO] a library says hello'", 'echo \'{"rows": [], "notes": ["taken"]}\'']
    monkeypatch.setattr(sys, "executable", script(tmp_path / "noisy", *printed))
    assert suite.measure("B1")["notes"] == ["taken"]


def test_a_script_that_falls_costs_no_other_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    falls = script(tmp_path / "falls", "echo half a line", "exit 1")
    monkeypatch.setattr(sys, "executable", falls)
    found = suite.run(["B1", "B2"])
    assert [one["not_taken"] for one in found["benchmarks"].values()] == [
        "the script ended with 1; its message is above"
    ] * 2
    assert suite.status_of(found) == report.NOT_TAKEN


def test_exit_status_of_the_table() -> None:
    assert suite.status_of(record(line("B1", 3.0, 2.0), line("B2", 3.0, 0.0))) == 0
    assert suite.status_of(record(line("B1", 3.0, 2.0), line("B2", 3.0, 4.0))) == report.MISSED
    missing = record(line("B1", 3.0, 2.0), not_taken="no GPU")
    assert suite.status_of(missing) == report.NOT_TAKEN


def test_rows_taken_at_another_time_stay() -> None:
    before = record(line("B1", 3.0, 2.0), line("B12", 1.0, 1.0))
    both = suite.joined(before, record(line("B2", 5.0, 2.0), line("B1", 4.0, 2.0)))
    assert [(one["row"], one["ratio"]) for one in both["rows"]] == [
        ("B1", 4.0),
        ("B2", 5.0),
        ("B12", 1.0),
    ]
    assert list(both["benchmarks"]) == ["B1", "B2", "B12"]
    assert both["seconds"] == 180


def test_the_table_goes_between_its_marks_and_is_checked(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(f"# Head\n{table.BEGIN}\nold\n{table.END}\nTail\n")
    measured = record(line("B1", 3.0, 2.0), line("B2", 3.0, 4.0), not_taken="no torchvision")
    results.write_text(json.dumps(measured))
    command = [sys.executable, "-m", "benchmarks.table", str(results), str(page)]

    def run(*flags: str) -> int:
        return subprocess.run([*command, *flags], cwd=REPO, check=False).returncode

    assert run("--check") == 1
    assert run() == 0
    assert run("--check") == 0
    text = page.read_text()
    assert text.startswith("# Head\n")
    assert text.endswith("Tail\n")
    assert "| B1 | TMRoPE ids: a clip | 2 ms | 6 ms | 3 (2.5 to 3.5) | 2 | yes |" in text
    assert "| 4 | **no** |" in text
    assert "B3 not taken: no torchvision." in text
    assert "old" not in text


def test_missed_goals_stand_below_the_table_with_their_cause() -> None:
    missed = [line("B5", 0.9, 0.95), line("B5", 0.8, 0.95), line("B6", 1.0, 1.5)]
    text = table.table(record(*(one | {"why": "it cannot"} for one in missed)))
    assert "- B5, a clip: 0.9 of 0.95; a clip: 0.8 of 0.95. it cannot" in text
    assert "- B6, a clip: 1 of 1.5. it cannot" in text
    assert "- B6, a clip: 1 of 1.5. The cause is not known." in table.table(
        record(line("B6", 1.0, 1.5))
    )
    assert "Goals that are missed" not in table.table(record(line("B1", 3.0, 2.0)))


def test_the_readme_has_the_table_of_its_json() -> None:
    found = json.loads((REPO / "benchmarks" / "results.json").read_text(encoding="ascii"))
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert table.replaced(readme, table.table(found)) == readme
    assert [row for row in found["benchmarks"] if row.startswith("B")] == ROWS
    assert all(one["why"] for one in found["rows"] if one["pass"] is False)


@pytest.mark.parametrize("text", ["none", f"{table.END}\n{table.BEGIN}", table.BEGIN * 2])
def test_a_page_without_marks_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="needs one line"):
        table.replaced(text, "block")

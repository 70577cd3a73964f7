"""How benchmarks find figures, keep them, and compare those of two runs; no timing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import check, docs
from benchmarks.highest_rate import highest_rate
from benchmarks.report import Better, Report, figure_line, summary, trimmed


def figure(
    values: list[float], *, better: Better = "higher", name: str = "HTTP over bare loop"
) -> dict[str, Any]:
    return summary(name, values, better, None) | {"unit": "", "ratio": True}


def run(*figures: dict[str, Any], quick: bool = False) -> dict[str, Any]:
    return {"name": "ceiling", "quick": quick, "figures": list(figures)}


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report("ceiling", "The ceiling", argparse.Namespace(quick=True, results=tmp_path))


def test_what_is_printed_is_what_is_kept(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = report.table({"canvas": "", "batch": "d", "pictures/s": ".1f"}, "Bundled")
    table.row("384 x 512", 1, 19.04)
    table.row("512 x 384", 8, None)
    report.figure("ratio", [0.97, 0.99, 0.93], better="higher", bound=0.95)
    path = report.save()

    kept = json.loads(path.read_text())
    assert path == tmp_path / "ceiling.json"
    assert kept["quick"] is True
    assert kept["tables"][0]["rows"][0] == {
        "canvas": "384 x 512",
        "batch": 1,
        "pictures/s": 19.04,
    }
    assert {"CPU", "cores", "cores by quota", "memory"} <= kept["machine"].keys()
    assert {"Python", "onnxruntime", "pillow", "commit"} <= kept["versions"].keys()
    printed = capsys.readouterr().out
    for line in (
        "| canvas | batch | images/s |",
        "| 384 x 512 | 1 | 19.0 |",
        "| 512 x 384 | 8 | - |",
        "- ratio: **0.97** (0.93 to 0.99); asked: at least 0.95: holds",
    ):
        assert line in printed.splitlines()
        assert line in kept["markdown"].splitlines()


def test_a_row_has_a_cell_for_each_column(report: Report) -> None:
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        report.table({"a": "", "b": ""}).row("x")


@pytest.mark.parametrize(
    ("values", "better", "bound", "holds"),
    [
        ([0.94, 0.95, 0.99], "higher", 0.95, True),
        ([0.94, 0.94, 0.99], "higher", 0.95, False),
        ([0.7, 0.8, 3.0], "lower", 0.8, True),
        ([0.7, 0.9, 0.9], "lower", 0.8, False),
        ([0.7], "lower", None, None),
    ],
)
def test_the_median_must_reach_the_bound(
    values: list[float], better: Better, bound: float | None, holds: bool | None
) -> None:
    assert summary("x", values, better, bound)["holds"] is holds


def test_a_missed_criterion_ends_with_status_1_and_is_kept(report: Report, tmp_path: Path) -> None:
    report.figure("ready", [2.6], better="lower", bound=2.5, unit="s", ratio=False)
    with pytest.raises(SystemExit) as ended:
        report.close()
    assert ended.value.code == 1
    kept = json.loads((tmp_path / "ceiling.json").read_text())
    line = figure_line(kept["figures"][0])
    assert line == "ready: **2.6** s; asked: at most 2.5 s: **does not hold**"


def test_a_run_that_meets_all_ends_with_status_0(report: Report) -> None:
    report.figure("ready", [2.4], better="lower", bound=2.5)
    with pytest.raises(SystemExit) as ended:
        report.close()
    assert ended.value.code == 0


def test_a_figure_without_values_is_refused(report: Report) -> None:
    with pytest.raises(ValueError, match="ratio: a figure needs at least one value"):
        report.figure("ratio", [], better="higher")


@pytest.mark.parametrize(
    ("old", "new", "better", "fell"),
    [
        # Apart by more than either spread.
        ([0.98, 1.0, 1.02], [0.88, 0.9, 0.92], "higher", True),
        ([0.7, 0.8, 0.9], [1.2, 1.3, 1.4], "lower", True),
        # Better is never worse.
        ([0.98, 1.0, 1.02], [1.18, 1.2, 1.22], "higher", False),
        ([0.7, 0.8, 0.9], [0.1, 0.2, 0.3], "lower", False),
        # The committed run saw such values itself.
        ([0.85, 1.0, 1.02], [0.88, 0.9, 0.92], "higher", False),
        # This run saw values like the committed ones.
        ([0.98, 1.0, 1.02], [0.88, 0.9, 1.01], "higher", False),
        # Beyond the spread, but by less than the margin.
        ([0.999, 1.0, 1.001], [0.98, 0.98, 0.98], "higher", False),
        # A single round says nothing of the spread: a wider margin.
        ([1.0], [0.92], "higher", False),
        ([1.0], [0.88], "higher", True),
    ],
)
def test_worse_is_beyond_the_spread(
    old: list[float], new: list[float], better: Better, fell: bool
) -> None:
    reason = check.worse(figure(old, better=better), figure(new, better=better))
    assert (reason is not None) is fell


def test_what_is_worse_is_said_in_words() -> None:
    (reason,) = check.compare(run(figure([0.98, 1.0, 1.02])), run(figure([0.88, 0.9, 0.92])))
    assert reason == (
        "ceiling: HTTP over bare loop: 0.900 (0.880 to 0.920), it was 1.000 (0.980 to 1.020); "
        "higher is better, and the two are further apart than either run's rounds"
    )


def test_a_ratio_must_not_get_lost() -> None:
    (reason,) = check.compare(run(figure([1.0])), run())
    assert reason == "ceiling: HTTP over bare loop: the new run has no such figure"
    assert check.compare(run(figure([1.0])), run(quick=True)) == []


def test_only_ratios_are_compared() -> None:
    slow = figure([1.0]) | {"ratio": False}
    assert check.compare(run(slow), run(figure([0.1]))) == []


@pytest.mark.parametrize("count", [0, 1, 3])
def test_of_few_values_none_is_left_out(count: int) -> None:
    values = [float(number) for number in range(count)]
    assert trimmed(values) == values


def test_extremes_are_left_out_at_both_ends() -> None:
    assert trimmed([9.0, 1.0, 2.0, 3.0, -5.0]) == [1.0, 2.0, 3.0]
    assert trimmed([float(number) for number in range(20)])[::15] == [2.0, 17.0]


@pytest.mark.parametrize("limit", [7.5, 8.31, 9.9])
def test_the_highest_rate_is_found_from_below(limit: float) -> None:
    found = highest_rate(
        lambda rate: rate <= limit, lambda rate: rate <= limit, maximum=10, steps=6
    )
    assert limit - 3.0 / 2**6 <= found <= limit


def test_the_long_trial_decides() -> None:
    tried: list[float] = []

    def long(rate: float) -> bool:
        tried.append(rate)
        return rate <= 8.0

    found = highest_rate(lambda rate: rate <= 9.0, long, maximum=10, steps=6)
    assert found == tried[-1] <= 8.0
    assert found > 7.7, "it goes down in small steps"


def test_a_service_that_holds_nothing_ends_the_search() -> None:
    assert highest_rate(lambda _: False, lambda _: False, maximum=10, steps=6) == 0.0


def test_the_page_shows_what_the_results_say() -> None:
    page = docs.PAGE.read_text()
    assert docs.shown(page), "nothing is shown, so nothing was tested"
    assert docs.filled(page) == page, "python benchmarks/docs.py"
    assert docs.unshown(page) == []


def test_a_page_is_filled_between_its_marks(report: Report, tmp_path: Path) -> None:
    report.figure("ratio", [0.97], better="higher")
    report.save()
    (tmp_path / "other.json").write_text("{}")
    page = "before\n<!-- results/ceiling.json -->\nold\n<!-- end -->\nafter <!-- end -->\n"
    filled = docs.filled(page, tmp_path)
    assert filled.startswith("before\n<!-- results/ceiling.json -->\n`")
    assert "- ratio: **0.97**\n<!-- end -->\nafter <!-- end -->\n" in filled
    assert "old" not in filled
    assert docs.filled(filled, tmp_path) == filled
    assert docs.unshown(page, tmp_path) == ["other"]

"""The table of an ablation, per run and per row over its seeds, as Markdown, CSV and figure."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from model_export.study.ablation import Result, Row, replace_file
from model_export.study.figures import panels, save


@dataclass(frozen=True, slots=True)
class Summary:
    """One row over its seeds, AP in points; diverged runs are left out of the figures."""

    name: str
    runs: int
    diverged: int
    mean: float | None
    """None if every run diverged."""
    deviation: float | None
    """Standard deviation over the seeds (n - 1); None of fewer than two runs."""
    least: float | None
    most: float | None
    ap50: float | None
    minutes: float
    paper: float | None
    reference: str | None
    difference: Difference | None
    """From the reference row; None without one, and of that row itself."""


@dataclass(frozen=True, slots=True)
class Difference:
    """AP of a row minus that of another with the same seed, in points."""

    mean: float
    error: float | None
    """Half the width of the 95 % interval of the mean, by Student's t; None of one seed."""
    seeds: int
    """Seeds that both rows have."""

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.1f}"
        return f"{self.mean:+.1f}{error}"


# Two-sided 95 % quantiles of Student's t by degrees of freedom; from 10 on the last one, which is
# too wide.
_STUDENT_T: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def paired(row: Sequence[Result], reference: Sequence[Result]) -> Difference | None:
    """Return the difference over the seeds that both have, without diverged runs.

    >>> def runs(*aps):
    ...     return [Result("", seed, ap, 0.0, 0.0, None) for seed, ap in enumerate(aps)]
    >>> str(paired(runs(0.30, 0.34, 0.35), runs(0.29, 0.32, 0.32)))
    '+2.0 ± 2.5'
    """
    theirs = {each.seed: each.ap for each in reference if each.diverged is None}
    own = [each for each in row if each.diverged is None and each.seed in theirs]
    points = [100 * (each.ap - theirs[each.seed]) for each in own]
    if not points:
        return None
    error = None
    if len(points) > 1:
        t = _STUDENT_T[min(len(points) - 1, len(_STUDENT_T)) - 1]
        error = t * statistics.stdev(points) / math.sqrt(len(points))
    return Difference(statistics.mean(points), error, len(points))


def summarise(rows: Sequence[Row], results: Sequence[Result]) -> list[Summary]:
    """Return each row that has a result, in the order of the rows."""
    summaries = []
    for row in rows:
        own = [result for result in results if result.row == row.name]
        if not own:
            continue
        compared = [result for result in results if result.row == row.reference]
        sound = [result for result in own if result.diverged is None]
        points = [100 * result.ap for result in sound]
        summaries.append(
            Summary(
                name=row.name,
                runs=len(own),
                diverged=len(own) - len(sound),
                mean=statistics.mean(points) if points else None,
                deviation=statistics.stdev(points) if len(points) > 1 else None,
                least=min(points, default=None),
                most=max(points, default=None),
                ap50=statistics.mean(100 * each.ap50 for each in sound) if sound else None,
                minutes=statistics.mean(each.minutes for each in sound or own),
                paper=row.paper,
                reference=row.reference,
                difference=None if row.name == row.reference else paired(own, compared),
            )
        )
    return summaries


def table(summaries: Sequence[Summary]) -> Iterator[str]:
    """Return the rows as lines of Markdown."""
    compared = any(each.reference for each in summaries)
    heads = ["row", "runs", "AP", "sd", "min to max", "AP50", "minutes", "paper's AP"]
    if compared:
        heads.insert(5, "difference")
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for each in summaries:
        runs = f"{each.runs}" + (f", {each.diverged} diverged" if each.diverged else "")
        span = f"{_points(each.least)} to {_points(each.most)}"
        cells = [each.mean, each.deviation, span, each.ap50, each.minutes, each.paper]
        if compared:
            cells.insert(3, f"{each.difference} to {each.reference}" if each.difference else "")
        yield f"| {each.name} | {runs} | {' | '.join(map(_points, cells))} |"


def write_results(results: Sequence[Result], path: Path) -> None:
    """Write one CSV line per run; AP in [0, 1]."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Result)])
    writer.writeheader()
    writer.writerows(dataclasses.asdict(result) for result in results)
    replace_file(path, text.getvalue())


def _points(value: float | str | None) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return value or "-"


def write_plot(
    title: str, summaries: Sequence[Summary], results: Sequence[Result], path: Path
) -> Path:
    """Draw a dot for every run, a bar for every row's mean and, where known, the paper's AP."""
    known = any(each.paper is not None for each in summaries)
    height = 1.2 + 0.36 * len(summaries)
    figure, axes = panels(2 if known else 1, width=6.0, height=height)
    rows = {each.name: index for index, each in enumerate(summaries)}
    ours = axes[0]
    ours.barh(list(rows.values()), [each.mean or 0.0 for each in summaries], alpha=0.35)
    for result in results:
        mark = "o" if result.diverged is None else "x"
        ours.plot([100 * result.ap], [rows[result.row]], mark, color="tab:blue", markersize=4)
    ours.set(title=title, xlabel="AP (dots: seeds, crosses: diverged)")
    if known:
        with_paper = [each for each in summaries if each.paper is not None]
        places = [rows[each.name] for each in with_paper]
        axes[1].barh(
            places, [each.paper or 0.0 for each in with_paper], color="tab:gray", alpha=0.5
        )
        axes[1].set(title="The paper, on COCO", xlabel="AP")
    for each in axes:
        each.set_yticks(list(rows.values()), list(rows), parse_math=False)
        each.set_ylim(len(rows) - 0.4, -0.6)
    return save(figure, path)

"""Figures of an evaluation as PNG: curves, scores, calibration and confusions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model_export.evaluation.coco_metrics import SCORE, Matches
from model_export.evaluation.error_analysis import Confusion
from model_export.evaluation.reliability import Reliability
from model_export.evaluation.results import EvaluationResults
from model_export.evaluation.thresholds import operating_points

_LEGEND = 12
"""So many classes fit into a legend."""
_BINS = 40
_DARK = 0.5
"""Shares above are drawn so dark that text on them is white."""


def save_plots(measured: EvaluationResults, folder: Path) -> list[Path]:
    """Draw all figures into `folder`, which is made if need be; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    matches, classes = measured.matches, tuple(map(_plain, measured.classes))
    return [
        _save(precision_recall(matches, classes), folder / "precision-recall.png"),
        _save(score_histogram(matches, classes), folder / "scores.png"),
        _save(f1_over_threshold(matches, classes), folder / "f1-threshold.png"),
        _save(reliability_diagram(measured.overall_calibration), folder / "reliability.png"),
        _save(confusion_matrix(measured.confusion, classes), folder / "confusion.png"),
    ]


def precision_recall(matches: Sequence[Matches], classes: Sequence[str]) -> Figure:
    """Precision over recall of each class at IoU 0.50."""
    figure, axes = _figure("Precision over recall at IoU 0.50", across="recall", up="precision")
    for each, name in zip(matches, classes, strict=True):
        points = operating_points(each)
        if points is not None and points.scores.size:
            axes.plot(points.recall, points.precision, label=name)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    _legend(axes)
    return figure


def f1_over_threshold(matches: Sequence[Matches], classes: Sequence[str]) -> Figure:
    """F1 of each class at IoU 0.50 over the score threshold, the best threshold named."""
    title = "F1 over the score threshold at IoU 0.50"
    figure, axes = _figure(title, across="score threshold", up="F1")
    for each, name in zip(matches, classes, strict=True):
        points = operating_points(each)
        if points is None or not points.scores.size:
            continue
        best = points.best_threshold()
        label = name if best is None else f"{name}: {best:.2f}"
        (line,) = axes.plot(points.scores, points.f1, drawstyle="steps-post", label=label)
        if best is not None:
            axes.plot([best], [points.f1.max()], marker="o", color=line.get_color())
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    _legend(axes)
    return figure


def score_histogram(matches: Sequence[Matches], classes: Sequence[str]) -> Figure:
    """How the scores of hits and of false positives at IoU 0.50 spread, class by class."""
    columns = min(3, len(classes))
    rows = -(-len(classes) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Scores of detections at IoU 0.50")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    edges = np.linspace(SCORE, 1.0, _BINS + 1)
    for axes, each, name in zip(grid, matches, classes, strict=False):
        judged = each.at_50()
        axes.hist(
            [judged.scores[judged.hits], judged.scores[~judged.hits]],
            bins=edges,
            stacked=True,
            label=["hit", "false positive"],
        )
        # Most detections at score 0.01 are false positives; a linear axis would hide the rest.
        axes.set_yscale("symlog")
        axes.set_title(f"{name}, {int(each.objects.sum())} objects", fontsize=10)
        axes.set(xlabel="score", ylabel="detections")
        # A fixed place: looking for the best one takes matplotlib seconds, and it warns of it.
        axes.legend(fontsize=8, loc="upper right")
    for axes in grid[len(classes) :]:
        axes.set_visible(False)
    return figure


def reliability_diagram(calibration: Reliability) -> Figure:
    """Precision of the detections of each score bin; on the diagonal scores mean what they say."""
    error = "-" if calibration.error is None else f"{calibration.error:.3f}"
    title = f"Precision over score at IoU 0.50, D-ECE {error}"
    figure, axes = _figure(title, across="score", up="precision")
    filled = calibration.counts > 0
    axes.bar(
        calibration.edges[:-1][filled],
        calibration.precision[filled],
        width=np.diff(calibration.edges)[filled],
        align="edge",
        edgecolor="white",
        label="precision",
    )
    scores, counts = calibration.confidence[filled], calibration.counts[filled]
    axes.plot(scores, calibration.precision[filled], "k.", label="at the mean score")
    for score, share, count in zip(scores, calibration.precision[filled], counts, strict=True):
        axes.annotate(str(count), (score, share), (0, 6), textcoords="offset points", ha="center")
    axes.plot([0, 1], [0, 1], "k--", linewidth=1, label="what the scores say")
    axes.set(xlim=(0, 1), ylim=(0, 1.1))
    axes.legend(loc="upper left")
    return figure


def confusion_matrix(confusion: Confusion, classes: Sequence[str]) -> Figure:
    """Objects by what they are and what they were detected as, coloured by share of the row."""
    side = max(4.0, 0.45 * (len(classes) + 1) + 2)
    figure, axes = _figure(
        "Confusions at IoU 0.50",
        across="detected as",
        up="labelled as",
        size=(side, side),
    )
    axes.grid(visible=False)
    shares = confusion.row_shares()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(confusion.counts):
        if count:
            colour = "white" if shares[row, column] > _DARK else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    ticks = range(len(classes) + 1)
    axes.set_xticks(ticks, [*classes, "nothing"], rotation=90)
    axes.set_yticks(ticks, [*classes, "nothing"])
    return figure


def _plain(name: str) -> str:
    """A name that matplotlib shows as it is: no formula, and not left out of legends."""
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _figure(
    title: str, *, across: str, up: str, size: tuple[float, float] = (7, 5)
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    # Not pyplot: that keeps every figure in memory and asks for a screen.
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(title=title, xlabel=across, ylabel=up)
    axes.grid(alpha=0.3)
    return figure, axes


def _legend(axes: Axes) -> None:
    named = len(axes.get_legend_handles_labels()[0])
    if 0 < named <= _LEGEND:
        axes.legend(loc="lower center")
    elif named:
        axes.legend(ncols=2, fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path

"""Figures of an evaluation: curves, scores, calibration and confusions, as PNG files or as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model_export.evaluation.coco_metrics import SCORE, Matches
from model_export.evaluation.error_analysis import Confusion
from model_export.evaluation.reliability import Reliability
from model_export.evaluation.results import EvaluationResults
from service.engine.drawing import LabelFont
from service.errors import DataError
from service.settings import ENV_PREFIX, load_settings

_LEGEND = 12
"""Number of classes that fit into a legend."""
_BINS = 40
_COLUMNS = 3
_DARK = 0.5
"""Share of a row from which on a cell is dark enough for white text."""


class PlotFont(NamedTuple):
    """The font of figures: its name in matplotlib, and which names it can write."""

    family: str
    labels: LabelFont


def open_font() -> PlotFont:
    """Return the font of FONT_FILE, or matplotlib's own.

    Raises DataError where that is no font, or one that matplotlib does not read.
    """
    file = load_settings().font_file or Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    labels = LabelFont(file)
    try:
        font_manager.fontManager.addfont(file)
        return PlotFont(font_manager.FontProperties(fname=file).get_name(), labels)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{ENV_PREFIX}FONT_FILE={file}: matplotlib cannot read it ({error}); name a TrueType "
            "or OpenType font that is not compressed, as WOFF is"
        ) from error


def save_plots(results: EvaluationResults, folder: Path, font: PlotFont) -> list[Path]:
    """Write all figures as PNG into `folder`, which is created if needed; return their paths."""
    names = [font.labels.name(results.classes, label) for label in range(len(results.classes))]
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"font.family": font.family}):
        return [
            _save(precision_recall(results, names), folder / "precision-recall.png"),
            _save(score_histogram(results.matches, names), folder / "scores.png"),
            _save(f1_over_threshold(results, names), folder / "f1-threshold.png"),
            _save(reliability_diagram(results.overall_calibration), folder / "reliability.png"),
            _save(confusion_matrix(results.confusion, names), folder / "confusion.png"),
        ]


def svg(figure: Figure) -> bytes:
    """Return a figure as SVG, its text as text."""
    target = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(target, format="svg", transparent=True)
    return target.getvalue()


def precision_recall(results: EvaluationResults, classes: Sequence[str]) -> Figure:
    """Precision over recall of each class at IoU 0.50, a dot at the file's own threshold."""
    figure, axes = _figure("Precision over recall at IoU 0.50", across="recall", up="precision")
    for label, (name, points) in enumerate(zip(classes, results.points.values(), strict=True)):
        if points is None or not points.scores.size:
            continue
        (line,) = axes.plot(points.recall, points.precision, label=_plain(name))
        threshold = results.model.metadata.thresholds.of(results.classes[label])
        precision, recall, _ = points.at(threshold)
        if precision is not None:
            axes.plot([recall], [precision], marker="o", color=line.get_color())
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    _legend(axes)
    return figure


def f1_over_threshold(results: EvaluationResults, classes: Sequence[str]) -> Figure:
    """F1 of each class at IoU 0.50 over the score threshold, a dot at the chosen threshold."""
    title = "F1 over the score threshold at IoU 0.50"
    figure, axes = _figure(title, across="score threshold", up="F1")
    chosen = None if results.chosen is None else results.chosen.thresholds
    for label, (name, points) in enumerate(zip(classes, results.points.values(), strict=True)):
        if points is None or not points.scores.size:
            continue
        threshold = None if chosen is None else chosen.of(results.classes[label])
        text = _plain(name) if threshold is None else f"{_plain(name)}: {threshold}"
        (line,) = axes.plot(points.scores, points.f1, drawstyle="steps-post", label=text)
        if threshold is not None:
            axes.plot([threshold], [points.at(threshold)[2]], marker="o", color=line.get_color())
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    _legend(axes)
    return figure


def score_histogram(matches: Sequence[Matches], classes: Sequence[str]) -> Figure:
    """Scores of hits and of false positives at IoU 0.50, class by class."""
    figure, grid = _panels(len(classes), "Scores of detections at IoU 0.50")
    edges = np.linspace(SCORE, 1.0, _BINS + 1)
    for axes, each, name in zip(grid, matches, classes, strict=True):
        at_50 = each.at_50()
        axes.hist(
            [at_50.scores[at_50.hits], at_50.scores[~at_50.hits]],
            bins=edges.tolist(),
            stacked=True,
            label=["hit", "false positive"],
        )
        # Most detections at score 0.01 are false positives; a linear axis would hide the rest.
        axes.set_yscale("symlog")
        axes.set_title(f"{_plain(name)}, {int(each.objects.sum())} objects", fontsize=10)
        axes.set(xlabel="score", ylabel="detections")
        # A fixed place: looking for the best one takes matplotlib seconds, and it warns of it.
        axes.legend(fontsize=8, loc="upper right")
    return figure


def reliability_diagram(calibration: Reliability) -> Figure:
    """Precision of the detections of each score bin; calibrated scores lie on the diagonal."""
    title = f"Precision over score at IoU 0.50, D-ECE {_error(calibration)}"
    figure, axes = _figure(title, across="score", up="precision")
    _draw_bins(axes, calibration)
    axes.legend(loc="upper left")
    return figure


def reliability_by_class(calibrations: dict[str, Reliability]) -> Figure:
    """Return a reliability diagram for each class."""
    figure, grid = _panels(len(calibrations), "Precision over score at IoU 0.50, class by class")
    for axes, (name, calibration) in zip(grid, calibrations.items(), strict=True):
        _draw_bins(axes, calibration)
        axes.set_title(f"{_plain(name)}, D-ECE {_error(calibration)}", fontsize=10)
    return figure


def confusion_matrix(confusion: Confusion, classes: Sequence[str]) -> Figure:
    """Objects by labelled and by detected class, coloured by share of the row."""
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
    names = [*map(_plain, classes), "nothing"]
    axes.set_xticks(ticks, names, rotation=90)
    axes.set_yticks(ticks, names)
    return figure


def _draw_bins(axes: Axes, calibration: Reliability) -> None:
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
    axes.plot([0, 1], [0, 1], "k--", linewidth=1, label="perfect calibration")
    axes.set(xlim=(0, 1), ylim=(0, 1.1))


def _error(calibration: Reliability) -> str:
    return "-" if calibration.error is None else f"{calibration.error:.3f}"


def _plain(name: str) -> str:
    """Return a name that matplotlib neither reads as a formula nor leaves out of legends."""
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _figure(
    title: str, *, across: str, up: str, size: tuple[float, float] = (7, 5)
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=across, ylabel=up)
    axes.grid(alpha=0.3)
    return figure, axes


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` axes in a grid."""
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    figure.suptitle(title)
    grid = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _legend(axes: Axes) -> None:
    named = len(axes.get_legend_handles_labels()[0])
    if 0 < named <= _LEGEND:
        axes.legend(loc="lower center")
    elif named:
        axes.legend(ncols=2, fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path

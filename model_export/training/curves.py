"""Training curves as images, drawn from metrics.csv alone."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def training_curves(metrics: Path, output: Path) -> None:
    """Draw losses, learning rate and AP over epochs into `output`/curves.png."""
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates, metric = figure.subplots(1, 3)
    for name in ("classification_loss", "regression_loss"):
        losses.plot(epochs, [float(row[name]) for row in rows], label=name.replace("_", " "))
    losses.set_yscale("log")
    losses.legend(loc="upper right")
    rates.plot(epochs, [float(row["lr"]) for row in rows])
    rates.set_title("learning rate", fontsize=10)
    for name in ("ap", "ap50"):
        points = [(int(row["epoch"]), float(row[name])) for row in rows if row[name]]
        metric.plot([p[0] for p in points], [p[1] for p in points], marker=".", label=name)
    if metric.lines and len(metric.lines[0].get_xdata()):
        metric.legend(loc="lower right")
    metric.set_title("validation", fontsize=10)
    for axes in (losses, rates, metric):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.savefig(output / "curves.png", dpi=110)

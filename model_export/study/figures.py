"""Helpers of the exhibits: figures without a screen, and CSV columns."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_DPI: Final = 110


def panels(count: int, *, width: float = 5.2, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` panels side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False).ravel())
    for each in axes:
        each.grid(alpha=0.3)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    return path


def write_columns(path: Path, columns: Mapping[str, Sequence[float]]) -> Path:
    """Write columns of one length as CSV, six digits each; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([f"{value:.6g}" for value in row])
    return path

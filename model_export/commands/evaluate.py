"""`retinaserve evaluate`: a model file and a labelled folder to a table, figures and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from model_export.commands.data import load, used
from model_export.comparison import Comparison, Difference, compare
from model_export.config import DataConfig
from model_export.datasets import Dataset
from model_export.evaluation import Evaluation, evaluate_file, match
from model_export.operating_points import OperatingPoints, operating_points
from service.artifact import read_artifact
from service.detector import Detections
from service.errors import DataError


def run(
    model: Path,
    *,
    data: Path,
    split: str,
    labels: Mapping[str, Any],
    device: str,
    batch_size: int | None,
    against: Path | None,
    json_file: Path | None,
    plots: Path | None,
) -> None:
    """Measure a file and print what was found. Raises RetinaserveError."""
    artifact = read_artifact(model)
    dataset = load_for(model, data, split, used(labels))
    evaluation, found = evaluate_file(model, dataset, device=device, batch_size=batch_size)
    matches = match(dataset.samples, found, dataset.classes)
    points = dict(zip(dataset.classes, map(operating_points, matches), strict=True))
    click.echo(f"{model} on {data}, split {split!r}")
    for line in table(evaluation, points):
        click.echo(line)
    answer: dict[str, Any] = {
        "model": {"name": artifact.metadata.name, "file": model.name, "sha256": artifact.sha256},
        "data": {"name": data.resolve().name, "split": split},
        "metrics": evaluation.to_dict(),
        "thresholds": {
            name: None if each is None else each.best_threshold() for name, each in points.items()
        },
    }
    if against is not None:
        other, found_by_other = _other(against, dataset, device=device, batch_size=batch_size)
        comparison = compare(dataset.samples, found, found_by_other, dataset.classes)
        for line in comparison_lines(against, comparison):
            click.echo(line)
        answer["against"] = {
            "model": {"file": against.name, "sha256": read_artifact(against).sha256},
            "metrics": other.to_dict(),
            "difference": asdict(comparison),
        }
    if plots is not None:
        from model_export.plots import save_plots

        for path in save_plots(matches, dataset.classes, plots):
            click.echo(f"wrote {path}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(answer, indent=2, allow_nan=False) + "\n")
        click.echo(f"wrote {json_file}")


def load_for(
    model: Path, data: Path, split: str, choice: DataConfig | None = None
) -> Dataset:
    """Read a split with a model file's class list. Raises DataError if the data has others."""
    classes = read_artifact(model).metadata.classes
    try:
        return load(data, split, choice, classes=classes)
    except DataError as error:
        raise DataError(f"{error} (the classes of {model} are {', '.join(classes)})") from error


def table(
    evaluation: Evaluation, points: Mapping[str, OperatingPoints | None] | None = None
) -> Iterator[str]:
    """The metrics as lines of text, with the best F1 of each class where `points` are given."""
    overall = {
        "AP": evaluation.ap,
        "AP50": evaluation.ap50,
        "AP75": evaluation.ap75,
        "small": evaluation.ap_small,
        "medium": evaluation.ap_medium,
        "large": evaluation.ap_large,
        "AR100": evaluation.ar100,
    }
    yield f"{evaluation.images} pictures, {evaluation.boxes} objects"
    yield "  ".join(f"{name:>6}" for name in overall)
    yield "  ".join(_number(value) for value in overall.values())
    yield ""
    width = max(len("class"), *(len(name) for name in evaluation.per_class))
    head = f"{'class':<{width}}  objects      AP    AP50"
    yield head if points is None else f"{head}  best F1  at score"
    for name, row in evaluation.per_class.items():
        line = f"{name:<{width}}  {row.count:>7}  {_number(row.ap)}  {_number(row.ap50)}"
        yield line if points is None else line + _best(points[name])
    if evaluation.timing is not None:
        yield ""
        yield (
            f"session alone {evaluation.timing.session:.1f} ms per picture (median, one per "
            f"call); whole pipeline {evaluation.timing.pipeline:.1f} ms per picture"
        )


def _best(points: OperatingPoints | None) -> str:
    f1 = None if points is None or not points.f1.size else float(points.f1.max())
    threshold = None if points is None else points.best_threshold()
    return f"  {_number(f1):>7}  {_number(threshold):>8}"


def comparison_lines(against: Path, comparison: Comparison) -> Iterator[str]:
    """The differences as lines of text."""
    yield ""
    yield f"minus {against}, with the 95 % interval of a paired bootstrap over pictures"
    for name, each in (("AP", comparison.ap), ("AP50", comparison.ap50)):
        yield f"{name:<5} {_difference(each)}"


def _other(
    model: Path, dataset: Dataset, *, device: str, batch_size: int | None
) -> tuple[Evaluation, list[Detections]]:
    """Evaluate another file on the same pictures; its labels become those of `dataset`."""
    classes = read_artifact(model).metadata.classes
    if set(classes) != set(dataset.classes):
        raise DataError(
            f"{model}: its classes are {', '.join(classes)}, those of the first file are "
            f"{', '.join(dataset.classes)}; only models of the same classes can be compared"
        )
    own = load(dataset.root, dataset.split, classes=classes)
    evaluation, found = evaluate_file(model, own, device=device, batch_size=batch_size)
    ours = np.array([dataset.classes.index(name) for name in classes], dtype=np.int64)
    return evaluation, [Detections(each.boxes, each.scores, ours[each.labels]) for each in found]


def _number(value: float | None) -> str:
    return f"{'-':>6}" if value is None else f"{value:>6.4f}"


def _difference(difference: Difference) -> str:
    return f"{difference.value:+.4f}  [{difference.low:+.4f}, {difference.high:+.4f}]"

"""`retinaserve evaluate`: metrics of a model file on a labelled folder, as table and files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from model_export.commands.labelled_data import data_config, load_measured
from model_export.config import DataConfig
from model_export.data.datasets import Dataset
from model_export.data.samples import ClassSelection
from model_export.evaluation.bootstrap import SEEDS_NOTE, Comparison, Difference, compare
from model_export.evaluation.coco_metrics import Evaluation, Timing
from model_export.evaluation.inference import evaluate_file
from model_export.evaluation.json_report import to_json
from model_export.evaluation.reliability import MIN_SCORE, Reliability
from model_export.evaluation.results import Baseline, EvaluationResults, describe_file, measure
from service.commands.coco_ids import CocoIds, image_names, read_ids
from service.errors import DataError, shown_list
from service.filenames import refuse_to_replace
from service.runtime.artifact import read_artifact
from service.runtime.detector import Detections


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
    report: Path | None,
    predictions: Path | None,
) -> None:
    """Evaluate a file, print the metrics and write the files. Raises RetinaserveError."""
    refuse_to_replace(
        filter(None, (json_file, report, predictions)), filter(None, (model, against, data))
    )
    choice = data_config(labels)
    dataset = load_for(model, data, split, choice)
    if against is not None:
        _check_comparable(dataset, against)
    ids = None if predictions is None else coco_ids(dataset, choice)
    draw = None if plots is None else _drawer(plots)
    measured = measure(model, dataset, device=device, batch_size=batch_size)
    click.echo(f"{model} on {data}, split {split!r}")
    for line in table(measured.evaluation, measured):
        click.echo(line)
    other = None
    if against is not None:
        other = _compare(measured, against, device=device, batch_size=batch_size)
        for line in comparison_lines(against, other.comparison):
            click.echo(line)
    for path in _write(measured, other, draw, json_file=json_file, report=report):
        click.echo(f"wrote {path}")
    if predictions is not None and ids is not None:
        click.echo(f"wrote {_write_predictions(measured, predictions, ids)}")
        if ids.unmatched:
            click.echo(
                f"note: {len(ids.unmatched)} images of the annotation file were not measured: "
                f"{shown_list(ids.unmatched)}; leave them out of a comparison (params.imgIds of "
                "pycocotools)"
            )
        for note in ids.notes:
            click.echo(f"note: {note}")


def _check_comparable(dataset: Dataset, against: Path) -> None:
    """Raise DataError where another file cannot be compared: before minutes of measuring."""
    classes = read_artifact(against).metadata.classes
    if set(classes) != set(dataset.classes):
        raise DataError(
            f"{against}: its classes are {', '.join(classes)}, those of the first file are "
            f"{', '.join(dataset.classes)}; only models of the same classes can be compared"
        )
    if not any(each.counted.any() for each in dataset.samples):
        raise DataError(
            f"--against: no object counts in the split {dataset.split!r} of {dataset.root}, where "
            "those marked difficult do not; name a split with objects"
        )


def _drawer(folder: Path) -> Callable[[EvaluationResults], list[Path]]:
    """Return what writes the figures. Raises DataError where FONT_FILE is no font for them."""
    from model_export.evaluation.plots import open_font, save_plots

    return partial(save_plots, folder=folder, font=open_font())


def _write(
    measured: EvaluationResults,
    against: Baseline | None,
    draw: Callable[[EvaluationResults], list[Path]] | None,
    *,
    json_file: Path | None,
    report: Path | None,
) -> Iterator[Path]:
    """Write the requested files; yield each path after it is written."""
    if draw is not None:
        yield from draw(measured)
    if json_file is not None:
        text = json.dumps(to_json(measured, against), indent=2, allow_nan=False)
        yield _write_text(json_file, text + "\n")
    if report is not None:
        from model_export.evaluation.html_report import render

        yield _write_text(report, render(measured, against))


def coco_ids(dataset: Dataset, choice: DataConfig) -> CocoIds:
    """Return the ids of the data set's annotation file where it is COCO's.

    In other formats an image's id is its place by file name and a category's its label, from 0.
    Raises DataError.
    """
    images = [sample.path for sample in dataset.samples]
    files = [path for path in dataset.labels if path.suffix.lower() == ".json"]
    if not files:
        by_name = sorted(images, key=lambda path: (path.name, path))
        numbers = {path: place for place, path in enumerate(by_name)}
        return CocoIds(numbers, range(len(dataset.classes)))
    if len(files) > 1:
        raise DataError(
            f"--predictions: the split {dataset.split!r} is annotated in {len(files)} files "
            f"({shown_list(image_names(files))}), whose ids may repeat; join them"
        )
    # Also of classes that are left out: their detections are written, too.
    rename = ClassSelection(remap=choice.remap).name
    ids = read_ids(files[0], dataset.classes, images, rename=rename)
    if choice.classes is not None:
        note = "of the objects, only those of --classes were measured: compare them (params.catIds)"
        ids = dataclasses.replace(ids, notes=[*ids.notes, note])
    if ids.unlisted:
        raise DataError(
            f"--predictions: {files[0]} has no entry with the file name of "
            f"{shown_list(image_names(ids.unlisted))}; write the names there as the files have "
            "them"
        )
    return ids


def _write_predictions(measured: EvaluationResults, path: Path, ids: CocoIds) -> Path:
    """Write the measured detections as COCO results."""
    rows = [
        json.dumps(row)
        for sample, found in zip(measured.dataset.samples, measured.found, strict=True)
        for row in ids.rows(sample.path, found)
    ]
    return _write_text(path, "[\n" + ",\n".join(rows) + "\n]\n")


def _write_text(path: Path, text: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: cannot be written: {reason}; name another file") from error
    return path


def load_for(model: Path, data: Path, split: str, choice: DataConfig | None = None) -> Dataset:
    """Read a split with a model file's class list. Raises DataError if the data has others."""
    classes = read_artifact(model).metadata.classes
    try:
        return load_measured(data, split, choice, classes=classes)
    except DataError as error:
        raise DataError(f"{error} (the classes of {model} are {', '.join(classes)})") from error


def table(evaluation: Evaluation, measured: EvaluationResults | None = None) -> Iterator[str]:
    """Return the metrics as lines of text; `measured` adds thresholds and calibration."""
    yield f"{evaluation.images} images, {evaluation.boxes} objects"
    for figures in _overall(evaluation):
        yield "  ".join(f"{name:>6}" for name in figures)
        yield "  ".join(_number(value) for value in figures.values())
    yield ""
    width = max(len("class"), *(len(name) for name in evaluation.per_class))
    head = f"{'class':<{width}}  objects      AP    AP50"
    yield head if measured is None else f"{head}      F1  at score   D-ECE"
    for name, row in evaluation.per_class.items():
        line = f"{name:<{width}}  {row.count:>7}  {_number(row.ap)}  {_number(row.ap50)}"
        yield line if measured is None else line + _of_class(measured, name)
    if measured is not None:
        yield ""
        yield from map(str, filter(None, [measured.chosen]))
        yield _calibration(measured.overall_calibration)
    if evaluation.timing is not None:
        yield ""
        yield _latency(evaluation.timing)


def _overall(evaluation: Evaluation) -> Iterator[dict[str, float | None]]:
    yield {
        "AP": evaluation.ap,
        "AP50": evaluation.ap50,
        "AP75": evaluation.ap75,
        "small": evaluation.ap_small,
        "medium": evaluation.ap_medium,
        "large": evaluation.ap_large,
    }
    yield {
        "AR1": evaluation.ar1,
        "AR10": evaluation.ar10,
        "AR100": evaluation.ar100,
        "small": evaluation.ar_small,
        "medium": evaluation.ar_medium,
        "large": evaluation.ar_large,
    }


def _of_class(measured: EvaluationResults, name: str) -> str:
    threshold = None if measured.chosen is None else measured.chosen.thresholds.of(name)
    error = _number(measured.calibration[name].error)
    # In full: a rounded threshold may keep other detections.
    at_score = "-" if threshold is None else str(threshold)
    return f"  {_number(measured.f1(name))}  {at_score:>8}  {error}"


def _calibration(overall: Reliability) -> str:
    if overall.error is None or overall.bias is None:
        return f"D-ECE -: no detection scores above {MIN_SCORE:g}"
    lean = "above" if overall.bias > 0 else "below"
    return (
        f"D-ECE {overall.error:.4f} of {overall.total} detections above {MIN_SCORE:g} in "
        f"{len(overall.counts)} bins; the mean score is {abs(overall.bias):.4f} {lean} precision"
    )


def _latency(timing: Timing) -> str:
    batch = f", {timing.batch:.1f} ms in batches of {timing.batch_size}"
    return (
        f"on {timing.device}: session alone {timing.session:.1f} ms per image (median, one per "
        f"call{batch if timing.batch_size > 1 else ''}); whole pipeline {timing.pipeline:.1f} ms "
        "per image"
    )


def comparison_lines(against: Path, comparison: Comparison) -> Iterator[str]:
    """Return the differences as lines of text."""
    yield ""
    yield f"minus {against}, with the 95 % interval of a paired bootstrap over images"
    figures = {"AP": comparison.ap, "AP50": comparison.ap50, "D-ECE": comparison.d_ece}
    for name, each in figures.items():
        yield f"{name:<5} {'-' if each is None else _difference(each)}"
    yield SEEDS_NOTE


def _compare(
    measured: EvaluationResults, model: Path, *, device: str, batch_size: int | None
) -> Baseline:
    """Evaluate another file on the same images; its labels become those of the first."""
    dataset = measured.dataset
    classes = read_artifact(model).metadata.classes
    theirs = np.array([classes.index(name) for name in dataset.classes], dtype=np.int64)
    own = dataclasses.replace(
        dataset,
        classes=classes,
        samples=tuple(
            dataclasses.replace(
                each, labels=theirs[each.labels], crowd_labels=theirs[each.crowd_labels]
            )
            for each in dataset.samples
        ),
    )
    evaluation, answers = evaluate_file(model, own, device=device, batch_size=batch_size)
    ours = np.array([dataset.classes.index(name) for name in classes], dtype=np.int64)
    found = [Detections(each.boxes, each.scores, ours[each.labels]) for each in answers]
    comparison = compare(dataset.samples, measured.found, found, dataset.classes)
    return Baseline(describe_file(model), evaluation, comparison)


def _number(value: float | None) -> str:
    return f"{'-':>6}" if value is None else f"{value:>6.4f}"


def _difference(difference: Difference) -> str:
    return f"{difference.value:+.4f}  [{difference.low:+.4f}, {difference.high:+.4f}]"

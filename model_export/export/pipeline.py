"""From a checkpoint to a finished model file: written, verified, measured, described."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from model_export.checkpoints import Checkpoint
from model_export.data.datasets import Dataset
from model_export.evaluation.calibration import Calibration, calibrate
from model_export.evaluation.coco_metrics import Evaluation
from model_export.evaluation.inference import detect, evaluate_file
from model_export.evaluation.thresholds import best_thresholds
from model_export.export.comparison import Row, check_loss, side_by_side
from model_export.export.graph import export, replace_weights
from model_export.export.precision import Precision, write_reduced
from model_export.export.verify import Report, verify, verify_reduced
from service.imaging.canvas import Buckets, ShortSide
from service.runtime import devices
from service.runtime.artifact import (
    Metadata,
    Metrics,
    Thresholds,
    read_artifact,
    write_checksum,
    write_metadata,
)
from service.runtime.detector import Detections, Detector

VERIFIED_IMAGES: Final = 6


@dataclass(frozen=True, slots=True)
class PrecisionOptions:
    """Options of a smaller precision."""

    precision: Precision
    images: Sequence[bytes]
    """Compressed images from which the ranges of activations are taken."""
    accepted_loss: float | None = None
    """AP in points of 100; None: the precision's own."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The result of `export_model`."""

    report: Report
    evaluation: Evaluation | None
    calibration: Calibration | None = None
    reduced: Report | None = None
    """The smaller file against the float32 one."""
    rows: Sequence[Row] = ()
    """The float32 file and the smaller one side by side."""


def export_model(
    checkpoint: Checkpoint,
    output: Path,
    *,
    name: str,
    canvas: Buckets | ShortSide | None,
    score: float | None,
    held_out: Dataset | None,
    images: Sequence[bytes],
    calibrate_on: Dataset | None = None,
    reduction: PrecisionOptions | None = None,
) -> ExportResult:
    """Write a model file, verify it on `images` and, given `held_out` data, measure it.

    With `held_out` the file says how well it detects there, and its thresholds are the ones of
    highest F1 for each class; `score` replaces these. `calibrate_on` gives data to calibrate the
    scores on, before all of that. Raises VerificationError. The file is
    moved into place at the end: if anything fails, an existing file stays unchanged.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as folder:
        draft = Path(folder) / output.name
        thresholds = Thresholds() if score is None else Thresholds(score=score)
        metadata = export(checkpoint, draft, name=name, canvas=canvas, thresholds=thresholds)
        calibration = None
        if calibrate_on is not None:
            calibration, found = _calibrate(draft, calibrate_on)
            folded = calibration.score_map.fold(checkpoint.weights)
            checkpoint = dataclasses.replace(checkpoint, weights={**checkpoint.weights, **folded})
            metadata = _describe_calibration(metadata, calibration, calibrate_on)
            if score is None:
                metadata = _with_thresholds(metadata, calibrate_on, found)
            replace_weights(draft, folded, metadata)
        report = verify(checkpoint.build(), _open(draft), images, metadata.canvas)
        done = ExportResult(report, None, calibration)
        choose = score is None
        if reduction is None and held_out is not None:
            evaluation, found = evaluate_file(draft, held_out)
            _describe_measured(draft, held_out, evaluation, found, choose_thresholds=choose)
            done = dataclasses.replace(done, evaluation=evaluation)
        if reduction is not None:
            smaller = Path(folder) / "smaller" / output.name
            done = _reduce(done, draft, smaller, reduction, held_out, images, choose)
            draft = smaller
        draft.replace(output)
    write_checksum(output)
    return done


def _open(model: Path) -> Detector:
    return devices.open_detector(read_artifact(model), devices.Device("cpu"))


def _calibrate(model: Path, data: Dataset) -> tuple[Calibration, list[Detections]]:
    """Return a score map fitted on a file's detections, and these with calibrated scores."""
    found = detect(_open(model), data.samples, batch_size=1)
    calibration = calibrate(data.samples, found, data.classes)
    return calibration, [calibration.score_map.detections(each) for each in found]


def _describe_calibration(metadata: Metadata, calibration: Calibration, data: Dataset) -> Metadata:
    entry: dict[str, Any] = {
        "data": data.root.resolve().name,
        "split": data.split,
        "pictures": calibration.images,
        "detections": calibration.detections,
        "d_ece_before": round(calibration.before, 4),
        "d_ece_cross_validated": round(calibration.after, 4),
        "scale": dict(zip(data.classes, calibration.score_map.scales.round(4), strict=True)),
        "offset": dict(zip(data.classes, calibration.score_map.offsets.round(4), strict=True)),
    }
    provenance = {**metadata.provenance, "calibration": entry}
    return metadata.model_copy(update={"calibrated": True, "provenance": provenance})


def _with_thresholds(metadata: Metadata, data: Dataset, found: Sequence[Detections]) -> Metadata:
    """Return the thresholds of highest F1 on labelled images."""
    per_class = best_thresholds(data.samples, found, metadata.classes)
    rounded = {label: round(value, 2) for label, value in per_class.items()}
    thresholds = metadata.thresholds.model_copy(update={"per_class": rounded})
    return metadata.model_copy(update={"thresholds": thresholds})


def _describe_measured(
    model: Path,
    held_out: Dataset,
    evaluation: Evaluation,
    found: Sequence[Detections],
    *,
    choose_thresholds: bool,
) -> None:
    """Write the measured metrics into a file."""
    metadata = read_artifact(model).metadata
    if choose_thresholds:
        metadata = _with_thresholds(metadata, held_out, found)
    metrics = None
    if evaluation.ap is not None and evaluation.ap50 is not None:
        metrics = Metrics(
            dataset=held_out.root.resolve().name,
            split=held_out.split,
            ap=round(evaluation.ap, 4),
            ap50=round(evaluation.ap50, 4),
        )
    write_metadata(model, metadata.model_copy(update={"metrics": metrics}))


def _reduce(
    done: ExportResult,
    full: Path,
    smaller: Path,
    reduction: PrecisionOptions,
    held_out: Dataset | None,
    images: Sequence[bytes],
    choose_thresholds: bool,
) -> ExportResult:
    """Write, verify and measure the file of smaller precision beside the float32 one."""
    precision = reduction.precision
    write_reduced(full, smaller, precision, reduction.images)
    rule = read_artifact(full).metadata.canvas
    report = verify_reduced(_open(full), _open(smaller), images, rule)
    rows, measured = side_by_side({Precision.FP32: full, precision: smaller}, held_out, images)
    check_loss(rows[0], rows[1], reduction.accepted_loss)
    evaluation = None
    if held_out is not None:
        evaluation, found = measured[precision]
        _describe_measured(
            smaller, held_out, evaluation, found, choose_thresholds=choose_thresholds
        )
    return dataclasses.replace(done, evaluation=evaluation, reduced=report, rows=rows)

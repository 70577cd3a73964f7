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
from model_export.evaluation.coco_metrics import Evaluation, match
from model_export.evaluation.inference import detect, evaluate_file
from model_export.evaluation.thresholds import ChosenThresholds, choose_thresholds
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
    chosen: ChosenThresholds | None = None
    """The file's thresholds, where labelled images chose them."""
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
    required_inputs: bool = False,
) -> ExportResult:
    """Write a model file, verify it on `images` and, given `held_out` data, measure it.

    With `held_out` the file says how well it detects there, and its thresholds are chosen there
    as `evaluation.thresholds` says; `score` replaces them. `calibrate_on` gives data to calibrate
    the scores on, before all of that. With `required_inputs` no input of the file has a default.
    Raises VerificationError. The file is moved into place at the end: if anything fails, an
    existing file stays unchanged.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as folder:
        draft = Path(folder) / output.name
        thresholds = Thresholds() if score is None else Thresholds(score=score)
        metadata = export(
            checkpoint,
            draft,
            name=name,
            canvas=canvas,
            thresholds=thresholds,
            required_inputs=required_inputs,
        )
        calibration = chosen = None
        if calibrate_on is not None:
            calibration, found = _calibrate(draft, calibrate_on)
            folded = calibration.score_map.fold(checkpoint.weights)
            checkpoint = dataclasses.replace(checkpoint, weights={**checkpoint.weights, **folded})
            metadata = _describe_calibration(metadata, calibration, calibrate_on)
            if score is None:
                metadata, chosen = _with_thresholds(metadata, calibrate_on, found)
            replace_weights(draft, folded, metadata)
        report = verify(checkpoint.build(), _open(draft), images, metadata.canvas)
        done = ExportResult(report, None, calibration, chosen)
        choose = score is None
        if reduction is None and held_out is not None:
            evaluation, found = evaluate_file(draft, held_out)
            again = _describe_measured(draft, held_out, evaluation, found, choose=choose)
            done = dataclasses.replace(done, evaluation=evaluation, chosen=again or chosen)
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


def _with_thresholds(
    metadata: Metadata, data: Dataset, found: Sequence[Detections]
) -> tuple[Metadata, ChosenThresholds | None]:
    """Choose the thresholds on labelled images; without a detection that hits they stay."""
    matches = match(data.samples, found, metadata.classes)
    chosen = choose_thresholds(data.samples, matches, metadata.classes)
    if chosen is None:
        return metadata, None
    own = chosen.thresholds
    thresholds = metadata.thresholds.model_copy(
        update={"score": own.score, "per_class": own.per_class}
    )
    entry = {"data": data.root.resolve().name, "split": data.split, **chosen.to_dict()}
    provenance = {**metadata.provenance, "thresholds": entry}
    update = {"thresholds": thresholds, "provenance": provenance}
    return metadata.model_copy(update=update), chosen


def _describe_measured(
    model: Path,
    held_out: Dataset,
    evaluation: Evaluation,
    found: Sequence[Detections],
    *,
    choose: bool,
) -> ChosenThresholds | None:
    """Write the measured metrics into a file, and the thresholds that are chosen by them."""
    metadata, chosen = read_artifact(model).metadata, None
    if choose:
        metadata, chosen = _with_thresholds(metadata, held_out, found)
    metrics = None
    if evaluation.ap is not None and evaluation.ap50 is not None:
        metrics = Metrics(
            dataset=held_out.root.resolve().name,
            split=held_out.split,
            ap=round(evaluation.ap, 4),
            ap50=round(evaluation.ap50, 4),
        )
    write_metadata(model, metadata.model_copy(update={"metrics": metrics}))
    return chosen


def _reduce(
    done: ExportResult,
    full: Path,
    smaller: Path,
    reduction: PrecisionOptions,
    held_out: Dataset | None,
    images: Sequence[bytes],
    choose: bool,
) -> ExportResult:
    """Write, verify and measure the file of smaller precision beside the float32 one."""
    precision = reduction.precision
    write_reduced(full, smaller, precision, reduction.images)
    rule = read_artifact(full).metadata.canvas
    report = verify_reduced(_open(full), _open(smaller), images, rule)
    rows, measured = side_by_side({Precision.FP32: full, precision: smaller}, held_out, images)
    check_loss(rows[0], rows[1], reduction.accepted_loss)
    done = dataclasses.replace(done, reduced=report, rows=rows)
    if held_out is None:
        return done
    evaluation, found = measured[precision]
    chosen = _describe_measured(smaller, held_out, evaluation, found, choose=choose)
    return dataclasses.replace(done, evaluation=evaluation, chosen=chosen or done.chosen)

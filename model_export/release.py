"""From a checkpoint to a finished model file: written, verified, measured, described."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from model_export.checkpoints import Checkpoint
from model_export.datasets import Dataset
from model_export.evaluation import Evaluation, evaluate_file
from model_export.export import export
from model_export.operating_points import best_thresholds
from model_export.verification import Report, verify
from service import devices
from service.artifact import (
    Metadata,
    Metrics,
    Thresholds,
    read_artifact,
    write_checksum,
    write_metadata,
)
from service.canvas import Buckets, ShortSide

VERIFIED_PICTURES: Final = 6


@dataclass(frozen=True, slots=True)
class Release:
    """What came of `release`."""

    report: Report
    evaluation: Evaluation | None


def release(
    checkpoint: Checkpoint,
    output: Path,
    *,
    name: str,
    canvas: Buckets | ShortSide | None,
    score: float | None,
    held_out: Dataset | None,
    pictures: Sequence[bytes],
) -> Release:
    """Write a model file, verify it on `pictures` and, given `held_out` data, measure it.

    With `held_out` the file says how well it detects there, and its thresholds are the ones of
    highest F1 for each class; `score` replaces these. Raises VerificationError. The file comes to
    its place when all of this is done: whatever fails, a file that was there stays as it was.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as folder:
        draft = Path(folder) / output.name
        thresholds = Thresholds() if score is None else Thresholds(score=score)
        metadata = export(checkpoint, draft, name=name, canvas=canvas, thresholds=thresholds)
        detector = devices.open_detector(read_artifact(draft), devices.Device("cpu"))
        report = verify(checkpoint.build(), detector, pictures, metadata.canvas)
        evaluation = None
        if held_out is not None:
            evaluation = _measure(draft, metadata, held_out, choose_thresholds=score is None)
        draft.replace(output)
    write_checksum(output)
    return Release(report, evaluation)


def _measure(
    model: Path, metadata: Metadata, held_out: Dataset, *, choose_thresholds: bool
) -> Evaluation:
    """Evaluate a file and write the answer into it."""
    evaluation, found = evaluate_file(model, held_out)
    thresholds = metadata.thresholds
    if choose_thresholds:
        per_class = best_thresholds(held_out.samples, found, metadata.classes)
        rounded = {label: round(value, 2) for label, value in per_class.items()}
        thresholds = thresholds.model_copy(update={"per_class": rounded})
    metrics = Metrics(
        dataset=held_out.root.resolve().name,
        split=held_out.split,
        ap=round(evaluation.ap or 0.0, 4),
        ap50=round(evaluation.ap50 or 0.0, 4),
    )
    write_metadata(
        model, metadata.model_copy(update={"metrics": metrics, "thresholds": thresholds})
    )
    return evaluation

"""The results of evaluating a model file, shared by table, JSON, plots and report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from model_export.data.datasets import Dataset
from model_export.evaluation.bootstrap import Comparison
from model_export.evaluation.coco_metrics import Evaluation, Matches, match
from model_export.evaluation.error_analysis import (
    Confusion,
    ImageAnalysis,
    Mistake,
    analyse,
    confusion,
    find_mistakes,
)
from model_export.evaluation.inference import evaluate_file
from model_export.evaluation.reliability import Reliability, reliability
from model_export.evaluation.thresholds import (
    ChosenThresholds,
    OperatingPoints,
    choose_thresholds,
    operating_points,
)
from service.engine import postprocessing as results
from service.runtime.artifact import Metadata, read_artifact
from service.runtime.detector import Detections


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model file, without its weights."""

    path: Path
    sha256: str
    size: int
    """Bytes."""
    metadata: Metadata


@dataclass(frozen=True)
class EvaluationResults:
    """Results of a model file on a data set; derived values are computed on first access."""

    model: ModelFile
    dataset: Dataset
    evaluation: Evaluation
    found: Sequence[Detections]
    """In original pixels, one entry per sample."""

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return self.dataset.classes

    @property
    def data_digest(self) -> str:
        """SHA-256 over file names, sizes and labels: equal for equal data."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for each in self.dataset.samples:
            digest.update(repr((each.path.name, tuple(each.size))).encode())
            for values in (each.boxes, each.labels, each.crowds, each.crowd_labels):
                digest.update(repr(values.tolist()).encode())
            if len(each.difficult) or each.annotated_areas is not None:
                digest.update(repr((each.difficult.tolist(), each.areas.tolist())).encode())
        return digest.hexdigest()

    @cached_property
    def matches(self) -> list[Matches]:
        """Of each class."""
        return match(self.dataset.samples, self.found, self.classes)

    @cached_property
    def points(self) -> dict[str, OperatingPoints | None]:
        """By class name; None where the truth has no object."""
        return dict(zip(self.classes, map(operating_points, self.matches), strict=True))

    @cached_property
    def chosen(self) -> ChosenThresholds | None:
        """The thresholds that these images choose; None where no detection hits an object."""
        return choose_thresholds(self.dataset.samples, self.matches, self.classes)

    def f1(self, name: str) -> float | None:
        """Return F1 of a class at its chosen threshold; None where it has no object."""
        points = self.points[name]
        if points is None or self.chosen is None:
            return None
        return points.at(self.chosen.thresholds.of(name))[2]

    @cached_property
    def calibration(self) -> dict[str, Reliability]:
        """By class name."""
        judged = [each.at_50() for each in self.matches]
        return {
            name: reliability(each.scores, each.hits)
            for name, each in zip(self.classes, judged, strict=True)
        }

    @cached_property
    def overall_calibration(self) -> Reliability:
        """Of the detections of all classes together."""
        judged = [each.at_50() for each in self.matches]
        return reliability(
            np.concatenate([each.scores for each in judged]),
            np.concatenate([each.hits for each in judged]),
        )

    @property
    def selection(self) -> results.Selection:
        """The file's recommended thresholds: the service's defaults."""
        return results.resolve(self.model.metadata)

    @cached_property
    def analyses(self) -> list[ImageAnalysis]:
        """Of each image, at the recommended thresholds."""
        selection = self.selection
        return [
            analyse(sample, each, selection)
            for sample, each in zip(self.dataset.samples, self.found, strict=True)
        ]

    @cached_property
    def confusion(self) -> Confusion:
        """At the recommended thresholds."""
        return confusion(self.dataset.samples, self.analyses, len(self.classes))

    @cached_property
    def mistakes(self) -> list[Mistake]:
        """At the recommended thresholds, the worst first."""
        return find_mistakes(self.dataset.samples, self.analyses)


@dataclass(frozen=True, slots=True)
class Baseline:
    """Results of another file on the same images."""

    model: ModelFile
    evaluation: Evaluation
    comparison: Comparison
    """The measured file minus this one."""


def measure(
    model: Path, dataset: Dataset, *, device: str, batch_size: int | None
) -> EvaluationResults:
    """Evaluate a model file. Raises ArtifactError, DeviceError or DataError."""
    evaluation, found = evaluate_file(model, dataset, device=device, batch_size=batch_size)
    return EvaluationResults(describe_file(model), dataset, evaluation, found)


def describe_file(model: Path) -> ModelFile:
    """Read a model file's metadata, size and hash. Raises ArtifactError."""
    artifact = read_artifact(model)
    return ModelFile(model, artifact.sha256, len(artifact.content), artifact.metadata)

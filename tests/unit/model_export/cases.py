"""Labelled images and detections made up for tests of the evaluation."""

import dataclasses
from pathlib import Path

import numpy as np

from model_export.data.datasets import Dataset
from model_export.data.samples import Sample
from model_export.evaluation.coco_metrics import coco_metrics
from model_export.evaluation.results import EvaluationResults, ModelFile
from service.imaging.canvas import Buckets, Size
from service.runtime.artifact import Metadata
from service.runtime.detector import Detections

CLASSES = ("cell", "speck")


def sample(boxes, labels, path=Path("unused.png")) -> Sample:
    """An image of 640 x 480."""
    return Sample(
        path=path,
        size=Size(480, 640),
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
    )


def detections(boxes, scores, labels) -> Detections:
    return Detections(
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        scores=np.array(scores, dtype=np.float32),
        labels=np.array(labels, dtype=np.int64),
    )


NOTHING = detections([], [], [])
EMPTY = sample([], [])


def with_crowds(truth, seed: int) -> list[Sample]:
    """The same, a region of each class laid over every other image."""
    generator = np.random.default_rng(seed)
    regions = []
    for index, each in enumerate(truth):
        count = 2 * (index % 2)
        corner = generator.uniform(0, 200, (count, 2)).astype(np.float32)
        crowds = np.concatenate([corner, corner + 160], axis=1)
        regions.append(
            dataclasses.replace(each, crowds=crowds, crowd_labels=np.arange(count, dtype=np.int64))
        )
    return regions


def with_difficult(truth, seed: int) -> list[Sample]:
    """The same, about a third of the objects marked difficult."""
    generator = np.random.default_rng(seed)
    return [
        dataclasses.replace(
            each, difficult=np.flatnonzero(generator.random(len(each.labels)) < 0.3)
        )
        for each in truth
    ]


def with_areas(truth, seed: int) -> list[Sample]:
    """The same, the objects' outlines smaller than their boxes."""
    generator = np.random.default_rng(seed)
    return [
        dataclasses.replace(
            each, annotated_areas=each.areas * generator.uniform(0.05, 1, len(each.labels))
        )
        for each in truth
    ]


def random_case(seed: int, images: int = 12):
    """Objects, and detections that are the objects shaken, some missing, some invented."""
    generator = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(images):
        count = int(generator.integers(0, 7))
        corner = generator.uniform(0, 300, (count, 2))
        boxes = np.concatenate([corner, corner + generator.uniform(10, 180, (count, 2))], axis=1)
        labels = generator.integers(0, len(CLASSES), count)
        truth.append(sample(boxes, labels))
        kept = generator.random(count) < 0.8
        # At most 9 in both corners together, so that no box of 10 turns inside out.
        shaken = boxes[kept] + generator.normal(0, 8, (int(kept.sum()), 4)).clip(-4.5, 4.5)
        invented = generator.uniform(0, 200, (2, 2))
        every = np.concatenate([shaken, np.concatenate([invented, invented + 40], axis=1)])
        scores = generator.uniform(0.01, 1, len(every))
        order = np.argsort(-scores)
        all_labels = np.concatenate([labels[kept], generator.integers(0, len(CLASSES), 2)])
        found.append(detections(every[order], scores[order], all_labels[order]))
    return truth, found


def model_file(classes=CLASSES, *, name="made-up", **metadata) -> ModelFile:
    return ModelFile(
        path=Path(f"{name}.onnx"),
        sha256="0" * 64,
        size=1_000_000,
        metadata=Metadata(
            name=name,
            classes=classes,
            canvas=Buckets(sizes=(Size(96, 128),)),
            **metadata,
        ),
    )


def measurement(truth, found, classes=CLASSES, model=None) -> EvaluationResults:
    """What an evaluation finds, without a model and without timings."""
    return EvaluationResults(
        model=model or model_file(classes),
        dataset=Dataset(Path("made-up-data"), "val", tuple(classes), tuple(truth), ()),
        evaluation=coco_metrics(truth, found, classes),
        found=found,
    )

"""The bundled model was trained on photographs alone; it has to find drawn cells all the same."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest

from service.engine.postprocessing import resolve as resolve_selection
from service.engine.postprocessing import select
from service.imaging.decode import prepare
from service.imaging.samples import PLATELET, RED, WHITE, draw_smear, sample_jpeg
from service.runtime.artifact import read_artifact, scan_repository
from service.runtime.detector import Detections, Detector
from service.runtime.devices import open_detector, resolve
from service.settings import bundled_models
from tests.matching import found


@pytest.fixture(scope="module")
def detector() -> Detector:
    newest = max(scan_repository(bundled_models()), key=lambda entry: entry.version)
    return open_detector(read_artifact(newest.path), resolve("cpu").devices[0])


def detect(detector: Detector, image: bytes) -> Detections:
    """As the service does, at the model's own thresholds."""
    metadata = detector.metadata
    prepared = prepare(image, metadata.canvas)
    selection = resolve_selection(metadata)
    [raw] = detector(
        prepared.canvas[None],
        np.array([prepared.letterbox.resized]),
        score_threshold=selection.lowest_score,
        iou_threshold=selection.iou,
    )
    return select(raw, prepared.letterbox, selection)


def test_bundled_model_finds_drawn_cells(detector: Detector) -> None:
    classes = detector.metadata.classes
    drawn = hits = seen = 0
    for seed in range(12):
        image, cells = draw_smear(seed, platelets=3)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        detections = detect(detector, file.getvalue())
        drawn += len(cells)
        hits += found(cells, detections, classes)
        seen += len(detections)
    assert hits / drawn >= 0.95
    assert hits / seen >= 0.85


def test_bundled_model_counts_the_sample(detector: Detector) -> None:
    detections = detect(detector, sample_jpeg())
    counts = Counter(detector.metadata.classes[label] for label in detections.labels)
    assert counts == {RED: 13, WHITE: 1, PLATELET: 3}

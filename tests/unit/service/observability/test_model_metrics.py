"""The series of model versions."""

from __future__ import annotations

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.observability.model_metrics import ModelKey, ModelMetrics
from service.observability.record import Stages

STAGES = Stages(0.001, 0.002, 0.004, 0.008)


def series(metrics: ModelMetrics) -> dict[tuple[str, frozenset[str]], float]:
    registry = CollectorRegistry()
    registry.register(metrics)
    text = generate_latest(registry).decode()
    return {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metric_series_exist_from_load_to_unload() -> None:
    metrics = ModelMetrics()
    loaded = {ModelKey("cells", 1): ("RBC", "WBC")}
    metrics.watch(loaded.items)
    name = "retinaserve_detections_total"
    assert series(metrics)[name, frozenset({"cells", "1", "WBC"})] == 0

    cells = metrics.of(ModelKey("cells", 1), ("RBC", "WBC"))
    found = np.array([1, 1, 0]), np.array([0.9, 0.8, 0.7], dtype=np.float32)
    cells.observe_image(STAGES, *found)
    after = series(metrics)
    assert after[name, frozenset({"cells", "1", "WBC"})] == 2
    assert after["retinaserve_detection_score_count", frozenset({"cells", "1"})] == 3
    assert after["retinaserve_detection_score_bucket", frozenset({"cells", "1", "0.75"})] == 1
    # The sum of the stages is a stage of its own.
    stage = "retinaserve_stage_seconds_sum"
    assert round(after[stage, frozenset({"cells", "1", "total"})], 6) == 0.015

    loaded.clear()
    loaded[ModelKey("cells", 2)] = ("RBC",)
    # An image of the old version comes to its end after the version has gone.
    metrics.of(ModelKey("cells", 1), ("RBC", "WBC")).count("answered")
    labels = frozenset.union(*(labels for _, labels in series(metrics)))
    assert "2" in labels
    assert not {"1", "WBC"} & labels


def test_metric_series_restart_with_other_classes() -> None:
    metrics = ModelMetrics()
    metrics.of(ModelKey("cells", 1), ("RBC",)).count("answered")
    assert metrics.of(ModelKey("cells", 1), ("RBC",)) is metrics.of(ModelKey("cells", 1), ("RBC",))
    metrics.of(ModelKey("cells", 1), ("RBC", "WBC"))
    name = "retinaserve_pictures_total"
    assert series(metrics)[name, frozenset({"cells", "1", "answered"})] == 0


def test_image_without_detections_is_counted() -> None:
    metrics = ModelMetrics()
    empty = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    metrics.of(ModelKey("cells", 1), ("RBC",)).observe_image(STAGES, *empty)
    found = series(metrics)
    name = "retinaserve_detections_per_picture_bucket"
    assert found[name, frozenset({"cells", "1", "0.0"})] == 1
    assert found["retinaserve_detection_score_count", frozenset({"cells", "1"})] == 0

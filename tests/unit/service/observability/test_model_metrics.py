"""The tables behind a model's metrics."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.observability.model_metrics import Bins, ModelKey, ModelMetricsCollector
from service.observability.record import Stages

BOUNDS = (0.25, 0.5, 1.0)
STAGES = Stages(0.001, 0.002, 0.004, 0.008)


def series(collector: ModelMetricsCollector) -> dict[tuple[str, frozenset[str]], float]:
    registry = CollectorRegistry()
    registry.register(collector)
    text = generate_latest(registry).decode()
    return {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 1.0, 1.5]), max_size=30))
def test_counting_at_once_is_counting_one_by_one(values: list[float]) -> None:
    one_by_one, at_once = Bins(BOUNDS), Bins(BOUNDS)
    for value in values:
        one_by_one.add(value)
    at_once.add_all(np.array(values, dtype=np.float64))
    buckets, total = at_once.read()
    assert (buckets, round(total, 6)) == (one_by_one.read()[0], round(sum(values), 6))
    # Prometheus counts a value that equals a bound below it.
    expected = [sum(value <= bound for value in values) for bound in BOUNDS]
    assert [count for _, count in buckets] == [*expected, len(values)]
    assert [name for name, _ in buckets] == ["0.25", "0.5", "1.0", "+Inf"]


def test_series_begin_at_zero_and_end_with_their_model() -> None:
    collector = ModelMetricsCollector()
    loaded = {ModelKey("cells", 1): ("RBC", "WBC")}
    collector.watch(loaded.items)
    name = "retinaserve_detections_total"
    assert series(collector)[name, frozenset({"cells", "1", "WBC"})] == 0

    numbers = collector.of("cells", 1, ("RBC", "WBC"))
    found = np.array([1, 1, 0]), np.array([0.9, 0.8, 0.7], dtype=np.float32)
    numbers.observe_image(STAGES, *found)
    after = series(collector)
    assert after[name, frozenset({"cells", "1", "WBC"})] == 2
    assert after["retinaserve_detection_score_count", frozenset({"cells", "1"})] == 3
    assert after["retinaserve_detection_score_bucket", frozenset({"cells", "1", "0.75"})] == 1
    # The sum of the stages is a stage of its own.
    stage = "retinaserve_stage_seconds_sum"
    assert round(after[stage, frozenset({"cells", "1", "total"})], 6) == 0.015

    loaded.clear()
    loaded[ModelKey("cells", 2)] = ("RBC",)
    # An image of the old version comes to its end after the version has gone.
    collector.of("cells", 1, ("RBC", "WBC")).count("answered")
    labels = frozenset.union(*(labels for _, labels in series(collector)))
    assert "2" in labels
    assert not {"1", "WBC"} & labels


def test_another_file_under_the_same_version_begins_anew() -> None:
    collector = ModelMetricsCollector()
    collector.of("cells", 1, ("RBC",)).count("answered")
    assert collector.of("cells", 1, ("RBC",)) is collector.of("cells", 1, ("RBC",))
    collector.of("cells", 1, ("RBC", "WBC"))
    name = "retinaserve_pictures_total"
    assert series(collector)[name, frozenset({"cells", "1", "answered"})] == 0


def test_a_image_without_objects_counts_too() -> None:
    collector = ModelMetricsCollector()
    empty = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    collector.of("cells", 1, ("RBC",)).observe_image(STAGES, *empty)
    found = series(collector)
    name = "retinaserve_detections_per_picture_bucket"
    assert found[name, frozenset({"cells", "1", "0.0"})] == 1
    assert found["retinaserve_detection_score_count", frozenset({"cells", "1"})] == 0

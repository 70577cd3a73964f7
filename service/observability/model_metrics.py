"""Counters and histograms of each model version.

A version's series begin at zero when it is loaded, so that a rate is right from the first event on,
and end when it is unloaded.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from service.observability.record import Stages

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SCORES: Final = tuple(round(step / 20, 2) for step in range(1, 21))
_PER_IMAGE: Final = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_STAGES: Final = (*Stages._fields, "total")

Outcome = Literal["answered", "refused", "rejected", "late", "cancelled", "failed"]


class ModelKey(NamedTuple):
    """A model version."""

    name: str
    version: int


Loaded = Callable[[], Iterable[tuple[ModelKey, tuple[str, ...]]]]
"""Returns the loaded versions and their classes."""


class ModelSeries:
    """The series of one model version. Thread-safe."""

    def __init__(self, metrics: ModelMetrics, key: ModelKey, classes: tuple[str, ...]) -> None:
        model = key.name, str(key.version)
        self.classes = classes
        self._outcomes = {name: metrics.images.labels(*model, name) for name in get_args(Outcome)}
        self._detections = [metrics.detections.labels(*model, name) for name in classes]
        self._stages = [metrics.stages.labels(*model, name) for name in _STAGES]
        self._batch_size = metrics.batch_size.labels(*model)
        self._scores = metrics.scores.labels(*model)
        self._per_image = metrics.per_image.labels(*model)

    def count(self, outcome: Outcome) -> None:
        """Count an image by how it ended."""
        self._outcomes[outcome].inc()

    def observe_batch(self, size: int) -> None:
        """Record one inference."""
        self._batch_size.observe(size)

    def observe_image(
        self, stages: Stages, labels: NDArray[np.int64], scores: NDArray[np.float32]
    ) -> None:
        """Record the seconds and the detections of one answered image."""
        for histogram, seconds in zip(self._stages, (*stages, stages.total), strict=True):
            histogram.observe(seconds)
        self._per_image.observe(len(labels))
        for label, count in Counts(labels.tolist()).items():
            self._detections[label].inc(count)
        for score in scores.tolist():
            self._scores.observe(score)


class ModelMetrics(Collector):
    """The metrics of all loaded versions."""

    def __init__(self) -> None:
        model = ("model", "version")
        self.images = Counter(
            "retinaserve_pictures",
            "Images that reached a model, by how they ended; all but 'refused' were admitted.",
            (*model, "outcome"),
            registry=None,
        )
        self.detections = Counter(
            "retinaserve_detections",
            "Objects in answers, by class.",
            (*model, "label"),
            registry=None,
        )
        self.stages = Histogram(
            "retinaserve_stage_seconds",
            "Seconds that an answered image spent in each stage.",
            (*model, "stage"),
            buckets=SECONDS,
            registry=None,
        )
        self.batch_size = Histogram(
            "retinaserve_batch_size",
            "Images in each inference.",
            model,
            buckets=_SIZES,
            registry=None,
        )
        self.scores = Histogram(
            "retinaserve_detection_score",
            "Scores of the objects in answers.",
            model,
            buckets=_SCORES,
            registry=None,
        )
        self.per_image = Histogram(
            "retinaserve_detections_per_picture",
            "Objects in each answer.",
            model,
            buckets=_PER_IMAGE,
            registry=None,
        )
        self._families = (
            self.images,
            self.detections,
            self.stages,
            self.batch_size,
            self.scores,
            self.per_image,
        )
        self._series: dict[ModelKey, ModelSeries] = {}
        self._loaded: Loaded | None = None

    def watch(self, loaded: Loaded) -> None:
        """Show the series of the versions that `loaded` returns, and of no other."""
        self._loaded = loaded

    def of(self, key: ModelKey, classes: tuple[str, ...]) -> ModelSeries:
        """Return the series of a version; other classes than before begin new ones."""
        series = self._series.get(key)
        if series is not None and series.classes != classes:
            self._remove(key)
            series = None
        if series is None:
            # Two threads that come here at once get the same one.
            series = self._series.setdefault(key, ModelSeries(self, key, classes))
        return series

    def collect(self) -> Iterable[Metric]:
        """Return the samples of the versions that are loaded now."""
        if self._loaded is not None:
            loaded = dict(self._loaded())
            for key in self._series.keys() - loaded.keys():
                self._remove(key)
            for key, classes in loaded.items():
                self.of(key, classes)
        return chain.from_iterable(family.collect() for family in self._families)

    def _remove(self, key: ModelKey) -> None:
        self._series.pop(key, None)
        for family in self._families:
            family.remove_by_labels({"model": key.name, "version": str(key.version)})

"""What is counted of each model version: small tables of numbers, made into metrics when asked.

The series of a version come and go with it: none outlives its model, and each begins at zero as
soon as the model is loaded, so that a rate is right from the first event on.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from service.observability.record import Stages

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SCORES: Final = tuple(round(step / 20, 2) for step in range(1, 21))
_PER_IMAGE: Final = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_FEW: Final = 40
"""Up to so many values one after the other is faster than numpy."""
_STAGES: Final = (*Stages._fields, "total")

Outcome = Literal["answered", "refused", "rejected", "late", "cancelled", "failed"]
OUTCOMES: Final[tuple[Outcome, ...]] = (
    "answered", "refused", "rejected", "late", "cancelled", "failed",
)  # fmt: skip


class ModelKey(NamedTuple):
    """Which model version."""

    name: str
    version: int


class Bins:
    """A histogram."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: the largest value of each bin, rising; one more bin takes what is above."""
        self._bounds = bounds
        self._names = [*(str(float(bound)) for bound in bounds), "+Inf"]
        self._array = np.asarray(bounds, dtype=np.float64)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_all(self, values: NDArray[np.floating]) -> None:
        """Count many values at once."""
        if len(values) <= _FEW:
            counts, bounds = self._counts, self._bounds
            for value in values.tolist():
                counts[bisect_left(bounds, value)] += 1
                self._sum += value
            return
        found = np.bincount(np.searchsorted(self._array, values), minlength=len(self._counts))
        for index in found.nonzero()[0].tolist():
            self._counts[index] += int(found[index])
        self._sum += float(values.sum(dtype=np.float64))

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts under their bounds, as Prometheus writes them, and the sum."""
        return list(zip(self._names, accumulate(self._counts), strict=True)), self._sum


Counters = dict[Literal["pictures", "detections"], CounterMetricFamily]
Histograms = dict[Literal["stages", "batch_size", "scores", "per_picture"], HistogramMetricFamily]


class ModelMetrics:
    """The numbers of one model version. Any thread."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self._lock = threading.Lock()
        self._outcomes = dict.fromkeys(OUTCOMES, 0)
        self._stages = {name: Bins(SECONDS) for name in _STAGES}
        self._batch_size = Bins(_SIZES)
        self._scores = Bins(_SCORES)
        self._per_image = Bins(_PER_IMAGE)
        self._detections = [0] * len(classes)

    def count(self, outcome: Outcome) -> None:
        """Count an image that ended in some way."""
        with self._lock:
            self._outcomes[outcome] += 1

    def observe_batch(self, size: int) -> None:
        """Record one inference."""
        with self._lock:
            self._batch_size.add(size)

    def observe_image(
        self, stages: Stages, labels: NDArray[np.int64], scores: NDArray[np.float32]
    ) -> None:
        """Record the seconds and the objects of one answered image."""
        with self._lock:
            for name, seconds in zip(_STAGES, (*stages, stages.total), strict=True):
                self._stages[name].add(seconds)
            self._per_image.add(len(labels))
            self._scores.add_all(scores)
            for label in labels.tolist():
                self._detections[label] += 1

    def read(self, key: ModelKey, counters: Counters, histograms: Histograms) -> None:
        """Add the samples of this moment."""
        model = [key.name, str(key.version)]
        with self._lock:
            for outcome, count in self._outcomes.items():
                counters["pictures"].add_metric([*model, outcome], count)
            for label, count in zip(self.classes, self._detections, strict=True):
                counters["detections"].add_metric([*model, label], count)
            for stage, bins in self._stages.items():
                histograms["stages"].add_metric([*model, stage], *bins.read())
            histograms["batch_size"].add_metric(model, *self._batch_size.read())
            histograms["scores"].add_metric(model, *self._scores.read())
            histograms["per_picture"].add_metric(model, *self._per_image.read())


Loaded = Callable[[], Iterable[tuple[ModelKey, tuple[str, ...]]]]
"""The versions that are loaded now, with their classes."""


class ModelMetricsCollector(Collector):
    """The numbers of every loaded version."""

    def __init__(self) -> None:
        self._tables: dict[ModelKey, ModelMetrics] = {}
        self._loaded: Loaded | None = None

    def watch(self, loaded: Loaded) -> None:
        """From now on show the loaded versions alone."""
        self._loaded = loaded

    def of(self, name: str, version: int, classes: tuple[str, ...]) -> ModelMetrics:
        """The numbers of one version. They begin anew when its file was exchanged."""
        key = ModelKey(name, version)
        table = self._tables.get(key)
        if table is None or table.classes != classes:
            # Of two threads that come here at once both get the same one.
            if table is not None:
                self._tables.pop(key, None)
            table = self._tables.setdefault(key, ModelMetrics(classes))
        return table

    def collect(self) -> Iterable[Metric]:
        """The samples of this moment."""
        if self._loaded is not None:
            loaded = dict(self._loaded())
            for key, classes in loaded.items():
                self.of(*key, classes)
            for key in self._tables.keys() - loaded.keys():
                self._tables.pop(key, None)
        counters, histograms = _counters(), _histograms()
        for key, table in sorted(self._tables.items(), key=itemgetter(0)):
            table.read(key, counters, histograms)
        return [*counters.values(), *histograms.values()]


def _counters() -> Counters:
    return {
        "pictures": CounterMetricFamily(
            "retinaserve_pictures",
            "Images that reached a model, by how they ended; all but 'refused' were admitted.",
            labels=("model", "version", "outcome"),
        ),
        "detections": CounterMetricFamily(
            "retinaserve_detections",
            "Objects in answers, by class.",
            labels=("model", "version", "label"),
        ),
    }


def _histograms() -> Histograms:
    model = ("model", "version")
    return {
        "stages": HistogramMetricFamily(
            "retinaserve_stage_seconds",
            "Seconds that an answered image spent in each stage.",
            labels=(*model, "stage"),
        ),
        "batch_size": HistogramMetricFamily(
            "retinaserve_batch_size", "Images in each inference.", labels=model
        ),
        "scores": HistogramMetricFamily(
            "retinaserve_detection_score", "Scores of the objects in answers.", labels=model
        ),
        "per_picture": HistogramMetricFamily(
            "retinaserve_detections_per_picture", "Objects in each answer.", labels=model
        ),
    }

"""The Prometheus metrics of one application.

Labels come from loaded models, route templates and constants, never from a client's input, which
could fill the memory with series.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Final, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.registry import Collector

from service.errors import DeadlineExceeded, RetinaserveError, Unavailable
from service.imaging.canvas import Size
from service.observability.model_metrics import (
    SECONDS,
    ModelKey,
    ModelMetrics,
    ModelSeries,
    Outcome,
)
from service.observability.record import ImageRecord, Passage, Stages, Timing, current
from service.runtime.artifact import Metadata
from service.runtime.detector import Detections
from service.runtime.devices import Hardware

_BYTES: Final = tuple(float(4**power) for power in range(5, 15))
"""1 KiB to 256 MiB."""


class Model(Protocol):
    """A model version, as the metrics need it."""

    @property
    def name(self) -> str:
        """The name of the model."""

    @property
    def version(self) -> int:
        """The number of the version."""

    @property
    def metadata(self) -> Metadata:
        """The metadata, for its classes."""


class Metrics:
    """The metrics of one application, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.in_progress = 0
        """Requests in progress."""
        self._requests = Counter(
            "retinaserve_requests",
            "Requests by route template, method and status; 499: the client did not wait.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "retinaserve_request_seconds",
            "Seconds from the head of a request to the end of its answer.",
            ("route", "method"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._bytes = Histogram(
            "retinaserve_request_body_bytes",
            "Bytes of request bodies, of requests that had one.",
            ("route",),
            buckets=_BYTES,
            registry=self.registry,
        )
        self._refusals = Counter(
            "retinaserve_refusals",
            "Requests, and images of batches, that got an error, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self.tiles = Counter(
            "retinaserve_tiles",
            "Canvases of images that were cut into tiles.",
            registry=self.registry,
        )
        Gauge(
            "retinaserve_requests_in_progress",
            "Requests that have begun and not ended.",
            registry=self.registry,
        ).set_function(lambda: self.in_progress)
        # `labels` of prometheus_client takes longer than the counting.
        self._of_request: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._of_route: dict[str, Histogram] = {}
        self._models = ModelMetrics()
        self.registry.register(self._models)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def observe_request(
        self, route: str, method: str, status: int, *, seconds: float, body_bytes: int
    ) -> None:
        """Record a finished request. Route and method must come from bounded sets."""
        key = (route, method, status)
        children = self._of_request.get(key)
        if children is None:
            counter = self._requests.labels(route, method, status)
            children = self._of_request[key] = counter, self._seconds.labels(route, method)
        counter, histogram = children
        counter.inc()
        histogram.observe(seconds)
        if body_bytes:
            sizes = self._of_route.get(route)
            if sizes is None:
                sizes = self._of_route[route] = self._bytes.labels(route)
            sizes.observe(body_bytes)

    def count_refusal(self, error: RetinaserveError) -> None:
        """Count a request or image that failed, and add the reason to the record."""
        self.count_reason(error.reason if isinstance(error, Unavailable) else error.slug)

    def count_reason(self, reason: str) -> None:
        """Count a failure by its reason."""
        self._refusals.labels(reason).inc()
        record = current.get()
        if record is not None:
            record.reasons[reason] = None

    def count_status(self, status: int) -> None:
        """Count a failure by its HTTP status."""
        self.count_reason(HTTPStatus(status).phrase.lower().replace(" ", "-"))

    def observe_batch(self, model: Model, size: int) -> None:
        """Record one inference. Thread-safe."""
        self._of(model).observe_batch(size)

    def image(self, model: Model) -> ImageOutcome:
        """Return a context manager that counts how an image ends."""
        return ImageOutcome(self._of(model), model)

    def watch(
        self,
        *,
        hardware: Hardware,
        models: Collector,
        loaded: Callable[[], Iterable[tuple[ModelKey, tuple[str, ...]]]],
        waiting: Callable[[], int],
        held: Callable[[], int],
        bytes_held: Callable[[], int] = lambda: 0,
        wait: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Add the metrics that are read when scraped.

        `models` collects the states of the versions, `loaded` returns the loaded ones with their
        classes.
        """
        gauges: tuple[tuple[str, str, Callable[[], float]], ...] = (
            ("queue_depth", "Images that wait now.", waiting),
            (
                "pictures_held",
                "Images (of tiled ones, canvases) in the service now, from arrival to answer.",
                held,
            ),
            ("picture_bytes_held", "Bytes of those images, as they were sent.", bytes_held),
            (
                "predicted_wait_seconds",
                "How long an image that came now would wait for a device.",
                wait,
            ),
        )
        for name, text, read in gauges:
            gauge = Gauge(f"retinaserve_{name}", text, registry=self.registry)
            gauge.set_function(read)
        Info("retinaserve_device", "The device in use.", registry=self.registry).info(
            {"device": hardware.name, "fallback": hardware.fallback or ""}
        )
        Gauge(
            "retinaserve_cpu_fallback",
            "1 when DEVICE=auto found no GPU and fell back to the CPU.",
            registry=self.registry,
        ).set(hardware.fallback is not None)
        self.registry.register(models)
        self._models.watch(loaded)

    def _of(self, model: Model) -> ModelSeries:
        return self._models.of(ModelKey(model.name, model.version), model.metadata.classes)


class ImageOutcome:
    """Counts one image of a model: by its exception, or by `answered`."""

    def __init__(self, series: ModelSeries, model: Model) -> None:
        self.done = False
        self._series = series
        self._model = model
        self._started = time.monotonic()

    def __enter__(self) -> ImageOutcome:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            self._series.count(_outcome(error))
        else:
            self._series.count("answered" if self.done else "failed")

    def answered(
        self,
        found: Detections,
        timing: Timing,
        size: Size,
        passage: Passage | None,
    ) -> None:
        """Record the detections on an image of that size."""
        finished = time.monotonic()
        # The rest: selection, mapping to the image, writing, the switch to the event loop.
        rest = max(0.0, finished - self._started - sum(timing))
        stages = Stages(*timing, rest)
        self._series.observe_image(stages, found.labels, found.scores)
        self.done = True
        record = current.get()
        if record is not None:
            record.images.append(
                ImageRecord(
                    self._model.name,
                    self._model.version,
                    size.width,
                    size.height,
                    len(found),
                    stages,
                    finished,
                    passage,
                )
            )


def _outcome(error: BaseException) -> Outcome:
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    if isinstance(error, Unavailable):
        return "refused"
    if isinstance(error, DeadlineExceeded):
        return "late"
    if isinstance(error, RetinaserveError) and error.status < HTTPStatus.INTERNAL_SERVER_ERROR:
        return "rejected"
    return "failed"

"""The metrics of one application, for Prometheus to scrape.

Labels come from loaded models, route templates and words of our own, never from what a client
sent: otherwise anybody could fill the memory with series.
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
from service.observability.record import Passage, Seen, Stages, Timing, current
from service.runtime.artifact import Metadata
from service.runtime.detector import Detections
from service.runtime.devices import Hardware

_BYTES: Final = tuple(float(4**power) for power in range(5, 15))
"""1 KiB to 256 MiB."""


class Model(Protocol):
    """What the metrics say of a model version."""

    @property
    def name(self) -> str:
        """Of the model."""

    @property
    def version(self) -> int:
        """Its number."""

    @property
    def metadata(self) -> Metadata:
        """Its classes above all."""


class Metrics:
    """The metrics of one application, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.in_progress = 0
        """Requests that have begun and not ended."""
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
        # `labels` of prometheus_client costs more than the counting itself.
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
        """Record one request that is over. Route and method must come from a bounded set."""
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
        """Count one request or image that got an error, and note why in its record."""
        self.count_reason(error.reason if isinstance(error, Unavailable) else error.slug)

    def count_reason(self, reason: str) -> None:
        """As `count_refusal`, where there is no error but a word of our own."""
        self._refusals.labels(reason).inc()
        record = current.get()
        if record is not None:
            record.reasons[reason] = None

    def count_status(self, status: int) -> None:
        """As `count_reason`, where nothing is known but the HTTP status."""
        self.count_reason(HTTPStatus(status).phrase.lower().replace(" ", "-"))

    def observe_batch(self, model: Model, size: int) -> None:
        """Record one inference. Any thread."""
        self._of(model).observe_batch(size)

    def image(self, model: Model) -> Watched:
        """Count how an image ends that is handed to a model; an exception tells, or `answered`."""
        return Watched(self._of(model), model)

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
        """Add what is read at the moment of scraping.

        `models` tells how far each version got, `loaded` which are loaded, with their classes.
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


class Watched:
    """An image on its way through a model."""

    def __init__(self, series: ModelSeries, model: Model) -> None:
        self.done = False
        self._series = series
        self._model = model
        self._started = time.monotonic()

    def __enter__(self) -> Watched:
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
        """Record what an image of that size gave."""
        finished = time.monotonic()
        # What is left: choosing, mapping to the image, writing, the way back to the event loop.
        rest = max(0.0, finished - self._started - sum(timing))
        stages = Stages(*timing, rest)
        self._series.observe_image(stages, found.labels, found.scores)
        self.done = True
        record = current.get()
        if record is not None:
            record.images.append(
                Seen(
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

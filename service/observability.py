"""What an operator sees: metrics, log lines, and the request id that ties them together."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable
from typing import Final

import orjson
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
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.devices import Hardware
from service.errors import RetinaserveError, Unavailable
from service.registry import Registry
from service.request_id import request_id

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_STAGES: Final = ("decode", "queue", "inference", "total")


class Metrics:
    """The metrics of one application, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "retinaserve_requests",
            "HTTP requests by route template, method and status.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        stages = Histogram(
            "retinaserve_stage_seconds",
            "Time that a picture spent in each stage.",
            ("stage",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._stages = [stages.labels(stage) for stage in _STAGES]
        self.batch_size = Histogram(
            "retinaserve_batch_size",
            "Pictures in each inference.",
            buckets=_SIZES,
            registry=self.registry,
        )
        self.tiles = Counter(
            "retinaserve_tiles",
            "Canvases of pictures that were cut into tiles.",
            registry=self.registry,
        )
        self._refusals = Counter(
            "retinaserve_refusals",
            "Pictures and requests that were refused, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self._detections = Counter(
            "retinaserve_detections",
            "Objects in answers, by model and class.",
            ("model", "label"),
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def observe_stages(self, decode: float, queue: float, inference: float, total: float) -> None:
        """Record the seconds of one answered picture."""
        for child, seconds in zip(self._stages, (decode, queue, inference, total), strict=True):
            child.observe(seconds)

    def count_refusal(self, error: RetinaserveError) -> None:
        """Count one request or picture that got an error."""
        reason = error.reason if isinstance(error, Unavailable) else error.slug
        self._refusals.labels(reason).inc()

    def count_detections(self, model: str, classes: tuple[str, ...], counts: list[int]) -> None:
        """Count the objects of one answer; counts[k] of class k."""
        for label, count in zip(classes, counts, strict=False):
            if count:
                self._detections.labels(model, label).inc(count)

    def watch(
        self,
        *,
        hardware: Hardware,
        registry: Registry,
        waiting: Callable[[], int],
        held: Callable[[], int],
    ) -> None:
        """Add what is read at the moment of scraping."""
        Gauge(
            "retinaserve_queue_depth", "Pictures that wait now.", registry=self.registry
        ).set_function(waiting)
        Gauge(
            "retinaserve_pictures_held",
            "Pictures (of tiled ones, canvases) in the service now, from arrival to answer.",
            registry=self.registry,
        ).set_function(held)
        Info("retinaserve_device", "The device in use.", registry=self.registry).info(
            {"device": hardware.name, "fallback": hardware.fallback or ""}
        )
        Gauge(
            "retinaserve_cpu_fallback",
            "1 when DEVICE=auto found no GPU and fell back to the CPU.",
            registry=self.registry,
        ).set(hardware.fallback is not None)
        self.registry.register(_ModelCollector(registry))


class _ModelCollector(Collector):
    """One sample for each version of each model: 1 when it is ready."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """The samples of this moment."""
        family = GaugeMetricFamily(
            "retinaserve_model_ready",
            "1 when the version can serve.",
            labels=("model", "version", "state", "sha256"),
        )
        for slot in self._registry.slots():
            family.add_metric(
                (slot.name, str(slot.version), slot.state, slot.sha256 or ""),
                float(slot.state == "ready"),
            )
        yield family


class TextFormatter(logging.Formatter):
    """Lines for people."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        stamp = _stamp(record)
        text = f"{stamp} {record.levelname:<8} [{_request_id(record)}] {record.getMessage()}"
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return text


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        line: dict[str, object] = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": _request_id(record),
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def configure_logging(log_format: str, level: str) -> None:
    """Send the lines of this process to stderr. For the command line, not for the factory."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for chatty in ("uvicorn", "python_multipart", "PIL"):
        # uvicorn reports start and stop, which the command does in one line of its own.
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.root.level))


def _stamp(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def _request_id(record: logging.LogRecord) -> str:
    return str(getattr(record, "request_id", None) or request_id.get())

"""OpenTelemetry traces, where its standard variables enable them.

A request becomes a child of the client's span (W3C trace context), and each stage of each image a
child of the request's. Stages become spans once the request is over, from recorded times, so that
no stage waits for tracing. OpenTelemetry's SDK reads the rest of its configuration from OTEL_*.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from service.observability.record import ImageRecord, Record

if TYPE_CHECKING:
    from opentelemetry.propagators.textmap import TextMapPropagator
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_log = logging.getLogger("retinaserve.tracing")

INSTALL: Final = "pip install 'retinaserve[otel]'"
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL: Final = "http/protobuf"


class _Stage(NamedTuple):
    """A stage as a span."""

    name: str
    begin: float
    end: float
    attributes: dict[str, str | int]


def asked_for(environment: Mapping[str, str]) -> bool:
    """Return whether the variables enable traces."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter:
        return exporter != "none"
    return any(environment.get(name) for name in _ENDPOINTS)


def open_tracing(environment: Mapping[str, str], *, version: str) -> Tracing | None:
    """Return tracing as the variables configure it; None without, or with a warning."""
    if not asked_for(environment):
        return None
    try:
        return _open(environment, version)
    except ImportError as error:
        _log.warning(
            "OTEL_* variables enable traces, but %s is not installed: %s",
            error.name or "OpenTelemetry",
            INSTALL,
        )
    except Exception as error:
        # The service runs without traces.
        _log.warning("traces are off: the OTEL_* variables cannot be used: %s", error)
    return None


def _open(environment: Mapping[str, str], version: str) -> Tracing:
    from opentelemetry.propagate import get_global_textmap
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = _exporter(environment)
    resource = Resource.create({SERVICE_VERSION: version})
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "retinaserve"}))
    # Closed by the drain: at exit it could wait for a dead collector.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider, exporter, get_global_textmap())


def _exporter(environment: Mapping[str, str]) -> SpanExporter:
    wanted = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp"
    if wanted == "console":
        import sys

        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        # Standard output has only the line with the address.
        return ConsoleSpanExporter(out=sys.stderr)
    if wanted != "otlp":
        raise ValueError(f"OTEL_TRACES_EXPORTER={wanted}; use otlp, console or none")
    for name in _PROTOCOLS:
        protocol = environment.get(name, _PROTOCOL)
        if protocol != _PROTOCOL:
            raise ValueError(
                f"{name}={protocol}; traces are sent as {_PROTOCOL}, which collectors accept on "
                "port 4318"
            )
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


class Tracing:
    """The spans of one application. Not thread-safe."""

    def __init__(
        self, provider: TracerProvider, exporter: SpanExporter, propagator: TextMapPropagator
    ) -> None:
        self._provider = provider
        self._exporter = exporter
        self._propagator = propagator
        self._tracer = provider.get_tracer("retinaserve")
        self._wall = time.time_ns() - time.monotonic_ns()
        """Offset from the monotonic clock to the time of day."""

    def begin(self, record: Record, name: str, headers: Mapping[str, str]) -> Span:
        """Start the span of a request, with the context of its lower-case headers."""
        from opentelemetry.trace import SpanKind, format_span_id, format_trace_id

        span = self._tracer.start_span(
            name,
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            start_time=self._time(record.started),
        )
        context = span.get_span_context()
        record.trace_id = format_trace_id(context.trace_id)
        record.span_id = format_span_id(context.span_id)
        return span

    def finish(
        self, span: Span, record: Record, name: str, attributes: dict[str, Any], *, failed: bool
    ) -> None:
        """End a request's span, with the spans of its stages."""
        if span.is_recording():
            from opentelemetry.trace import Status, StatusCode, set_span_in_context

            span.update_name(name)
            span.set_attributes(attributes)
            if failed:
                span.set_status(Status(StatusCode.ERROR, ",".join(record.reasons)))
            context = set_span_in_context(span)
            for stage in _record_stages(record):
                child = self._tracer.start_span(
                    stage.name,
                    context=context,
                    attributes=stage.attributes,
                    start_time=self._time(stage.begin),
                )
                child.end(self._time(stage.end))
        span.end(self._time(time.monotonic()))

    def close(self, seconds: float) -> None:
        """Send the remaining spans within `seconds`. Blocks."""
        closer = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closer.start()
        closer.join(seconds)
        if closer.is_alive():
            _log.warning("traces were lost: the collector did not accept them within %g s", seconds)
            # Ends its retries.
            self._exporter.shutdown()

    def _time(self, moment: float) -> int:
        return self._wall + int(moment * 1e9)


def _record_stages(record: Record) -> Iterator[_Stage]:
    if record.body_finished is not None and record.body_bytes:
        yield _Stage(
            "body", record.started, record.body_finished, {"retinaserve.bytes": record.body_bytes}
        )
    for image in record.images:
        attributes: dict[str, str | int] = {
            "retinaserve.model": image.model,
            "retinaserve.version": image.version,
        }
        yield from _image_stages(image, attributes)


def _image_stages(image: ImageRecord, attributes: dict[str, str | int]) -> Iterator[_Stage]:
    """Yield the stages of an image: at recorded times, or in sequence up to its end."""
    stages, passage = image.stages, image.passage
    inference = attributes | {"retinaserve.detections": image.detections}
    if passage is None:
        begin = image.finished - stages.total
        decoded = begin + stages.decode
        inferring = decoded + stages.queue
    else:
        inference["retinaserve.batch_size"] = passage.batch_size
        begin, inferring = passage.decoding, passage.inferring
        decoded = begin + stages.decode
        yield _Stage("wait for a decoder", passage.arrived, begin, attributes)
    inferred = inferring + stages.inference
    yield _Stage("decode", begin, decoded, attributes)
    yield _Stage("queue", decoded, inferring, attributes)
    yield _Stage("inference", inferring, inferred, inference)
    yield _Stage("postprocess", inferred, max(inferred, image.finished), attributes)

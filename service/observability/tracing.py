"""Traces by OpenTelemetry, where it is installed and its standard variables ask for it.

A request becomes a span below the caller's (W3C trace context), with a span for each stage of each
image below it. Those are made from the recorded moments once the request is over, so that no
stage waits for tracing. Everything is configured by the OTEL_* variables, which OpenTelemetry's own
SDK reads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from service.observability.record import Record, Seen

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


class _Part(NamedTuple):
    """A stage as a span."""

    name: str
    begin: float
    end: float
    attributes: dict[str, str | int]


def asked_for(environment: Mapping[str, str]) -> bool:
    """Whether the variables ask for traces."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter:
        return exporter != "none"
    return any(environment.get(name) for name in _ENDPOINTS)


def open_tracing(environment: Mapping[str, str], *, version: str) -> Tracing | None:
    """Tracing as the variables ask for it; None, with a warning where it was asked for in vain."""
    if not asked_for(environment):
        return None
    try:
        return _open(environment, version)
    except ImportError as error:
        _log.warning(
            "traces are asked for by OTEL_* variables, but %s is not installed: %s",
            error.name or "OpenTelemetry",
            INSTALL,
        )
    except Exception as error:
        # A mistake in a variable is no reason not to detect.
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
    # The drain shuts it down in its own time; at exit that could take as long as a dead collector.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider, exporter, get_global_textmap())


def _exporter(environment: Mapping[str, str]) -> SpanExporter:
    wanted = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp"
    if wanted == "console":
        import sys

        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        # Standard output holds the one line with the address.
        return ConsoleSpanExporter(out=sys.stderr)
    if wanted != "otlp":
        raise ValueError(f"OTEL_TRACES_EXPORTER={wanted}; use otlp, console or none")
    for name in _PROTOCOLS:
        protocol = environment.get(name, _PROTOCOL)
        if protocol != _PROTOCOL:
            raise ValueError(
                f"{name}={protocol}; traces leave as {_PROTOCOL}, which collectors take on port "
                "4318"
            )
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


class Tracing:
    """The spans of one application. `begin` and `finish` are for one event loop."""

    def __init__(
        self, provider: TracerProvider, exporter: SpanExporter, propagator: TextMapPropagator
    ) -> None:
        self._provider = provider
        self._exporter = exporter
        self._propagator = propagator
        self._tracer = provider.get_tracer("retinaserve")
        self._wall = time.time_ns() - time.monotonic_ns()
        """What turns moments into times of day, the same for every span of a process."""

    def begin(self, record: Record, name: str, headers: Mapping[str, str]) -> Span:
        """The span of a request that begins, below the caller's; header names in lower case."""
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
        """End a request's span, with the spans of what was done for it below."""
        if span.is_recording():
            from opentelemetry.trace import Status, StatusCode, set_span_in_context

            span.update_name(name)
            span.set_attributes(attributes)
            if failed:
                span.set_status(Status(StatusCode.ERROR, ",".join(record.reasons)))
            context = set_span_in_context(span)
            for part in _parts(record):
                child = self._tracer.start_span(
                    part.name,
                    context=context,
                    attributes=part.attributes,
                    start_time=self._time(part.begin),
                )
                child.end(self._time(part.end))
        span.end(self._time(time.monotonic()))

    def close(self, seconds: float) -> None:
        """Send what is left, for at most so many seconds. Blocks."""
        closer = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closer.start()
        closer.join(seconds)
        if closer.is_alive():
            _log.warning("traces were lost: the collector did not take them in %g s", seconds)
            # Otherwise it would go on trying.
            self._exporter.shutdown()

    def _time(self, moment: float) -> int:
        return self._wall + int(moment * 1e9)


def _parts(record: Record) -> Iterator[_Part]:
    if record.body_finished is not None and record.body_bytes:
        yield _Part(
            "body", record.started, record.body_finished, {"retinaserve.bytes": record.body_bytes}
        )
    for seen in record.images:
        attributes: dict[str, str | int] = {
            "retinaserve.model": seen.model,
            "retinaserve.version": seen.version,
        }
        yield from _stages(seen, attributes)


def _stages(seen: Seen, attributes: dict[str, str | int]) -> Iterator[_Part]:
    """The stages of an image: at their real moments, or one after the other up to the end."""
    stages, passage = seen.stages, seen.passage
    inference = attributes | {"retinaserve.detections": seen.detections}
    if passage is None:
        begin = seen.finished - stages.total
        decoded = begin + stages.decode
        inferring = decoded + stages.queue
    else:
        inference["retinaserve.batch_size"] = passage.batch_size
        begin, inferring = passage.decoding, passage.inferring
        decoded = begin + stages.decode
        yield _Part("wait for a decoder", passage.arrived, begin, attributes)
    inferred = inferring + stages.inference
    yield _Part("decode", begin, decoded, attributes)
    yield _Part("queue", decoded, inferring, attributes)
    yield _Part("inference", inferring, inferred, inference)
    yield _Part("postprocess", inferred, max(inferred, seen.finished), attributes)

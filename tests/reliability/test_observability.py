"""A real server as its operator sees it: log, metrics and traces, by the tools that read them."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from tests.pictures import encoded, one_red
from tests.reliability.conftest import Process, Serve, until

GOOD = encoded(one_red())
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
STAGES = ["decode", "queue", "inference", "postprocess"]


class Receiver(ThreadingHTTPServer):
    """Takes traces as an OpenTelemetry collector does, by OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[ExportTraceServiceRequest] = []

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in self.received
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Receiver)
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Not on the tests' output."""


@contextmanager
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def attributes(span: Span) -> dict[str, Any]:
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes
    }


def children(spans: list[Span], parent: Span) -> list[Span]:
    found = [span for span in spans if span.parent_span_id == parent.span_id]
    return sorted(found, key=lambda span: span.start_time_unix_nano)


def lines(process: Process) -> list[dict[str, Any]]:
    return [json.loads(line) for line in process.log.read_text().splitlines()]


def test_a_request_in_log_metrics_and_trace(
    serve: Serve, quick_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiver() as collector:
        monkeypatch.setenv(
            "OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}"
        )
        # It is the end of the server that sends them.
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
        process = serve(quick_models, log_format="json", log_level="debug")
        with process.client() as client:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "job-1"}
            assert client.post("/v1/detect", content=GOOD, headers=headers).status_code == 200
            assert client.post("/v1/detect", content=b"").status_code == 400
            assert client.get("/%0a%1b[31m{}").status_code == 404
            text = client.get("/metrics").text
        process.terminate()
        assert process.exit_code() == 0
        _check_spans(collector)
    _check_metrics(text)
    _check_lines(lines(process))


def _check_spans(collector: Receiver) -> None:
    (resource,) = {request.resource_spans[0].SerializeToString() for request in collector.received}
    assert b"retinaserve" in resource
    served = next(span for span in collector.spans if span.parent_span_id.hex() == PARENT)
    assert (served.name, served.trace_id.hex()) == ("POST /v1/detect", TRACE)
    assert served.kind == Span.SPAN_KIND_SERVER
    assert attributes(served)["http.response.status_code"] == 200
    parts = children(collector.spans, served)
    assert [span.name for span in parts] == ["body", "wait for a decoder", *STAGES]
    by_name = {span.name: attributes(span) for span in parts}
    assert by_name["inference"]["retinaserve.model"] == "tiny"
    assert by_name["inference"]["retinaserve.version"] == 1
    assert by_name["inference"]["retinaserve.batch_size"] == 1
    moments = [served.start_time_unix_nano]
    for span in parts:
        moments += [span.start_time_unix_nano, span.end_time_unix_nano]
    moments.append(served.end_time_unix_nano)
    # The clock that they share counts in nanoseconds, seconds as float in somewhat less.
    assert all(after - before > -2_000 for before, after in pairwise(moments))
    others = [span for span in collector.spans if not span.parent_span_id]
    assert sorted(span.name for span in others) == ["POST /v1/detect", "any unmatched"]
    assert not any("/healthz" in span.name or "/readyz" in span.name for span in others)


def _check_metrics(text: str) -> None:
    families = {family.name: family for family in text_string_to_metric_families(text)}
    statuses = {
        (sample.labels["route"], sample.labels["status"]): sample.value
        for sample in families["retinaserve_requests"].samples
        if sample.name.endswith("_total") and sample.labels["method"] != "GET"
    }
    assert statuses == {
        ("/v1/detect", "200"): 1,
        ("/v1/detect", "400"): 1,
        ("unmatched", "404"): 1,
    }
    reasons = {
        sample.labels["reason"]: sample.value
        for sample in families["retinaserve_refusals"].samples
        if sample.name.endswith("_total")
    }
    assert reasons == {"malformed-image": 1, "not-found": 1}


def _check_lines(found: list[dict[str, Any]]) -> None:
    for line in found:
        assert {"time", "level", "logger", "request_id", "message"} <= set(line)
    (served,) = [line for line in found if line["request_id"] == "job-1"]
    assert (served["status"], served["model"], served["trace_id"]) == (200, "tiny", TRACE)
    probes = [line for line in found if line.get("route") == "/readyz" and line["status"] == 200]
    assert probes
    assert all(line["level"] == "debug" for line in probes)
    assert any("draining" in line["message"] for line in found)


def test_a_collector_that_never_answers_hurts_nobody(
    serve: Serve, quick_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
        process = serve(quick_models)
        with process.client() as client:
            for _ in range(5):
                assert client.post("/v1/detect", content=GOOD).status_code == 200
        process.terminate()
        assert process.exit_code() == 0
    assert "traces were lost" in process.log.read_text()


def test_a_client_that_goes_away_is_counted_as_such(serve: Serve, slow_models: Path) -> None:
    process = serve(slow_models, request_timeout_ms=600_000, log_format="json")
    head = f"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length: {len(GOOD)}\r\n\r\n".encode()

    def cancelled() -> float:
        with process.client() as client:
            text = client.get("/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("outcome") == "cancelled"
        )

    rude = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(3)]
    for connection in rude:
        connection.sendall(head + GOOD)
    with process.client() as client:
        until(lambda: "retinaserve_pictures_held 3" in client.get("/metrics").text)
    for connection in rude:
        connection.close()
    until(lambda: cancelled() == 3)
    gone = [line for line in lines(process) if line.get("status") == 499]
    assert len(gone) == 3

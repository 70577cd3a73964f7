"""A real server as its operator sees it: log, metrics and traces, by the tools that read them."""

from __future__ import annotations

import json
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from tests.images import encoded, one_red
from tests.otlp import Receiver, attributes, children, receiver
from tests.reliability.conftest import Process, Serve

GOOD = encoded(one_red())
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
STAGES = ["decode", "queue", "inference", "postprocess"]


def lines(process: Process) -> list[dict[str, Any]]:
    return [json.loads(line) for line in process.log.read_text().splitlines()]


def test_request_is_in_log_metrics_and_trace(
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


def test_unresponsive_trace_collector_delays_no_request(
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

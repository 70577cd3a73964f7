"""What a request leaves behind: Server-Timing, its log line, its counts, its trace."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.http.auth.keys import new_key
from service.observability.logs import JsonFormatter, TextFormatter
from tests import tiny_model
from tests.api.conftest import Start
from tests.api.served import served
from tests.api.test_operation import samples
from tests.images import encoded, huge_png, one_red
from tests.otlp import attributes, children, receiver

GOOD = encoded(one_red())
BODIES = {
    200: {"content": GOOD},
    400: {"content": b""},
    404: {"content": GOOD, "params": {"model": "none"}},
    413: {"content": huge_png()},
    415: {"content": b"GIF89a..."},
    422: {"content": GOOD, "params": {"score_threshold": "2"}},
    504: {"content": GOOD, "headers": {"X-Deadline-Ms": "1"}},
}


def timing(answer: httpx.Response) -> dict[str, float]:
    entries = re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"])
    return {name: float(value) for name, value in entries}


def access_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    formatter = JsonFormatter()
    return [
        json.loads(formatter.format(record))
        for record in caplog.records
        if record.name == "retinaserve.access"
    ]


@pytest.mark.parametrize("accept", ["application/json", "image/jpeg"])
async def test_server_timing_has_every_stage(client: httpx.AsyncClient, accept: str) -> None:
    answer = await client.post("/v1/detect", content=GOOD, headers={"Accept": accept})
    assert answer.headers["content-type"] == accept
    found = timing(answer)
    assert list(found) == ["body", "decode", "queue", "inference", "postprocess", "total"]
    # Each is rounded to a hundredth of a millisecond.
    assert sum(found.values()) - found["total"] <= found["total"] + 0.05
    assert found["inference"] > 0


async def test_server_timing_of_a_batch_sums_its_images(client: httpx.AsyncClient) -> None:
    files = [("files", GOOD)] * 3
    answer = await client.post("/v1/detect/batch", files=files)
    assert 'desc="sum of 3 images"' in answer.headers["server-timing"]
    assert timing(answer)["inference"] > 0
    # These begin before anything is known.
    headers = {"Accept": "application/x-ndjson"}
    answer = await client.post("/v1/detect/batch", files=files, headers=headers)
    assert "server-timing" not in answer.headers


async def test_errors_have_no_server_timing(client: httpx.AsyncClient) -> None:
    for path, content in (("/v1/detect", b""), ("/none", GOOD)):
        assert "server-timing" not in (await client.post(path, content=content)).headers


async def test_access_log_line_has_documented_fields(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="retinaserve"):
        await client.post("/v1/detect", content=GOOD)
        await client.post("/v1/detect", content=b"GIF89a...")
        await client.post("/v1/detect/batch", files=[("files", GOOD), ("files", b"")])
    good, bad, batch = access_lines(caplog)
    assert good["model"] == "tiny"
    assert (good["version"], good["pictures"], good["detections"]) == (1, 1, 1)
    assert (good["width"], good["height"], good["body_bytes"]) == (128, 96, len(GOOD))
    for name in ("body_ms", "decode_ms", "queue_ms", "inference_ms", "postprocess_ms"):
        assert 0 <= float(str(good[name])) <= float(str(good["milliseconds"])) + 0.1
    assert "reason" not in good
    assert "trace_id" not in good
    assert (bad["status"], bad["reason"]) == (415, "unsupported-media-type")
    assert "model" not in bad
    assert (batch["status"], batch["pictures"], batch["reason"]) == (200, 1, "malformed-image")


async def test_request_cannot_forge_log_lines_or_labels(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    forged = "%0A2026-01-01T00:00:00.000Z%20INFO%20%1b[31mforged"
    with caplog.at_level(logging.INFO, logger="retinaserve"):
        await client.get(f"/{forged}")
        await client.post(f"/v1/detect?model={forged}", content=GOOD)
        await client.request("FORGED", "/v1/detect")
        await client.post("/v1/detect", content=GOOD, headers={"X-Request-Id": "a b\tforged"})
    for record in caplog.records:
        line = TextFormatter().format(record)
        assert len(line.splitlines()) == 1
        assert "\x1b" not in line
    assert len(access_lines(caplog)) == 4
    text = (await client.get("/metrics")).text
    assert "forged" not in text.lower()


async def test_log_never_holds_a_key(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    key = new_key(path, "lab", admin=False)
    with caplog.at_level(logging.DEBUG):
        async with start(api_keys_file=path) as client:
            headers = {"Authorization": f"Bearer {key}"}
            assert (
                await client.post("/v1/detect", content=GOOD, headers=headers)
            ).status_code == 200
            await client.post(f"/v1/detect/{key}", content=GOOD, headers=headers)
            await client.post("/v1/detect", content=GOOD, headers={"X-API-Key": f"{key}x"})
    for formatter in (TextFormatter(), JsonFormatter()):
        lines = [formatter.format(record) for record in caplog.records if record.name != "httpx"]
        assert not any(key in line for line in lines)
    served, _, refused = access_lines(caplog)
    assert served["key"] == "lab"
    assert (refused["status"], refused["reason"]) == (401, "unauthorized")
    assert refused["route"] == "/v1/detect", "although it was refused before it was routed"


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.sampled_from(sorted(BODIES)), min_size=1, max_size=25))
def test_metrics_outcomes_add_up_to_requests(start: Start, plan: list[int]) -> None:
    async def counted() -> tuple[list[int], dict[str, Counter[str]]]:
        async with start() as client:
            answers = await asyncio.gather(
                *(client.post("/v1/detect", **BODIES[each]) for each in plan)
            )
            counts: dict[str, Counter[str]] = {}
            for (name, labels), value in (await samples(client)).items():
                for label in labels:
                    counts.setdefault(name, Counter())["=".join(label)] += int(value)
            return [answer.status_code for answer in answers], counts

    statuses, counts = asyncio.run(counted())
    requests = counts["retinaserve_requests_total"]
    by_status = Counter(f"status={status}" for status in statuses)
    assert requests["route=/v1/detect"] == len(plan)
    assert {name: requests[name] for name in by_status} == dict(by_status)
    refusals = sum(
        count
        for name, count in counts.get("retinaserve_refusals_total", Counter()).items()
        if name.startswith("reason=")
    )
    images = counts["retinaserve_pictures_total"]
    assert images["outcome=answered"] == by_status["status=200"]
    assert images["outcome=answered"] + refusals == len(plan)
    assert images["outcome=late"] <= by_status["status=504"]
    assert counts["retinaserve_request_seconds_count"]["route=/v1/detect"] == len(plan)


async def test_metrics_count_one_outcome_per_batch_image(new_client: httpx.AsyncClient) -> None:
    files = [("files", content) for content in (GOOD, b"", GOOD, b"GIF89a...", GOOD)]
    await new_client.post("/v1/detect/batch", files=files)
    found = await samples(new_client)
    outcomes = {
        dict(labels)["outcome"]: value
        for (name, labels), value in found.items()
        if name == "retinaserve_pictures_total" and value
    }
    assert outcomes == {"answered": 3, "rejected": 2}
    assert found["retinaserve_request_body_bytes_count", (("route", "/v1/detect/batch"),)] == 1
    assert found["retinaserve_requests_in_progress", ()] == 1, "the scrape itself"


async def test_metrics_label_routes_by_template(new_client: httpx.AsyncClient) -> None:
    paths = ("/static/sample.jpg", "/static/none", "/v1/models/tiny", "/v1/models/none", "/none")
    for path in paths:
        await new_client.get(path)
    routes: Counter[str] = Counter()
    for (name, labels), value in (await samples(new_client)).items():
        if name == "retinaserve_requests_total":
            routes[dict(labels)["route"]] += int(value)
    # The scrape itself is over only after it was written.
    assert routes == {"/static": 2, "/v1/models/{name}": 2, "unmatched": 1}


async def test_metrics_count_detections_and_scores(new_client: httpx.AsyncClient) -> None:
    for _ in range(2):
        await new_client.post("/v1/detect", content=GOOD)
    found = await samples(new_client)
    model = ("model", "tiny"), ("version", "1")
    assert found["retinaserve_detection_score_count", model] == 2
    assert found["retinaserve_detections_per_picture_sum", model] == 2
    assert found["retinaserve_detections_total", (("label", "green"), *model)] == 0
    (seconds,) = [
        value for (name, _), value in found.items() if name == "retinaserve_model_load_seconds"
    ]
    assert seconds > 0


async def test_unload_removes_metric_series(start: Start, tmp_path: Path) -> None:
    tiny_model.save(tmp_path, version=1)
    tiny_model.save(tmp_path, version=2)
    async with start(models_dir=tmp_path) as client:
        for version in (1, 2):
            await client.post(f"/v1/detect?version={version}", content=GOOD)
        before = await samples(client)
        client._transport.app.state.service.registry.unload("tiny", 1)  # type: ignore[attr-defined]
        after = await samples(client)

    def names(
        found: dict[tuple[str, tuple[tuple[str, str], ...]], float], version: str
    ) -> set[str]:
        return {name for name, labels in found if ("version", version) in labels}

    assert names(before, "1") == names(before, "2") == names(after, "2")
    # How far it got is still told, until its file has gone as well.
    assert names(after, "1") <= {"retinaserve_model_ready", "retinaserve_model_load_seconds"}


def test_grpc_call_leaves_log_line_metrics_and_span(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    key = new_key(tmp_path / "keys.json", "lab", admin=False)
    image = triton.InferInput("encoded_images", [1], "BYTES")
    image.set_data_from_numpy(np.array([GOOD], dtype=object))
    headers = {"traceparent": f"00-{trace}-{parent}-01", "x-api-key": key}
    with receiver() as collector, caplog.at_level(logging.INFO, logger="retinaserve"):
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        with served(repository, api_keys_file=tmp_path / "keys.json") as running:
            with triton.InferenceServerClient(running.grpc) as client:
                client.infer("tiny", [image], headers=headers)
            with running.client() as http:
                text = http.get("/metrics").text
    (call,) = [span for span in collector.spans if span.parent_span_id.hex() == parent]
    assert call.name == "inference.GRPCInferenceService/ModelInfer"
    assert attributes(call)["retinaserve.code"] == "OK"
    assert "inference" in [span.name for span in children(collector.spans, call)]
    (line,) = [each for each in access_lines(caplog) if each.get("method") == "gRPC"]
    assert (line["key"], line["model"], line["code"], line["pictures"]) == ("lab", "tiny", "OK", 1)
    route = "/inference.GRPCInferenceService/ModelInfer"
    assert f'method="gRPC",route="{route}",status="200"}} 1.0' in text

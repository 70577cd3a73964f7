"""Health, metrics, models, documentation, page, and what the log says."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from service.errors import ArtifactError, DataError, DeviceError
from service.http.admin import create_admin_app
from service.http.app import create_app
from service.http.auth.keys import new_key
from service.observability.logs import JsonFormatter, TextFormatter
from service.settings import Settings
from tests import tiny_model
from tests.api.conftest import Start, running
from tests.images import RED, encoded, one_red, squares


async def samples(
    client: httpx.AsyncClient,
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = (await client.get("/metrics")).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_health_probes_report_ready(client: httpx.AsyncClient) -> None:
    answer = await client.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    answer = await client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ready", "device": "cpu", "model": "tiny"}
    assert (await client.head("/healthz")).status_code == 200


async def test_readyz_is_503_until_the_default_model_is_warm(repository: Path) -> None:
    app = create_app(Settings(models_dir=repository, device="cpu"))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        # The lifespan has not begun, so nothing loads yet.
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert "loading" in answer.json()["reason"]
        assert answer.headers["retry-after"] == "1"
        answer = await client.post("/v1/detect", content=encoded(one_red()))
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert (await client.get("/healthz")).status_code == 200


async def test_readyz_is_503_while_draining(start: Start) -> None:
    async with start() as client:
        app = client._transport.app  # type: ignore[attr-defined]
        app.state.service.draining = True
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert "draining" in answer.json()["reason"]
        answer = await client.post("/v1/detect", content=encoded(one_red()))
        assert answer.status_code == 200, "a drain still serves"


async def test_cpu_fallback_is_reported(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.runtime.devices.nvidia_driver", lambda: None)
    with caplog.at_level(logging.WARNING, logger="retinaserve"):
        async with start(device="auto") as client:
            answer = await client.get("/readyz")
            assert answer.json()["fallback"] == "no NVIDIA driver was found"
            assert (await samples(client))["retinaserve_cpu_fallback", ()] == 1
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "no NVIDIA driver" in warnings[0].getMessage()


async def test_metrics_count_requests_and_stages(new_client: httpx.AsyncClient) -> None:
    content = encoded(squares((0, 0, RED), (64, 0, RED)))
    for _ in range(3):
        await new_client.post("/v1/detect", content=content, params={"score_threshold": 0.9})
    await new_client.post("/v1/detect", content=b"")
    await new_client.get("/no/such/path")
    found = await samples(new_client)
    route = ("method", "POST"), ("route", "/v1/detect")
    assert found["retinaserve_requests_total", (*route, ("status", "200"))] == 3
    assert found["retinaserve_requests_total", (*route, ("status", "400"))] == 1
    unmatched = (("method", "any"), ("route", "unmatched"), ("status", "404"))
    assert found["retinaserve_requests_total", unmatched] == 1
    model = ("model", "tiny"), ("version", "1")
    labels = (("label", "red"), *model)
    assert found["retinaserve_detections_total", labels] == 6
    assert found["retinaserve_refusals_total", (("reason", "malformed-image"),)] == 1
    assert found["retinaserve_batch_size_count", model] == 3
    for stage in ("decode", "queue", "inference", "postprocess", "total"):
        labels = (model[0], ("stage", stage), model[1])
        assert found["retinaserve_stage_seconds_count", labels] == 3
    assert found["retinaserve_queue_depth", ()] == 0
    assert found["retinaserve_pictures_held", ()] == 0
    assert found["process_resident_memory_bytes", ()] > 1e6
    (ready,) = [
        (dict(labels), value)
        for (name, labels), value in found.items()
        if name == "retinaserve_model_ready"
    ]
    assert ready[0]["state"] == "ready"
    assert ready[1] == 1


async def test_applications_share_no_metrics(start: Start) -> None:
    async with start() as one, start() as two:
        await one.post("/v1/detect", content=encoded(one_red()))
        labels = (("label", "red"), ("model", "tiny"), ("version", "1"))
        assert (await samples(one))["retinaserve_detections_total", labels] == 1
        assert (await samples(two))["retinaserve_detections_total", labels] == 0


async def test_models_lists_metadata(client: httpx.AsyncClient) -> None:
    (model,) = (await client.get("/v1/models")).json()["models"]
    assert (model["name"], model["default"], model["serving"]) == ("tiny", True, 1)
    (version,) = model["versions"]
    assert version["state"] == "ready"
    assert version["device"] == "cpu"
    assert version["classes"] == ["red", "green", "blue"]
    assert version["canvas"]["sizes"] == [[96, 128], [128, 96], [96, 96]]
    assert version["thresholds"]["per_class"] == {"blue": 0.8}
    assert version["metrics"]["ap50"] == 0.9
    assert version["licence"] == {"model": "Apache-2.0"}
    assert (await client.get("/v1/models/tiny")).json() == model
    answer = await client.get("/v1/models/none")
    assert answer.status_code == 404
    assert "tiny" in answer.json()["detail"]


async def test_broken_versions_are_listed_as_failed(start: Start, tmp_path: Path) -> None:
    tiny_model.save(tmp_path, version=1)
    tiny_model.save(tmp_path, version=2)
    broken = tiny_model.save(tmp_path, version=10)
    broken.write_bytes(broken.read_bytes()[:1000])
    tiny_model.save(tmp_path, name="another").write_bytes(b"nothing")
    async with start(models_dir=tmp_path, default_model="tiny") as client:
        answer = await client.post("/v1/detect", content=encoded(one_red()))
        assert answer.json()["model"] == {"name": "tiny", "version": 2}
        answer = await client.post("/v1/detect?version=1", content=encoded(one_red()))
        assert answer.json()["model"] == {"name": "tiny", "version": 1}
        models = {each["name"]: each for each in (await client.get("/v1/models")).json()["models"]}
        states = {each["version"]: each["state"] for each in models["tiny"]["versions"]}
        assert states == {1: "ready", 2: "ready", 10: "failed"}
        assert "ONNX" in models["tiny"]["versions"][-1]["reason"]
        assert models["another"]["serving"] is None
        for query in ("version=10", "model=another"):
            answer = await client.post(f"/v1/detect?{query}", content=encoded(one_red()))
            assert answer.status_code == 503
            assert "failed to load" in answer.json()["detail"]


def test_start_rejects_unusable_repository(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no model"):
        create_app(Settings(models_dir=tmp_path, device="cpu"))
    with pytest.raises(DataError, match=r"'cells'.*tiny"):
        create_app(Settings(models_dir=repository, device="cpu", default_model="cells"))
    tiny_model.save(tmp_path, name="a")
    tiny_model.save(tmp_path, name="b")
    with pytest.raises(DataError, match=r"a, b.*RETINASERVE_DEFAULT_MODEL"):
        create_app(Settings(models_dir=tmp_path, device="cpu"))


def test_start_rejects_missing_device(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.runtime.devices.nvidia_driver", lambda: None)
    with pytest.raises(DeviceError, match="cuda:0 cannot be used: no NVIDIA driver"):
        create_app(Settings(models_dir=repository, device="cuda"))


async def test_openapi_example_has_the_response_shape(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    operation = document["paths"]["/v1/detect"]["post"]
    names = {parameter["name"] for parameter in operation["parameters"]}
    assert {"score_threshold", "classes", "format", "version", "X-Deadline-Ms"} <= names
    assert set(operation["requestBody"]["content"]) >= {"multipart/form-data", "application/json"}
    example = operation["responses"]["200"]["content"]["application/json"]["example"]
    real = (await client.post("/v1/detect", content=encoded(one_red()))).json()
    assert shape(example) == shape(real)
    assert "503" in operation["responses"]
    assert {"/v1/models", "/healthz", "/readyz", "/metrics"} <= set(document["paths"])


def shape(value: object) -> object:
    """Keys and kinds of a JSON document; lists by their first entry."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value[:1]]
    return type(value)


async def test_wrong_method_is_405_with_the_right_one(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/detect")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["detail"].endswith("use POST")


async def test_page_and_static_files_are_served(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert (await client.get("/static/sample.jpg")).headers["content-type"] == "image/jpeg"
    assert (await client.get("/static/../api.py")).status_code == 404


async def test_docs_load_nothing_from_other_hosts(client: httpx.AsyncClient) -> None:
    docs = await client.get("/docs")
    assert docs.status_code == 200
    assert "//" not in docs.text
    assert "<script>" not in docs.text, "a strict content policy would stop it"
    addresses = re.findall(r'(?:src|href)="([^"]+)"', docs.text)
    assert len(addresses) == 4
    for address in addresses:
        assert (await client.get(f"/{address}")).status_code == 200, address
    assert "openapi.json" in (await client.get("/docs.js")).text


async def test_log_has_request_id_and_no_forged_line(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="retinaserve"):
        await client.post("/v1/detect", content=b"", headers={"X-Request-Id": "job-1"})
        await client.get("/a%0aFAKE", headers={"X-Request-Id": "job-2"})
        await client.get("/healthz")
    records = [record for record in caplog.records if record.name == "retinaserve.access"]
    assert len(records) == 2, "probes that go well stay out of the log"
    texts = [TextFormatter().format(record) for record in records]
    assert all("\n" not in text for text in texts)
    assert "POST /v1/detect 400" in texts[0]
    line = json.loads(JsonFormatter().format(records[0]))
    assert line["route"] == "/v1/detect"
    assert line["status"] == 400
    assert line["level"] == "info"


async def test_unhandled_exception_is_an_opaque_500(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(models_dir=repository, device="cpu"))

    async def broken() -> None:
        raise ZeroDivisionError("secret")

    app.add_api_route("/broken", broken)
    async with running(app) as client:
        answer = await client.get("/broken", headers={"X-Request-Id": "job-3"})
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == "job-3"
    assert "secret" not in answer.text
    assert "job-3" in answer.json()["detail"]
    assert "ZeroDivisionError: secret" in caplog.text


HOST = "evil.example"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def spelt(path: str) -> tuple[str, ...]:
    """Return a path as it may be written wrongly, and rightly."""
    return path, f"{path}/", f"/{path}", f"{path}//", path.replace("/", "//"), f"//{HOST}{path}"


async def assert_no_answer_names_the_host(app: FastAPI, headers: dict[str, str]) -> None:
    asked = {"Host": HOST, "X-Forwarded-Host": HOST, "X-Forwarded-Proto": "http", **headers}
    templates = {getattr(route, "path", "") for route in app.routes} | {"/static", "/docs-assets"}
    paths = {re.sub("{.*?}", "tiny", each) for each in templates}
    assert len(paths) >= 8, "every route is there"
    async with running(app) as client:
        for path in sorted(spelling for each in paths for spelling in spelt(each)):
            for method in METHODS:
                url = httpx.URL("http://test").copy_with(raw_path=path.encode())
                answer = await client.request(method, url, headers=asked)
                assert not answer.is_redirect, (method, path)
                told = str(answer.headers) + answer.text
                # What the client wrote as a path is repeated as a path.
                assert HOST not in told.replace(f"//{HOST}", ""), (method, path, told)
                assert "location" not in answer.headers


async def test_responses_ignore_host_and_never_redirect(repository: Path) -> None:
    app = create_app(Settings(models_dir=repository, device="cpu"))
    await assert_no_answer_names_the_host(app, {})


async def test_admin_responses_ignore_host_and_never_redirect(
    repository: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    key = new_key(keys, "operator", admin=True)
    app = create_app(Settings(models_dir=repository, device="cpu", api_keys_file=keys))
    service = app.state.service
    assert app.state.keys is not None
    admin = create_admin_app(service, app.state.keys)
    async with app.router.lifespan_context(app):
        admin.state.service = service
        await assert_no_answer_names_the_host(admin, {"Authorization": f"Bearer {key}"})


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("/v1/detect/", "/v1/detect"),
        ("//v1//detect", "/v1/detect"),
        ("/v1/models/tiny/", "/v1/models/tiny"),
        ("/docs/", "/docs"),
    ],
)
async def test_extra_slashes_are_404_with_the_right_path(
    client: httpx.AsyncClient, asked: str, meant: str
) -> None:
    url = client.base_url.copy_with(raw_path=asked.encode())
    answer = await client.post(url)
    if answer.status_code == 405:
        answer = await client.get(url)
    assert answer.status_code == 404
    assert answer.json()["detail"].endswith(f"Not Found; use '{meant}'")

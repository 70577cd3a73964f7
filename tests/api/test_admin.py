"""The admin listener: models change while the service runs, by an admin's key alone."""

from __future__ import annotations

import asyncio
import base64
import gc
import logging
import weakref
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import onnx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.http.admin import AdminListener
from service.http.app import create_app
from service.http.auth.keys import new_key
from service.http.listening import listen
from service.settings import Settings
from tests import tiny_model
from tests.api.conftest import running
from tests.images import encoded, one_red, squares


class Doors(NamedTuple):
    """Clients of both listeners."""

    main: httpx.AsyncClient
    admin: httpx.AsyncClient
    client_key: str


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    """A service with the tiny model as version 1, and its admin listener on loopback."""
    tiny_model.save(tmp_path)
    async with both(tmp_path) as opened:
        yield opened


def both(models: Path) -> AbstractAsyncContextManager[Doors]:
    keys = models / "keys.json"
    admin_key = new_key(keys, "operator", admin=True)
    client_key = new_key(keys, "camera", admin=False)
    app = create_app(Settings(models_dir=models, device="cpu", api_keys_file=keys))
    listener = listen("127.0.0.1", 0)
    companion = AdminListener(app.state.service, app.state.keys, listener)

    @asynccontextmanager
    async def opened() -> AsyncIterator[Doors]:
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        headers = {"Authorization": f"Bearer {admin_key}"}
        async with running(app) as main:
            main.headers["X-API-Key"] = client_key
            await companion.start()
            try:
                async with httpx.AsyncClient(base_url=base, headers=headers, timeout=60) as admin:
                    yield Doors(main, admin, client_key)
            finally:
                await companion.stop(5)

    return opened()


async def detected(main: httpx.AsyncClient, query: str = "") -> dict[str, object]:
    answer = await main.post(f"/v1/detect{query}", content=encoded(one_red()))
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()["model"]
    return found


async def test_admin_loads_selects_and_unloads_a_version(doors: Doors, tmp_path: Path) -> None:
    tiny_model.save(tmp_path, version=2)
    answer = await doors.admin.post("/v1/models/tiny/load")
    assert answer.status_code == 200
    loaded = answer.json()
    assert loaded.pop("seconds") > 0
    sha256 = loaded.pop("sha256")
    assert loaded == {
        "name": "tiny",
        "version": 2,
        "state": "ready",
        "changed": True,
        "serving": 2,
        "pinned": False,
        "default": True,
    }
    assert await detected(doors.main) == {"name": "tiny", "version": 2}
    (model,) = (await doors.admin.get("/v1/models")).json()["models"]
    assert [each["state"] for each in model["versions"]] == ["ready", "ready"]
    assert model["versions"][1]["sha256"] == sha256
    assert (await doors.main.get("/v1/models")).json()["models"] == [model]

    answer = await doors.admin.post("/v1/models/tiny/default", json={"version": 1})
    assert answer.json() == {"name": "tiny", "serving": 1, "pinned": True, "default": True}
    assert await detected(doors.main) == {"name": "tiny", "version": 1}
    assert await detected(doors.main, "?version=2") == {"name": "tiny", "version": 2}
    assert (await doors.main.get("/v1/models/tiny")).json()["serving"] == 1

    answer = await doors.admin.post("/v1/models/tiny/unload?version=2")
    assert answer.json()["unloaded"] == [2]
    answer = await doors.main.post("/v1/detect?version=2", content=encoded(one_red()))
    assert answer.status_code == 404
    assert "version 2 is not loaded; loaded: version 1" in answer.json()["detail"]


async def test_model_ready_metric_follows_load_and_unload(doors: Doors, tmp_path: Path) -> None:
    tiny_model.save(tmp_path, name="second").write_bytes(b"no model")
    assert (await doors.admin.post("/v1/models/second/load")).status_code == 409
    tiny_model.save(tmp_path, version=2)
    await doors.admin.post("/v1/models/tiny/load")
    await doors.admin.post("/v1/models/tiny/unload?version=1")
    metrics = (await doors.admin.get("/metrics")).text
    states = {
        (sample.labels["model"], sample.labels["version"]): sample.labels["state"]
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == "retinaserve_model_ready"
    }
    assert states == {
        ("second", "1"): "failed",
        ("tiny", "1"): "unloaded",
        ("tiny", "2"): "ready",
    }
    assert (await doors.main.get("/readyz")).status_code == 200


async def test_load_of_a_broken_file_is_refused_with_the_reason(
    doors: Doors, tmp_path: Path
) -> None:
    path = tiny_model.save(tmp_path, version=2)
    (path.parent / "model.sha256").write_text(f"{'0' * 64}  model.onnx\n")
    answer = await doors.admin.post("/v1/models/tiny/load")
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == "urn:retinaserve:problem:load-failed"
    assert problem["instance"] == "/v1/models/tiny/load"
    assert "model.sha256 says '0000" in problem["detail"]
    assert "version 1 serves on" in problem["detail"]
    assert await detected(doors.main) == {"name": "tiny", "version": 1}
    (model,) = (await doors.main.get("/v1/models")).json()["models"]
    assert model["versions"][1]["state"] == "failed"
    assert "model.sha256" in model["versions"][1]["reason"]


async def test_load_rejects_file_with_fewer_names_than_classes(
    doors: Doors, tmp_path: Path
) -> None:
    path = tiny_model.save(tmp_path, version=2)
    model = onnx.load(path)
    model.metadata_props[0].value = model.metadata_props[0].value.replace('"red",', "")
    onnx.save(model, path)
    answer = await doors.admin.post("/v1/models/tiny/load")
    assert answer.status_code == 409
    assert "3 classes apart, but the metadata names 2" in answer.json()["detail"]
    assert "version 1 serves on" in answer.json()["detail"]
    assert await detected(doors.main) == {"name": "tiny", "version": 1}


WRONG: list[tuple[str, bytes, int, str]] = [
    ("none/load", b"", 404, "there is tiny"),
    ("tiny/load?version=7", b"", 404, "there is 1"),
    ("tiny/unload", b"", 409, "make another model the default"),
    ("tiny/unload?version=7", b"", 404, "there is 1"),
    ("none/default", b"", 404, "there is tiny"),
    ("tiny/load?version=0", b"", 422, "version='0'"),
    ("tiny/load?version=new", b"", 422, "a positive integer of at most 18 ASCII digits"),
    ("tiny/load?version=01", b"", 422, "version='01'"),
    ("tiny/load?version=%D9%A1", b"", 422, "without a leading zero"),
    ("tiny/load?version=1e0", b"", 422, "version='1e0'"),
    ("tiny/load?version=" + "9" * 3000, b"", 422, "at most 18 ASCII digits"),
    ("tiny/load", b'{"version": 1000000000000000000}', 422, "at most 18 ASCII digits"),
    ("tiny/load", b'{"version": 18446744073709551616}', 422, "at most 18 ASCII digits"),
    ("tiny/load?version=999999999999999999", b"", 404, "there is 1"),
    ("tiny/load?versoin=1", b"", 422, "versoin='1'"),
    ("tiny/load?version=1&version=2", b"", 422, "give it once"),
    ("tiny/load?version=1", b'{"version": 2}', 422, "give it once"),
    ("tiny/load", b'{"version": true}', 422, "version=True"),
    ("tiny/load", b'{"version": "1"}', 422, "version='1'"),
    ("tiny/load", b"version=1", 400, "JSON"),
    ("tiny/load", b" " * 5000, 413, "4096"),
    ("tiny/launch", b"", 404, "Not Found"),
    ("..%2fkeys.json/load", b"", 404, ""),
]


async def test_admin_request_errors_name_the_fault(doors: Doors) -> None:
    for path, content, status, says in WRONG:
        answer = await doors.admin.post(f"/v1/models/{path}", content=content)
        assert answer.status_code == status, (path, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
        assert says in answer.json()["detail"], path
        assert len(answer.json()["detail"]) < 500, path
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert await detected(doors.main) == {"name": "tiny", "version": 1}


async def test_admin_routes_require_an_admin_key(doors: Doors) -> None:
    path = "/v1/models/tiny/load"
    base = doors.admin.base_url
    async with httpx.AsyncClient(base_url=base) as stranger:
        assert (await stranger.get("/healthz")).status_code == 200
        assert (await stranger.get("/readyz")).status_code == 200
        for closed in ("/metrics", "/v1/models"):
            assert (await stranger.get(closed)).status_code == 401
        answer = await stranger.post(path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
        answer = await stranger.post(path, headers={"X-API-Key": doors.client_key})
        assert answer.status_code == 403
        assert "--admin" in answer.json()["detail"]
        answer = await stranger.post(path, headers={"X-API-Key": doors.client_key + "x"})
        assert answer.status_code == 401
    assert (await doors.admin.post(path)).status_code == 200


async def test_main_listener_has_no_admin_routes(doors: Doors) -> None:
    headers = dict(doors.admin.headers)
    for action in ("load", "unload", "default"):
        answer = await doors.main.post(f"/v1/models/tiny/{action}", headers=headers)
        assert answer.status_code == 404


class WarmUp:
    """A model's warm-up that begins, and waits for leave to end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._begun, self._go = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        monkeypatch.setattr("service.runtime.detector.Detector.warm", lambda *_, **__: self._wait())

    async def begun(self) -> None:
        await asyncio.wait_for(self._begun.wait(), 60)

    def end(self) -> None:
        self._go.set()

    def _wait(self) -> None:
        self._loop.call_soon_threadsafe(self._begun.set)
        asyncio.run_coroutine_threadsafe(self._go.wait(), self._loop).result(60)


async def test_detect_is_served_while_a_model_loads(
    doors: Doors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model.save(tmp_path, version=2)
    warm_up = WarmUp(monkeypatch)
    first, second = (
        asyncio.create_task(doors.admin.post("/v1/models/tiny/load")) for _ in range(2)
    )
    await warm_up.begun()
    assert (await doors.admin.get("/healthz")).status_code == 200
    assert await detected(doors.main) == {"name": "tiny", "version": 1}
    answer = await doors.admin.post("/v1/models/tiny/unload?version=2")
    assert answer.status_code == 409
    assert "being loaded" in answer.json()["detail"]
    first.cancel()
    warm_up.end()
    answer = await second
    assert (answer.status_code, answer.json()["changed"]) == (200, True), "not cancelled with it"
    assert await detected(doors.main) == {"name": "tiny", "version": 2}


async def test_shutdown_answers_pending_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model.save(tmp_path)
    async with both(tmp_path) as doors:
        tiny_model.save(tmp_path, version=2)
        warm_up = WarmUp(monkeypatch)
        loading = asyncio.create_task(doors.admin.post("/v1/models/tiny/load"))
        await warm_up.begun()
        doors.main._transport.app.state.service.registry.stop_loading()  # type: ignore[attr-defined]
        answer = await loading
        warm_up.end()
    assert answer.status_code == 503
    assert "stops" in answer.json()["detail"]


async def test_version_swap_loses_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The capturing handlers would keep the error of the request that fails, with its frames.
    caplog.set_level(logging.CRITICAL + 1, "retinaserve")
    tiny_model.save(tmp_path, poison=True)
    good, bad = encoded(one_red()), encoded(squares((0, 0, (255, 0, 255))))
    image = {"id": "a", "image": base64.b64encode(good).decode()}
    tensor = {
        "name": "encoded_images",
        "shape": [1],
        "datatype": "BYTES",
        "data": [image["image"]],
    }
    async with both(tmp_path) as doors:
        registry = doors.main._transport.app.state.service.registry  # type: ignore[attr-defined]
        detector = weakref.ref(registry.get().detectors[0])
        gc.disable()
        try:
            for query, content, headers in (
                ("", good, {}),
                ("?tile=64", good, {}),
                ("?format=coco", good, {}),
                ("", good, {"Accept": "image/png"}),
                ("", b"", {}),
                ("?classes=none", good, {}),
                ("", good, {"X-Deadline-Ms": "1"}),
            ):
                await doors.main.post(f"/v1/detect{query}", content=content, headers=headers)
            answer = await doors.main.post("/v1/detect", content=bad)
            assert answer.status_code == 500, "the model itself failed"
            for accept in ("application/json", "application/x-ndjson"):
                answer = await doors.main.post(
                    "/v1/detect/batch", json={"images": [image] * 3}, headers={"Accept": accept}
                )
                assert answer.status_code == 200
            answer = await doors.main.post("/v2/models/tiny/infer", json={"inputs": [tensor]})
            assert answer.status_code == 200, answer.text
            tiny_model.save(tmp_path, version=2)
            assert (await doors.admin.post("/v1/models/tiny/load")).status_code == 200
            assert (await doors.admin.post("/v1/models/tiny/unload?version=1")).status_code == 200
            async with asyncio.timeout(30):
                # The loader's thread may hold it for another moment.
                while detector() is not None:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()

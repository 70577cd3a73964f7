"""What the queue alone decides, and what the end of a device looks like from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from service.engine.prediction import Prediction
from service.engine.service import Service
from service.imaging.canvas import Size
from tests.api.conftest import Start
from tests.images import encoded, one_red

GOOD = encoded(one_red())
PATHS = (
    "/v1/detect",
    "/v1/detect/batch",
    "/v2/models/tiny/infer",
    "/v2/models/tiny/versions/1/infer",
)


def service_of(client: httpx.AsyncClient) -> Service:
    service = client._transport.app.state.service  # type: ignore[attr-defined]
    assert isinstance(service, Service)
    return service


class Body:
    """Knows whether somebody asked for it."""

    read = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.read = True
        yield GOOD


@pytest.mark.parametrize("path", PATHS)
async def test_long_queue_is_503_before_the_body(
    start: Start, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(Prediction, "wait", lambda self, *_, **__: 3.0)
    async with start() as client:
        body = Body()
        answer = await client.post(path, content=body, headers={"X-Deadline-Ms": "500"})
        assert answer.status_code == 503
        # 3 s, stretched by the caution of the start, less the half second that there is.
        assert answer.headers["retry-after"] == "3"
        assert not body.read
        assert "deadline, 500 ms away" in answer.text
        assert 'reason="deadline"' in (await client.get("/metrics")).text


async def test_default_deadline_applies_to_admission(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Prediction, "wait", lambda self, *_, **__: 3.0)
    async with start() as client:
        assert (await client.post("/v1/detect", content=GOOD)).status_code == 200
    async with start(request_timeout_ms=2_000) as client:
        assert (await client.post("/v1/detect", content=GOOD)).status_code == 503


@pytest.mark.parametrize("wrong", ["0", "-5", "1e3", "x", "9" * 40, ""])
async def test_invalid_deadline_is_422(start: Start, wrong: str) -> None:
    async with start() as client:
        headers = {"X-Deadline-Ms": wrong}
        assert (await client.post("/v1/detect", content=GOOD, headers=headers)).status_code == 422


@pytest.mark.parametrize("wrong", ["0", "99999999"])
async def test_invalid_deadline_is_422_under_overload(
    start: Start, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr(Prediction, "wait", lambda self, *_, **__: 3.0)
    async with start() as client:
        headers = {"X-Deadline-Ms": wrong}
        assert (await client.post("/v1/detect", content=GOOD, headers=headers)).status_code == 422


async def test_full_queue_is_503_before_the_body(start: Start) -> None:
    async with start(max_queue_size=1) as client:
        with service_of(client).places.slot():
            body = Body()
            answer = await client.post("/v1/detect", content=body)
        assert answer.status_code == 503
        assert "queue is full" in answer.json()["detail"]
        assert not body.read


async def test_queue_bytes_are_bounded(start: Start) -> None:
    async with start(max_queue_bytes=1_000_000) as client:
        with service_of(client).places.slot(1_000_000):
            answer = await client.post("/v1/detect", content=GOOD)
        assert answer.status_code == 503
        assert "1000000 bytes" in answer.json()["detail"]
        assert (await client.post("/v1/detect", content=GOOD)).status_code == 200


async def test_impossible_deadline_is_refused_with_the_needed_time(start: Start) -> None:
    async with start() as client:
        costs = service_of(client).registry.get().costs
        costs.__init__()  # type: ignore[misc]
        costs.observe(Size(96, 128), 1, 4.0)
        answer = await client.post("/v1/detect", content=GOOD, headers={"X-Deadline-Ms": "900"})
        assert answer.status_code == 503
        assert "takes at least 4000 ms here; allow more time" in answer.json()["detail"]
        # Longer than that and it is tried, whatever was learnt.
        assert (await client.post("/v1/detect", content=GOOD)).status_code == 200


async def test_warm_up_teaches_the_cost_model(start: Start) -> None:
    async with start() as client:
        costs = service_of(client).registry.get().costs
        for canvas in (Size(96, 128), Size(128, 96), Size(96, 96)):
            assert 0 < costs.of(canvas).seconds(1) < 10
            assert 0 < costs.fastest <= costs.of(canvas).seconds(1)


async def test_lost_device_fails_probes_and_requests(start: Start) -> None:
    async with start() as client:
        service_of(client).pipeline.fatal = "the device does not answer any more: CUDA error 700"
        for path in ("/healthz", "/readyz"):
            answer = await client.get(path)
            assert answer.status_code == 503
            assert "CUDA error 700" in answer.json()["reason"]
        body = Body()
        answer = await client.post("/v1/detect", content=body)
        assert answer.status_code == 503
        assert "CUDA error 700" in answer.json()["detail"]
        assert int(answer.headers["retry-after"]) >= 1
        assert not body.read


async def test_overload_refusal_skips_routing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Prediction, "wait", lambda self, *_, **__: 30.0)
    async with start() as client:
        monkeypatch.setattr(
            service_of(client).registry, "get", lambda *_: pytest.fail("it was routed")
        )
        assert (await client.post("/v1/detect", content=GOOD)).status_code == 503

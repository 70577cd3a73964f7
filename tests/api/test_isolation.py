"""A promise made to one client holds whatever another client sends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.engine import detection
from service.engine.service import Service
from service.imaging.canvas import Size
from service.imaging.header import read_header
from tests import tiny_model
from tests.api.conftest import Start
from tests.api.inference_protocol import INFER, images
from tests.images import encoded, noise, one_red, png_header, squares

SMALL = encoded(one_red())


def canvas_of(height: int, width: int) -> dict[str, Any]:
    return images(np.zeros((1, height, width, 3), np.uint8))


def kind_of(content: bytes) -> str:
    header = read_header(content)
    assert header is not None
    return header.kind


def service_of(client: httpx.AsyncClient) -> Service:
    service = client._transport.app.state.service  # type: ignore[attr-defined]
    assert isinstance(service, Service)
    return service


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    pytest.fail("it never happened")


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
async def test_slow_decodes_leave_a_thread_for_small_images(start: Start, mode: str) -> None:
    large = encoded(Image.new(mode, (7000, 7000)), compress_level=1)
    async with start(cpus=2) as client:
        pipeline = service_of(client).pipeline
        # As many as there are decode threads, and more.
        slow = [asyncio.create_task(client.post("/v1/detect", content=large)) for _ in range(4)]
        await until(
            lambda: any(work.estimate.long for each in pipeline._decoders for work in each.held)
        )
        for _ in range(3):
            answer = await client.post("/v1/detect", content=SMALL)
            assert answer.status_code == 200, answer.text
        assert not all(each.done() for each in slow), "small images waited for large ones"
        assert {each.status_code for each in await asyncio.gather(*slow)} <= {200, 503}


async def test_cost_is_estimated_per_canvas(start: Start, tmp_path: Path) -> None:
    tiny_model.save(tmp_path, sizes=(Size(480, 640), Size(96, 128)))
    async with start(models_dir=tmp_path) as client:
        service = service_of(client)
        costs = service.registry.get().costs
        for canvas, seconds in ((Size(480, 640), 5.0), (Size(32, 32), 0.001)):
            for _ in range(200):
                costs.observe(canvas, 1, seconds)
        # The newest canvas is the small one; a busy service must know what the large one takes.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.pipeline.prediction, "wait", lambda *_, **__: 0.5)
            for path, given in (
                ("/v1/detect", {"content": encoded(noise((640, 480)))}),
                (INFER, {"json": {"inputs": [canvas_of(480, 640)]}}),
            ):
                answer = await client.post(path, **given, headers={"X-Deadline-Ms": "2000"})
                assert answer.status_code == 503, path
            answer = await client.post(
                INFER,
                json={"inputs": [canvas_of(32, 32)]},
                headers={"X-Deadline-Ms": "2000"},
            )
            assert answer.status_code == 200, answer.text


async def test_decode_queue_cost_is_estimated_per_canvas(start: Start, tmp_path: Path) -> None:
    tiny_model.save(tmp_path, sizes=(Size(480, 640), Size(96, 128)))
    async with start(models_dir=tmp_path) as client:
        service = service_of(client)
        costs, prediction = service.registry.get().costs, service.pipeline.prediction
        for canvas, seconds in ((Size(480, 640), 0.5), (Size(96, 128), 0.001)):
            for _ in range(200):
                costs.observe(canvas, 1, seconds)
        # Both decode threads are held, so that what comes stays in the queue.
        go_on = threading.Event()
        held = [
            asyncio.create_task(
                service.pipeline.run(
                    go_on.wait, service.registry.get(), detection.Estimate(), deadline=1e12
                )
            )
            for _ in service.pipeline._decoders
        ]
        waiting = asyncio.create_task(client.post("/v1/detect", content=encoded(noise((640, 480)))))
        await until(lambda: len(service.pipeline._arrived) == 1)
        known = costs.of(Size(480, 640)).seconds(1)
        assert prediction.wait() >= known > 0.4
        go_on.set()
        await asyncio.gather(*held)
        assert (await waiting).status_code == 200


async def test_drawing_past_its_deadline_is_refused_early(start: Start) -> None:
    content = encoded(noise((200, 200)), "JPEG")
    async with start() as client:
        costs = service_of(client).pipeline.prediction.thread_costs
        for _ in range(50):
            costs.observe(f"drawn image/png {kind_of(content)}", 40_000, 16.0)
        given = {"content": content, "headers": {"Accept": "image/png", "X-Deadline-Ms": "9000"}}
        answer = await client.post("/v1/detect", **given)
        assert answer.status_code == 503
        assert "takes at least 15" in answer.json()["detail"]
        answer = await client.post("/v1/detect?tile=64", **given)
        assert answer.status_code == 503
        assert (await client.post("/v1/detect", content=content)).status_code == 200


async def test_drawing_delays_only_drawing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing, go_on = threading.Semaphore(0), threading.Event()
    encode = detection.encode

    def slow(*given: Any) -> bytes:
        drawing.release()
        assert go_on.wait(60)
        return encode(*given)

    monkeypatch.setattr(detection, "encode", slow)
    async with start(cpus=2) as client:
        costs = service_of(client).pipeline.prediction.thread_costs
        for _ in range(50):
            costs.observe(f"drawn image/png {kind_of(SMALL)}", 128 * 96, 1.0)
        slow_ones = [
            asyncio.create_task(
                client.post("/v1/detect", content=SMALL, headers={"Accept": "image/png"})
            )
            for _ in range(4)
        ]
        await asyncio.to_thread(drawing.acquire)
        async with asyncio.timeout(30):
            assert "retinaserve_requests" in (await client.get("/metrics")).text
            assert (await client.get("/healthz")).status_code == 200
            for path in ("/v1/detect", "/v1/detect?tile=64"):
                assert (await client.post(path, content=SMALL)).status_code == 200
        assert not any(each.done() for each in slow_ones if not each.cancelled())
        go_on.set()
        answers = await asyncio.gather(*slow_ones)
    assert {each.status_code for each in answers} <= {200, 503}
    assert any(each.headers["content-type"] == "image/png" for each in answers)


async def test_late_drawing_is_504_at_its_deadline(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(detection, "encode", lambda *_: go_on.wait(60) and b"")
    async with start() as client:
        answer = await client.post(
            "/v1/detect", content=SMALL, headers={"Accept": "image/png", "X-Deadline-Ms": "700"}
        )
        assert answer.status_code == 504
        go_on.set()


@pytest.mark.parametrize("size", [(50_000_000, 1), (1, 50_000_000)])
async def test_too_many_tiles_are_refused_before_cutting(
    client: httpx.AsyncClient, size: tuple[int, int]
) -> None:
    answer = await client.post("/v1/detect?tile=auto", content=png_header(*size))
    assert answer.status_code == 413
    assert "at most 128 are accepted" in answer.json()["detail"]


async def test_tiled_image_shares_queue_places(start: Start, tmp_path: Path) -> None:
    tiny_model.save(tmp_path, sizes=(Size(256, 256),), work=4)
    content = encoded(squares(size=(1900, 1900)))
    async with start(models_dir=tmp_path, request_timeout_ms=120_000) as client:
        service = service_of(client)
        with service.places.hold(12, 0):
            tiled = asyncio.create_task(client.post("/v1/detect?tile=auto", content=content))
            await until(lambda: service.pipeline.depth > 0)
            assert service.places.held <= 12 + service.batch_window
            assert (await client.post("/v1/detect", content=SMALL)).status_code == 200
            assert not tiled.done()
            answer = await tiled
        assert answer.status_code == 200, answer.text
        assert answer.json()["image"]["tiles"] > 60
        assert service.places.held == 0


async def test_unread_drawings_are_bounded(start: Start) -> None:
    async with start() as client:
        service = service_of(client)
        given = {"content": SMALL, "headers": {"Accept": "image/png"}}
        with service.unsent.hold(0, service.settings.max_queue_bytes):
            answer = await client.post("/v1/detect", **given)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert (await client.post("/v1/detect", content=SMALL)).status_code == 200
        assert (await client.post("/v1/detect", **given)).status_code == 200
        assert service.unsent.bytes_held == 0

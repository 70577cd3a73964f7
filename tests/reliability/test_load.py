"""Overload, slow clients, disconnects, memory."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.images import encoded, noise, one_red
from tests.reliability.conftest import Process, Serve, until

GOOD = encoded(one_red())
MEBIBYTE = 1 << 20


def metric(process: Process, name: str) -> float:
    with process.client() as client:
        lines = client.get("/metrics").text.splitlines()
    # Of a metric with labels, the sum over all of them.
    found = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    assert found, f"no metric {name}"
    return sum(float(line.rpartition(" ")[2]) for line in found)


def test_healthz_is_quick_under_load(serve: Serve, slow_models: Path) -> None:
    # On a busy machine an inference takes seconds, and a shorter deadline would have them refused.
    process = serve(slow_models, request_timeout_ms=600_000)
    stop = threading.Event()

    def hammer() -> None:
        with process.client() as client:
            while not stop.is_set():
                client.post("/v1/detect", content=GOOD)

    with ThreadPoolExecutor(8) as pool, process.client() as client:
        for _ in range(8):
            pool.submit(hammer)
        try:
            until(lambda: metric(process, "retinaserve_queue_depth") >= 4)
            seconds = []
            for _ in range(40):
                started = time.perf_counter()
                assert client.get("/healthz").status_code == 200
                seconds.append(time.perf_counter() - started)
                time.sleep(0.01)
        finally:
            stop.set()
    # The median: on a busy machine single answers wait for a core, whatever the server does.
    assert statistics.median(seconds) < 0.050


def test_full_queue_is_503_and_recovers(serve: Serve, slow_models: Path) -> None:
    process = serve(slow_models, max_queue_size=3, request_timeout_ms=600_000)

    def post(_: int) -> httpx.Response:
        with process.client() as client:
            return client.post("/v1/detect", content=GOOD)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(post, range(12)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["content-type"] == "application/problem+json"
    assert "queue is full" in refused.json()["detail"]
    assert post(0).status_code == 200
    assert metric(process, "retinaserve_pictures_held") == 0


def test_disconnected_clients_leave_the_queue(serve: Serve, slow_models: Path) -> None:
    process = serve(slow_models, request_timeout_ms=600_000)
    head = f"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length: {len(GOOD)}\r\n\r\n".encode()
    rude = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(30)]
    for index, connection in enumerate(rude):
        # Every other one has sent its next request already.
        connection.sendall((head + GOOD) * (1 + index % 2))
    until(lambda: metric(process, "retinaserve_pictures_held") >= 25)
    for connection in rude:
        connection.close()
    until(lambda: metric(process, "retinaserve_pictures_held") == 0)
    assert metric(process, "retinaserve_queue_depth") == 0
    with process.client() as client:
        assert client.post("/v1/detect", content=GOOD).status_code == 200
        text = client.get("/metrics").text
    gone = 'retinaserve_requests_total{method="POST",route="/v1/detect",status="499"}'
    cancelled = 'retinaserve_pictures_total{model="tiny",outcome="cancelled",version="1"}'
    counts = [float(text.partition(f"\n{name} ")[2].split()[0]) for name in (gone, cancelled)]
    assert counts[0] == counts[1] > 0
    assert metric(process, "retinaserve_batch_size_count") < 20


def test_slow_body_is_408(serve: Serve, quick_models: Path) -> None:
    process = serve(quick_models, body_timeout_ms=300)
    with socket.create_connection(("127.0.0.1", process.port), timeout=30) as connection:
        started = time.monotonic()
        connection.sendall(
            b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nabc"
        )
        answer = connection.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 408 ")
    assert "connection: close" in answer.lower()
    assert 0.25 < time.monotonic() - started < 10
    assert metric(process, "retinaserve_pictures_held") == 0


def test_unsent_body_after_413_closes_the_connection(serve: Serve, quick_models: Path) -> None:
    """The client withholds its body, so the next bytes on that connection are not a body."""
    process = serve(quick_models, max_body_bytes=1000)
    with socket.create_connection(("127.0.0.1", process.port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
            b"Expect: 100-continue\r\nContent-Length: 2000\r\n\r\n"
        )
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    head = received.lower()
    assert head.startswith(b"http/1.1 413 ")
    assert b"connection: close" in head
    with process.client() as client:
        assert client.get("/healthz").status_code == 200


def test_large_body_is_413_without_buffering(serve: Serve, quick_models: Path) -> None:
    process = serve(quick_models)
    before = process.resident()
    with process.client() as client:

        def body() -> object:
            for _ in range(100):
                yield bytes(MEBIBYTE)

        headers = {"Content-Length": str(100 * MEBIBYTE)}
        answer = client.post("/v1/detect", content=bytes(100 * MEBIBYTE), headers=headers)
        assert answer.status_code == 413
        answer = client.post("/v1/detect", content=body())  # type: ignore[arg-type]
        assert answer.status_code == 413
        assert client.post("/v1/detect", content=GOOD).status_code == 200
    assert process.resident() - before < 80 * MEBIBYTE


def test_large_forms_stay_in_memory(
    serve: Serve, quick_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing can be written there, as with a read-only root.
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, "/proc")
    process = serve(quick_models)
    large = encoded(noise((1100, 1000)))
    assert len(large) > 3_000_000
    with process.client() as client:
        answer = client.post("/v1/detect", files={"file": ("large.png", large)})
        assert answer.status_code == 200
        files = [("files", ("a", large)), ("files", ("b", large))]
        answer = client.post("/v1/detect/batch", files=files)
        assert [each["status"] for each in answer.json()["results"]] == [200, 200]


def test_memory_is_flat_under_load(serve: Serve, quick_models: Path) -> None:
    process = serve(quick_models, log_level="warning")
    bodies = [GOOD, encoded(noise((640, 480)), "JPEG"), b"\xff\xd8\xff broken", b""]

    def some(count: int) -> None:
        with process.client() as client:
            for number in range(count):
                client.post("/v1/detect", content=bodies[number % len(bodies)])

    def many(count: int) -> None:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                pool.submit(some, count)

    many(150)
    before = process.resident()
    many(250)
    assert process.resident() - before < 12 * MEBIBYTE


def test_ndjson_lines_stream_as_images_finish(serve: Serve, slow_models: Path) -> None:
    process = serve(slow_models, request_timeout_ms=600_000)
    arrivals: list[float] = []
    files = [("files", (f"{i}", GOOD)) for i in range(4)]
    with (
        process.client() as client,
        client.stream(
            "POST",
            "/v1/detect/batch",
            files=files,
            headers={"Accept": "application/x-ndjson"},
        ) as answer,
    ):
        for line in answer.iter_lines():
            arrivals.append(time.monotonic())
            assert '"status":200' in line
    assert len(arrivals) == 4
    assert arrivals[-1] - arrivals[0] > 0.05, "the first did not wait for the last"

"""Graceful stop, with real signals."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.images import encoded, one_red
from tests.reliability.conftest import Process, Serve, command, environment, ready, until

GOOD = encoded(one_red())


def in_flight(process: Process) -> float:
    with process.client() as client:
        for line in client.get("/metrics").text.splitlines():
            if line.startswith("retinaserve_pictures_held "):
                return float(line.split()[1])
    raise AssertionError("the metric is gone")


def post_in_background(process: Process, answers: list[httpx.Response]) -> threading.Thread:
    def post() -> None:
        with process.client() as client:
            answers.append(client.post("/v1/detect", content=GOOD))

    thread = threading.Thread(target=post)
    thread.start()
    until(lambda: in_flight(process) >= 1)
    return thread


def refuses_connections(process: Process) -> bool:
    try:
        socket.create_connection(("127.0.0.1", process.port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_drain_finishes_requests_in_flight(
    serve: Serve, slow_models: Path, number: signal.Signals
) -> None:
    process = serve(slow_models)
    answers: list[httpx.Response] = []
    thread = post_in_background(process, answers)
    process.popen.send_signal(number)
    until(lambda: refuses_connections(process))
    thread.join(30)
    (answer,) = answers
    assert answer.status_code == 200
    assert answer.headers["connection"] == "close"
    assert answer.json()["detections"]
    assert process.exit_code() == 0


def test_drain_delay_serves_while_not_ready(serve: Serve, quick_models: Path) -> None:
    process = serve(quick_models, drain_delay_seconds=2.0)
    with process.client() as client:
        assert client.get("/readyz").status_code == 200
        signalled = time.monotonic()
        process.terminate()
        until(lambda: client.get("/readyz").status_code == 503)
        answer = client.get("/readyz")
        assert "draining" in answer.json()["reason"]
        assert client.post("/v1/detect", content=GOOD).status_code == 200
        assert not refuses_connections(process), "new connections are welcome until the delay ends"
    assert process.exit_code() == 0
    assert time.monotonic() - signalled >= 2.0


def test_drain_ends_after_drain_seconds(serve: Serve, slow_models: Path) -> None:
    process = serve(slow_models, drain_seconds=1, request_timeout_ms=600_000)
    answers: list[httpx.Response] = []

    def post() -> None:
        with process.client() as client:
            answers.append(client.post("/v1/detect", content=GOOD))

    # Several times as much work as fits the drain.
    threads = [threading.Thread(target=post) for _ in range(40)]
    for thread in threads:
        thread.start()
    until(lambda: in_flight(process) >= 40)
    # On a busy machine the drain may be too short for even one.
    until(lambda: bool(answers))
    signalled = time.monotonic()
    process.terminate()
    assert process.exit_code() == 0
    assert time.monotonic() - signalled < 6.0
    for thread in threads:
        thread.join(30)
    statuses = [answer.status_code for answer in answers]
    assert len(statuses) == 40
    assert set(statuses) == {200, 503}
    late = next(answer for answer in answers if answer.status_code == 503)
    assert int(late.headers["retry-after"]) >= 1
    assert "the server stops" in late.json()["detail"]


def test_drain_answers_arriving_body_with_503(serve: Serve, quick_models: Path) -> None:
    process = serve(quick_models, drain_seconds=0)
    address = ("127.0.0.1", process.port)
    with socket.create_connection(address, timeout=30) as connection:
        head = b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n"
        connection.sendall(head + b"abc")
        # Answered after the other connection's bytes were taken in.
        assert ready(process)
        process.terminate()
        answer = connection.makefile("rb").read().decode().lower()
    assert answer.startswith("http/1.1 503 ")
    assert "connection: close" in answer
    assert "retry-after: " in answer
    assert "application/problem+json" in answer
    assert process.exit_code() == 0
    assert "Traceback" not in process.log.read_text()


def test_drain_closes_idle_connections(serve: Serve, quick_models: Path) -> None:
    process = serve(quick_models)
    with process.client() as client:
        assert client.get("/healthz").status_code == 200
        signalled = time.monotonic()
        process.terminate()
        assert process.exit_code() == 0
        assert time.monotonic() - signalled < 5.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_signal_while_loading_stops(quick_models: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        command("serve", "--models", quick_models, "--port", 0),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    status = Path(f"/proc/{process.pid}/status")
    until(lambda: bool(caught_signals(status) & 1 << (signal.SIGQUIT - 1)))
    process.send_signal(number)
    assert process.wait(30) == 0


def caught_signals(status: Path) -> int:
    (mask,) = (line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
    return int(mask.split()[1], 16)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_ignored_signal_stays_ignored(
    serve: Serve, quick_models: Path, number: signal.Signals
) -> None:
    """As `nohup` starts a command, and a shell one in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        process = serve(quick_models)
    finally:
        signal.signal(number, before)
    process.popen.send_signal(number)
    for _ in range(3):
        assert ready(process)
    process.terminate()
    assert process.exit_code() == 0


def test_second_signal_stops_at_once(serve: Serve, quick_models: Path) -> None:
    process = serve(quick_models, drain_delay_seconds=30)
    process.terminate()
    until(lambda: not ready(process))
    process.terminate()
    assert process.exit_code(10) == 0


@pytest.mark.parametrize("content", [b"\xff\xd8\xff", GOOD])
def test_stop_right_after_work_is_clean(serve: Serve, quick_models: Path, content: bytes) -> None:
    process = serve(quick_models)
    with process.client() as client:
        client.post("/v1/detect", content=content)
    process.terminate()
    assert process.exit_code() == 0
    log = process.log.read_text()
    assert "Traceback" not in log
    assert "rror" not in log.replace("400", "")

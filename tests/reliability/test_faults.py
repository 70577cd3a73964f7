"""A batch that never ends, a lost device, a dead thread: every request gets its response."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.images import encoded, one_red
from tests.reliability import faulty_server
from tests.reliability.conftest import Process, Serve

GOOD = encoded(one_red())
FAULTY = (sys.executable, "-m", "tests.reliability.faulty_server")


def image(colour: tuple[int, int, int]) -> bytes:
    return encoded(Image.new("RGB", (128, 96), colour))


def post_many(process: Process, bodies: list[bytes]) -> list[httpx.Response]:
    """All at once; every one that reaches the process gets an answer."""
    answers: list[httpx.Response] = []
    refused: list[httpx.ConnectError] = []
    connected = threading.Barrier(len(bodies))

    def post(body: bytes) -> None:
        with process.client() as client:
            # A client that connects after the process has ended is refused, as it should be.
            assert client.get("/healthz").status_code == 200
            connected.wait(60)
            try:
                answers.append(client.post("/v1/detect", content=body))
            except httpx.ConnectError as error:
                # The process has ended, and with it the idle connection, before this thread's turn.
                refused.append(error)

    threads = [threading.Thread(target=post, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers
    assert len(answers) + len(refused) == len(bodies), "a request hangs"
    return answers


@pytest.mark.parametrize(
    ("colour", "reason"),
    [(faulty_server.WEDGE, "has been on the device for"), (faulty_server.LOSE, "CUDA error 700")],
    ids=["wedged", "lost"],
)
def test_lost_device_fails_requests_and_ends_the_process(
    serve: Serve, quick_models: Path, colour: tuple[int, int, int], reason: str
) -> None:
    process = serve(quick_models, program=FAULTY, watchdog_seconds=1.0)
    with process.client() as client:
        assert client.post("/v1/detect", content=GOOD).status_code == 200
    answers = post_many(process, [image(colour)] * 6)
    assert {answer.status_code for answer in answers} == {503}
    for answer in answers:
        assert reason in answer.json()["detail"]
        assert int(answer.headers["retry-after"]) >= 1
    assert process.exit_code() == 1
    assert reason in process.log.read_text()


def test_dead_worker_thread_is_replaced(serve: Serve, quick_models: Path) -> None:
    process = serve(quick_models, program=FAULTY)
    (answer,) = post_many(process, [image(faulty_server.DIE)])
    assert answer.status_code == 500
    assert "SystemExit" not in answer.text
    with process.client() as client:
        assert client.post("/v1/detect", content=GOOD).status_code == 200
        assert client.get("/healthz").status_code == 200
    log = process.log.read_text()
    assert "thread decode-" in log
    assert "died" in log
    process.terminate()
    assert process.exit_code() == 0

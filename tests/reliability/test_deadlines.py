"""Under overload: what is let in is in time, the rest knows at once, one goes before many."""

from __future__ import annotations

import collections
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from service.imaging.canvas import Size
from tests import tiny_model
from tests.images import encoded, one_red
from tests.reliability.conftest import Process, Serve, until
from tests.reliability.test_load import metric

GOOD = encoded(one_red())


def seconds_alone(process: Process) -> float:
    """What one image takes on this machine at this moment."""
    with process.client() as client:
        taken = [
            client.post("/v1/detect", content=GOOD).json()["timing_ms"]["inference"]
            for _ in range(3)
        ]
    return max(taken) / 1e3


def test_admitted_requests_meet_their_deadline_under_overload(serve: Serve, tmp_path: Path) -> None:
    # Twenty images are let in within seconds: quicker than the other tests' model.
    tiny_model.save(tmp_path, work=30, sizes=(Size(96, 128),))
    process = serve(tmp_path)
    # Room for a handful of images, under twenty clients that do not wait to be asked again.
    deadline = max(1_000, min(9_000, round(6e3 * seconds_alone(process))))
    statuses: collections.Counter[int] = collections.Counter()
    refusals: list[httpx.Response] = []
    begun = time.monotonic()

    def goes_on() -> bool:
        """For some seconds, and on a busy machine until there is enough to judge by."""
        seconds = time.monotonic() - begun
        return seconds < 4.0 or (statuses[200] + statuses[504] < 20 and seconds < 40.0)

    def hammer(_: int) -> None:
        with process.client() as client:
            while goes_on():
                answer = client.post(
                    "/v1/detect", content=GOOD, headers={"X-Deadline-Ms": str(deadline)}
                )
                statuses[answer.status_code] += 1
                if answer.status_code == 503:
                    refusals.append(answer)
                    time.sleep(0.1)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(hammer, range(20)))
    assert set(statuses) <= {200, 503, 504}
    assert statuses[200] > 0
    assert refusals, "there was no overload"
    assert statuses[504] <= statuses[200] / 2, "most of what was let in was in time"
    for refused in refusals:
        assert int(refused.headers["retry-after"]) >= 1
        assert "cannot be met" in refused.json()["detail"]
    until(lambda: metric(process, "retinaserve_pictures_held") == 0)
    with process.client() as client:
        assert client.post("/v1/detect", content=GOOD).status_code == 200


def test_overload_refusal_precedes_the_body(serve: Serve, slow_models: Path) -> None:
    process = serve(slow_models, max_queue_size=1)

    def post_many() -> None:
        with process.client() as client:
            client.post("/v1/detect/batch", files=[("files", GOOD)] * 3)

    thread = threading.Thread(target=post_many)
    thread.start()
    until(lambda: metric(process, "retinaserve_pictures_held") >= 1)
    with socket.create_connection(("127.0.0.1", process.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n")
        answer = connection.makefile("rb").readline()
    assert answer.startswith(b"HTTP/1.1 503 ")
    thread.join(60)


def test_single_image_overtakes_a_batch(serve: Serve, slow_models: Path) -> None:
    process = serve(slow_models, request_timeout_ms=900_000)
    done: dict[str, float] = {}
    many: list[httpx.Response] = []

    def post_many() -> None:
        with process.client(timeout=300.0) as client:
            files = [("files", (str(i), GOOD)) for i in range(8)]
            many.append(client.post("/v1/detect/batch", files=files))
        done["many"] = time.monotonic()

    thread = threading.Thread(target=post_many)
    thread.start()
    until(lambda: metric(process, "retinaserve_queue_depth") >= 2)
    with process.client() as client:
        assert client.post("/v1/detect", content=GOOD).status_code == 200
    done["one"] = time.monotonic()
    thread.join(300)
    assert done["one"] < done["many"]
    (answer,) = many
    assert [each["status"] for each in answer.json()["results"]] == [200] * 8

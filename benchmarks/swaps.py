"""What a swap between two versions of a model costs those who are being served meanwhile.

    python benchmarks/swaps.py                          # bundled model against a variant of itself
    python benchmarks/swaps.py --one A.onnx --two B.onnx --swaps 10

Each swap loads one version, makes it the default and unloads the other, under closed-loop clients.
Checked: no request fails, every answer is the one that the version which it names gives, only the
new version answers what is asked after a swap, and memory returns to its level.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import shutil
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import onnx
from serving import Running, served

from service.http.auth.keys import new_key
from service.imaging.canvas import Buckets, ShortSide, Size
from service.imaging.samples import draw_smear
from service.runtime.artifact import read_artifact, scan_repository, set_metadata
from service.settings import bundled_models

NAME = "model"
IMAGES = 8
PIXELS, SCORE = 0.5, 1e-3
"""How far answers of one version may lie apart."""
SETTLED_SHARE = 0.1
"""Of the memory of one version: how far above its level memory may end."""


class Answer(NamedTuple):
    """One answered request."""

    asked: float
    seconds: float
    status: int
    version: int | None
    right: bool


class Client:
    """One keep-alive connection with a key."""

    def __init__(self, url: str, key: str) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.netloc, timeout=300)
        self._headers = {"Authorization": f"Bearer {key}"}

    def rest(self) -> None:
        """Close; the next request opens it again. Idle ones are closed by the service."""
        self._connection.close()

    def post(self, path: str, body: bytes = b"") -> tuple[int, dict[str, Any]]:
        self._connection.request("POST", path, body, self._headers)
        answer = self._connection.getresponse()
        return answer.status, json.loads(answer.read())


class Load:
    """Clients that never stop asking."""

    def __init__(self, url: str, key: str, images: list[bytes]) -> None:
        self.answers: list[Answer] = []
        self._url, self._key, self._images = url, key, images
        asker = Client(url, key)
        self._expected = [
            {v: asker.post(f"/v1/detect?version={v}", data)[1]["detections"] for v in (1, 2)}
            for data in images
        ]
        for each in self._expected:
            if same(each[1], each[2]):
                raise SystemExit("both versions give the same answer: nothing to tell them by")
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, clients: int) -> None:
        self._stop.clear()
        self._threads = [
            threading.Thread(target=self._ask, args=(index,)) for index in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, index: int) -> None:
        client = Client(self._url, self._key)
        while not self._stop.is_set():
            index = (index + 1) % len(self._images)
            asked = time.monotonic()
            status, document = client.post("/v1/detect", self._images[index])
            seconds = time.monotonic() - asked
            version = document["model"]["version"] if status == 200 else None
            right = version is not None and same(
                document["detections"], self._expected[index][version]
            )
            self.answers.append(Answer(asked, seconds, status, version, right))


def same(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> bool:
    """Whether two answers are of one version; near-ties may change places."""
    if len(one) != len(two):
        return False
    rest = list(two)
    for each in one:
        match = next((other for other in rest if _equal(each, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def _equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return (
        one["label"] == two["label"]
        and abs(one["score"] - two["score"]) <= SCORE
        and all(abs(one["box"][side] - two["box"][side]) <= PIXELS for side in one["box"])
    )


def drawn(seed: int) -> bytes:
    """An image, as JPEG."""
    content = io.BytesIO()
    draw_smear(seed)[0].save(content, "JPEG", quality=90)
    return content.getvalue()


def variant(path: Path) -> bytes:
    """The same weights on smaller canvases: another answer from a file of the same size."""
    model = onnx.load(path)
    metadata = read_artifact(path).metadata
    rule = metadata.canvas
    canvas: Buckets | ShortSide
    if isinstance(rule, Buckets):
        sizes = tuple(Size(each.height - 64, each.width - 64) for each in rule.sizes)
        canvas = rule.model_copy(update={"sizes": sizes})
    else:
        canvas = rule.model_copy(update={"short": rule.short - 64, "long": rule.long - 64})
    set_metadata(model, metadata.model_copy(update={"canvas": canvas}))
    return bytes(model.SerializeToString())


def place(folder: Path, one: Path, two: Path | None) -> Path:
    """A repository with both versions."""
    for version in (1, 2):
        (folder / NAME / str(version)).mkdir(parents=True)
    shutil.copyfile(one, folder / NAME / "1" / "model.onnx")
    second = folder / NAME / "2" / "model.onnx"
    if two is None:
        second.write_bytes(variant(one))
    else:
        shutil.copyfile(two, second)
    return folder


def swap(admin: Client, to: int) -> float:
    """Seconds until the last request for the other version may have begun."""
    started = time.monotonic()
    for action, version in (("load", to), ("default", to), ("unload", 3 - to)):
        status, document = admin.post(f"/v1/models/{NAME}/{action}?version={version}")
        if status != 200:
            raise SystemExit(f"{action} of version {version}: {document['detail']}")
    admin.rest()
    return time.monotonic() - started


def settled(server: Running, seconds: float = 5.0) -> float:
    """Memory in MB once it has stopped to fall."""
    lowest, since = server.resident(), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.1)
        now = server.resident()
        if now < lowest - 1:
            lowest, since = now, time.monotonic()
    return lowest


def latencies(load: Load, begun: float, ended: float) -> list[float]:
    """Milliseconds of what was asked between two moments."""
    return [each.seconds * 1e3 for each in load.answers if begun <= each.asked <= ended]


def measure(server: Running, admin: Client, load: Load, arguments: argparse.Namespace) -> bool:
    """All swaps. Whether all that was promised was kept."""
    both = settled(server)
    swap(admin, 1)
    load.start(arguments.clients)
    time.sleep(arguments.pause)
    load.stop()
    quiet = [each.seconds * 1e3 for each in load.answers]
    level = settled(server)
    print(f"memory: {both:.0f} MB with both versions, {level:.0f} MB with one")
    print(f"without swaps: p50 {statistics.median(quiet):.0f} ms, longest {max(quiet):.0f} ms")
    print("| swap | to | seconds | requests meanwhile | p50 ms | longest ms |")
    print("|---|---|---|---|---|---|")
    load.start(arguments.clients)
    late = 0
    for index in range(arguments.swaps):
        to = 2 - index % 2
        begun = time.monotonic()
        seconds = swap(admin, to)
        ended = time.monotonic()
        time.sleep(arguments.pause)
        late += sum(each.asked > ended and each.version != to for each in list(load.answers))
        meanwhile = latencies(load, begun, ended)
        median, longest = statistics.median(meanwhile), max(meanwhile)
        print(
            f"| {index + 1} | {to} | {seconds:.2f} | {len(meanwhile)} | {median:.0f} "
            f"| {longest:.0f} |",
            flush=True,
        )
    load.stop()
    end = settled(server)
    failed = sum(each.status != 200 for each in load.answers)
    wrong = sum(not each.right for each in load.answers) - failed
    print(
        f"{len(load.answers)} requests: {failed} failed, {wrong} not as their version answers, "
        f"{late} by the old version after a swap; memory {level:.0f} MB before, {end:.0f} MB after"
    )
    return not failed and not wrong and not late and end - level < SETTLED_SHARE * (both - level)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=Path, help="model file; default: the bundled one")
    parser.add_argument("--two", type=Path, help="model file; default: a variant of the first")
    parser.add_argument("--swaps", type=int, default=10)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pause", type=float, default=3.0, help="seconds between swaps")
    arguments = parser.parse_args()
    one = arguments.one or scan_repository(bundled_models())[0].path
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "keys.json")
        admin_key = new_key(keys, "admin", admin=True)
        models = place(Path(folder, "models"), one, arguments.two)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = {"api_keys_file": keys, "admin_port": port, "request_timeout_ms": 60_000}
        with served(models, **settings) as server:
            admin = Client(f"http://127.0.0.1:{port}", admin_key)
            # Answers only once both are loaded: whoever asks again shares the load.
            for version in (1, 2):
                admin.post(f"/v1/models/{NAME}/load?version={version}")
            admin.rest()
            load = Load(server.url, admin_key, [drawn(seed) for seed in range(IMAGES)])
            kept = measure(server, admin, load, arguments)
    if not kept:
        raise SystemExit("not all of it was kept")


if __name__ == "__main__":
    main()

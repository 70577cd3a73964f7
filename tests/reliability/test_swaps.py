"""Model swaps under load: only the version in the response changes."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from service.http.auth.keys import new_key
from tests import tiny_model
from tests.images import encoded, one_red
from tests.reliability.conftest import Process, Serve, until

GOOD = encoded(one_red())
WHITE = {1: 255.0, 2: 510.0}
"""By version: a red square scores 255/white."""
BALLAST = 24
"""MiB of weights of each version."""


@dataclass
class Load:
    """Clients that never stop asking, and what they were told."""

    process: Process
    key: str
    statuses: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def ask(self, stop: threading.Event) -> None:
        with self.process.client(headers={"X-API-Key": self.key}) as client:
            while not stop.is_set():
                answer = client.post("/v1/detect?score_threshold=0.2", content=GOOD)
                self.statuses.append(answer.status_code)
                if answer.status_code == 200:
                    self._check(answer)

    def _check(self, answer: httpx.Response) -> None:
        document = answer.json()
        version = document["model"]["version"]
        self.versions.append(version)
        score = document["detections"][0]["score"]
        if abs(score - 255.0 / WHITE[version]) > 0.01:
            self.wrong.append(f"version {version} scored {score}")

    @contextmanager
    def running(self, clients: int) -> Iterator[None]:
        stop = threading.Event()
        threads = [threading.Thread(target=self.ask, args=(stop,)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)


def admin_url(process: Process) -> str:
    """From the log, which says it once the listener is open."""
    found: list[str] = []

    def said() -> bool:
        found[:] = re.findall(r"administered on (http://\S+)", process.log.read_text())
        return bool(found)

    until(said)
    return found[0]


def swap(admin: httpx.Client, to: int) -> None:
    for action, version in (("load", to), ("default", to), ("unload", 3 - to)):
        answer = admin.post(f"/v1/models/tiny/{action}?version={version}")
        assert answer.status_code == 200, answer.text
    assert answer.json()["serving"] == to


def test_model_swaps_under_load_lose_no_request(serve: Serve, tmp_path: Path) -> None:
    models, keys = tmp_path / "models", tmp_path / "keys.json"
    tiny_model.save(models, version=1, white=WHITE[1], ballast=BALLAST)
    admin_key, key = new_key(keys, "admin", admin=True), new_key(keys, "client", admin=False)
    process = serve(models, api_keys_file=keys, admin_host="localhost", admin_port=0)
    tiny_model.save(models, version=2, white=WHITE[2], ballast=BALLAST)
    load = Load(process, key)
    headers = {"Authorization": f"Bearer {admin_key}"}
    with httpx.Client(base_url=admin_url(process), headers=headers, timeout=60) as admin:
        with load.running(3):
            swap(admin, 2)
            swap(admin, 1)
        level = process.resident()
        with load.running(3):
            for to in (2, 1, 2, 1):
                swap(admin, to)
                seen = len(load.versions)
                until(lambda seen=seen: len(load.versions) > seen + 10)  # type: ignore[misc]
                assert set(load.versions[seen + 5 :]) == {to}, "nothing but the new one serves"
        until(lambda: process.resident() < level + BALLAST * 2**20)
    assert set(load.statuses) == {200}
    assert load.wrong == []
    assert set(load.versions) == {1, 2}
    process.terminate()
    assert process.exit_code() == 0
    assert "Traceback" not in process.log.read_text()

"""Companions: other ways into the service that open and close with it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import httpx
import pytest

from service.engine.service import Service
from service.http.app import create_app
from service.http.listening import AddressError, listen
from service.http.server import Server
from service.settings import Settings
from tests import tiny_model


class Witness:
    """Records its calls and whether the service was still open then."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.seen: list[tuple[str, bool]] = []
        self.seconds: float | None = None
        self.started = asyncio.Event()

    async def start(self) -> None:
        self._note("start")
        self.started.set()

    async def stop(self, seconds: float) -> None:
        self.seconds = seconds
        self._note("stop")
        await asyncio.sleep(0.2)
        self._note("stopped")

    def _note(self, event: str) -> None:
        threads = [worker.thread for worker in self.service.pipeline._devices]
        self.seen.append((event, all(thread.is_alive() for thread in threads)))


class Broken:
    """Fails to close."""

    async def start(self) -> None:
        pass

    async def stop(self, seconds: float) -> None:
        raise OSError("stuck")


async def test_failing_companion_does_not_stop_the_shutdown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model.save(tmp_path)
    app = create_app(Settings(models_dir=tmp_path, device="cpu", drain_seconds=3))
    service: Service = app.state.service
    witness = Witness(service)
    with listen("127.0.0.1", 0) as listener, caplog.at_level(logging.ERROR):
        server = Server(app, companions=[Broken(), witness])
        running = asyncio.create_task(server.serve([listener]))
        async with httpx.AsyncClient() as client:
            port = listener.getsockname()[1]
            answer = await client.get(f"http://127.0.0.1:{port}/healthz")
            assert answer.status_code == 200
        async with asyncio.timeout(60):
            await witness.started.wait()
        server.should_exit = True
        await running
    assert witness.seen == [("start", True), ("stop", True), ("stopped", True)]
    assert witness.seconds == 3
    assert not any(worker.thread.is_alive() for worker in service.pipeline._devices)
    assert "a server failed to stop" in caplog.text, "said, and kept nothing else from closing"


async def test_companion_that_cannot_start_ends_the_server(tmp_path: Path) -> None:
    class Shut(Broken):
        async def start(self) -> None:
            raise AddressError("no door")

    tiny_model.save(tmp_path)
    app = create_app(Settings(models_dir=tmp_path, device="cpu"))
    with listen("127.0.0.1", 0) as listener, pytest.raises(AddressError, match="no door"):
        await Server(app, companions=[Shut()]).serve([listener])
    service: Service = app.state.service
    assert not any(worker.thread.is_alive() for worker in service.pipeline._devices)


def test_busy_port_names_the_remedy() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressError, match=f"port {port}.*set THIS"):
            listen("127.0.0.1", port, remedy="set THIS to another")

"""The real servers, HTTP and gRPC, on loopback: in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx

from service.engine.service import Service
from service.http.app import create_app
from service.http.listening import listen
from service.http.oip.grpc_server import GrpcServer
from service.http.server import Server
from service.settings import Settings

PATIENCE = 60.0
"""Seconds; generous, since the machine may be busy with something else."""


@dataclass(frozen=True)
class Served:
    """Servers that take requests."""

    service: Service
    http: str
    """host:port"""
    grpc: str
    """host:port"""

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://{self.http}", timeout=PATIENCE)


@contextmanager
def served(
    models: Path, *, certificate: Path | None = None, key: Path | None = None, **given: object
) -> Iterator[Served]:
    """Serve a model repository until the block ends."""
    settings = Settings(models_dir=models, device="cpu", **given)  # type: ignore[arg-type]
    app = create_app(settings)
    service: Service = app.state.service
    with ExitStack() as ports:
        listeners = [ports.enter_context(listen("127.0.0.1", 0)) for _ in range(2)]
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in listeners]
        companion = GrpcServer(
            service, app.state.gate, listeners[1], certificate=certificate, key=key
        )
        server = Server(app, companions=[companion])
        thread = threading.Thread(target=server.run, args=([listeners[0]],))
        thread.start()
        try:
            limit = time.monotonic() + PATIENCE
            while not (server.started and service.not_ready() is None):
                assert thread.is_alive()
                assert time.monotonic() < limit, service.not_ready()
                time.sleep(0.01)
            with grpc.insecure_channel(addresses[1]) as channel:
                if certificate is None:
                    grpc.channel_ready_future(channel).result(PATIENCE)
            yield Served(service, *addresses)
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()

"""How an answer leaves: its head with its body, and where there is none yet, at once."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from service.http.connections.httptools_protocol import HttpTools
from tests.reliability.conftest import until

TIMES = 10
SECONDS = 30
HEADERS = [(b"content-type", b"text/plain"), (b"content-length", b"5")]


class App:
    """Answers by path; what is streamed waits until `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        headers = [] if scope["path"] == "/stream" else HEADERS
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["path"] == "/breaks":
            raise RuntimeError("between head and body")
        if scope["path"] == "/ends":
            return
        if scope["path"] == "/stream":
            await asyncio.to_thread(self.go.wait, SECONDS)
        if scope["path"] == "/parts":
            await send({"type": "http.response.body", "body": b"wh", "more_body": True})
            await asyncio.to_thread(self.go.wait, SECONDS)
            await send({"type": "http.response.body", "body": b"ole"})
            return
        await send({"type": "http.response.body", "body": b"whole"})


class Served:
    def __init__(self) -> None:
        self.app = App()
        config = uvicorn.Config(
            self.app,  # type: ignore[arg-type]
            port=0,
            http=HttpTools,
            ws="none",
            lifespan="off",
            log_config=None,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def connect(self) -> socket.socket:
        return socket.create_connection(
            ("127.0.0.1", self.server.servers[0].sockets[0].getsockname()[1]), timeout=SECONDS
        )


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    served.thread.start()
    until(lambda: served.server.started)
    yield served
    served.server.should_exit = True
    served.thread.join(SECONDS)
    assert not served.thread.is_alive()


def ask(client: socket.socket, path: str, method: str = "GET") -> bytes:
    """The first that comes back."""
    client.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return client.recv(65536)


def segments(client: socket.socket) -> int:
    """With data, that came in: `tcpi_data_segs_in` of Linux's <linux/tcp.h>."""
    told = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
    return int.from_bytes(told[152:156], sys.byteorder)


def test_response_head_and_body_are_one_write(served: Served) -> None:
    with served.connect() as client:
        for _ in range(TIMES):
            received = ask(client, "/whole")
            assert received.startswith(b"HTTP/1.1 200 OK\r\n")
            assert received.endswith(b"\r\n\r\nwhole")
        assert segments(client) == TIMES


def test_response_without_body_is_sent_at_once(served: Served) -> None:
    with served.connect() as client:
        for _ in range(2):
            received = ask(client, "/whole", "HEAD")
            assert received.startswith(b"HTTP/1.1 200 OK\r\n")
            assert received.endswith(b"content-length: 5\r\n\r\n")


def test_streaming_response_sends_its_head_at_once(served: Served) -> None:
    served.app.go.clear()
    with served.connect() as client:
        received = ask(client, "/stream")
        assert received.lower().endswith(b"transfer-encoding: chunked\r\n\r\n")
        served.app.go.set()
        assert client.recv(65536).startswith(b"5\r\nwhole\r\n")


def test_streaming_response_sends_chunks_at_once(served: Served) -> None:
    served.app.go.clear()
    with served.connect() as client:
        assert ask(client, "/parts").endswith(b"\r\n\r\nwh")
        served.app.go.set()
        assert client.recv(65536) == b"ole"


@pytest.mark.parametrize("path", ["/breaks", "/ends"])
def test_response_head_is_sent_when_the_body_fails(served: Served, path: str) -> None:
    with served.connect() as client:
        assert ask(client, path).endswith(b"content-length: 5\r\n\r\n")
        assert client.recv(65536) == b""

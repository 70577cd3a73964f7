"""More connections than file descriptors, and clients that stop halfway into TLS."""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from service.http import server
from service.http.app import create_app
from service.http.connections import bounds as connection
from service.http.listening import listen
from service.settings import Settings
from tests.certificates import make_certificate
from tests.images import encoded, one_red
from tests.reliability.conftest import Process, Serve, until

GOOD = encoded(one_red())
FEW = 160
LIMITED = (
    f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({FEW}, {FEW}));"
    "from service.cli import main; main()"
)
HEAD = b"POST /v1/detect HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\n\r\nx"


def crowd(process: Process, sent: bytes, stack: ExitStack) -> None:
    for _ in range(2 * FEW):
        client = stack.enter_context(socket.create_connection(("127.0.0.1", process.port), 30))
        # It may have been closed already.
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)


def ask(process: Process, method: str, path: str, content: bytes | None = None) -> httpx.Response:
    """In a connection of its own."""
    with process.client() as client:
        return client.request(method, path, content=content)


def test_connections_beyond_the_descriptor_limit_are_closed(
    serve: Serve, quick_models: Path
) -> None:
    process = serve(quick_models, program=(sys.executable, "-c", LIMITED))
    with ExitStack() as stack:
        # Those who said nothing make way.
        crowd(process, b"", stack)
        assert [ask(process, "GET", path).status_code for path in ("/healthz", "/readyz")] == [
            200,
            200,
        ]
        until(lambda: ask(process, "POST", "/v1/detect", GOOD).status_code == 200)
    with ExitStack() as stack:
        # Those whose requests are on their way stay.
        crowd(process, HEAD, stack)
        for _ in range(3):
            assert ask(process, "GET", "/readyz").status_code == 200
            refused = ask(process, "POST", "/v1/detect", GOOD)
            assert refused.status_code == 503
            assert "too many connections" in refused.json()["detail"]
            assert refused.headers["retry-after"] == "1"
            assert refused.headers["connection"] == "close"
        assert 'reason="connections"' in ask(process, "GET", "/metrics").text
    until(lambda: ask(process, "POST", "/v1/detect", GOOD).status_code == 200)
    assert process.log.read_text().count(f"nearly all of the {FEW} file descriptors") == 1


@pytest.fixture(scope="module")
def secure(
    quick_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[int, ssl.SSLContext]]:
    """The port of a server over TLS that waits for a second at most, and what trusts it."""
    certificate, key = make_certificate(tmp_path_factory.mktemp("tls"))
    app = create_app(Settings(models_dir=quick_models, device="cpu"))
    with pytest.MonkeyPatch.context() as patch, listen("127.0.0.1", 0) as listener:
        for each in (connection, server):
            patch.setattr(each, "HEAD_SECONDS", 1.0)
        running = server.Server(app, certificate=certificate, key=key)
        thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
        thread.start()
        until(lambda: running.started and app.state.service.not_ready() is None)
        yield listener.getsockname()[1], ssl.create_default_context(cafile=str(certificate))
        running.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def hello(context: ssl.SSLContext) -> bytes:
    """What a client says first."""
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


def test_tls_handshake_times_out(secure: tuple[int, ssl.SSLContext]) -> None:
    port, context = secure
    said = hello(context)
    with ExitStack() as stack:
        silent, halfway, waiting, trickling = (
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            for _ in range(4)
        )
        halfway.sendall(said[: len(said) // 2])
        waiting.sendall(said)
        with contextlib.suppress(ConnectionError):
            for byte in said:
                trickling.sendall(bytes([byte]))
                time.sleep(0.01)
        for client in (silent, halfway, waiting, trickling):
            with contextlib.suppress(ConnectionError):
                while client.recv(65_536):
                    pass


def test_tls_headers_time_out(secure: tuple[int, ssl.SSLContext]) -> None:
    port, context = secure
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as client,
    ):
        client.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        received = b""
        while not received.endswith(b"}"):
            received += client.recv(65_536)
        assert received.startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /hea")
        assert client.recv(65_536) == b""

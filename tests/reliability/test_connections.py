"""Hostile connections: endless headers, unwanted bodies, request smuggling."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from service.http.app import create_app
from service.http.connections import bounds as connection
from service.http.connections.httptools_protocol import HttpTools
from service.settings import Settings
from tests.images import encoded, one_red
from tests.reliability.conftest import Serve, until

GOOD = encoded(one_red())


@pytest.fixture(scope="module")
def port(quick_models: Path) -> Iterator[int]:
    """A server in a thread of this process, with short times."""
    settings = Settings(
        models_dir=quick_models, device="cpu", cpu_inferences=1, max_body_bytes=4_000_000
    )
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=HttpTools, ws="none", log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "HEAD_SECONDS", 1.0)
        patch.setattr(connection, "_STALL_SECONDS", 0.4)
        patch.setattr(connection, "_LINGER_SECONDS", 0.5)
        patch.setattr(connection, "_LAST_SECONDS", 0.2)
        thread.start()
        until(lambda: server.started and app.state.service.not_ready() is None)
        yield server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def ask(port: int, request: bytes) -> bytes:
    """Everything that comes back until the server closes."""
    with connect(port) as client:
        client.sendall(request)
        return read(client)


def read(client: socket.socket) -> bytes:
    received = b""
    while chunk := client.recv(65536):
        received += chunk
    return received


def cut_off(client: socket.socket, piece: bytes, *, times: int, pause: float = 0.0) -> bool:
    """Whether the server ends the connection while the client goes on sending."""
    try:
        for _ in range(times):
            client.sendall(piece)
            time.sleep(pause)
    except ConnectionError:
        return True
    return False


def statuses(received: bytes) -> list[int]:
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]


def post(*headers: str, body: bytes = b"", path: str = "/v1/detect") -> bytes:
    return "\r\n".join((f"POST {path} HTTP/1.1", "Host: x", *headers, "", "")).encode() + body


def assert_serving(port: int) -> None:
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/detect", content=GOOD, timeout=30)
    assert answer.status_code == 200


@pytest.mark.parametrize("sent", [b"", b"G", b"\r\n", b"POST /v1/detect HTTP/1.1\r\nHost: x\r\n"])
def test_incomplete_headers_time_out(port: int, sent: bytes) -> None:
    received = ask(port, sent)
    assert received == b"" or statuses(received) == [400]
    assert_serving(port)


def test_trickling_headers_time_out(port: int) -> None:
    with connect(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        assert cut_off(client, b"X: 1\r\n", times=1000, pause=0.02)


def test_header_timeout_restarts_for_each_request(port: int) -> None:
    with connect(port) as client:
        for _ in range(2):
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert statuses(client.recv(65536)) == [200]
            # Between requests a connection may rest for longer than headers may take.
            time.sleep(1.2)
        client.sendall(b"GET /healthz HTT")
        assert read(client) == b""


@pytest.mark.parametrize("pieces", [1, 1000])
def test_endless_headers_are_431(port: int, pieces: int) -> None:
    with connect(port) as client:
        received = b""
        try:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: ")
            for _ in range(pieces):
                client.sendall(b"x" * (1_000_000 // pieces))
            received = read(client)
        except ConnectionError:
            received = b""
    assert statuses(received) in ([], [431])
    assert_serving(port)


def test_large_headers_of_proxies_are_accepted(port: int) -> None:
    answer = httpx.get(f"http://127.0.0.1:{port}/healthz", headers={"X": "x" * 30_000})
    assert answer.status_code == 200


def test_httptools_headers_and_pipelining_are_bounded(port: int) -> None:
    head = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
    many = b"".join(b"X-%d: 1\r\n" % number for number in range(200))
    received = ask(port, head + many + b"\r\n")
    assert statuses(received) == [431]
    assert b"application/problem+json" in received
    assert statuses(ask(port, head + b"X: " + b"x" * 70_000 + b"\r\n\r\n")) == [431]
    with connect(port) as client:
        assert cut_off(client, (head + b"\r\n") * 100, times=1000, pause=0.02)
    assert_serving(port)


def test_pipelined_requests_are_answered_in_order(port: int) -> None:
    ahead = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /nothing HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert statuses(ask(port, ahead + last)) == [200, 404, 200]


def test_disconnect_with_pipelined_requests_logs_no_error(
    port: int, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(port) as client:
        client.sendall(post(f"Content-Length: {len(GOOD)}", body=GOOD) * 4)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    for _ in range(3):
        assert_serving(port)
    assert [each.getMessage() for each in caplog.records if each.levelname == "ERROR"] == []


def test_large_invalid_request_is_refused_once(port: int, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(20):
        with connect(port) as client:
            client.sendall(b"no request\r\n" + b"x" * 70_000)
            try:
                received = read(client)
            except ConnectionError:
                received = b""
        assert statuses(received) in ([], [400], [431])
    assert_serving(port)
    assert [each.getMessage() for each in caplog.records if each.levelname == "ERROR"] == []


@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)])
@pytest.mark.parametrize("path", ["/v1/detect", "/v1/detect/batch", "/nothing"])
def test_request_with_invalid_chunks_is_refused_once(
    port: int, caplog: pytest.LogCaptureFixture, path: str, expect: tuple[str, ...]
) -> None:
    headers = ("Transfer-Encoding: chunked", "Content-Type: image/jpeg", *expect)
    invalid = post(*headers, path=path) + b"zz\r\n"
    for _ in range(5):
        received = ask(port, invalid)
        assert statuses(received) == [400], received
    assert_serving(port)
    assert [each.getMessage() for each in caplog.records if each.levelname == "ERROR"] == []


@pytest.mark.parametrize("length", [100_000, 40_000_000])
def test_early_response_reaches_a_sending_client(port: int, length: int) -> None:
    """Whoever sends all of the body first must find the answer, and not a reset."""
    body = bytes(length)
    for path, status in (("/v1/detect?score_threshold=7", 422), ("/nothing", 404)):
        with connect(port) as client:
            client.sendall(post(f"Content-Length: {length}", path=path))
            # The answer is there before the first byte of the body.
            begin = client.recv(65536)
            assert statuses(begin) == [status]
            assert b"connection: close" in begin.lower()
            try:
                client.sendall(body)
            except ConnectionError:
                assert length > 1_000_000, "a small rest of a body is taken"
            else:
                assert length < 1_000_000, "megabytes are not read for a response that is known"
    assert_serving(port)


def test_early_response_closes_without_the_body(port: int) -> None:
    with connect(port) as client:
        client.sendall(post("Content-Length: 1000000", path="/nothing"))
        assert statuses(read(client)) == [404]
        assert cut_off(client, b"x", times=400, pause=0.05)


def test_error_after_the_body_keeps_the_connection(port: int) -> None:
    with connect(port) as client:
        for path in ("/nothing", "/v1/detect?score_threshold=7", "/v1/detect"):
            client.sendall(post(f"Content-Length: {len(GOOD)}", body=GOOD, path=path))
            received = client.recv(65536)
            assert b"connection: close" not in received.lower(), path
    assert_serving(port)


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n"


def test_chunked_bodies_and_trailers_are_accepted(port: int) -> None:
    request = post("Transfer-Encoding: chunked", "Connection: close")
    small = [GOOD[start : start + 7] for start in range(0, len(GOOD), 7)]
    assert statuses(ask(port, request + chunked(*small) + b"\r\n")) == [200]
    trailer = chunked(GOOD) + b"X-Checksum: 1\r\nAuthorization: Bearer x\r\n\r\n"
    assert statuses(ask(port, request + trailer)) == [200]


@pytest.mark.parametrize(
    "endless",
    [b"1\r\nx\r\n", b"1;" + b"x" * 60 + b"\r\nx\r\n", b"0\r\n" + b"A: b\r\n" * 1000],
    ids=["single bytes", "extensions", "trailers"],
)
def test_endless_chunk_framing_is_cut_off(port: int, endless: bytes) -> None:
    with connect(port) as client:
        # Little is on its way at a time, so that all cannot be sent before the server has read it;
        # and the body stays smaller than a body may be.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        client.sendall(post("Transfer-Encoding: chunked"))
        piece = endless * 100
        assert cut_off(client, piece, times=20_000_000 // len(piece))
    assert_serving(port)


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: 4", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Content-Length: 4"),
        ("Content-Length: 4", "Content-Length: 5"),
        ("Content-Length: +4",),
        ("Content-Length: 4 4",),
        ("Content-Length: 0x4",),
        ("Content-Length: -1",),
        ("Content-Length: 99999999999999999999999999",),
        ("Transfer-Encoding: identity",),
        ("Transfer-Encoding: chunked, identity",),
        ("Transfer-Encoding: xchunked",),
        ("Transfer-Encoding : chunked",),
        ("X: 1\n\n",),
        ("Content-Length:\n4",),
    ],
)
def test_smuggled_request_is_not_answered(port: int, headers: tuple[str, ...]) -> None:
    """Where two ends could disagree on where a body ends, the connection is over."""
    hidden = b"0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(port) as client:
        client.sendall(post(*headers, body=hidden, path="/nothing"))
        client.shutdown(socket.SHUT_WR)
        received = read(client)
    assert 200 not in statuses(received), received
    assert_serving(port)


def test_response_header_injection_is_refused(port: int) -> None:
    request = (
        b"GET /healthz%0d%0aX-Evil:%201 HTTP/1.1\r\nHost: x\r\n"
        b"X-Request-Id: a\tb\r\nConnection: close\r\n\r\n"
    )
    received = ask(port, request)
    assert b"\r\nx-evil" not in received.lower()
    assert statuses(received) == [404]


HIDDEN = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
UPGRADES = {
    "curl": ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQ"),
    "java": ("Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAEAAEAA", "Upgrade: h2c"),
    "websocket": ("Upgrade: websocket", "Connection: keep-alive, Upgrade", "Sec-WebSocket-Key: x"),
    "nothing": ("Connection: Upgrade",),
}


@pytest.mark.parametrize("client", UPGRADES)
def test_upgrade_request_is_served_with_its_body(port: int, client: str) -> None:
    headers = UPGRADES[client]
    whole = post(*headers, f"Content-Length: {len(GOOD)}", body=GOOD)
    in_chunks = post(*headers, "Transfer-Encoding: chunked", body=chunked(GOOD[:50], GOOD[50:]))
    for request in (whole, in_chunks + b"\r\n"):
        assert statuses(answers(port, request)) == [200, 404]
        # The same, the body behind the headers, and the bytes one by one.
        head, _, body = request.partition(b"\r\n\r\n")
        assert statuses(answers(port, head + b"\r\n\r\n", body)) == [200, 404]
        assert statuses(answers(port, *(bytes([each]) for each in request))) == [200, 404]
        assert statuses(answers(port, request * 3)) == [200, 200, 200, 404]
    assert_serving(port)


def answers(port: int, *pieces: bytes) -> bytes:
    """Return what comes for pieces that are sent one by one, and for a last request behind them."""
    last = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with connect(port) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.02 if len(pieces) < 10 else 0)
        client.sendall(last)
        return read(client)


@pytest.mark.parametrize("client", UPGRADES)
@pytest.mark.parametrize("path", ["/v1/detect", "/nothing"])
def test_upgrade_request_body_is_not_parsed_as_request(port: int, client: str, path: str) -> None:
    length = f"Content-Length: {len(HIDDEN)}"
    request = post(*UPGRADES[client], length, body=HIDDEN, path=path)
    head, body = request[: -len(HIDDEN)], HIDDEN
    for pieces in ((request,), (head, body), (head, body[:10], body[10:])):
        assert 200 not in statuses(answers(port, *pieces))


@pytest.mark.parametrize("client", UPGRADES)
def test_upgrade_request_with_expect_gets_100(port: int, client: str) -> None:
    head = post(*UPGRADES[client], f"Content-Length: {len(GOOD)}", "Expect: 100-continue")
    with connect(port) as connection:
        connection.sendall(head)
        assert statuses(connection.recv(65536)) == [100]
        connection.sendall(GOOD)
        assert statuses(connection.recv(65536)) == [200]


@pytest.mark.parametrize("headers", [(), (f"Content-Length: {len(HIDDEN)}",), UPGRADES["curl"]])
def test_connect_method_is_refused(port: int, headers: tuple[str, ...]) -> None:
    begin = "\r\n".join(("CONNECT other:443 HTTP/1.1", "Host: other", *headers, "", "")).encode()
    assert statuses(ask(port, begin + HIDDEN)) in ([404], [501])
    with connect(port) as client:
        client.sendall(begin)
        received = read(client) if not headers else client.recv(65536)
        assert statuses(received) in ([404], [501])


def test_http2_preface_is_refused(port: int) -> None:
    assert 200 not in statuses(ask(port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))


@pytest.mark.parametrize("pieces", [1, 2])
def test_half_closed_connection_gets_its_response(port: int, pieces: int) -> None:
    request = post(f"Content-Length: {len(GOOD)}", body=GOOD)
    for each in (request, request * 3, b"GET /healthz HTTP/1.0\r\n\r\n"):
        with connect(port) as client:
            client.sendall(each)
            if pieces == 2:
                # Seen together with the request by the server, and after it.
                time.sleep(0.01)
            client.shutdown(socket.SHUT_WR)
            received = read(client)
        assert statuses(received) == [200] * (3 if each == request * 3 else 1)
    assert_serving(port)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n",
        post("Content-Length: 1000", body=b"x" * 999),
        post("Transfer-Encoding: chunked", body=b"5\r\nabcde\r\n"),
        post("Content-Length: 1000", "Expect: 100-continue"),
        post("Content-Length: 1000", path="/nothing"),
    ],
)
def test_half_close_within_a_request_ends_it(port: int, sent: bytes) -> None:
    with connect(port) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        assert 200 not in statuses(read(client))
    assert_serving(port)


def test_half_closed_client_is_probed_while_it_waits(serve: Serve, slow_models: Path) -> None:
    """Only a write tells whether it has closed the whole connection."""
    process = serve(slow_models, request_timeout_ms=600_000)
    request = post(f"Content-Length: {len(GOOD)}", body=GOOD)
    waiting = [request] * 10 + [request.replace(b"HTTP/1.1", b"HTTP/1.0")] * 2
    clients = [connect(process.port) for _ in waiting]
    for client, each in zip(clients, waiting, strict=True):
        client.sendall(each)
        client.shutdown(socket.SHUT_WR)
    received = [statuses(read(client)) for client in clients]
    assert all(each[-1] == 200 for each in received)
    assert {100} == {status for each in received[:10] for status in each[:-1]}
    assert received[10:] == [[200], [200]], "HTTP/1.0 has no such answer"
    for client in clients:
        client.close()


def test_half_close_after_a_response_ends_at_once(port: int) -> None:
    with connect(port) as client:
        client.sendall(HIDDEN)
        assert statuses(client.recv(65536)) == [200]
        client.shutdown(socket.SHUT_WR)
        assert read(client) == b""


def test_half_close_within_a_pipelined_request_keeps_the_first_response(port: int) -> None:
    with connect(port) as client:
        client.sendall(post(f"Content-Length: {len(GOOD)}", body=GOOD) + b"GET /healthz HT")
        client.shutdown(socket.SHUT_WR)
        assert statuses(read(client)) == [200]


def form(*images: bytes) -> bytes:
    """Return a form for /v1/detect/batch, with the boundary "b"."""
    begin = b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\n'
    return b"".join(begin + each + b"\r\n" for each in images) + b"--b--\r\n"


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_http_1_0_response_has_no_chunks_and_closes(port: int, connection: str) -> None:
    body = form(GOOD, b"rubbish", GOOD)
    head = (
        "POST /v1/detect/batch HTTP/1.0",
        f"Connection: {connection}",
        "Accept: application/x-ndjson",
        "Content-Type: multipart/form-data; boundary=b",
        f"Content-Length: {len(body)}",
        "Expect: 100-continue",
    )
    received = ask(port, "\r\n".join((*head, "", "")).encode() + body)
    assert statuses(received) == [200]
    headers, _, lines = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in headers.lower()
    assert b"connection: close" in headers.lower()
    found = [json.loads(line) for line in lines.splitlines()]
    assert sorted(each["status"] for each in found) == [200, 200, 415]


def test_http_1_0_gets_no_100_continue(port: int) -> None:
    with connect(port) as client:
        head = f"POST /v1/detect HTTP/1.0\r\nContent-Length: {len(GOOD)}\r\n"
        client.sendall(head.encode() + b"Expect: 100-continue\r\n\r\n")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(30)
        client.sendall(GOOD)
        assert statuses(read(client)) == [200]


def test_unread_response_is_cut_off(port: int) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.settimeout(30)
        request = b"GET /docs-assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
        client.sendall(request * 8)
        assert cut_off(client, b"\r\n", times=400, pause=0.05)
    assert_serving(port)


def test_slow_bodies_do_not_block_others(serve: Serve, quick_models: Path) -> None:
    process = serve(quick_models)
    slow = [connect(process.port) for _ in range(200)]
    for client in slow:
        client.sendall(post("Content-Length: 100000"))
    with process.client() as good:
        for _ in range(2):
            for client in slow:
                client.sendall(b"x")
            for _ in range(20):
                assert good.post("/v1/detect", content=GOOD).status_code == 200
            time.sleep(1)
    for client in slow:
        client.close()

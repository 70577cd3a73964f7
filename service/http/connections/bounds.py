"""Bounds on an HTTP connection.

uvicorn waits for a request's headers without a timeout, accepts any number and size of them, and
keeps reading the rest of a body after the response. Here each of these has a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import is_ssl

from service.http.connections.client import Client, set_client
from service.http.connections.descriptors import DescriptorLimit
from service.http.problems import MEDIA_TYPE, http_problem

HEAD_SECONDS: Final = 10.0
"""Longest time from the first byte of a request (for the first one: from the connection) to the end
of its headers."""
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
HEAD_BYTES: Final = 65_536
HEAD_FIELDS: Final = 100

_DRAIN_BYTES: Final = 65_536
"""Bytes of a body that are read after a response that did not wait for them."""
_LINGER_SECONDS: Final = 2.0
"""How long such a connection stays open: closed with unread bytes it would be reset, which can
overtake the response."""
_LAST_SECONDS: Final = 0.5
"""How long it stays open once it is no longer read."""

_FRAMING_BYTES: Final = 131_072
_FRAMING_SHARE: Final = 0.25
"""Bytes of a body's framing (chunk sizes and extensions, trailers) that are accepted: these, and
a share of the body. A body in chunks of one byte takes the time of a large one."""

_PROBE_SECONDS: Final = 0.5
"""When a half-closed connection is first probed; then after twice the time, and so on."""

_STALL_SECONDS: Final = 20.0
_STALL_BYTES: Final = 16_384
"""A client must read this many bytes of a waiting response in that time."""


def is_old(version: str) -> bool:
    """Return whether an HTTP version has neither chunks nor 1xx responses."""
    return version in ("0.9", "1.0")


def refusal(status: int, detail: str) -> bytes:
    """Return the response to bytes that are not a request."""
    document = http_problem(status, detail, instance="", request_id="-")
    content = orjson.dumps(document)
    head = (
        f"HTTP/1.1 {status} {document['title']}\r\ncontent-type: {MEDIA_TYPE}\r\n"
        f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + content


class Bounded(HttpToolsProtocol):
    """uvicorn's protocol with bounds on what happens around a request."""

    # A RequestResponseCycle, of which `track` replaces parts.
    cycle: Any
    server_state: Any

    def __init__(self, *args: Any, limit: DescriptorLimit | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limit = limit
        self._idle_since = time.monotonic()
        self._requests: list[tuple[Any, Client]] = []
        """Requests without a complete response; several where a client pipelines them."""
        self._one_request = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._half_closed = False
        self.lingering = False
        self._drained = 0
        self._framing = 0
        self._body = 0

    def connection_made(  # type: ignore[override]
        self, transport: asyncio.Transport
    ) -> None:
        """Start the timer of the headers."""
        super().connection_made(transport)
        if self._limit is not None:
            descriptor = transport.get_extra_info("socket").fileno()
            others = (each for each in self.server_state.connections if each is not self)
            if not self._limit.has_room(descriptor, others):
                self.app = self._limit.probes_only(self.app)
                self._one_request = True
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers, and tell the requests without a response."""
        for timer in (
            self._head_timer,
            self._linger_timer,
            self._stall_timer,
            self._probe_timer,
        ):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._disconnect()

    def data_received(self, data: bytes) -> None:
        """Parse a request, or discard the rest of a body."""
        if self.lingering:
            self._drain(len(data))
            return
        cycle = self.cycle
        before = 0 if cycle is None else len(cycle.body)
        super().data_received(data)
        if not self.transport.is_closing():
            self._count_framing(cycle, before, len(data))

    def time_head(self, is_open: bool) -> None:
        """Start the headers' timer, or cancel it: `is_open` says whether they are incomplete."""
        if not is_open:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def eof_received(self) -> Any:
        """Return whether to keep the connection open, for responses to complete requests.

        A client may close its side after its last request. TLS connections close as a whole.
        """
        unanswered = self._unanswered()
        if not unanswered or self.lingering or self.cycle.more_body or is_ssl(self.transport):
            return False
        self._half_closed = True
        self._probe_timer = self.loop.call_later(_PROBE_SECONDS, self._probe, _PROBE_SECONDS)
        return True

    def track(self, cycle: Any) -> None:
        """Add a Client to the scope, and close the connection after a last response."""
        client = Client(cycle)
        set_client(cycle.scope, client)
        self._requests.append((cycle, client))
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]] = cycle.send
        # Where client and server may disagree on the end of a body, the bytes after it are not a
        # request (RFC 9112, 6.1); nor are those sent ahead through a refused tunnel.
        names = {name for name, _ in cycle.scope["headers"]}
        last = (
            self._one_request
            or {b"content-length", b"transfer-encoding"} <= names
            or cycle.scope["method"] == "CONNECT"
        )
        has_body = cycle.scope["method"] != "HEAD"
        old = is_old(cycle.scope["http_version"])
        view = _Transport(self, cycle)

        async def send_and_close(message: MutableMapping[str, Any]) -> None:
            nonlocal old
            if not cycle.response_started:
                headers = message.get("headers", ())
                has_length = any(name == b"content-length" for name, _ in headers)
                view.hold = has_body and has_length
                old = old and not has_length
                if old:
                    # HTTP/1.0 has no chunks: the body ends with the connection.
                    cycle.chunked_encoding = False
                if last or cycle.more_body:
                    message["headers"] = [
                        *(each for each in headers if each[0] != b"connection"),
                        (b"connection", b"close"),
                    ]
            elif old:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        cycle.send = send_and_close
        cycle.transport = view

    def refuse(self, status: int, detail: str) -> None:
        """Respond once to bytes that are not a request, unless another response has started."""
        if self.lingering:
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(refusal(status, detail))
            self._disconnect()
            self.linger()
        else:
            self.transport.close()

    def linger(self) -> None:
        """Close the sending side, and give the client time to read the response."""
        self.lingering = True
        if self.transport.can_write_eof():
            # The client may have reset the connection.
            with contextlib.suppress(OSError):
                self.transport.write_eof()
        self.flow.resume_reading()
        self._linger_timer = self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    @property
    def idle_since(self) -> float | None:
        """When the wait for headers began, on `time.monotonic`; None during a request."""
        idle = self.cycle is None or self.cycle.response_complete
        return self._idle_since if idle else None

    def abort(self) -> None:
        """Close the connection at once."""
        self.transport.abort()

    def on_response_complete(self) -> None:
        """Read the next request, unless the connection lingers."""
        self._idle_since = time.monotonic()
        self._requests = self._unanswered()
        if self.lingering:
            self.server_state.total_requests += 1
            return
        super().on_response_complete()
        if self._half_closed and not self._unanswered():
            self.transport.close()

    def pause_writing(self) -> None:
        """Start the stall timer: the client reads slower than the response is written."""
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        """Cancel the stall timer."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _disconnect(self) -> None:
        """End the requests without a response: nothing more is sent on this connection."""
        for cycle, client in self._unanswered():
            # uvicorn marks only the newest of several.
            cycle.disconnected = True
            client.disconnect()

    def _unanswered(self) -> list[tuple[Any, Client]]:
        return [each for each in self._requests if not each[0].response_complete]

    def _probe(self, waited: float) -> None:
        """Write to a client that closed its side `waited` seconds ago.

        A client that closed the whole connection responds to the write with a reset.
        """
        for cycle, _ in self._unanswered()[:1]:
            if not cycle.response_started and not is_old(cycle.scope["http_version"]):
                # Any number of these may precede a response (RFC 9110, 15.2).
                self.transport.write(_CONTINUE)
        self._probe_timer = self.loop.call_later(waited, self._probe, 2 * waited)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            # The next request, pipelined behind one without a response.
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _drain(self, size: int) -> None:
        self._drained += size
        if self._drained > _DRAIN_BYTES and self._linger_timer is not None:
            self.flow.pause_reading()
            self._linger_timer.cancel()
            self._linger_timer = self.loop.call_later(_LAST_SECONDS, self.transport.close)

    def _count_framing(self, cycle: Any, before: int, received: int) -> None:
        if cycle is None or cycle is not self.cycle or not cycle.more_body:
            self._framing = self._body = 0
            return
        body = len(cycle.body) - before
        self._body += body
        self._framing += received - body
        if self._framing > _FRAMING_BYTES + _FRAMING_SHARE * self._body:
            self.transport.abort()

    def _watch_stall(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(_STALL_SECONDS, self._check_stall, size)

    def _check_stall(self, before: int) -> None:
        if self.transport.get_write_buffer_size() > before - _STALL_BYTES:
            self.transport.abort()
        else:
            self._watch_stall()


class _Transport:
    """A request's view of the transport.

    The head of a response is written together with the first piece of its body, and closing before
    the request's body has arrived becomes lingering.
    """

    def __init__(self, connection: Bounded, cycle: Any) -> None:
        self._connection = connection
        self._cycle = cycle
        self._held = b""
        self.hold = False
        """Whether the next write waits for the one after it."""

    def write(self, data: bytes) -> None:
        if self.hold:
            # Two system calls, and waking the client twice, cost more than a copy.
            self._held, self.hold = data, False
            return
        held, self._held = self._held, b""
        self._connection.transport.write(held + data)

    def is_closing(self) -> bool:
        return self._connection.lingering or self._connection.transport.is_closing()

    def close(self) -> None:
        if self._held:
            self.write(b"")
        if self._cycle.more_body and self._cycle.response_complete:
            self._connection.linger()
        else:
            self._connection.transport.close()

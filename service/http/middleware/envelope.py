"""What every request goes through: its id, its line in the log, its count, its last resort."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, cast

from starlette._utils import get_route_path
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.http.bodies import ClientGone
from service.http.problems import http_problem, written
from service.observability.metrics import Metrics
from service.observability.record import Record, current
from service.observability.request_id import ID, new_id, request_id
from service.observability.tracing import Tracing

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_log = logging.getLogger("retinaserve.access")
_error_log = logging.getLogger("retinaserve.error")
_PROBES: Final = frozenset(
    {"/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"}
)
_UNMATCHED: Final = "unmatched"
_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
"""Others a client may make up: metrics count them as one."""
_CLIENT_GONE: Final = 499
"""Status in log and metrics of a request whose client did not wait; nothing is sent."""
_LONGEST_TARGET: Final = 8192
"""Bytes of a path with its query. It takes the event loop up to two milliseconds to parse them."""
_LONGEST_PARSED: Final = 2048
_PARSED: Final = frozenset(
    {
        b"accept",
        b"access-control-request-headers",
        b"authorization",
        b"content-encoding",
        b"content-type",
        b"if-none-match",
        b"range",
        b"traceparent",
        b"tracestate",
        b"x-api-key",
        b"x-deadline-ms",
    }
)
"""Header fields whose values are parsed, which takes the event loop up to a millisecond for as many
bytes. Others, such as cookies, may be as large as the server takes them."""


class Envelope:
    """Around everything that answers, plain ASGI: it adds some microseconds."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        request_id.set(exchange.record.request_id)
        current.set(exchange.record)
        excess = _excess(scope)
        span = self._begin_span(exchange) if excess is None else None
        self._metrics.in_progress += 1
        try:
            if excess is None:
                await self._answer(exchange)
            else:
                await exchange.send_problem(*excess)
        finally:
            self._metrics.in_progress -= 1
            self._finish(exchange, span)

    async def _answer(self, exchange: _Exchange) -> None:
        try:
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except ClientGone:
            pass
        except asyncio.CancelledError:
            # The server stops, and this request did not even arrive by the end of the drain.
            if exchange.begun:
                raise
            await exchange.send_problem(503, "the server stops; try again later")
        except Exception:
            _error_log.exception("the request failed in a way that nobody foresaw")
            if exchange.begun:
                raise
            # It tells nothing but the id under which the log tells all.
            name = exchange.record.request_id
            detail = f"something went wrong; the server's log has it under request {name}"
            await exchange.send_problem(500, detail)

    def _finish(self, exchange: _Exchange, span: Span | None) -> None:
        record, status = exchange.record, exchange.status
        template, method = exchange.route()
        refused = status >= HTTPStatus.BAD_REQUEST and status != _CLIENT_GONE
        # Errors of our own have been counted where they arose; a probe's are no refusals.
        if refused and not record.reasons and template not in _PROBES:
            self._metrics.count_status(status)
        seconds = time.monotonic() - record.started
        self._metrics.observe_request(
            template, method, status, seconds=seconds, body_bytes=record.body_bytes
        )
        # Probes come every few seconds for ever; only their failures are worth a line.
        level = logging.DEBUG if template in _PROBES and status == HTTPStatus.OK else logging.INFO
        if _log.isEnabledFor(level):
            _write_line(exchange, level, template, round(seconds * 1e3, 1))
        if span is not None:
            assert self._tracing is not None, "it began the span"
            self._tracing.finish(
                span,
                record,
                f"{method} {template}",
                exchange.attributes(template),
                failed=status >= HTTPStatus.INTERNAL_SERVER_ERROR,
            )

    def _begin_span(self, exchange: _Exchange) -> Span | None:
        scope = exchange.scope
        if self._tracing is None or scope["path"] in _PROBES:
            return None
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        return self._tracing.begin(exchange.record, scope["method"], headers)


class _Exchange:
    """One request and its answer, and what passes by."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.record = Record(_request_id(scope))
        self.status = _CLIENT_GONE
        self.begun = False
        # What lies below a mounted folder changes the scope.
        self._path = get_route_path(scope)
        self._receive = receive
        self._send = send
        # Asking for the body is what makes the server send 100 Continue.
        self._waits = any(header == b"expect" for header, _ in scope["headers"])

    async def receive(self) -> MutableMapping[str, Any]:
        """The next piece of the body."""
        self._waits = False
        message = await self._receive()
        if message["type"] == "http.request":
            self.record.body_bytes += len(message.get("body", b""))
            if not message.get("more_body", False):
                self.record.body_finished = time.monotonic()
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """The next piece of the answer."""
        if message["type"] == "http.response.start":
            self.status, self.begun = message["status"], True
            headers = [*message["headers"], (b"x-request-id", self.record.request_id.encode())]
            timing = self.record.server_timing()
            if timing is not None:
                headers.append((b"server-timing", timing.encode()))
            if self._waits:
                # The client keeps its body back, and the server would take the client's next
                # request for it.
                headers.append((b"connection", b"close"))
            message["headers"] = headers
        await self._send(message)

    async def send_problem(self, status: int, detail: str) -> None:
        """Answer with an error."""
        document = http_problem(
            status, detail, instance=self.scope["path"], request_id=self.record.request_id
        )
        content, media_type = written(document)
        headers = [
            (b"content-type", media_type.encode()),
            (b"content-length", str(len(content)).encode()),
        ]
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append((b"retry-after", b"1"))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": content})

    def route(self) -> tuple[str, str]:
        """Route template and method, as metrics may have them."""
        route = self.scope.get("route") or _route_of(self.scope, self._path)
        # Never the path itself: anybody could make any number of those.
        template = getattr(route, "path", None) or _UNMATCHED
        method = self.scope["method"]
        return template, method if template != _UNMATCHED and method in _METHODS else "any"

    def path(self) -> str:
        """Return the path as it came, in ASCII; a long one is cut."""
        raw = bytes(self.scope.get("raw_path", b""))
        return raw[:_LONGEST_TARGET].decode("ascii", "backslashreplace")

    def attributes(self, template: str) -> dict[str, str | int]:
        """What OpenTelemetry's conventions want to know of a request."""
        return {
            "http.request.method": self.scope["method"],
            "http.route": template,
            "http.response.status_code": self.status,
            "url.path": self.path(),
            "url.scheme": self.scope.get("scheme", "http"),
            "retinaserve.request_id": self.record.request_id,
        }


def _excess(scope: Scope) -> tuple[int, str] | None:
    """Return the status and the detail for a request with more to parse than is parsed."""
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    if size > _LONGEST_TARGET:
        return 414, f"the path and the query have {size} bytes; at most {_LONGEST_TARGET} are taken"
    for name, value in scope["headers"]:
        if len(value) > _LONGEST_PARSED and name in _PARSED:
            return 431, (
                f"the header {name.decode()} has {len(value)} bytes; at most {_LONGEST_PARSED} are "
                "taken"
            )
    return None


def _route_of(scope: Scope, path: str) -> BaseRoute | None:
    """The route of a request that was refused before it was routed, or the folder of a file."""
    for route in getattr(scope.get("app"), "routes", ()):
        pattern = getattr(route, "path_regex", None)
        if pattern is not None and pattern.match(path):
            return cast("BaseRoute", route)
    return None


def _write_line(exchange: _Exchange, level: int, template: str, milliseconds: float) -> None:
    scope, path = exchange.scope, exchange.path()
    state = scope.get("state") or {}
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": path,
        "route": template,
        "status": exchange.status,
        "milliseconds": milliseconds,
    }
    exchange.record.key = state.get("key")
    fields |= exchange.record.fields() | state.get("log", {})
    _log.log(
        level,
        "%s %s %d %.1f ms",
        scope["method"],
        path,
        exchange.status,
        milliseconds,
        extra={"fields": fields},
    )


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            if ID.fullmatch(value):
                return bytes(value).decode()
            break
    return new_id()

"""The ASGI layers around every route.

From the outside in: `RequestContext`, then `RequestGuard`. Plain ASGI, which costs a few
microseconds a request where Starlette's `BaseHTTPMiddleware` costs a task.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, MutableMapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, cast

from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.engine.batch_queue import Urgency
from service.engine.service import Service
from service.errors import RetinaserveError
from service.http.auth.gate import Gate
from service.http.connections.client import ClientDisconnected
from service.http.paths import PROBES, route_path
from service.http.problems import error_response, http_problem, respond
from service.observability.record import Record, current
from service.observability.request_id import request_id, valid_or_new

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_log = logging.getLogger("retinaserve.access")
_error_log = logging.getLogger("retinaserve.error")

_UNMATCHED: Final = "unmatched"
_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
"""Metrics count all other methods as one: a client may invent any number."""
_CLIENT_GONE: Final = 499
"""Status in log and metrics of a request whose client disconnected; nothing is sent."""
_MAX_TARGET: Final = 8192
"""Bytes of a path with its query. Parsing them takes the event loop up to two milliseconds."""
_MAX_PARSED: Final = 2048
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
"""Headers whose values are parsed, which takes the event loop up to a millisecond for 2048 bytes.
Others, such as cookies, may be as large as the server accepts."""
_SECURITY_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # A response shown as a document may load nothing and may not be framed; the page and the
    # documentation come with policies of their own.
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)

_OPEN: Final = frozenset({"/", "/healthz", "/readyz", "/docs", "/docs.js", "/openapi.json"})
_OPEN_FOLDERS: Final = ("/static/", "/docs-assets/", "/v2/health/")
_METRICS: Final = "/metrics"
_URGENCY: Final = {"/v1/detect": Urgency.INTERACTIVE, "/v1/detect/batch": Urgency.BULK}
_INFER: Final = ("/v2/models/", "/infer")
_MAX_DIGITS: Final = 9


class RequestContext:
    """Gives a request its id, record, span, log line and metrics, and its response headers.

    Responds with 500 to exceptions that no layer inside handled, and with 414 or 431 to a target or
    header that would take the event loop too long to parse.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._metrics = service.metrics
        self._tracing = service.tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
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
                await self._respond(exchange)
            else:
                await exchange.send_problem(*excess)
        finally:
            self._metrics.in_progress -= 1
            self._finish(exchange, span)

    async def _respond(self, exchange: _Exchange) -> None:
        try:
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except ClientDisconnected:
            pass
        except asyncio.CancelledError:
            # The server stops, and the body had not arrived by the end of the drain.
            if exchange.started:
                raise
            await exchange.send_problem(503, "the server stops; try again later")
        except Exception:
            _error_log.exception("unhandled exception in a request")
            if exchange.started:
                raise
            # The client gets only the id under which the log has the exception.
            name = exchange.record.request_id
            detail = f"something went wrong; the server's log has it under request {name}"
            await exchange.send_problem(500, detail)

    def _finish(self, exchange: _Exchange, span: Span | None) -> None:
        record, status = exchange.record, exchange.status
        template, method = exchange.route()
        refused = status >= HTTPStatus.BAD_REQUEST and status != _CLIENT_GONE
        # Our own errors have been counted where they were raised; a probe's 503 is not a refusal.
        if refused and not record.reasons and template not in PROBES:
            self._metrics.count_status(status)
        seconds = time.monotonic() - record.started
        self._metrics.observe_request(
            template, method, status, seconds=seconds, body_bytes=record.body_bytes
        )
        # Probes come every few seconds; only their failures are worth a line.
        level = logging.DEBUG if template in PROBES and status == HTTPStatus.OK else logging.INFO
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
        if self._tracing is None or scope["path"] in PROBES:
            return None
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        return self._tracing.begin(exchange.record, scope["method"], headers)


class _Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.record = Record(_request_id(scope))
        self.status = _CLIENT_GONE
        self.started = False
        """Whether the response has started."""
        # Mounted applications change the scope.
        self._path = route_path(scope)
        self._receive = receive
        self._send = send
        # The server sends 100 Continue when the body is asked for.
        self._expects = any(header == b"expect" for header, _ in scope["headers"])

    async def receive(self) -> MutableMapping[str, Any]:
        """Receive the next piece of the body."""
        self._expects = False
        message = await self._receive()
        if message["type"] == "http.request":
            self.record.body_bytes += len(message.get("body", b""))
            if not message.get("more_body", False):
                self.record.body_finished = time.monotonic()
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send the next piece of the response."""
        if message["type"] == "http.response.start":
            self.status, self.started = message["status"], True
            headers = [*message["headers"], (b"x-request-id", self.record.request_id.encode())]
            timing = self.record.server_timing()
            if timing is not None:
                headers.append((b"server-timing", timing.encode()))
            if self._expects:
                # The client never sends its body: the server would read the client's next request
                # as that body.
                headers.append((b"connection", b"close"))
            names = {name for name, _ in headers}
            headers += [each for each in _SECURITY_HEADERS if each[0] not in names]
            message["headers"] = headers
        await self._send(message)

    async def send_problem(self, status: int, detail: str) -> None:
        """Respond with an error."""
        document = http_problem(
            status, detail, instance=self.scope["path"], request_id=self.record.request_id
        )
        unavailable = status == HTTPStatus.SERVICE_UNAVAILABLE
        response = respond(document, {"Retry-After": "1"} if unavailable else None)
        await response(self.scope, self.receive, self.send)

    def route(self) -> tuple[str, str]:
        """Return the route template and the method, as labels of bounded sets."""
        route = self.scope.get("route") or _route_of(self.scope, self._path)
        template = getattr(route, "path", None) or _UNMATCHED
        method = self.scope["method"]
        return template, method if template != _UNMATCHED and method in _METHODS else "any"

    def path(self) -> str:
        """Return the path as it was sent, in ASCII and cut to 8192 bytes."""
        raw = bytes(self.scope.get("raw_path", b""))
        return raw[:_MAX_TARGET].decode("ascii", "backslashreplace")

    def attributes(self, template: str) -> dict[str, str | int]:
        """Return the attributes of the span, after OpenTelemetry's conventions."""
        return {
            "http.request.method": self.scope["method"],
            "http.route": template,
            "http.response.status_code": self.status,
            "url.path": self.path(),
            "url.scheme": self.scope.get("scheme", "http"),
            "retinaserve.request_id": self.record.request_id,
        }


def _excess(scope: Scope) -> tuple[int, str] | None:
    """Return the status and the detail for a request that is too large to parse."""
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    if size > _MAX_TARGET:
        return 414, f"the path and the query have {size} bytes; at most {_MAX_TARGET} are taken"
    for name, value in scope["headers"]:
        if len(value) > _MAX_PARSED and name in _PARSED:
            return 431, (
                f"the header {name.decode()} has {len(value)} bytes; at most {_MAX_PARSED} are "
                "taken"
            )
    return None


def _route_of(scope: Scope, path: str) -> BaseRoute | None:
    """Return the route of a request that was refused before routing, or the mount of a file."""
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
            return valid_or_new(value.decode("latin-1"))
    return valid_or_new(None)


class RequestGuard:
    """Refuses requests before routing and before their body is read.

    A request needs a key (every path does that is not listed above), a place in its rate limit,
    and, where it asks for detections, a place in the queue.
    """

    def __init__(self, app: ASGIApp, service: Service, gate: Gate, *, open_metrics: bool) -> None:
        self._app = app
        self._service = service
        self._gate = gate
        self._open = _OPEN | {_METRICS} if open_metrics else _OPEN

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            try:
                self._check(scope)
            except RetinaserveError as error:
                response = error_response(error, self._service.metrics, scope["path"])
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raise Unauthorized, Forbidden, RateLimited or Unavailable."""
        # The path as the router sees it, not as it was sent.
        path = route_path(scope)
        if path not in self._open and not path.startswith(_OPEN_FOLDERS):
            key = self._gate.enter(_presented(scope), _address(scope))
            if key is not None:
                scope.setdefault("state", {})["key"] = key.name
        if scope["method"] == "POST" and (urgency := _urgency(path)) is not None:
            longest = self._service.settings.request_timeout_ms
            self._service.admission.check(_patience_ms(scope, longest) / 1e3, urgency)


def _presented(scope: Scope) -> Iterator[str]:
    """Yield the keys in a request's headers: the first of each kind."""
    bearer = api_key = None
    for name, value in scope["headers"]:
        if name == b"authorization" and bearer is None and value[:7].lower() == b"bearer ":
            bearer = value[7:].strip().decode("latin-1")
        elif name == b"x-api-key" and api_key is None:
            api_key = value.strip().decode("latin-1")
    if bearer is not None:
        yield bearer
    if api_key is not None:
        yield api_key


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return "" if client is None else str(client[0])


def _urgency(path: str) -> Urgency | None:
    """Return the urgency of the detections that a path asks for; None for other paths."""
    if path.startswith(_INFER[0]) and path.endswith(_INFER[1]):
        return Urgency.INTERACTIVE
    return _URGENCY.get(path)


def _patience_ms(scope: Scope, longest: int) -> int:
    """Return how long the client waits. The route refuses an invalid header."""
    for name, value in scope["headers"]:
        if name == b"x-deadline-ms" and value.isdigit() and len(value) <= _MAX_DIGITS:
            asked = int(value)
            return asked if 1 <= asked <= longest else longest
    return longest

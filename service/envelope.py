"""What every request goes through: its id, its line in the log, its count, its last resort."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any, Final

from starlette.types import ASGIApp, Receive, Scope, Send

from service.bodies import ClientGone
from service.observability import Metrics
from service.problems import http_problem, written
from service.request_id import request_id

_log = logging.getLogger("retinaserve.access")
_error_log = logging.getLogger("retinaserve.error")
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_PROBES: Final = frozenset({"/healthz", "/readyz", "/metrics"})
_CLIENT_GONE: Final = 499
"""Status in log and metrics of a request whose client did not wait; nothing is sent."""


class Envelope:
    """The outermost layer, plain ASGI: it adds some microseconds."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        name = _request_id(scope)
        request_id.set(name)
        status = _CLIENT_GONE
        begun = False
        # Asking for the body is what makes the server send 100 Continue.
        waits = any(header == b"expect" for header, _ in scope["headers"])

        async def receive_marked() -> MutableMapping[str, Any]:
            nonlocal waits
            waits = False
            return await receive()

        async def send_marked(message: MutableMapping[str, Any]) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
                if waits:
                    # The client keeps its body back, and the server would take the client's next
                    # request for it.
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self._app(scope, receive_marked if waits else receive, send_marked)
        except ClientGone:
            pass
        except asyncio.CancelledError:
            # The server stops, and this request did not even arrive by the end of the drain.
            if begun:
                raise
            await _send_problem(scope, name, send_marked, 503, "the server stops; try again later")
        except Exception:
            _error_log.exception("the request failed in a way that nobody foresaw")
            if begun:
                raise
            # It tells nothing but the id under which the log tells all.
            detail = f"something went wrong; the server's log has it under request {name}"
            await _send_problem(scope, name, send_marked, 500, detail)
        finally:
            self._record(scope, status, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        # Never the path itself: anybody could make any number of those.
        template = getattr(route, "path", None) or "unmatched"
        method = scope["method"] if template != "unmatched" else "any"
        self._metrics.requests.labels(template, method, status).inc()
        # Probes come every few seconds for ever; only their failures are worth a line.
        level = logging.DEBUG if template in _PROBES and status == 200 else logging.INFO
        if _log.isEnabledFor(level):
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
            milliseconds = round(seconds * 1e3, 1)
            _log.log(
                level,
                "%s %s %d %.1f ms",
                scope["method"],
                path,
                status,
                milliseconds,
                extra={
                    "fields": {
                        "method": scope["method"],
                        "path": path,
                        "route": template,
                        "status": status,
                        "milliseconds": milliseconds,
                    }
                },
            )


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            if _REQUEST_ID.fullmatch(value):
                return bytes(value).decode()
            break
    return uuid.uuid4().hex


async def _send_problem(scope: Scope, name: str, send: Send, status: int, detail: str) -> None:
    document = http_problem(status, detail, instance=scope["path"], request_id=name)
    content, media_type = written(document)
    headers = [
        (b"content-type", media_type.encode()),
        (b"content-length", str(len(content)).encode()),
    ]
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})

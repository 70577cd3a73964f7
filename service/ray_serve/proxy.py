"""Rewrites the refusals of Ray Serve's proxies to those of the service.

Ray's own refusals are plain text, not all of them with `Retry-After`, and a request whose replica
died gets a bare 500. With RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=service.ray_proxy:layers
in the environment of `ray start`, clients read problem details and when to come back.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any, Final

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from service.http.problems import http_problem, respond
from service.observability.request_id import valid_or_new

_RAYS_OWN: Final = "/-/"
"""Paths of the proxies' own endpoints."""
_LOST: Final = "the replica that had the request is gone; send it again"
_DETAILS: Final = {
    408: (504, "no answer came within the time that Ray Serve's request_timeout_s allows"),
    503: (503, "no replica takes requests just now; try again in a moment"),
}
"""By the status of Ray's answer: the service's, and what it means."""
_REQUEST_ID: Final = b"x-request-id"

Message = MutableMapping[str, Any]


def layers() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(ProxyAnswers)]


class ProxyAnswers:
    """ASGI middleware of a proxy that rewrites Ray's own refusals."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"].startswith(_RAYS_OWN):
            await self._app(scope, receive, send)
            return
        identity = _request_id(scope)
        # Ray would make one of another kind, or repeat whatever the client has sent.
        others = [each for each in scope["headers"] if each[0] != _REQUEST_ID]
        scope["headers"] = [*others, (_REQUEST_ID, identity.encode())]
        answer = _Answer(scope, receive, send, identity)
        await self._app(scope, receive, answer.send)
        if not answer.begun:
            # Ray ends like this when the replica failed before it began to answer.
            await answer.replace(503, _LOST)


class _Answer:
    """The response to one client."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, identity: str) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._identity = identity
        self._replaced = False
        self.begun = False

    async def send(self, message: Message) -> None:
        """Send the next message of the response."""
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            self.begun = True
            headers = message["headers"] = [tuple(each) for each in message.get("headers", ())]
            status = int(message["status"])
            if status in _DETAILS and _is_plain(headers):
                self._replaced = True
                retry_after = dict(headers).get(b"retry-after", b"1").decode()
                await self.replace(*_DETAILS[status], retry_after=retry_after)
                return
            message["headers"] = _without_second_id(headers)
        await self._send(message)

    async def replace(self, status: int, detail: str, *, retry_after: str = "1") -> None:
        """Respond in place of Ray."""
        self.begun = True
        headers = {"X-Request-Id": self._identity, "X-Content-Type-Options": "nosniff"}
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers["Retry-After"] = retry_after
        document = http_problem(
            status, detail, instance=self._scope["path"], request_id=self._identity
        )
        await respond(document, headers)(self._scope, self._receive, self._send)


def _is_plain(headers: list[tuple[bytes, bytes]]) -> bool:
    """Return whether Ray wrote the response: the service's refusals are JSON."""
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/plain")
        for name, value in headers
    )


def _without_second_id(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Remove the request id that Ray adds after the service's."""
    kept, seen = [], False
    for name, value in headers:
        if name.lower() == _REQUEST_ID:
            if seen:
                continue
            seen = True
        kept.append((name, value))
    return kept


def _request_id(scope: Scope) -> str:
    """Return the client's request id if it is valid, else a new one."""
    given = next((value for name, value in scope["headers"] if name == _REQUEST_ID), b"")
    return valid_or_new(given.decode("latin-1"))

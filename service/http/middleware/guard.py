"""The service's door over HTTP: nobody comes in without a key, before anything is read or done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import RetinaserveError
from service.http.auth.gate import Gate
from service.http.refusal import refusal
from service.observability.metrics import Metrics

_OPEN: Final = frozenset({"/", "/healthz", "/readyz", "/docs", "/docs.js", "/openapi.json"})
_OPEN_FOLDERS: Final = ("/static/", "/docs-assets/", "/v2/health/")
_METRICS: Final = "/metrics"


class Guard:
    """Plain ASGI: closed but for what is listed here, so that a new route is closed from birth."""

    def __init__(self, app: ASGIApp, gate: Gate, metrics: Metrics, *, open_metrics: bool) -> None:
        self._app = app
        self._gate = gate
        self._metrics = metrics
        self._open = _OPEN | {_METRICS} if open_metrics else _OPEN

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http":
            # The path as the router will see it, not as it was written.
            path = get_route_path(scope)
            if path not in self._open and not path.startswith(_OPEN_FOLDERS):
                try:
                    key = self._gate.enter(_presented(scope), _address(scope))
                except RetinaserveError as error:
                    response = refusal(error, self._metrics, scope["path"])
                    await response(scope, receive, send)
                    return
                if key is not None:
                    scope.setdefault("state", {})["key"] = key.name
        await self._app(scope, receive, send)


def _presented(scope: Scope) -> Iterator[str]:
    """The keys in a request's headers: the first of each kind."""
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

"""Refusals that the queue alone decides: made before routing, and before the body is read."""

from __future__ import annotations

from typing import Final

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Receive, Scope, Send

from service.engine.batch_queue import Urgency
from service.engine.service import Service
from service.errors import RetinaserveError
from service.http.refusal import refusal

_URGENCY: Final = {"/v1/detect": Urgency.INTERACTIVE, "/v1/detect/batch": Urgency.BULK}
_INFER: Final = ("/v2/models/", "/infer")
_LONGEST_NUMBER: Final = 9


class OverloadGuard:
    """Plain ASGI: turns work away while all that it costs is a look at the queue."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and scope["method"] == "POST":
            urgency = _urgency(get_route_path(scope))
            if urgency is not None:
                try:
                    self._service.admission.check(self._seconds(scope), urgency)
                except RetinaserveError as error:
                    response = refusal(error, self._service.metrics, scope["path"])
                    await response(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _seconds(self, scope: Scope) -> float:
        """How long the client waits. What it wrote wrongly its route will refuse."""
        longest = self._service.settings.request_timeout_ms
        for name, value in scope["headers"]:
            if name == b"x-deadline-ms" and value.isdigit() and len(value) <= _LONGEST_NUMBER:
                asked = int(value)
                return (asked if 1 <= asked <= longest else longest) / 1e3
        return longest / 1e3


def _urgency(path: str) -> Urgency | None:
    """Of the work that a path asks for; None where it asks for none."""
    if path.startswith(_INFER[0]) and path.endswith(_INFER[1]):
        return Urgency.INTERACTIVE
    return _URGENCY.get(path)

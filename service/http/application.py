"""FastAPI's application, with a shorter way in for the route that takes nearly all requests."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from service.http.short_way import is_short


class Application(FastAPI):
    """Leaves out what FastAPI lays around the layers that were added to it.

    Errors that nobody foresaw, telemetry, a bound on bodies: our own layers do each of these, and
    looking whether there is anything to do costs the event loop a twentieth of an image's time.
    """

    _layers: ASGIApp | None = None

    def build_middleware_stack(self) -> ASGIApp:
        """Every layer; the outermost of those that were added is kept."""
        stack = super().build_middleware_stack()
        layers: Any = stack
        outermost: Any = self.user_middleware[0].cls
        while type(layers) is not outermost:
            layers = layers.app
        self._layers = layers
        return stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the beginning and end of everything."""
        if self._layers is None or self.root_path or not is_short(scope):
            await super().__call__(scope, receive, send)
            return
        scope["app"] = self
        await self._layers(scope, receive, send)

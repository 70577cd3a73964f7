"""Headers that tell browsers what not to do with any answer."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Final

from starlette.types import ASGIApp, Receive, Scope, Send

_DEFAULTS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # Whatever is shown as a document may load nothing and be framed by nobody; the page and the
    # documentation come with policies of their own.
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


class SecurityHeaders:
    """Plain ASGI: adds what a response does not say itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"]
                names = {name.lower() for name, _ in headers}
                missing = [each for each in _DEFAULTS if each[0] not in names]
                message["headers"] = [*headers, *missing]
            await send(message)

        await self._app(scope, receive, send_with)

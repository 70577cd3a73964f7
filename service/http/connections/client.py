"""The client of a request, as far as the server knows it without being asked for a message.

ASGI tells of a disconnect only to those that wait for a message, which takes a task for each
request, and a timer for a body that has arrived. Our own server puts a `Client` into the scope;
under other servers there is none, and ASGI's messages tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any, Final, Protocol

from starlette.requests import Request

_EXTENSION: Final = "retinaserve.client"


class ClientDisconnected(Exception):
    """The client closed the connection; there is nothing to respond to."""


class Cycle(Protocol):
    """The part of uvicorn's RequestResponseCycle that is used here."""

    more_body: bool


class Client:
    """The client of one request. Not thread-safe."""

    def __init__(self, cycle: Cycle) -> None:
        self._cycle = cycle
        self._on_disconnect: Callable[[], None] | None = None
        self.disconnected = False
        """Whether the connection was lost before the response was complete."""

    @property
    def body_complete(self) -> bool:
        """Whether the server has received the whole body."""
        return not self._cycle.more_body

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        """Set the callback for a lost connection; None removes it."""
        self._on_disconnect = callback

    def disconnect(self) -> None:
        """Record that the connection was lost."""
        self.disconnected = True
        if self._on_disconnect is not None:
            self._on_disconnect()


def set_client(scope: MutableMapping[str, Any], client: Client) -> None:
    """Put a client into a request's scope."""
    scope.setdefault("extensions", {})[_EXTENSION] = client


def client_of(scope: MutableMapping[str, Any]) -> Client | None:
    """Return the client of a request; None under a server other than our own."""
    client: Client | None = scope.get("extensions", {}).get(_EXTENSION)
    return client


class CancelOnDisconnect:
    """Context manager that cancels the work inside once the client disconnects.

    Raises ClientDisconnected then.
    """

    def __init__(self, request: Request) -> None:
        self._receive = request.receive
        self._client = client_of(request.scope)
        self._watcher: asyncio.Task[None] | None = None
        self._disconnected = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "runs inside a request"
        self._task = task
        if self._client is None:
            self._watcher = asyncio.create_task(self._watch())
        elif self._client.disconnected:
            raise ClientDisconnected
        else:
            self._client.on_disconnect(self._cancel)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        if self._client is not None:
            self._client.on_disconnect(None)
        if self._disconnected and kind is asyncio.CancelledError:
            self._task.uncancel()
            raise ClientDisconnected from None

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._cancel()

    def _cancel(self) -> None:
        self._disconnected = True
        self._task.cancel()

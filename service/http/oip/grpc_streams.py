"""Bounds on slow messages and on `Health/Watch`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from service.engine.service import Service
from service.errors import BodyTimeout, MalformedRequest, RateLimited, Unavailable
from service.http.oip.grpc_codec import read
from service.http.oip.grpc_messages import Method
from service.http.oip.grpc_methods import health

_SPARE: Final = 4
"""Messages that are received at a time beside the slow ones."""
_PROBES_AT_A_TIME: Final = 4
_AT_ONCE: Final = 0.25
"""Seconds after which a message that has not arrived counts as slow."""
_MOST_WATCHES: Final = 64
_LOOK_SECONDS: Final = 0.5

Messages = AsyncIterator[bytes]


class Arrivals:
    """Receives messages, a bounded number of them slowly. Not thread-safe.

    gRPC buffers incomplete messages and does not tell their size: a slow one counts as one of the
    largest, and as many are accepted as fit into the bytes that may wait.
    """

    def __init__(self, service: Service) -> None:
        settings = service.settings
        self.most_slow = max(1, settings.max_queue_bytes // settings.max_body_bytes)
        self.slow = 0
        # gRPC buffers what is being received, whatever becomes of it.
        self._probes = asyncio.Semaphore(_PROBES_AT_A_TIME)
        self._others = asyncio.Semaphore(self.most_slow + _SPARE)
        self._seconds = settings.body_timeout_ms / 1e3

    async def receive(self, messages: Messages, *, probe: bool = False) -> bytes:
        """Return the first message. Raises BodyTimeout, MalformedRequest or Unavailable.

        A `probe` needs no key; few of them are received at a time, and none waits for the others.
        """
        async with self._probes if probe else self._others:
            coming = asyncio.ensure_future(_first(messages))
            try:
                await asyncio.wait({coming}, timeout=min(_AT_ONCE, self._seconds))
                content = coming.result() if coming.done() else await self._receive_slowly(coming)
            finally:
                coming.cancel()
        if content is None:
            raise MalformedRequest("the call has no message")
        return content

    async def _receive_slowly(self, coming: asyncio.Future[bytes | None]) -> bytes | None:
        if self.slow >= self.most_slow:
            raise Unavailable(
                f"{self.slow} messages are arriving slowly (at most {self.most_slow}); "
                "try again in a second, or over HTTP",
                reason="uploads-full",
            )
        self.slow += 1
        try:
            async with asyncio.timeout(max(0.0, self._seconds - _AT_ONCE)):
                return await coming
        except TimeoutError:
            raise BodyTimeout(f"the message did not arrive within {self._seconds:g} s") from None
        finally:
            self.slow -= 1


class Watches:
    """gRPC's `Health/Watch`: the status at once, and after each change."""

    def __init__(
        self, service: Service, method: Method, receive: Callable[[Messages], Awaitable[bytes]]
    ) -> None:
        self._service = service
        self._method = method
        self._receive = receive
        self._open = 0
        self._closed = asyncio.Event()

    async def states(self, messages: Messages) -> AsyncIterator[Any]:
        """Yield the status until the client disconnects or the server stops.

        Raises RateLimited, and what `receive` raises.
        """
        if self._open >= _MOST_WATCHES:
            # Watches need no key, and take the places of calls.
            raise RateLimited(
                f"{self._open} clients watch already; call Check now and then", retry_after=60.0
            )
        self._open += 1
        try:
            request = read(await self._receive(messages), self._method.request)
            told = None
            while not self._closed.is_set():
                status = health(self._service, request.service)
                if status != told:
                    told = status
                    yield self._method.response(status=status)
                await self._pause()
            yield self._method.response(status="NOT_SERVING")
        finally:
            self._open -= 1

    def close(self) -> None:
        """End all watches with NOT_SERVING."""
        self._closed.set()

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(_LOOK_SECONDS):
                await self._closed.wait()
        except TimeoutError:
            return


async def _first(messages: Messages) -> bytes | None:
    return await anext(messages, None)

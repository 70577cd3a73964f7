"""What the server knows of a request's client without being asked for the next message.

ASGI tells that a client has gone only to whoever waits for a message, which takes a task of its own
for each request, and a timer for a body that has long been there. Our own server says it in the
scope; under any other nobody finds this there, and asks as ASGI says.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, Final, Protocol

_EXTENSION: Final = "retinaserve.presence"


class Arrival(Protocol):
    """The part of uvicorn's RequestResponseCycle that is used here."""

    more_body: bool


class Presence:
    """The client of one request. One event loop's."""

    def __init__(self, arrival: Arrival) -> None:
        self._arrival = arrival
        self._on_gone: Callable[[], None] | None = None
        self.gone = False
        """Whether the connection was lost before the answer was complete."""

    @property
    def whole(self) -> bool:
        """Whether the request has arrived with all of its body."""
        return not self._arrival.more_body

    def watch(self, on_gone: Callable[[], None] | None) -> None:
        """Call this once the client goes; None: nothing any more."""
        self._on_gone = on_gone

    def leave(self) -> None:
        """The connection was lost."""
        self.gone = True
        if self._on_gone is not None:
            self._on_gone()


def announce(scope: MutableMapping[str, Any], presence: Presence) -> None:
    """Put it where `presence_of` looks."""
    scope.setdefault("extensions", {})[_EXTENSION] = presence


def presence_of(scope: MutableMapping[str, Any]) -> Presence | None:
    """What the server says of a request's client; None where it says nothing."""
    found: Presence | None = scope.get("extensions", {}).get(_EXTENSION)
    return found

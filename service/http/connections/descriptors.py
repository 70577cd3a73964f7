"""What becomes of connections when the process runs out of file descriptors, one for each of them.

Left alone, the system would turn away whoever comes next: the probes too, so that a service that
is only crowded would be restarted.
"""

from __future__ import annotations

import heapq
import logging
import math
import sys
import time
from collections.abc import Iterable
from typing import Final, Protocol, TypeVar

from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Unavailable
from service.http.paths import PROBES, route_path
from service.http.problems import error_response
from service.observability.metrics import Metrics

_log = logging.getLogger("retinaserve.server")
_WANTED: Final = 8192
"""File descriptors that the process asks the system for; 1024 is what it often has."""
_SPARE: Final = 64
"""File descriptors, or a quarter of them where there are few, that ordinary connections leave: half
to those who find an idle connection to replace, the rest to probes and files."""
_GIVE_WAY: Final = 4
_SHARE_GIVES_WAY: Final = 64
"""So many connections that are idle, or one in so many, make way for one that comes."""
_QUIET_SECONDS: Final = 60.0


class Connection(Protocol):
    """What can make way."""

    @property
    def idle_since(self) -> float | None:
        """Since when it waits for a whole head, on `time.monotonic`; None: there is a request."""

    def make_way(self) -> None:
        """End at once."""


Idle = TypeVar("Idle", bound=Connection)


class Crowd:
    """Looks at each new connection of one listener. One event loop's."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._told = -math.inf

    def has_room(self, descriptor: int, others: Iterable[Connection]) -> bool:
        """Whether a new connection with this file descriptor is one for any request.

        When there are few descriptors left, the `others` that have been idle for longest end.
        """
        # The system gives out the lowest number that is free: it tells how many are taken, by
        # whatever and whomever.
        limit = descriptors()
        spare = min(_SPARE, limit // 4)
        left = limit - descriptor
        if left > spare:
            return True
        idle = [each for each in others if each.idle_since is not None]
        count = max(_GIVE_WAY, len(idle) // _SHARE_GIVES_WAY)
        for each in heapq.nsmallest(count, idle, key=lambda each: each.idle_since or 0.0):
            each.make_way()
        self._tell(limit)
        return bool(idle) and left > spare / 2

    def probes_only(self, app: ASGIApp) -> ASGIApp:
        """An application that lets nobody in but those who ask how the service is."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            if route_path(scope) not in PROBES:
                error = Unavailable(
                    "the service has too many connections; try again in a second",
                    reason="connections",
                )
                await error_response(error, self._metrics, scope["path"])(scope, receive, send)
            else:
                await app(scope, receive, send)

        return answer

    def _tell(self, limit: float) -> None:
        now = time.monotonic()
        if now - self._told > _QUIET_SECONDS:
            self._told = now
            _log.warning(
                "nearly all of the %d file descriptors are taken: idle connections are closed and "
                "new ones get 503; more of them: `ulimit -n`",
                limit,
            )


def descriptors() -> float:
    """How many file descriptors this process may have."""
    if sys.platform == "win32":
        return math.inf
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else soft


def ask_for_descriptors() -> None:
    """Raise the process's own limit as far as it may, and as is of use."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

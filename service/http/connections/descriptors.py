"""The limit on connections that the process's file descriptors set.

Without it the system would refuse the next connections, probes among them, so that a service with
too many connections would be restarted.
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
"""File descriptors that the process asks the system for; the default is often 1024."""
_SPARE: Final = 64
"""File descriptors (at most a quarter of all) that ordinary connections leave free: half for those
that replace an idle connection, the rest for probes and files."""
_MIN_CLOSED: Final = 4
_SHARE_CLOSED: Final = 64
"""A new connection closes 4 idle ones, or one in 64 where that is more."""
_WARNING_SECONDS: Final = 60.0
"""Least time between two warnings."""


class Connection(Protocol):
    """A connection that can be closed while it is idle."""

    @property
    def idle_since(self) -> float | None:
        """When the wait for headers began, on `time.monotonic`; None during a request."""

    def abort(self) -> None:
        """Close the connection at once."""


Idle = TypeVar("Idle", bound=Connection)


class DescriptorLimit:
    """Limits the connections of one listener. Not thread-safe."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._warned = -math.inf

    def has_room(self, descriptor: int, others: Iterable[Connection]) -> bool:
        """Return whether a new connection with this file descriptor may make any request.

        Where few descriptors are left, those of `others` that were idle longest are closed.
        """
        # The system assigns the lowest free number, which tells how many are in use.
        limit = descriptors()
        spare = min(_SPARE, limit // 4)
        left = limit - descriptor
        if left > spare:
            return True
        idle = [each for each in others if each.idle_since is not None]
        count = max(_MIN_CLOSED, len(idle) // _SHARE_CLOSED)
        for each in heapq.nsmallest(count, idle, key=lambda each: each.idle_since or 0.0):
            each.abort()
        self._warn(limit)
        return bool(idle) and left > spare / 2

    def probes_only(self, app: ASGIApp) -> ASGIApp:
        """Return an application that responds to probes, and to other requests with 503."""

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            if route_path(scope) not in PROBES:
                error = Unavailable(
                    "the service has too many connections; try again in a second",
                    reason="connections",
                )
                await error_response(error, self._metrics, scope["path"])(scope, receive, send)
            else:
                await app(scope, receive, send)

        return respond

    def _warn(self, limit: float) -> None:
        now = time.monotonic()
        if now - self._warned > _WARNING_SECONDS:
            self._warned = now
            _log.warning(
                "nearly all of the %d file descriptors are in use: idle connections are closed and "
                "new ones get 503; raise the limit with `ulimit -n`",
                limit,
            )


def descriptors() -> float:
    """Return the number of file descriptors this process may open."""
    if sys.platform == "win32":
        return math.inf
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else soft


def ask_for_descriptors() -> None:
    """Raise this process's limit of file descriptors to 8192, or as far as it may."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

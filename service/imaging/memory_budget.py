"""A bound on the memory of images while they are decoded, over all threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from service.errors import TooLarge

_SPARED: Final = 8
"""One part in this many is for small images alone, each of them smaller than that."""


class DecodeMemory:
    """A semaphore of bytes. Large images wait for room in order of arrival.

    Images come in compressed, and a compressed image may be a thousand times smaller than its
    pixels: a bound on bytes that arrive is no bound on bytes that they become. Small images never
    wait behind large ones.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._small = limit // _SPARED
        self._most = limit - self._small
        """Of large images together."""
        self._large = 0
        """Held by large images."""
        self._condition = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Hold `size` bytes. Raises TooLarge if they do not fit even alone."""
        if size > self._most:
            raise TooLarge(
                f"decoding the image takes {size} bytes of memory; at most {self._most} are "
                "allowed; make it smaller, or send it as a JPEG, which is scaled while decoded"
            )
        large = size if size > self._small else 0
        with self._condition:
            if large:
                self._wait_in_turn(large)
            else:
                self._condition.wait_for(lambda: self.held + size <= self.limit)
            self.held += size
            self._large += large
        try:
            yield
        finally:
            with self._condition:
                self.held -= size
                self._large -= large
                self._condition.notify_all()

    def _wait_in_turn(self, size: int) -> None:
        ticket = object()
        self._waiting.append(ticket)
        # In order, or the largest would wait for as long as others come.
        self._condition.wait_for(
            lambda: (
                self._waiting[0] is ticket
                and self._large + size <= self._most
                and self.held + size <= self.limit
            )
        )
        self._waiting.popleft()
        self._condition.notify_all()

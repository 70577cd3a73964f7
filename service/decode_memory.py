"""How much memory pictures may take while they are decoded, over all threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import TooLarge


class DecodeMemory:
    """A semaphore of bytes. Whoever finds no room waits, in the order of arrival.

    Pictures come in compressed, and a compressed picture may be a thousand times smaller than its
    pixels: a bound on bytes that arrive is no bound on bytes that they become.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._condition = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Hold so many bytes. Raises TooLarge where they would not fit even alone."""
        if size > self.limit:
            raise TooLarge(
                f"decoding the image takes {size} bytes of memory; at most {self.limit} are "
                "allowed; make it smaller, or send it as a JPEG, which is scaled while decoded"
            )
        ticket = object()
        with self._condition:
            self._waiting.append(ticket)
            # In order, or a large picture would wait for as long as small ones come.
            self._condition.wait_for(
                lambda: self._waiting[0] is ticket and self.held + size <= self.limit
            )
            self._waiting.popleft()
            self.held += size
            self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self.held -= size
                self._condition.notify_all()

"""How much the service holds at a time: images, and the bytes that they were sent as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from service.engine.batch_queue import Urgency
from service.errors import Unavailable

_SPARED: Final = 4
"""One place in this many is never taken by bulk."""


class Places:
    """Bounds how many images, and bytes of them, the service holds. Not thread-safe."""

    def __init__(
        self,
        limit: int,
        *,
        bytes_limit: int | None = None,
        pause: Callable[[], float] | None = None,
    ) -> None:
        """`pause` tells how many seconds it will take until there is room."""
        self.limit = limit
        self.bytes_limit = bytes_limit
        self.bulk_limit = limit - limit // _SPARED
        """Bulk leaves places to those who wait for one image."""
        self.held = 0
        self.bulk_held = 0
        self.bytes_held = 0
        self._pause = pause or (lambda: 1.0)

    def check(self, places: int = 1, size: int = 0, urgency: Urgency = Urgency.INTERACTIVE) -> None:
        """Raise Unavailable when there is no room, before anything was spent on the request."""
        if self.held + places > self.limit:
            raise Unavailable(
                f"the queue is full ({self.limit} images); try again in a moment",
                reason="queue-full",
                retry_after=self._pause(),
            )
        if urgency is Urgency.BULK and self.bulk_held + places > self.bulk_limit:
            raise Unavailable(
                f"batches hold {self.bulk_held} of {self.limit} places, the rest is for single "
                "images; try again in a moment",
                reason="queue-full",
                retry_after=self._pause(),
            )
        # What is larger than the bound passes when it is alone: its size has a bound of its own.
        crowded = self.bytes_limit is not None and self.bytes_held + size > self.bytes_limit
        if crowded and size and self.bytes_held:
            raise Unavailable(
                f"the queue holds {self.bytes_held} bytes of images and has no room for {size} "
                f"more (at most {self.bytes_limit}); try again in a moment",
                reason="queue-bytes",
                retry_after=self._pause(),
            )

    def slot(self, size: int = 0, urgency: Urgency = Urgency.INTERACTIVE) -> Place:
        """Hold the place of an image of `size` bytes. Raises Unavailable without room."""
        self.check(1, size, urgency)
        return Place(self, 1, size, bulk=int(urgency is Urgency.BULK))

    def body(self, size: int) -> Place:
        """To hold the bytes of a request of many images, which then need only places.

        Raises Unavailable without room.
        """
        self.check(0, size)
        return self.hold(0, size)

    def more(self, places: int) -> Place:
        """To hold further places, for a request of several canvases.

        Raises Unavailable without room for all of them.
        """
        self.check(places)
        return self.hold(places, 0)

    def hold(self, places: int, size: int) -> Place:
        """To hold what has been checked already."""
        return Place(self, places, size)


class Place:
    """What is held while a `with` block runs."""

    __slots__ = ("_bulk", "_owner", "_places", "_size")

    def __init__(self, owner: Places, places: int, size: int, *, bulk: int = 0) -> None:
        self._owner = owner
        self._places = places
        self._size = size
        self._bulk = bulk

    def __enter__(self) -> None:
        self._change(1)

    def __exit__(self, *_: object) -> None:
        self._change(-1)

    def _change(self, sign: int) -> None:
        held = self._owner
        held.held += sign * self._places
        held.bytes_held += sign * self._size
        held.bulk_held += sign * self._bulk

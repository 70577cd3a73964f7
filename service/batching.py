"""The queue between requests and a device: first in, first out, in batches of equal kind.

Pictures can share an inference only when model, canvas and IoU threshold are equal, so the queue
keeps one lane for each such key. A free device takes the lane whose head waited longest, so that
no kind of picture starves another.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from service.errors import Unavailable


class Waiting(Protocol):
    """What a queue can hold."""

    @property
    def key(self) -> Hashable:
        """Only items of equal key share a batch."""

    @property
    def deadline(self) -> float:
        """On the clock of `time.monotonic`: from then on the item is worth no device time."""

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for the item any more."""


Item = TypeVar("Item", bound=Waiting)


@dataclass(frozen=True, slots=True)
class Policy:
    """How batches are made."""

    max_batch_size: int = 1
    max_delay: float = 0.0
    """Seconds that the oldest item may wait for its batch to fill; 0: a free device never waits."""


@dataclass(slots=True)
class _Ticket(Generic[Item]):
    item: Item
    number: int
    arrived: float


class BatchQueue(Generic[Item]):
    """A thread-safe queue that is emptied in batches. It does not bound itself: see Admission."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._condition = threading.Condition()
        # Ordered by arrival; an OrderedDict gives both ends and any middle in constant time.
        self._lanes: dict[Hashable, OrderedDict[int, _Ticket[Item]]] = {}
        self._arrivals = 0
        self._length = 0
        self._closed = False

    def __len__(self) -> int:
        return self._length

    def push(self, item: Item) -> None:
        """Append an item. After `close` it is dropped: nobody will come for it."""
        with self._condition:
            if self._closed:
                return
            self._arrivals += 1
            lane = self._lanes.setdefault(item.key, OrderedDict())
            lane[id(item)] = _Ticket(item, self._arrivals, time.monotonic())
            self._length += 1
            self._condition.notify()

    def remove(self, item: Item) -> bool:
        """Take an item out before its turn. False when it is not (or no longer) here."""
        with self._condition:
            lane = self._lanes.get(item.key)
            if lane is None or lane.pop(id(item), None) is None:
                return False
            self._length -= 1
            if not lane:
                del self._lanes[item.key]
            return True

    def take(self) -> list[Item]:
        """Wait for work and take the next batch: equal keys, oldest first, nothing expired.

        An empty list means that the queue was closed and is empty.
        """
        with self._condition:
            while True:
                now = time.monotonic()
                head, pause = self._ripest(now)
                if head is not None:
                    if batch := self._pop(head.key, now):
                        return batch
                    # All of it was abandoned at this very moment; an empty list would mean the end.
                    continue
                if self._closed and not self._length:
                    return []
                self._condition.wait(pause)

    def close(self) -> None:
        """Take nothing more in; those who wait in `take` get what is left, then an empty list."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def _ripest(self, now: float) -> tuple[Item | None, float | None]:
        """The head of the lane to serve now, or how long until there is one (None: unknown)."""
        best: _Ticket[Item] | None = None
        pause: float | None = None
        for key in list(self._lanes):
            head = self._head(key, now)
            if head is None:
                continue
            rest = head.arrived + self._policy.max_delay - now
            full = len(self._lanes[key]) >= self._policy.max_batch_size
            if rest <= 0 or full or self._closed:
                if best is None or head.number < best.number:
                    best = head
            elif pause is None or rest < pause:
                pause = rest
        return (None, pause) if best is None else (best.item, None)

    def _head(self, key: Hashable, now: float) -> _Ticket[Item] | None:
        """The oldest item of a lane that is still worth its time; older ones are dropped."""
        lane = self._lanes[key]
        while lane:
            head = next(iter(lane.values()))
            if _worth(head.item, now):
                return head
            lane.popitem(last=False)
            self._length -= 1
        del self._lanes[key]
        return None

    def _pop(self, key: Hashable, now: float) -> list[Item]:
        batch: list[Item] = []
        while len(batch) < self._policy.max_batch_size:
            head = self._head(key, now)
            if head is None:
                return batch
            self._lanes[key].popitem(last=False)
            self._length -= 1
            batch.append(head.item)
        if not self._lanes[key]:
            del self._lanes[key]
        return batch


def _worth(item: Waiting, now: float) -> bool:
    return not item.abandoned and item.deadline > now


class Admission:
    """Bounds how many pictures the service holds, from arrival to answer. One event loop's."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def check(self) -> None:
        """Raise Unavailable when there is no room, before anything was spent on the request."""
        if self.held >= self.limit:
            raise Unavailable(
                f"the queue is full ({self.limit} pictures); try again in a second",
                reason="queue-full",
            )

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one picture's place. Raises Unavailable when there is no room."""
        self.check()
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    @contextmanager
    def more(self, places: int) -> Iterator[None]:
        """Hold further places, for a picture's tiles: all, or Unavailable is raised."""
        if self.held + places > self.limit:
            raise Unavailable(
                f"the queue has room for {self.limit - self.held} more of the picture's "
                f"{places + 1} canvases; try again in a second, or with larger tiles",
                reason="queue-full",
            )
        self.held += places
        try:
            yield
        finally:
            self.held -= places

"""The queue between requests and a device: batches of equal kind, the urgent before the bulk.

Images can share an inference only when model, canvas and IoU threshold are equal, so the queue
keeps a lane for each such key and urgency. A free device takes the urgent lane whose head waited
longest, so that no kind of image starves another; bulk gets a turn after a number of others.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

URGENT_TURNS: Final = 7
"""Batches that may go before bulk which waits, then bulk has its turn."""


class Urgency(IntEnum):
    """Who goes first."""

    INTERACTIVE = 0
    """Somebody waits for this one image."""
    BULK = 1
    """One of many images of a request."""


class Waiting(Protocol):
    """What a queue can hold."""

    @property
    def key(self) -> Hashable:
        """Only items of equal key share a batch."""

    @property
    def urgency(self) -> Urgency:
        """Whether it goes before others."""

    @property
    def deadline(self) -> float:
        """On the clock of `time.monotonic`: from then on the item is worth no device time."""

    @property
    def abandoned(self) -> bool:
        """Whether the item's client has left."""

    @property
    def seconds(self) -> float:
        """What the item is expected to take of a taker's time; 0 where its key tells."""


Item = TypeVar("Item", bound=Waiting)


Sizing = Callable[[Hashable, int, float], int]
"""Return how many items to take at once, by key, number that wait, and seconds that the oldest has
left."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How batches are made."""

    max_batch_size: int = 1
    max_delay: float = 0.0
    """Seconds that the oldest item may wait for its batch to fill; 0: a free device never waits."""


class Lane(NamedTuple):
    """How many items of one kind wait."""

    key: Hashable
    urgency: Urgency
    length: int
    seconds: float
    """The sum of what its items are expected to take."""


class _Kind(NamedTuple):
    key: Hashable
    urgency: Urgency


@dataclass(slots=True)
class _Ticket(Generic[Item]):
    item: Item
    number: int
    arrived: float


class BatchQueue(Generic[Item]):
    """A thread-safe queue that is emptied in batches. It does not bound itself: see admission."""

    def __init__(
        self,
        policy: Policy,
        sizing: Sizing | None = None,
        *,
        places: int | None = None,
        takes_long: Callable[[Hashable], bool] | None = None,
    ) -> None:
        """Batches are as large as the policy allows, or as `sizing` says.

        With `places` at most that many batches are out at a time; each ends with `done`.
        `takes_long` tells the keys that only some takers take.
        """
        self._takes_long = takes_long
        self._policy = policy
        self._sizing = sizing
        self._places = places
        """How many more batches may go out. None: any number."""
        self._condition = threading.Condition()
        # Ordered by arrival; an OrderedDict gives both ends and any middle in constant time.
        self._lanes: dict[_Kind, OrderedDict[int, _Ticket[Item]]] = {}
        self._arrivals = 0
        self._length = 0
        self._urgent_turns = 0
        self._closed = False

    def __len__(self) -> int:
        return self._length

    @property
    def arrivals(self) -> int:
        """How many items have ever come."""
        return self._arrivals

    def lanes(self) -> list[Lane]:
        """What waits."""
        if not self._length:
            return []
        with self._condition:
            return [
                Lane(*kind, len(lane), sum(ticket.item.seconds for ticket in lane.values()))
                for kind, lane in self._lanes.items()
            ]

    def push(self, item: Item) -> None:
        """Append an item. After `close` it is dropped."""
        with self._condition:
            if self._closed:
                return
            self._arrivals += 1
            lane = self._lanes.setdefault(_Kind(item.key, item.urgency), OrderedDict())
            lane[id(item)] = _Ticket(item, self._arrivals, time.monotonic())
            self._length += 1
            if self._takes_long is not None and self._takes_long(item.key):
                # The one that would be woken alone might not take it.
                self._condition.notify_all()
            else:
                self._condition.notify()

    def offer(self, item: Item) -> bool:
        """Whether the caller may have the item's place at once, and works at it. Else: as `push`.

        Only where there are `places`, nothing else waits, and batches do not wait to fill.
        """
        with self._condition:
            if self._places and not (self._length or self._policy.max_delay or self._closed):
                self._places -= 1
                return True
        self.push(item)
        return False

    def remove(self, item: Item) -> bool:
        """Take an item out before its turn. False when it is not (or no longer) here."""
        with self._condition:
            kind = _Kind(item.key, item.urgency)
            lane = self._lanes.get(kind)
            if lane is None or lane.pop(id(item), None) is None:
                return False
            self._length -= 1
            if not lane:
                del self._lanes[kind]
            return True

    def take(self, *, short_only: bool = False) -> list[Item]:
        """Wait for work and take the next batch: equal keys, oldest first, nothing expired.

        With `short_only` nothing whose key takes long. An empty list means that the queue was
        closed and is empty.
        """
        with self._condition:
            while True:
                pause = None
                if self._places != 0:
                    batch, pause = self._next(short_only=short_only)
                    if batch:
                        if self._places is not None:
                            self._places -= 1
                        return batch
                if self._closed and (short_only or not self._length):
                    return []
                self._condition.wait(pause)

    def done(self) -> None:
        """A batch that was out is done."""
        with self._condition:
            self._give_back()

    def done_for(self) -> list[Item]:
        """As `done`, and the next batch in its place if one is ripe; without waiting for it."""
        with self._condition:
            batch, _ = self._next()
            if not batch:
                self._give_back()
            return batch

    def close(self) -> None:
        """Take nothing more in; those who wait in `take` get what is left, then an empty list."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def _give_back(self) -> None:
        assert self._places is not None, "its takers are not counted"
        self._places += 1
        if self._length or self._closed:
            self._condition.notify()

    def _next(self, *, short_only: bool = False) -> tuple[list[Item], float | None]:
        """A batch that is ripe now; else none, and how long until there is one (None: unknown)."""
        while True:
            now = time.monotonic()
            head, pause = self._ripest(now, short_only=short_only)
            if head is None:
                return [], pause
            if batch := self._pop(head, now):
                return batch, None
            # All of it was abandoned at this very moment.

    def _ripest(self, now: float, *, short_only: bool) -> tuple[Item | None, float | None]:
        """The head of the lane to serve now, or how long until there is one (None: unknown)."""
        best: dict[Urgency, _Ticket[Item]] = {}
        pause: float | None = None
        for kind in list(self._lanes):
            if short_only and self._takes_long is not None and self._takes_long(kind.key):
                continue
            head = self._head(kind, now)
            if head is None:
                continue
            rest = head.arrived + self._policy.max_delay - now
            full = len(self._lanes[kind]) >= self._policy.max_batch_size
            if rest <= 0 or full or self._closed:
                rival = best.get(kind.urgency)
                if rival is None or head.number < rival.number:
                    best[kind.urgency] = head
            elif pause is None or rest < pause:
                pause = rest
        if not best:
            return None, pause
        return best[self._turn(best)].item, None

    def _turn(self, best: dict[Urgency, _Ticket[Item]]) -> Urgency:
        """Whose turn it is."""
        if len(best) == 1:
            return next(iter(best))
        return Urgency.BULK if self._urgent_turns >= URGENT_TURNS else Urgency.INTERACTIVE

    def _head(self, kind: _Kind, now: float) -> _Ticket[Item] | None:
        """The oldest item of a lane that is still worth its time; older ones are dropped."""
        lane = self._lanes.get(kind)
        if lane is None:
            return None
        while lane:
            head = next(iter(lane.values()))
            if _worth(head.item, now):
                return head
            lane.popitem(last=False)
            self._length -= 1
        del self._lanes[kind]
        return None

    def _pop(self, first: Item, now: float) -> list[Item]:
        """A batch that begins with the lane of `first`, filled up from the other urgency's."""
        size = self._size(first, now)
        batch: list[Item] = []
        others = [urgency for urgency in Urgency if urgency != first.urgency]
        for urgency in (first.urgency, *others):
            kind = _Kind(first.key, urgency)
            while len(batch) < size and (head := self._head(kind, now)) is not None:
                self._lanes[kind].popitem(last=False)
                self._length -= 1
                batch.append(head.item)
            if not self._lanes.get(kind, True):
                del self._lanes[kind]
        if batch:
            served = any(item.urgency is Urgency.BULK for item in batch)
            passed_over = any(kind.urgency is Urgency.BULK for kind in self._lanes)
            self._urgent_turns = self._urgent_turns + 1 if passed_over and not served else 0
        return batch

    def _size(self, first: Item, now: float) -> int:
        most = self._policy.max_batch_size
        if self._sizing is None:
            return most
        kinds = (_Kind(first.key, urgency) for urgency in Urgency)
        waiting = sum(len(self._lanes.get(kind, ())) for kind in kinds)
        return max(1, min(most, self._sizing(first.key, waiting, first.deadline - now)))


def _worth(item: Waiting, now: float) -> bool:
    return not item.abandoned and item.deadline > now

"""When work will be done: from what waits, what is in hand and what work has cost so far."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple

from service.engine.batch_queue import URGENT_TURNS, BatchQueue, Lane, Urgency
from service.engine.cost import ThreadCosts
from service.engine.work import BatchKey, DecodeKey, Servable, Work
from service.engine.workers import Worker
from service.imaging.canvas import Size

_LONGEST_DOUBT: Final = 30.0
"""Seconds that a batch which is overdue is thought to need at most."""


Kind = Literal["single", "long", "many"]
KINDS: Final[tuple[Kind, ...]] = ("single", "long", "many")


class Price(NamedTuple):
    """What a request is expected to take, beside waiting."""

    canvas: Size | None = None
    """None: not known yet."""
    canvases: int = 1
    window: int = 1
    """Canvases that are in the pipeline at a time, if there are several."""
    decode: float = 0.0
    """Seconds of a decode thread before inference."""
    after: float = 0.0
    """Seconds of a decode thread after inference."""
    long: bool = False
    """Whether a decode thread is held for long at a time."""

    @property
    def kind(self) -> Kind:
        """Requests of one kind are mispredicted in the same way."""
        if self.canvases > 1:
            return "many"
        return "long" if self.long else "single"


class Booking:
    """Work of requests that were let in, and that is in no queue yet."""

    def __init__(self, device: float, thread: float) -> None:
        self.device = device
        """Seconds of one device."""
        self.thread = thread
        """Seconds of a decode thread, long at a time."""


class Forecast(NamedTuple):
    """When a request would be done, in seconds from now."""

    wait: float
    """Until its turn; 0: an idle service."""
    needed: float
    """Until it is done."""
    alone: float
    """The least that it takes on an idle service."""


class Prediction:
    """Looks at the queues and threads of a pipeline; changes nothing in them."""

    def __init__(
        self,
        *,
        arrived: BatchQueue[Work],
        ready: BatchQueue[Work],
        decoders: Sequence[Worker[Work]],
        devices: Sequence[Worker[Work]],
        count: int,
        max_batch_size: int,
    ) -> None:
        """`arrived` waits for the `decoders`, `ready` for the threads of the `devices`.

        `count` is how many devices there are: each has equally many of the threads, one after the
        other, which share it. More threads may come.
        """
        self._arrived = arrived
        self._ready = ready
        self._decoders = decoders
        self._devices = devices
        self._count = count
        self._max_batch_size = max_batch_size
        self.thread_costs = ThreadCosts()
        """What work in decode threads costs."""
        self._bookings: set[Booking] = set()

    def wait(self, urgency: Urgency = Urgency.INTERACTIVE, *, long: bool = False) -> float:
        """How many seconds, by what is known, until an image that comes now has its turn.

        `long`: it holds a decode thread for long. 0 when it would not wait at all. Any thread.
        """
        arrived, ready = self._arrived.lanes(), self._ready.lanes()
        now = time.monotonic()
        seconds = self._in_hand(now)
        before = after = 0.0
        for lane in (*arrived, *ready):
            if lane.urgency <= urgency:
                before += self._seconds(lane)
            else:
                after += self._seconds(lane)
        # Bulk has a turn now and then.
        seconds += before + min(after, before / URGENT_TURNS)
        before_it = [lane for lane in arrived if lane.urgency <= urgency]
        return max(seconds / self._count, self._decoding(before_it, now, long=long))

    @contextmanager
    def booked(self, model: Servable, price: Price) -> Iterator[Booking]:
        """Count what of a request comes into the queues bit by bit, such as tiles.

        On the event loop.
        """
        booking = Booking(
            device=self._inference(model, price) if price.canvases > 1 else 0.0,
            thread=price.after if price.long else 0.0,
        )
        self._bookings.add(booking)
        try:
            yield booking
        finally:
            self._bookings.discard(booking)

    def forecast(self, model: Servable, price: Price, urgency: Urgency) -> Forecast:
        """When a request that comes now would be done. On the event loop."""
        work, inference = price.decode + price.after, self._inference(model, price)
        wait = self.wait(urgency, long=price.long)
        alone = model.costs.fastest * math.ceil(price.canvases / self._count)
        if price.kind != "single":
            # What is long is learnt from few: the estimate must do on an idle service, too.
            alone += work
        if price.canvases > 1:
            inference += sum(each.device for each in self._bookings) / self._count
            inference *= 1 + self._others(price.window) / price.window
        if price.long:
            wait += sum(each.thread for each in self._bookings) / self._long_threads
        return Forecast(wait, wait + work + inference, alone)

    def _inference(self, model: Servable, price: Price) -> float:
        """Seconds that the canvases of a request take on the devices, were they alone."""
        rounds = math.ceil(price.canvases / self._count)
        return model.costs.of(price.canvas).lasting(rounds, most=self._max_batch_size)

    @property
    def _long_threads(self) -> int:
        """Decode threads that take what is long."""
        return max(1, len(self._decoders) - 1)

    def _others(self, window: int) -> int:
        """Images in the pipeline beside those of requests of many canvases."""
        held = sum(len(each.held) for each in (*self._decoders, *self._devices))
        many = window * sum(each.device > 0 for each in self._bookings)
        return max(0, len(self._arrived) + len(self._ready) + held - many)

    def _decoding(self, lanes: Sequence[Lane], now: float, *, long: bool) -> float:
        """Seconds until a decode thread is free for what waits behind these lanes."""
        short_seconds = long_seconds = 0.0
        held = 0
        for decoder in self._decoders:
            # Looked at once: the thread goes on meanwhile.
            for work in decoder.held:
                if work.prepared is None:
                    rest = _rest_of(work.estimate.seconds, now - decoder.since)
                    if work.estimate.long:
                        long_seconds += rest
                        held += 1
                    else:
                        short_seconds += rest
        for lane in lanes:
            if _is_long(lane):
                long_seconds += lane.seconds
                held += lane.length
            else:
                short_seconds += lane.seconds
        if long:
            return (long_seconds + short_seconds) / self._long_threads
        return short_seconds / max(1, len(self._decoders) - min(held, self._long_threads))

    def _in_hand(self, now: float) -> float:
        """How many seconds the devices, one after the other, will go on with what threads have."""
        seconds, inferring = 0.0, []
        for decoder in self._decoders:
            if infers(decoder):
                inferring.append(decoder)
            else:
                # Looked at once: the thread goes on meanwhile.
                for work in decoder.held:
                    if work.infers and not work.estimate.long:
                        seconds += work.model.costs.of(work.estimate.canvas).seconds(1)
        callers = len(self._devices) // self._count
        for first in range(0, self._count * callers, callers):
            busy = [each for each in self._devices[first : first + callers] if each.held]
            busy += inferring
            for worker in busy:
                seconds += _rest(worker, now, len(busy))
        return seconds

    def _seconds(self, lane: Lane) -> float:
        """What a device takes for the images of a lane, one batch after the other."""
        key = lane.key
        assert isinstance(key, BatchKey | DecodeKey), "there are no other keys"
        # The canvas of a long decode comes to the device long after what waits now.
        if isinstance(key, DecodeKey) and (key.long or not key.infers):
            return 0.0
        return key.model.costs.of(key.canvas).lasting(lane.length, most=self._max_batch_size)


def infers(decoder: Worker[Work]) -> bool:
    """Whether a decode thread goes on with what it decoded. Then there is only one device."""
    held = decoder.held
    return bool(held) and held[0].prepared is not None


def _is_long(lane: Lane) -> bool:
    return isinstance(lane.key, DecodeKey) and lane.key.long


def _rest(worker: Worker[Work], now: float, sharing: int) -> float:
    """How many seconds of a device's the batch still needs that a thread has in hand.

    `sharing` is how many batches the device works at.
    """
    since, batch = worker.since, worker.held
    if not batch:
        return 0.0
    key = batch[0].key
    cost = batch[0].model.costs.of(key.canvas)
    return _rest_of(cost.seconds(len(batch)), (now - since) / sharing)


def _rest_of(expected: float, spent: float) -> float:
    """How many seconds work still needs that has had `spent` of those that were expected."""
    rest = expected - spent
    # Work that is overdue is taken to need as long again. With 0 the service would look idle while
    # a batch hangs, and let in requests that would wait for it in vain.
    return rest if rest > 0 else min(-rest, _LONGEST_DOUBT)

"""When work will be done: from what waits, what is in hand and what batches have cost so far."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from service.admission import WAY_BACK, Caution, refuse_late
from service.batching import URGENT_TURNS, BatchQueue, Lane, Urgency
from service.work import BatchKey, Servable, Work
from service.workers import Worker

_LONGEST_DOUBT: Final = 30.0
"""Seconds that a batch which is overdue is thought to need at most."""
_NEWS: Final = 0.1
"""Share of the newest picture in what is known of decoding."""
_FRESH: Final = 0.002
"""Seconds within which a request that has been checked is let in by what was seen then."""


class _Checked(NamedTuple):
    """What a check saw."""

    urgency: Urgency
    arrivals: int
    at: float
    """On the clock of `time.monotonic`."""
    wait: float


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
        self._decode_seconds = 0.0
        """What decoding a picture takes, recent ones weighing more."""
        self._checked: _Checked | None = None
        """The last check."""
        self._cautions = {urgency: Caution() for urgency in Urgency}
        """One for each: bulk is also overtaken by what comes after it."""

    def wait(self, urgency: Urgency = Urgency.INTERACTIVE) -> float:
        """How many seconds, by what is known, until a picture that comes now has its turn.

        0 when it would not wait at all. Any thread.
        """
        arrived, ready = self._arrived.lanes(), self._ready.lanes()
        seconds = self._in_hand(time.monotonic())
        before = after = 0.0
        for lane in (*arrived, *ready):
            if lane.urgency <= urgency:
                before += self._seconds(lane)
            else:
                after += self._seconds(lane)
        # Bulk has a turn now and then.
        seconds += before + min(after, before / URGENT_TURNS)
        decodes = sum(lane.length for lane in arrived if lane.urgency <= urgency)
        return max(seconds / self._count, self._decode_seconds * decodes / len(self._decoders))

    def check(self, seconds: float, urgency: Urgency) -> None:
        """Raise Unavailable when the queue alone takes longer than `seconds`. On the event loop."""
        arrivals, now = self._arrived.arrivals, time.monotonic()
        wait = self.wait(urgency)
        self._checked = _Checked(urgency, arrivals, now, wait)
        refuse_late(finish=self._cautions[urgency].stretch(wait), left=seconds, alone=0.0)

    def admit(
        self,
        model: Servable,
        deadline: float,
        *,
        pictures: int = 1,
        urgency: Urgency = Urgency.INTERACTIVE,
    ) -> float:
        """Let pictures in if they will be done by `deadline`. Returns the seconds that they need.

        Raises Unavailable. On the event loop.
        """
        rounds = math.ceil(pictures / self._count)
        alone = model.costs.fastest * rounds
        wait = self._wait_as_checked(urgency)
        inference = model.costs.of().lasting(rounds, most=self._max_batch_size)
        needed = wait + self._decode_seconds + inference
        # An idle service lets in whatever is not hopeless: what it has learnt may be out of date,
        # and only work can tell.
        finish = self._cautions[urgency].stretch(needed) + WAY_BACK if wait else alone
        refuse_late(finish=finish, left=deadline - time.monotonic(), alone=alone)
        return needed

    def _wait_as_checked(self, urgency: Urgency) -> float:
        """As `wait`, without looking again where nothing has come since a check a moment ago.

        Of a request whose body came with its headers that is the check of the request itself.
        """
        seen = self._checked
        if (
            seen is None
            or seen.urgency is not urgency
            or seen.arrivals != self._arrived.arrivals
            or time.monotonic() - seen.at > _FRESH
        ):
            return self.wait(urgency)
        return seen.wait

    def learn(self, urgency: Urgency, *, predicted: float, actual: float) -> None:
        """Work that `admit` gave `predicted` seconds took `actual` seconds."""
        self._cautions[urgency].observe(predicted=predicted, actual=actual)

    def observe_decoding(self, seconds: float) -> None:
        """Decoding a picture took so long. Any thread."""
        self._decode_seconds += _NEWS * (seconds - self._decode_seconds)

    def _in_hand(self, now: float) -> float:
        """How many seconds the devices, one after the other, will go on with what threads have."""
        seconds, inferring = 0.0, []
        for decoder in self._decoders:
            if infers(decoder):
                inferring.append(decoder)
            else:
                # Looked at once: the thread goes on meanwhile.
                for work in decoder.held:
                    seconds += work.model.costs.of().seconds(1)
        callers = len(self._devices) // self._count
        for first in range(0, self._count * callers, callers):
            busy = [each for each in self._devices[first : first + callers] if each.held]
            busy += inferring
            for worker in busy:
                seconds += _rest(worker, now, len(busy))
        return seconds

    def _seconds(self, lane: Lane) -> float:
        """What the pictures of a lane will take, one batch after the other."""
        if isinstance(lane.key, BatchKey):
            cost = lane.key.model.costs.of(lane.key.canvas)
        else:
            assert isinstance(lane.key, Servable), "there are no other keys"
            cost = lane.key.costs.of()
        return cost.lasting(lane.length, most=self._max_batch_size)


def infers(decoder: Worker[Work]) -> bool:
    """Whether a decode thread goes on with what it decoded. Then there is only one device."""
    held = decoder.held
    return bool(held) and held[0].prepared is not None


def _rest(worker: Worker[Work], now: float, sharing: int) -> float:
    """How many seconds of a device's the batch still needs that a thread has in hand.

    `sharing` is how many batches the device works at.
    """
    since, batch = worker.since, worker.held
    if not batch:
        return 0.0
    key = batch[0].key
    cost = batch[0].model.costs.of(key.canvas if isinstance(key, BatchKey) else None)
    rest = cost.seconds(len(batch)) - (now - since) / sharing
    # What lasts longer than it should, nobody knows how long: for as long again, say. With 0 the
    # service would look idle while a batch hangs, and let in all who would wait for it in vain.
    return rest if rest > 0 else min(-rest, _LONGEST_DOUBT)

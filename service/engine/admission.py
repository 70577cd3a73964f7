"""Which requests are let in: those that find room, and will be done by their deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from service.engine.batch_queue import Urgency
from service.engine.prediction import KINDS, Booking, Prediction, Price
from service.engine.work import Servable
from service.errors import DeadlineExceeded, Unavailable

_START: Final = 1.1
"""How much longer than predicted work is taken to last before anything was seen."""
_MOST: Final = 4.0
_RISE: Final = 0.1
"""Least step of the ratio up when work lasted longer; else half of what was missing."""
_FALL: Final = 0.0002
"""Share of the ratio's excess over 1 that goes when work did not last longer, a tenth of it at
least: it settles where some 0.2 % last longer. A ratio that is too high makes queues shorter and
keeps no device idle; one that is too low breaks promises."""
WAY_BACK: Final = 0.02
"""Seconds from a device to the client: the event loop, and writing the answer."""
_RARE: Final = 0.02
"""`_FALL` for kinds of requests that are few: by the usual share their ratio never would."""
_SMALL_CHANGE: Final = 0.05
"""Seconds that are added to both sides of a comparison: being 20 ms late on 20 ms is no pattern."""

_SPARED: Final = 4
"""One place in this many is never taken by bulk."""


class Caution:
    """How far predictions are to be stretched so that few of them turn out too short.

    >>> caution = Caution()
    >>> round(caution.stretch(1.0), 2)
    1.1
    """

    def __init__(self, *, fall: float = _FALL) -> None:
        """`fall` is the share of the excess that goes when work did not last longer."""
        self.ratio = _START
        self._fall = fall

    def stretch(self, seconds: float) -> float:
        """A careful prediction, from a plain one."""
        return seconds * self.ratio

    def observe(self, *, predicted: float, actual: float) -> None:
        """Work whose plain prediction was `predicted` seconds took `actual` seconds."""
        seen = (actual + _SMALL_CHANGE) / (predicted + _SMALL_CHANGE)
        if seen > self.ratio:
            self.ratio += max(_RISE, (seen - self.ratio) / 2)
        else:
            self.ratio -= self._fall * max(self.ratio - 1.0, 0.1)
        self.ratio = min(max(self.ratio, 1.0), _MOST)


def refuse_late(*, finish: float, left: float, alone: float) -> None:
    """Raise Unavailable when work that would take `finish` seconds has only `left` seconds.

    `alone` is the least that it would take on an idle service.
    """
    if finish <= left:
        return
    if alone > left:
        raise Unavailable(
            f"the deadline, {_ms(left)} away, cannot be met: an image takes at least "
            f"{_ms(alone)} here; allow more time in X-Deadline-Ms",
            reason="deadline-too-short",
        )
    raise Unavailable(
        f"the deadline, {_ms(left)} away, cannot be met: the answer is expected in "
        f"{_ms(finish)}; try again later, or allow more time",
        reason="deadline",
        retry_after=finish - left,
    )


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


class Admission:
    """Lets a request in, or refuses it with the time after which to try again. Not thread-safe.

    A request is asked about twice at most: `check` before its body is read, `promise` once its
    image's header tells what it costs.
    """

    def __init__(
        self, places: Places, prediction: Prediction, *, refuse_if_over: Callable[[], None]
    ) -> None:
        """`refuse_if_over` raises Unavailable once no more work is taken."""
        self._places = places
        self._prediction = prediction
        self._refuse_if_over = refuse_if_over
        # Bulk is also overtaken by what comes after it.
        self._cautions = {
            (urgency, kind): Caution() if kind == "single" else Caution(fall=_RARE)
            for urgency in Urgency
            for kind in KINDS
        }

    def check(self, patience: float, urgency: Urgency) -> None:
        """Raise Unavailable where any image would be refused, whatever its body holds.

        `patience` is how many seconds its client waits.
        """
        self._refuse_if_over()
        self._places.check(urgency=urgency)
        wait = self._cautions[urgency, "single"].stretch(self._prediction.wait(urgency))
        refuse_late(finish=wait, left=patience, alone=0.0)

    @contextmanager
    def promise(
        self, model: Servable, deadline: float, price: Price, urgency: Urgency
    ) -> Iterator[Booking]:
        """Do the work of the block if it will be done by `deadline`, and learn how long it took.

        What of it comes into the queues bit by bit is booked meanwhile. Raises Unavailable.
        """
        self._refuse_if_over()
        forecast = self._prediction.forecast(model, price, urgency)
        caution = self._cautions[urgency, price.kind]
        # An idle service lets in whatever is not hopeless: what it has learnt may be out of date,
        # and only work can tell.
        finish = caution.stretch(forecast.needed) + WAY_BACK if forecast.wait else forecast.alone
        started = time.monotonic()
        refuse_late(finish=finish, left=deadline - started, alone=forecast.alone)
        with self._prediction.booked(model, price) as booking:
            try:
                yield booking
            except DeadlineExceeded:
                caution.observe(predicted=forecast.needed, actual=time.monotonic() - started)
                raise
            caution.observe(predicted=forecast.needed, actual=time.monotonic() - started)


def _ms(seconds: float) -> str:
    return f"{max(0.0, seconds) * 1e3:.0f} ms"

"""What work costs, learnt as it runs.

Inference: t(n) = a n + b seconds of a device for n images of one canvas. Everything else: seconds
of a thread for each pixel, by kind of work.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from operator import attrgetter
from typing import Final, NamedTuple

from service.imaging.canvas import Size

_NEWS: Final = 0.1
"""Share of the newest batch in what is known of its size."""
_OUTLIER: Final = 4.0
"""A batch that took more than this many times what was expected counts as that many times: one
pause of the machine says little about the next batch."""
_WORTH_SHARING: Final = 0.1
"""Images share a batch only where this share of a lone image's time is saved."""
_TRIAL: Final = 64
"""One in this many lone images that might have shared a batch does."""

_MOST_CANVASES: Final = 256
"""Costs are kept of this many canvases; clients may choose among thousands."""
_STALE_SECONDS: Final = 30.0
"""For so long a bound holds that no further batch has confirmed."""

_SMALL: Final = 20_000
"""Pixels that take as long as what is done once for each image."""
_FIRST_GUESS: Final = {
    "jpeg": 5e-9,
    "progressive": 1e-9,
    "png": 3e-8,
    "webp": 4e-8,
    "tile": 1e-8,
    "drawn": 1.5e-7,
}
"""Seconds of a thread for a pixel, by the first word of the kind, before any was seen."""
_OTHER_GUESS: Final = 5e-8
_GUESS_PIXELS: Final = 250_000.0
"""The weight of a first guess beside the first images."""


class BatchCost:
    """The cost of batches of one canvas on one kind of device. Not thread-safe by itself."""

    def __init__(self) -> None:
        self._mean: dict[int, float] = {}
        """Seconds by batch size, recent batches weighing more."""
        self.per_image = 0.0
        """a of t(n) = a n + b."""
        self.per_batch = 0.0
        """b of t(n) = a n + b."""
        self._alone = 0
        self.fastest = 0.0
        """A bound from below for a lone image; 0 before anything was seen."""

    def observe(self, images: int, seconds: float) -> None:
        """Learn that a batch of `images` images took `seconds`."""
        share = seconds / images
        self.fastest = share if not self._mean else min(self.fastest, share)
        before = self._mean.get(images)
        if before is None:
            self._mean[images] = seconds
        else:
            seconds = min(seconds, _OUTLIER * before)
            self._mean[images] = before + _NEWS * (seconds - before)
        self.per_image, self.per_batch = _line(self._mean)

    def seconds(self, images: int) -> float:
        """Return the seconds that a batch of `images` images takes; 0 before any was seen."""
        seen = self._mean.get(images)
        return self.per_image * images + self.per_batch if seen is None else seen

    def lasting(self, images: int, *, most: int) -> float:
        """What images (at least one) will take in batches of at most `most`, one by one."""
        size = self.best_batch(images, most=most, left=math.inf)
        batches, rest = divmod(images, size)
        return batches * self.seconds(size) + (self.seconds(rest) if rest else 0.0)

    def best_batch(self, waiting: int, *, most: int, left: float) -> int:
        """How many of the images that wait to take at once, at least 1 and at most `most`.

        `left` is how many seconds the oldest of them still has.
        """
        size = min(waiting, most)
        if len(self._mean) > 1 and not self._worth_sharing():
            return 1
        while size > 1 and self.seconds(size) > left:
            size -= 1
        return size

    def try_batch(self, waiting: int, *, most: int, left: float) -> int:
        """As `best_batch`; one is tried now and then where they do not pay: that may change."""
        size = self.best_batch(waiting, most=most, left=left)
        if size > 1 or min(waiting, most) == 1:
            return size
        self._alone += 1
        return min(waiting, most) if self._alone % _TRIAL == 0 else size

    def _worth_sharing(self) -> bool:
        return self.per_batch >= _WORTH_SHARING * (self.per_image + self.per_batch)


class Costs:
    """What one model costs on the service's devices, by canvas. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._costs: OrderedDict[Size, BatchCost] = OrderedDict()
        """The most recent one is the last."""
        self._newest = BatchCost()
        self._fastest = math.inf
        self._learnt = -math.inf

    def observe(self, canvas: Size, images: int, seconds: float) -> None:
        """A batch of canvases took so long."""
        with self._lock:
            cost = self._costs.setdefault(canvas, BatchCost())
            cost.observe(images, seconds)
            self._costs.move_to_end(canvas)
            self._newest = cost
            if len(self._costs) > _MOST_CANVASES:
                self._costs.popitem(last=False)
            self._fastest = min(self._fastest, cost.fastest)
            self._learnt = time.monotonic()

    def of(self, canvas: Size | None = None) -> BatchCost:
        """The cost of a canvas; without one, that of the most recent canvas.

        Of a canvas never seen it is that of the smallest larger one: too much rather than too
        little, until it is seen once.
        """
        # Without the lock: single look-ups, and asked for many times with each image.
        if canvas is None:
            return self._newest
        return self._costs.get(canvas) or self._of_larger(canvas)

    def _of_larger(self, canvas: Size) -> BatchCost:
        with self._lock:
            larger = [size for size in self._costs if size.area >= canvas.area]
            if not larger:
                return self._newest
            return self._costs[min(larger, key=attrgetter("area"))]

    @property
    def fastest(self) -> float:
        """A bound from below for a lone image on any canvas; 0 where there is none.

        One that was learnt while the machine was busy may be too high, and would turn away all
        the work that could correct it: so it ends some time after the last batch.
        """
        with self._lock:
            known = time.monotonic() - self._learnt < _STALE_SECONDS
            return self._fastest if known else 0.0


def _guess(kind: str) -> float:
    """Seconds for a pixel of work that was never seen."""
    return _FIRST_GUESS.get(kind.partition(" ")[0], _OTHER_GUESS)


class _Rate(NamedTuple):
    seconds: float
    pixels: float
    """Both are sums in which recent work weighs more."""
    learnt: float
    """On the clock of `time.monotonic`."""


class ThreadCosts:
    """What work in a decode thread costs: seconds for each pixel, by kind of work. Any thread.

    >>> costs = ThreadCosts()
    >>> for _ in range(100):
    ...     costs.observe("png rgb 8", 980_000, 0.04)
    >>> round(costs.seconds("png rgb 8", 48_980_000), 2)
    1.96
    """

    def __init__(self) -> None:
        self._rates: dict[str, _Rate] = {}
        """By kind, of which there are some hundred."""
        self._made = time.monotonic()

    def seconds(self, kind: str, pixels: float) -> float:
        """What work of a kind will take."""
        rate = self._rates.get(kind)
        if rate is None:
            rate = _Rate(_guess(kind), 1.0, self._made)
        # What was learnt while the machine was busy may be too much, and would turn away all the
        # work that could correct it: so it fades once no more work confirms it.
        fading = min(1.0, _STALE_SECONDS / max(time.monotonic() - rate.learnt, 1.0))
        return fading * rate.seconds / rate.pixels * (pixels + _SMALL)

    def observe(self, kind: str, pixels: float, seconds: float) -> None:
        """Work of a kind took this many seconds."""
        pixels += _SMALL
        before, now = self._rates.get(kind), time.monotonic()
        if before is None:
            # One file must not decide on all of its kind.
            before = _Rate(_guess(kind) * _GUESS_PIXELS, _GUESS_PIXELS, now)
        # Sums, so that a large image counts for more than the small ones before it.
        seconds = min(seconds, _OUTLIER * before.seconds / before.pixels * pixels)
        keep = 1.0 - _NEWS
        self._rates[kind] = _Rate(
            keep * before.seconds + seconds, keep * before.pixels + pixels, now
        )


def _line(points: dict[int, float]) -> tuple[float, float]:
    """a, b >= 0 of the line a n + b through (n, seconds), by least squares.

    >>> _line({1: 5.0, 4: 11.0})
    (2.0, 3.0)
    >>> _line({2: 5.0})
    (2.5, 0.0)
    """
    count = len(points)
    mean_n = sum(points) / count
    mean_t = sum(points.values()) / count
    spread = sum((n - mean_n) ** 2 for n in points)
    # Through the origin where all batches have one size, or where noise makes larger ones cheaper.
    steepest = mean_t / mean_n
    if not spread:
        return steepest, 0.0
    slope = sum((n - mean_n) * (t - mean_t) for n, t in points.items()) / spread
    slope = min(max(slope, 0.0), steepest)
    return slope, max(0.0, mean_t - slope * mean_n)

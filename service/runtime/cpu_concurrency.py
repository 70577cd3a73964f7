"""How many inferences share a CPU: as told, or as measured on the first model that is loaded.

A lone inference cannot keep all cores busy: between two parallel stretches, and inside
non-maximum suppression, only one of its threads has work. Others beside it, each on its share of
the cores, fill these gaps and have fewer threads to wait for; an image that comes alone still has
all cores.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final

from service.imaging.canvas import Size
from service.runtime.detector import Detector
from service.runtime.shared_detector import SharedDetector

_log = logging.getLogger("retinaserve.side_by_side")
_MOST: Final = 8
_GAIN: Final = 1.05
"""Twice as many side by side must bring so many times as many images: each keeps intermediate
values of its own in memory."""
_ROUNDS: Final = 12
"""The first that shows the gain is the last: something else may have kept the machine busy."""
_LONG_SECONDS: Final = 1.0
"""No further round of a measurement that has taken so long."""

Run = Callable[[], None]
"""One inference."""
OpenDetector = Callable[[int, int], Detector]
"""A detector of one model on so many threads, warm for so many callers side by side."""


class SideBySide:
    """The number, known from the start or once it was measured."""

    def __init__(self, asked: int | None, *, cores: int) -> None:
        """`asked` is the number to take; None: what proves best on so many cores."""
        self.chosen: Future[int] = Future()
        self._cores = cores
        if asked is not None or cores == 1:
            self.chosen.set_result(asked or 1)

    @property
    def surely(self) -> tuple[int, int] | None:
        """Threads and callers of a detector that `share` will ask for, whatever is measured.

        None where that is none.
        """
        count = self.chosen.result() if self.chosen.done() else 2
        return (self._threads(count), count) if self._cores > 1 and count > 1 else None

    def share(
        self,
        alone: Detector,
        open_detector: OpenDetector,
        *,
        canvas: Size,
        alone_seconds: float,
    ) -> tuple[Detector, int]:
        """A detector for so many callers side by side, and how many.

        `alone` has all cores and is warm: on `canvas` it has just taken `alone_seconds`. The number
        is measured there if it is not known yet. Raises what the detectors raise.
        """
        shared = {1: alone}

        def detector(count: int) -> Detector:
            if count not in shared:
                shared[count] = SharedDetector(alone, open_detector(self._threads(count), count))
            return shared[count]

        if not self.chosen.done():
            self._measure(
                lambda count: partial(detector(count).suited(lone=count == 1).warm, canvas),
                1 / alone_seconds,
            )
        count = self.chosen.result()
        # On one core there is nothing that threads could share.
        return (alone if self._cores == 1 else detector(count)), count

    def _threads(self, count: int) -> int:
        return max(1, self._cores // count)

    def _measure(self, runs: Callable[[int], Run], alone_rate: float) -> None:
        best, rates = measure(runs, alone_rate, most=min(self._cores, _MOST))
        _log.info(
            "inferences side by side on %d CPU cores: %d (measured %s)",
            self._cores,
            best,
            ", ".join(f"{count}: {rate:.1f}/s" for count, rate in rates.items()),
        )
        self.chosen.set_result(best)


def measure(
    runs: Callable[[int], Run], alone_rate: float, *, most: int
) -> tuple[int, dict[int, float]]:
    """How many runs side by side are best, and runs a second by how many were tried.

    1, 2, 4 and so on are; the first step that does not gain enough is the last. `runs` gives what
    to run so many times side by side; one alone has just had `alone_rate`.
    """
    best = 1
    rates = {1: alone_rate}
    while 2 * best <= most and _gains(runs, best, rates):
        best *= 2
    return best, rates


def _gains(runs: Callable[[int], Run], count: int, rates: dict[int, float]) -> bool:
    """Whether twice as many runs side by side gain enough over `count`; the best rates are kept."""
    few, many = (runs(count), count), (runs(2 * count), 2 * count)
    began = time.monotonic()
    for number in range(_ROUNDS):
        # In turns, so that what else the machine does counts for both. The first turn of a lone one
        # has been.
        for run, each in (many,) if count == 1 and not number else (few, many):
            rates[each] = max(rates.get(each, 0.0), _rate(run, each))
        if rates[2 * count] >= _GAIN * rates[count]:
            return True
        if time.monotonic() - began > _LONG_SECONDS:
            break
    return False


def _rate(run: Run, count: int) -> float:
    """Runs a second, side by side, when each goes on with another one as soon as it is done.

    So it is the sum of what each does by itself: to wait until all are done would count against
    them what else keeps one of the cores busy, and at a start something does.
    """

    def seconds() -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    with ThreadPoolExecutor(count, thread_name_prefix="measure") as pool:
        return sum(1 / each.result() for each in [pool.submit(seconds) for _ in range(count)])

"""How many inferences share a CPU: as told, or as measured on the first model that is loaded.

A lone inference cannot keep all cores busy: between two parallel stretches, and inside
non-maximum suppression, only one of its threads has work. A second one beside it, in the same
session and on the same threads, fills these gaps; the weights are there once, and a picture that
comes alone still has all threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

_log = logging.getLogger("retinaserve.side_by_side")
_MOST: Final = 8
_GAIN: Final = 1.1
"""Twice as many side by side must bring so many times as many pictures: each keeps intermediate
values of its own in memory."""
_ROUNDS: Final = 3
"""The first that shows the gain is the last: something else may have kept the machine busy."""
_LONG_SECONDS: Final = 1.0
"""No further round of a measurement that has taken so long."""


class SideBySide:
    """The number, known from the start or once it was measured."""

    def __init__(self, asked: int | None, *, cores: int) -> None:
        """`asked` is the number to take; None: what proves best on so many cores."""
        self.chosen: Future[int] = Future()
        self._cores = cores
        if asked is not None or cores == 1:
            self.chosen.set_result(asked or 1)

    def choose(self, run: Callable[[], None], *, release: Callable[[], None]) -> int:
        """The number; `run`, which is one inference, is measured if it is not known yet.

        `release` gives back the memory of more than are to run. Raises what the two raise.
        """
        if not self.chosen.done():
            best, rates = measure(run, most=min(self._cores, _MOST))
            _log.info(
                "inferences side by side on %d CPU cores: %d (measured %s)",
                self._cores,
                best,
                ", ".join(f"{count}: {rate:.1f}/s" for count, rate in rates.items()),
            )
            if best < max(rates):
                release()
            self.chosen.set_result(best)
        return self.chosen.result()


def measure(run: Callable[[], None], *, most: int) -> tuple[int, dict[int, float]]:
    """How many runs side by side are best, and runs a second by how many were tried.

    1, 2, 4 and so on are; the first step that does not gain enough is the last.
    """
    best = 1
    rates: dict[int, float] = {}
    while 2 * best <= most and _gains(run, best, rates):
        best *= 2
    return best, rates


def _gains(run: Callable[[], None], count: int, rates: dict[int, float]) -> bool:
    """Whether twice as many runs side by side gain enough over `count`; the best rates are kept."""
    began = time.monotonic()
    for _ in range(_ROUNDS):
        # In turns, so that what else the machine does counts for both.
        for each in (count, 2 * count):
            rates[each] = max(rates.get(each, 0.0), each / _together(run, each))
        if rates[2 * count] >= _GAIN * rates[count]:
            return True
        if time.monotonic() - began > _LONG_SECONDS:
            break
    return False


def _together(run: Callable[[], None], count: int) -> float:
    """Seconds until so many runs, begun together, are all done."""
    with ThreadPoolExecutor(count, thread_name_prefix="measure") as pool:
        started = time.perf_counter()
        for done in [pool.submit(run) for _ in range(count)]:
            done.result()
        return time.perf_counter() - started

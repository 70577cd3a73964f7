"""A rate limit: a token bucket for each client, in bounded memory."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from typing import Final

from service.errors import DataError, RateLimited
from service.settings import RATE_PATTERN

_PERIODS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}
_MOST_CALLERS: Final = 10_000
"""Buckets that are kept. The least recently used goes first: it is most likely full, and a full
bucket is the same as none."""


class RateLimiter:
    """Limits the requests of each client in a period; all of them may come at once.

    A bucket is one number, the moment when it will be full again (the "generic cell rate
    algorithm" of ATM networks): every call moves it by one interval.
    """

    def __init__(self, rate: str) -> None:
        """`rate` as in "100/s", "6000/m" or "1000/h". Raises DataError."""
        if re.fullmatch(RATE_PATTERN, rate) is None:
            raise DataError(f"{rate!r} is not a rate; write it as 100/s, 6000/m or 1000/h")
        count, _, unit = rate.partition("/")
        self._rate = rate
        self._period = _PERIODS[unit]
        self._interval = self._period / int(count)
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, caller: str) -> None:
        """Count one request. Raises RateLimited, and counts nothing, above the limit."""
        now = time.monotonic()
        before = self._full_at.pop(caller, now)
        full_at = max(now, before) + self._interval
        wait = full_at - now - self._period
        # Sums of intervals are not exact: the last request of a period must still pass.
        refused = wait > 1e-6 * self._period
        # Put back at the end in either case: the bucket of a refused client must be kept.
        self._full_at[caller] = before if refused else full_at
        if len(self._full_at) > _MOST_CALLERS:
            self._full_at.popitem(last=False)
        if refused:
            raise RateLimited(
                f"more than {self._rate} requests; try again in {wait:.1f} s", retry_after=wait
            )

"""The highest rate that a service can promise, found by trials."""

from __future__ import annotations

from collections.abc import Callable

LOWEST, HIGHEST = 0.7, 1.0
"""Of the closed-loop maximum: where the rate is looked for."""
STEP_DOWN = 0.97
"""What becomes of a rate that did not hold in the long trial."""
GIVE_UP = 0.35
"""Of the closed-loop maximum: the rate below which nothing is tried any more."""

Trial = Callable[[float], bool]


def highest_rate(short: Trial, long: Trial, *, maximum: float, steps: int) -> float:
    """The highest rate that holds in a long trial; 0 where none does.

    Bisection by short trials finds about where it is. They flatter, for a rate that is slightly too
    high shows only when its queue had time to grow: the long trial decides, and from there the rate
    goes down until it holds.
    """
    low, high = LOWEST * maximum, HIGHEST * maximum
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if short(middle) else (low, middle)
    while not long(low):
        low *= STEP_DOWN
        if low < GIVE_UP * maximum:
            return 0.0
    return low

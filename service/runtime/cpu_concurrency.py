"""The number of inferences that share a CPU, and the threads that each of them has.

One inference cannot keep all cores busy: between two parallel stretches, and inside non-maximum
suppression, only one of its threads has work. Several inferences, each on its share of the cores,
fill these gaps and have fewer threads to wait for. An image that is alone has all cores: see
`SharedDetector`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_MOST: Final = 4
"""Each inference keeps intermediate values of its own in memory."""


@dataclass(frozen=True, slots=True)
class CpuConcurrency:
    """How inferences share a CPU."""

    inferences: int = 1
    """Most inferences at a time."""
    threads: int | None = None
    """Threads of each while others run. None: there is nothing to share."""


def cpu_concurrency(asked: int | None, cores: int) -> CpuConcurrency:
    """Return how inferences share `cores` cores; `asked` is their number, None: by a rule.

    >>> [cpu_concurrency(None, cores).inferences for cores in (1, 2, 4, 6, 8, 64)]
    [1, 2, 2, 3, 4, 4]
    """
    inferences = asked or min(cores, max(2, min(_MOST, cores // 2)))
    if cores == 1 or inferences == 1:
        return CpuConcurrency(inferences)
    return CpuConcurrency(inferences, threads=max(1, cores // inferences))

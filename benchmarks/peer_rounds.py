"""What rounds of several servers tell: whether they do the same work, and how they compare."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PIXELS, SCORE = 0.1, 0.002
"""By how much answers may differ: sums of other threads round differently."""
Load = dict[str, Any]
Detections = Sequence[dict[str, Any]]


@dataclass
class Measured:
    """All rounds of one server."""

    name: str
    loads: dict[int, list[Load]] = field(default_factory=dict)

    def values(self, connections: int, what: str) -> list[float]:
        return [float(each[what]) for each in self.loads[connections]]

    def median(self, connections: int, what: str) -> float:
        return statistics.median(self.values(connections, what))

    def spread(self, connections: int) -> float:
        """Half of the range of images/s over the rounds, as a part of their median."""
        values = self.values(connections, "per_second")
        return (max(values) - min(values)) / 2 / statistics.median(values)


def together(turns: Sequence[Load]) -> Load:
    """One round of a server: what came of all its turns, as if they had been one."""
    requests = sum(turn["requests"] for turn in turns)
    seconds = sum(turn["requests"] / turn["per_second"] for turn in turns)
    cpu_seconds = sum(turn["cpu_seconds"] for turn in turns)
    latencies = [latency for turn in turns for latency in turn["latencies_ms"]]
    p50, p99 = np.percentile(latencies, [50, 99], method="higher")
    return {
        "per_second": requests / seconds,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "cpu_ms": 1e3 * cpu_seconds / requests,
        "busy": cpu_seconds / seconds,
        "resident": turns[-1]["resident"],
    }


def must_agree(name: str, answer: Detections, expected: Detections) -> None:
    """Refuse to compare servers that do not do the same work."""
    if len(answer) != len(expected) or not expected:
        raise SystemExit(f"{name} found {len(answer)} objects, expected {len(expected)}, not none")
    for one, other in zip(answer, expected, strict=True):
        boxes = [abs(one["box"][side] - other["box"][side]) for side in other["box"]]
        same = one["label"] == other["label"] and max(boxes) <= PIXELS
        if not same or abs(one["score"] - other["score"]) > SCORE:
            raise SystemExit(f"{name} found {one}, expected {other}")


def ratios(ours: Measured, peer: Measured, connections: int, what: str) -> list[float]:
    """Ours over the peer's, round by round."""
    pairs = zip(ours.values(connections, what), peer.values(connections, what), strict=True)
    return [one / other for one, other in pairs]


def allowed(ours: Measured, peer: Measured, connections: int) -> float:
    """What the ratio of rates may fall to: by less than either's rounds differ is not slower."""
    spread = max(ours.spread(connections), peer.spread(connections))
    return math.floor(1000 * (1 - spread)) / 1000

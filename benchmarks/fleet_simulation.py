"""A fleet of replicas, simulated: how many it takes, what a crowd does to it, how soon it grows.

    python benchmarks/fleet_simulation.py                    # 1 to 1,000 replicas, flash crowds
    python benchmarks/fleet_simulation.py --seconds 0.05     # another cost of an image
    python benchmarks/fleet_simulation.py --check            # beside two real replicas

A discrete-event simulation. Images arrive at random and are shared out at random, as a balancer
of connections does. A replica works at one image at a time, the others wait in line, and it lets
in by the service's own rule and its own code (`service.engine.admission`): what it has learnt of
the cost of an image, stretched by its caution, has to fit the deadline. The autoscaler is
Kubernetes', with the numbers of `deploy/kubernetes/base/autoscaling.yaml`; a new replica serves
after `--start-up` seconds.

`--check` sends random arrivals to two real services that share this machine's cores, measures
between slices of them how long an image takes just then, and simulates the same: the 99th
percentile of accepted requests and the share of refusals have to agree within 20 %.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from report import Report, Table, add_options

from service.engine.admission import WAY_BACK, Caution, refuse_late
from service.engine.cost import BatchCost
from service.errors import Unavailable

QUEUE: Final = 128
"""Images that a replica holds at most, as MAX_QUEUE_SIZE."""
SYNC_SECONDS: Final = 15.0
"""How often the autoscaler looks."""
TARGET_WAIT: Final = 0.5
TOLERANCE: Final = 0.1
GROW_SECONDS, GROW_SHARE, GROW_LEAST = 30.0, 1.0, 2
SHRINK_SECONDS, SHRINK_PERIOD = 300.0, 60.0
FLEETS: Final = (1, 2, 10, 100, 1000)

Draw = Callable[[random.Random], float]
"""Seconds that an image takes."""
Rate = Callable[[float], float]
"""Images a second at a time."""


class Replica:
    """One service with one device, which does one image after the other."""

    def __init__(self) -> None:
        self.cost = BatchCost()
        self.line: deque[tuple[float, float]] = deque()
        """(arrived, predicted) of what is held; the first is being worked at."""
        self.began = 0.0
        self._caution = Caution()

    def wait(self, now: float) -> float:
        """How long an image that came now would wait, by what the replica knows."""
        if not self.line:
            return 0.0
        mean = self.cost.seconds(1)
        rest = mean - (now - self.began)
        return (rest if rest > 0 else -rest) + (len(self.line) - 1) * mean

    def admits(self, now: float, deadline: float) -> bool:
        """Let an image in, or refuse it."""
        if len(self.line) >= QUEUE:
            return False
        wait = self.wait(now)
        needed = wait + self.cost.seconds(1)
        finish = self._caution.stretch(needed) + WAY_BACK if wait else self.cost.fastest
        try:
            refuse_late(finish=finish, left=deadline, alone=self.cost.fastest)
        except Unavailable:
            return False
        self.line.append((now, needed))
        return True

    def finish(self, now: float) -> float:
        """The first in line is done; how long it took from its arrival."""
        arrived, predicted = self.line.popleft()
        self.cost.observe(1, now - self.began)
        self._caution.observe(predicted=predicted, actual=now - arrived)
        return now - arrived


@dataclass
class Seen:
    """What came of all images."""

    sent: int = 0
    refused: int = 0
    late: int = 0
    latencies: list[float] = field(default_factory=list)
    fleet: list[tuple[float, int]] = field(default_factory=list)
    """(time, replicas) whenever their number changed."""

    def percentile(self, q: float) -> float:
        """Milliseconds of accepted images."""
        if not self.latencies:
            return math.nan
        return 1e3 * float(np.percentile(self.latencies, q, method="higher"))

    @property
    def refusal_rate(self) -> float:
        return self.refused / max(1, self.sent)


@dataclass(frozen=True)
class Scaling:
    """How a fleet grows and shrinks; with `most` as many as `least` it does not."""

    least: int
    most: int
    start_up: float


class Fleet:
    """Replicas behind a balancer, and the one who decides how many there are."""

    def __init__(self, draw: Draw, *, deadline: float, scaling: Scaling, seed: int = 0) -> None:
        self.seen = Seen(fleet=[(0.0, scaling.least)])
        self._draw = draw
        self._deadline = deadline
        self._scaling = scaling
        self._dice = random.Random(seed)
        self._replicas = [self._replica() for _ in range(scaling.least)]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._wanted = scaling.least
        self._grew = -math.inf
        self._shrank = -math.inf
        self._advice: deque[tuple[float, int]] = deque()

    def run(self, rate: Rate, *, highest: float, seconds: float) -> Seen:
        """Images at `rate`, which is never above `highest`, for so long; then what is left."""
        for due in self._arrivals(rate, highest, seconds):
            self._until(due)
            self._arrive(due)
        self._until(math.inf)
        return self.seen

    def _replica(self) -> Replica:
        made = Replica()
        # A service measures its model while it warms it.
        made.cost.observe(1, self._draw(self._dice))
        return made

    def _arrivals(self, rate: Rate, highest: float, seconds: float) -> Iterator[float]:
        now = 0.0
        if self._scaling.most > self._scaling.least:
            for turn in range(1, int(seconds / SYNC_SECONDS) + 1):
                self._at(turn * SYNC_SECONDS, self._look)
        while (now := now + self._dice.expovariate(highest)) < seconds:
            if self._dice.random() * highest < rate(now):
                yield now

    def _at(self, when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def _until(self, limit: float) -> None:
        while self._events and self._events[0][0] <= limit:
            when, _, what = heapq.heappop(self._events)
            what(when)

    def _arrive(self, now: float) -> None:
        self.seen.sent += 1
        replica = self._replicas[self._dice.randrange(len(self._replicas))]
        if not replica.admits(now, self._deadline):
            self.seen.refused += 1
        elif len(replica.line) == 1:
            self._begin(replica, now)

    def _begin(self, replica: Replica, now: float) -> None:
        replica.began = now
        self._at(now + self._draw(self._dice), lambda when: self._finish(replica, when))

    def _finish(self, replica: Replica, now: float) -> None:
        took = replica.finish(now)
        if took > self._deadline:
            self.seen.late += 1
        else:
            self.seen.latencies.append(took)
        if replica.line:
            self._begin(replica, now)

    def _look(self, now: float) -> None:
        """One turn of the autoscaler."""
        ready = len(self._replicas)
        ratio = sum(replica.wait(now) for replica in self._replicas) / ready / TARGET_WAIT
        steady = abs(ratio - 1) <= TOLERANCE
        advice = ready if steady else max(1, math.ceil(ready * ratio))
        self._advice.append((now, advice))
        while self._advice[0][0] < now - SHRINK_SECONDS:
            self._advice.popleft()
        if advice > self._wanted and now - self._grew >= GROW_SECONDS:
            step = max(GROW_LEAST, math.ceil(GROW_SHARE * self._wanted))
            more = min(advice, self._wanted + step, self._scaling.most) - self._wanted
            self._wanted += more
            self._grew = now
            for _ in range(more):
                self._at(now + self._scaling.start_up, self._join)
        elif now - self._shrank >= SHRINK_PERIOD and now >= SHRINK_SECONDS:
            # The highest advice of the last minutes: nobody leaves in a lull.
            highest = max(advice for _, advice in self._advice)
            if max(highest, self._scaling.least) < self._wanted == len(self._replicas):
                self._wanted -= 1
                self._shrank = now
                # It takes no more, and finishes what it has.
                self._replicas.pop()
                self.seen.fleet.append((now, len(self._replicas)))

    def _join(self, now: float) -> None:
        self._replicas.append(self._replica())
        self.seen.fleet.append((now, len(self._replicas)))


def spread_around(seconds: float, spread: float = 0.1) -> Draw:
    """Log-normal: mean `seconds`, standard deviation `spread` of it."""
    sigma = math.sqrt(math.log(1 + spread**2))
    middle = math.log(seconds) - sigma**2 / 2
    return lambda dice: dice.lognormvariate(middle, sigma)


def sizes(table: Table, draw: Draw, mean: float, deadline: float, quick: bool) -> None:
    """Fleets that do not grow, at loads around what they can do."""
    for count in FLEETS[: 3 if quick else None]:
        # About as many images for each: large fleets need less time to show the same.
        seconds = max(20.0, (20_000 if quick else 200_000) * mean / count)
        for load in (0.7, 0.9, 1.0, 1.5, 3.0):
            fleet = Fleet(draw, deadline=deadline, scaling=Scaling(count, count, 0.0))
            rate = load * count / mean
            seen = fleet.run(lambda _, rate=rate: rate, highest=rate, seconds=seconds)
            table.row(
                *(count, load, seen.sent, seen.percentile(50), seen.percentile(99)),
                *(100 * seen.refusal_rate, 100 * seen.late / seen.sent),
            )


def crowds(table: Table, draw: Draw, mean: float, deadline: float, lags: Sequence[float]) -> None:
    """A fleet at half its capacity meets a crowd after five minutes, for ten."""
    for least, factor, lag in itertools.product((2, 20), (2.0, 5.0), lags):
        usual = 0.5 * least / mean

        def rate(now: float, usual: float = usual, factor: float = factor) -> float:
            return usual * (factor if 300 <= now < 900 else 1.0)

        scaling = Scaling(least, 10 * least, lag)
        seen = Fleet(draw, deadline=deadline, scaling=scaling).run(
            rate, highest=usual * factor, seconds=2400
        )
        largest = max(count for _, count in seen.fleet)
        reached = next(when for when, count in seen.fleet if count == largest)
        table.row(
            *(least, factor, lag, seen.sent, 100 * seen.refusal_rate, seen.percentile(99)),
            *(100 * seen.late / seen.sent, largest, reached - 300, seen.fleet[-1][1]),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=0.09, help="that an image takes")
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds")
    parser.add_argument("--start-up", type=float, nargs="+", default=[5.0, 30.0, 120.0])
    parser.add_argument("--check", action="store_true", help="beside two real replicas")
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.check:
        from fleet_check import check

        check(arguments)
        return
    report = Report("fleet", "A fleet, simulated", arguments)
    mean, deadline = arguments.seconds, arguments.deadline
    draw = spread_around(mean)
    columns = {"replicas": "d", "load": ".1f", "sent": "d", "p50, ms": ".0f", "p99, ms": ".0f"}
    title = f"an image takes {1e3 * mean:g} ms, the deadline is {1e3 * deadline:g} ms"
    sizes(
        report.table(columns | {"refused, %": ".2f", "late, %": ".3f"}, title),
        *(draw, mean, deadline, report.quick),
    )
    columns = {"replicas": "d", "crowd": ".0f", "start-up, s": ".0f", "sent": "d"}
    columns |= {"refused, %": ".1f", "p99, ms": ".0f", "late, %": ".3f", "most replicas": "d"}
    columns |= {"there after, s": ".0f", "in the end": "d"}
    lags = arguments.start_up[:1] if report.quick else arguments.start_up
    crowds(report.table(columns, "Flash crowds"), draw, mean, deadline, lags)
    report.close()


if __name__ == "__main__":
    main()

"""The simulation of `fleet_simulation.py` beside two real replicas. Called by its `--check`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import client
from fleet_simulation import Fleet, Scaling, Seen
from load import load
from poisson import Seen as RealSeen
from poisson import poisson
from report import Report
from serving import Running, draw_images, served

from service.settings import bundled_models

REPLICAS = 2
LOADS = (0.8, 1.5)
BOUND = 0.2
SLICES = 12
"""Of each load, with a look at what an image takes between them: a machine that shares its cores
is not the same for long."""
OFTEN = 20
"""So many fleets are simulated: the simulation's own chance counts for less."""


@contextlib.contextmanager
def replica(core: int) -> Iterator[Running]:
    """A service that has one core for itself, but for the generator of the load."""
    before = os.sched_getaffinity(0)
    with contextlib.ExitStack() as stack:
        os.sched_setaffinity(0, {core})
        try:
            server = stack.enter_context(served(bundled_models()))
        finally:
            os.sched_setaffinity(0, before)
        yield server


def check(arguments: argparse.Namespace) -> None:
    """Measure, simulate, compare."""
    report = Report("fleet-check", "The simulation beside two real replicas", arguments)
    slices, seconds = (3, 6.0) if report.quick else (SLICES, 6.0)
    deadline = arguments.deadline
    columns = {"load": ".1f", "": "", "sent": "d", "p50, ms": ".0f", "p99, ms": ".0f"}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        images = draw_images(Path(scratch) / "images")
        cores = sorted(os.sched_getaffinity(0))[:REPLICAS]
        if len(cores) < REPLICAS:
            raise SystemExit(f"{REPLICAS} cores are needed, there is {len(cores)}")
        urls = [stack.enter_context(replica(core)).url for core in cores]
        before = client.run(_alone(urls, images, seconds / 2))
        fleets = Fleets(deadline)
        table = report.table(
            columns | {"refused, %": ".1f", "late, %": ".2f", "an image, ms": ".1f"},
            f"The deadline is {1e3 * deadline:g} ms",
        )
        for number, factor in enumerate(LOADS):
            rate = factor * REPLICAS / statistics.fmean(before)
            real, simulated, costs = RealSeen(), Seen(), []
            for turn in range(slices):
                seed = REPLICAS * (number * slices + turn)
                _add(real, client.run(_real(urls, images, rate, seconds, deadline, seed)))
                after = client.run(_alone(urls, images, seconds / 2))
                fleets.run(simulated, before + after, rate, seconds)
                costs += before + after
                before = after
            p99 = client.milliseconds(real.accepted, 99) or 0.0
            p50 = client.milliseconds(real.accepted, 50)
            refused = real.statuses["503"] / len(real.lag)
            late = real.statuses["504"] / len(real.lag)
            cost = 1e3 * statistics.fmean(costs)
            table.row(factor, "measured", len(real.lag), p50, p99, 100 * refused, 100 * late, cost)
            table.row(
                *(factor, "simulated", simulated.sent),
                *(simulated.percentile(50), simulated.percentile(99)),
                *(100 * simulated.refusal_rate, 100 * simulated.late / simulated.sent, cost),
            )
            _figure(report, f"p99 at {factor}x", p99, simulated.percentile(99))
            if refused > 0.01 or simulated.refusal_rate > 0.01:
                _figure(report, f"refusals at {factor}x", refused, simulated.refusal_rate)
    report.close()


class Fleets:
    """Simulated fleets that go on from slice to slice, with what they have learnt."""

    def __init__(self, deadline: float) -> None:
        self._costs: list[float] = []
        scaling = Scaling(REPLICAS, REPLICAS, 0.0)
        self._make = partial(Fleet, self._draw, deadline=deadline, scaling=scaling)
        self._fleets: list[Fleet] = []

    def run(self, whole: Seen, costs: list[float], rate: float, seconds: float) -> None:
        """One slice; `costs` is what images took just before it and just after."""
        self._costs = costs
        self._fleets = self._fleets or [self._make(seed=seed) for seed in range(OFTEN)]
        for fleet in self._fleets:
            fleet.seen = Seen()
            seen = fleet.run(lambda _: rate, highest=rate, seconds=seconds)
            whole.sent += seen.sent
            whole.refused += seen.refused
            whole.late += seen.late
            whole.latencies += seen.latencies

    def _draw(self, dice: random.Random) -> float:
        return self._costs[dice.randrange(len(self._costs))]


def _figure(report: Report, name: str, real: float, simulated: float) -> None:
    off = abs(simulated - real) / real if real else float(simulated > 0)
    report.figure(
        f"{name}: how far the simulation is off", [off], better="lower", bound=BOUND, ratio=False
    )


async def _alone(urls: list[str], images: Path, seconds: float) -> list[float]:
    """How long an image takes where none waits, on every replica at the same time."""
    found = await asyncio.gather(
        *(
            load(url, client.requests(url, images), clients=1, seconds=seconds, limit=None)
            for url in urls
        )
    )
    return [each for seen in found for each in seen.latencies]


async def _real(
    urls: list[str], images: Path, rate: float, seconds: float, deadline: float, seed: int
) -> RealSeen:
    """Random arrivals that are shared out at random: random arrivals at each."""
    header = f"X-Deadline-Ms: {round(1e3 * deadline)}"
    parts = await asyncio.gather(
        *(
            poisson(
                url,
                client.requests(url, images, header),
                rate=rate / len(urls),
                seconds=seconds,
                seed=1 + seed + index,
            )
            for index, url in enumerate(urls)
        )
    )
    whole = RealSeen()
    for part in parts:
        _add(whole, part)
    return whole


def _add(whole: RealSeen, part: RealSeen) -> None:
    whole.accepted += part.accepted
    whole.refused += part.refused
    whole.lag += part.lag
    whole.statuses += part.statuses

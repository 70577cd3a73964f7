"""The service under closed-loop clients, and the highest rate of random arrivals it can promise.

    python benchmarks/rates.py

Closed loop: 1, 8, 32 and 128 connections, in turn with a bare loop of the same work. Open loop, in
the manner of MLPerf's Server scenario: Poisson arrivals, latency from the moment a request was due,
and the highest rate at which the 99th percentile stays within 20 times the latency of a single
image. A refused request counts as one that never came back.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from report import Report, Table, add_options
from serving import Running, draw_images, run_script, served

from service.runtime.artifact import scan_repository
from service.settings import bundled_models

CONNECTIONS = (1, 8, 32, 128)
SATURATING = 16
LATENCY_FACTOR = 20.0
OPEN_SHARE = 0.8
LONG = 5
"""The trial that settles a rate takes this many times as long as the others."""
LOWEST, STEP_DOWN, GIVE_UP = 0.7, 0.97, 0.35
"""Of the closed-loop maximum: where the search begins; its step, and where it ends."""

Trial = Callable[[float], bool]


def closed(server: Running, images: Path, clients: int, seconds: float) -> dict[str, Any]:
    """One load, and what it cost the service."""
    before = server.cpu_seconds()
    load = run_script("load.py", server.url, images, "--clients", clients, "--seconds", seconds)
    good = max(1, load["statuses"].get("200", 0))
    return load | {"cpu_ms": 1e3 * (server.cpu_seconds() - before) / good}


def closed_loop(
    report: Report, server: Running, model: Path, images: Path, rounds: int, seconds: float
) -> None:
    """Throughput and latency at each number of connections, medians over the rounds."""
    table = report.table(
        {"connections": "d", "images/s": ".1f", "over bare loop": ".3f", "p50, ms": ".0f"}
        | {"p99, ms": ".0f", "server core-ms": ".2f", "not 200": "d"},
        "Closed loop",
    )
    found = {}
    for clients in CONNECTIONS:
        loads, ratios = [], []
        for _ in range(rounds):
            bare = run_script("bare_loop.py", model, images, "--seconds", seconds / 2)
            loads.append(closed(server, images, clients, seconds))
            ratios.append(loads[-1]["good_per_second"] / bare["per_second"])
        named = ("good_per_second", "p50_ms", "p99_ms", "cpu_ms")
        median = {name: statistics.median(each[name] for each in loads) for name in named}
        table.row(
            *(clients, median["good_per_second"], statistics.median(ratios)),
            *(median["p50_ms"], median["p99_ms"], median["cpu_ms"]),
            sum(each["not_200"] for each in loads),
        )
        found[clients] = ratios
    for clients, ratios in found.items():
        report.figure(f"HTTP over bare loop, {clients} connections", ratios, better="higher")


def highest_rate(short: Trial, long: Trial, *, maximum: float, steps: int) -> float:
    """The highest rate that holds in a long trial; 0 where none does.

    Bisection by short trials finds about where it is. A rate that is slightly too high shows only
    once its queue had time to grow: the rate goes down until it holds in a long trial.
    """
    low, high = LOWEST * maximum, maximum
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if short(middle) else (low, middle)
    while not long(low):
        low *= STEP_DOWN
        if low < GIVE_UP * maximum:
            return 0.0
    return low


class Trials:
    """Trials of rates, each with other arrivals."""

    def __init__(self, server: Running, images: Path, table: Table, bound_ms: float) -> None:
        self._server = server
        self._images = images
        self._table = table
        self._bound_ms = bound_ms
        self._seeds: Iterator[int] = itertools.count(1)

    def run(self, rate: float, seconds: float) -> bool:
        """Whether the 99th percentile of all requests stays within the bound."""
        seen = run_script(
            *("load.py", self._server.url, self._images, "--rate", rate),
            *("--seconds", seconds, "--seed", next(self._seeds)),
        )
        p99 = seen["p99_of_all_ms"]
        held = p99 is not None and p99 <= self._bound_ms
        self._table.row(
            *(rate, seconds, seen["requests"], seen["p50_ms"], p99, seen["lag_p99_ms"]),
            *(seen["not_200"], "yes" if held else "no"),
        )
        return held


def open_loop(
    report: Report, server: Running, images: Path, *, rounds: int, steps: int, seconds: float
) -> None:
    """The rate that can be promised, against the closed-loop maximum beside it."""
    single = closed(server, images, 1, seconds)["p50_ms"]
    bound_ms = LATENCY_FACTOR * single
    table = report.table(
        {"rate": ".2f", "seconds": ".0f", "sent": "d", "p50, ms": ".0f", "p99 of all, ms": ".0f"}
        | {"client lag p99, ms": ".1f", "not 200": "d", "held": ""},
        f"Open loop, Poisson arrivals; a single image takes {single:.1f} ms, so the 99th "
        f"percentile may be {bound_ms:.0f} ms",
    )
    trials = Trials(server, images, table, bound_ms)
    searches: list[tuple[float, float, float, float]] = []
    for _ in range(rounds):
        before = closed(server, images, SATURATING, seconds)["good_per_second"]
        rate = highest_rate(
            partial(trials.run, seconds=seconds),
            partial(trials.run, seconds=LONG * seconds),
            maximum=before,
            steps=steps,
        )
        after = closed(server, images, SATURATING, seconds)["good_per_second"]
        searches.append((before, after, rate, 2 * rate / (before + after)))
    searched = report.table(
        {"closed loop before, /s": ".2f", "after, /s": ".2f", "highest rate, /s": ".2f"}
        | {"over their mean": ".3f"}
    )
    for search in searches:
        searched.row(*search)
    report.figure(
        f"open-loop rate with p99 within {LATENCY_FACTOR:g} single images, over the closed-loop "
        f"maximum at {SATURATING} connections",
        [share for *_, share in searches],
        better="higher",
        bound=OPEN_SHARE,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=bundled_models())
    parser.add_argument("--images", type=Path, help="folder of JPEGs; default: drawn 640x480")
    add_options(parser)
    arguments = parser.parse_args()
    model = scan_repository(arguments.models)[-1].path
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        server = stack.enter_context(served(arguments.models))
        images = arguments.images or draw_images(Path(scratch) / "images")
        closed(server, images, SATURATING, 3)
        report = Report("service", "Closed loop and random arrivals", arguments)
        if arguments.quick:
            closed_loop(report, server, model, images, 1, 3)
            open_loop(report, server, images, rounds=1, steps=2, seconds=4)
        else:
            closed_loop(report, server, model, images, 3, 6)
            open_loop(report, server, images, rounds=2, steps=4, seconds=12)
    report.close()


if __name__ == "__main__":
    main()

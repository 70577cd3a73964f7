"""The simulated fleet: against queueing theory, against its own promises, growing and shrinking."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MEAN = 0.09


@pytest.fixture(scope="module")
def fleet() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import fleet_simulation

        yield fleet_simulation
    finally:
        sys.path.remove(str(BENCHMARKS))


def mean_wait(seen: object) -> float:
    latencies = seen.latencies  # type: ignore[attr-defined]
    return sum(latencies) / len(latencies) - MEAN


@pytest.mark.parametrize("load", [0.3, 0.7])
@pytest.mark.parametrize("replicas", [1, 4])
def test_waits_are_those_of_queueing_theory(fleet: ModuleType, load: float, replicas: int) -> None:
    """Random arrivals, equal costs, nobody refused: Pollaczek and Khinchine's formula for M/D/1.

    Replicas to which a balancer sends at random are as many queues of their own.
    """
    simulated = fleet.Fleet(
        lambda _: MEAN, deadline=1e6, scaling=fleet.Scaling(replicas, replicas, 0.0)
    )
    rate = load * replicas / MEAN
    seen = simulated.run(lambda _: rate, highest=rate, seconds=40_000 / rate)
    assert seen.refused == 0
    expected = load / (2 * (1 - load)) * MEAN
    assert mean_wait(seen) == pytest.approx(expected, rel=0.08)


def test_under_overload_what_is_let_in_is_in_time_and_the_rest_is_refused(
    fleet: ModuleType,
) -> None:
    rate = 3 * 2 / MEAN
    simulated = fleet.Fleet(
        fleet.spread_around(MEAN), deadline=1.0, scaling=fleet.Scaling(2, 2, 0.0)
    )
    seen = simulated.run(lambda _: rate, highest=rate, seconds=200)
    assert seen.percentile(99) <= 1000
    assert seen.late <= 0.01 * seen.sent
    assert seen.refusal_rate == pytest.approx(1 - 1 / 3, abs=0.03)
    assert seen.sent == seen.refused + seen.late + len(seen.latencies)


def test_the_queue_has_its_bound_too(fleet: ModuleType) -> None:
    simulated = fleet.Fleet(lambda _: MEAN, deadline=1e6, scaling=fleet.Scaling(1, 1, 0.0))
    rate = 10 / MEAN
    seen = simulated.run(lambda _: rate, highest=rate, seconds=60)
    assert seen.percentile(100) <= 1e3 * MEAN * (fleet.QUEUE + 1)
    assert seen.refused > 0


def test_a_crowd_makes_the_fleet_grow_and_a_lull_makes_it_shrink(fleet: ModuleType) -> None:
    usual = 0.5 * 2 / MEAN

    def rate(now: float) -> float:
        return usual * (5.0 if 100 <= now < 700 else 1.0)

    refused = {}
    for lag in (5.0, 120.0):
        simulated = fleet.Fleet(
            fleet.spread_around(MEAN), deadline=1.0, scaling=fleet.Scaling(2, 20, lag)
        )
        seen = simulated.run(rate, highest=5 * usual, seconds=2400)
        counts = [count for _, count in seen.fleet]
        assert max(counts) >= 5, "five times half of two replicas' work"
        assert max(counts) <= 20
        assert counts[-1] < max(counts)
        assert min(counts) == 2
        first = next(when for when, count in seen.fleet if count > 2)
        assert first >= 100 + lag
        refused[lag] = seen.refusal_rate
    assert refused[5.0] < refused[120.0]


def test_equal_seeds_give_equal_runs(fleet: ModuleType) -> None:
    def run(seed: int) -> list[float]:
        simulated = fleet.Fleet(
            fleet.spread_around(MEAN), deadline=1.0, scaling=fleet.Scaling(3, 3, 0.0), seed=seed
        )
        found: list[float] = simulated.run(lambda _: 30.0, highest=30.0, seconds=20).latencies
        return found

    assert run(1) == run(1) != run(2)

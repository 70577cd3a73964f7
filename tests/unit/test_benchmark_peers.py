"""How the comparison with peers judges; no timing, and no peer."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.peer_rounds import Load, Measured, allowed, must_agree, ratios, together

FOUND = [
    {"label": "RBC", "score": 0.97, "box": {"x1": 1.0, "y1": 2.0, "x2": 30.0, "y2": 40.0}},
    {"label": "WBC", "score": 0.61, "box": {"x1": 5.0, "y1": 6.0, "x2": 70.0, "y2": 80.0}},
]


def measured(name: str, *rates: float) -> Measured:
    return Measured(name, {16: [{"per_second": rate, "p99_ms": 1000 / rate} for rate in rates]})


def changed(index: int, **values: Any) -> list[dict[str, Any]]:
    return [each | values if at == index else each for at, each in enumerate(FOUND)]


def test_rounding_is_no_difference() -> None:
    box = FOUND[0]["box"] | {"x2": 30.01}

    must_agree("peer", changed(0, box=box, score=0.9701), FOUND)


@pytest.mark.parametrize(
    "answer",
    [
        FOUND[:1],
        changed(1, label="Platelets"),
        changed(1, score=0.65),
        changed(0, box=FOUND[0]["box"] | {"y1": 2.5}),
    ],
    ids=["one is missing", "another class", "another score", "another box"],
)
def test_a_peer_that_does_other_work_is_not_measured(answer: list[dict[str, Any]]) -> None:
    with pytest.raises(SystemExit, match="peer found"):
        must_agree("peer", answer, FOUND)


def test_a_image_without_objects_proves_nothing() -> None:
    with pytest.raises(SystemExit, match="not none"):
        must_agree("peer", [], [])


def test_ratios_are_those_of_one_round() -> None:
    ours, peer = measured("ours", 10.0, 30.0), measured("peer", 5.0, 20.0)

    assert ratios(ours, peer, 16, "per_second") == [2.0, 1.5]
    assert ratios(ours, peer, 16, "p99_ms") == pytest.approx([0.5, 1 / 1.5])


def test_slower_by_less_than_the_rounds_differ_is_not_slower() -> None:
    steady, restless = measured("ours", 100.0, 100.0, 101.0), measured("peer", 95.0, 100.0, 105.0)

    assert allowed(steady, restless, 16) == allowed(restless, steady, 16) == 0.95
    assert allowed(steady, steady, 16) == 0.995


def turn(requests: int, per_second: float, cpu_seconds: float, *latencies: float) -> Load:
    answered = {"requests": requests, "per_second": per_second, "latencies_ms": list(latencies)}
    return answered | {"cpu_seconds": cpu_seconds, "resident": 100.0}


def test_turns_of_a_round_count_together() -> None:
    quick, slow = turn(30, 10.0, 3.0, 1.0, 1.0, 1.0), turn(10, 2.0, 5.0, 9.0)

    assert together([quick, slow]) == {
        "per_second": 5.0,
        "p50_ms": 1.0,
        "p99_ms": 9.0,
        "cpu_ms": 200.0,
        "busy": 1.0,
        "resident": 100.0,
    }

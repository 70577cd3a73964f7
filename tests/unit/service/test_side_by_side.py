"""How many inferences share a CPU."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from service import side_by_side as module
from service.artifact import read_artifact
from service.devices import Device, open_detector
from service.registry import open_registry
from service.side_by_side import SideBySide, measure
from tests import tiny_model

SECONDS = 60.0


def machine(monkeypatch: pytest.MonkeyPatch, rates: dict[int, list[float]]) -> list[int]:
    """A machine on which so many runs together have these rates, the last one for good.

    Returns the numbers that are tried.
    """
    tried: list[int] = []

    def together(run: Callable[[], None], count: int) -> float:
        run()
        tried.append(count)
        left = rates[count]
        return count / (left.pop(0) if len(left) > 1 else left[0])

    monkeypatch.setattr(module, "_together", together)
    return tried


def unused() -> None:
    pytest.fail("nothing is to be measured or released")


@pytest.mark.parametrize(
    ("rates", "most", "best"),
    [
        ({1: [10.0], 2: [10.9]}, 2, 1),
        ({1: [10.0], 2: [11.1]}, 2, 2),
        ({1: [10.0], 2: [11.1]}, 3, 2),
        ({1: [10.0], 2: [15.0], 4: [16.0]}, 8, 2),
        ({1: [10.0], 2: [15.0], 4: [20.0], 8: [40.0]}, 8, 8),
        # Something else had the machine at first.
        ({1: [10.0], 2: [5.0, 5.0, 13.0]}, 2, 2),
        ({1: [5.0, 10.0], 2: [5.0, 10.0]}, 2, 1),
    ],
)
def test_as_many_as_each_doubling_gains(
    rates: dict[int, list[float]], most: int, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, rates)
    assert measure(lambda: None, most=most)[0] == best


@pytest.mark.parametrize(("asked", "cores"), [(3, 2), (1, 64), (None, 1)])
def test_nothing_is_measured_where_there_is_nothing_to_choose(
    asked: int | None, cores: int
) -> None:
    number = SideBySide(asked, cores=cores)
    assert number.choose(
        lambda: pytest.fail("measured"), release=lambda: pytest.fail("released")
    ) == (asked or 1)


def test_it_is_measured_once_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = machine(monkeypatch, {1: [16.0], 2: [20.0]})
    number = SideBySide(None, cores=2)
    with caplog.at_level(logging.INFO):
        assert [number.choose(lambda: None, release=unused) for _ in range(3)] == [2, 2, 2]
    assert tried == [1, 2]
    (line,) = caplog.messages
    assert "2 CPU cores: 2 (measured 1: 16.0/s, 2: 20.0/s)" in line


def test_memory_of_a_trial_that_did_not_win_is_given_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine(monkeypatch, {1: [16.0], 2: [16.0]})
    detector = open_detector(read_artifact(tiny_model.save(tmp_path)), Device("cpu"))
    canvas = detector.metadata.canvas.largest()
    released: list[int] = []

    def release() -> None:
        detector.release_memory(canvas)
        released.append(1)

    warm = partial(detector.warm, canvas)
    number = SideBySide(None, cores=2)
    assert [number.choose(warm, release=release) for _ in range(2)] == [1, 1]
    assert released == [1], "once"
    warm()


def test_runs_are_really_side_by_side() -> None:
    both = threading.Barrier(2)
    assert module._together(lambda: both.wait(SECONDS) and None, 2) < SECONDS


def test_a_run_that_fails_chooses_nothing() -> None:
    number = SideBySide(None, cores=2)

    def fail() -> None:
        raise RuntimeError("bad file")

    with pytest.raises(RuntimeError, match="bad file"):
        number.choose(fail, release=unused)
    assert not number.chosen.done()


def test_every_model_has_its_detector_as_often(tmp_path: Path) -> None:
    for version in (1, 2):
        tiny_model.save(tmp_path, version=version)
    registry = open_registry(
        tmp_path,
        devices=(Device("cpu"),),
        default=None,
        batch=1,
        side_by_side=SideBySide(2, cores=1),
    )
    registry.start()
    try:
        for version in (1, 2):
            registry.load("tiny", version).result(SECONDS)
            detectors = registry.get("tiny", version).detectors
            assert len(detectors) == 2
            assert len(set(detectors)) == 1, "the weights are there once"
    finally:
        registry.close(SECONDS)

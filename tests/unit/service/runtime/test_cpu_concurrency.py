"""How many inferences share a CPU."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from service.engine.models.registry import open_registry
from service.runtime import cpu_concurrency as module
from service.runtime.artifact import read_artifact
from service.runtime.cpu_concurrency import SideBySide, measure
from service.runtime.detector import Detector
from service.runtime.devices import Device, open_detector
from service.runtime.shared_detector import SharedDetector
from tests import tiny_model

SECONDS = 60.0


def machine(monkeypatch: pytest.MonkeyPatch, rates: dict[int, list[float]]) -> list[int]:
    """A machine on which so many runs together have these rates, the last one for good.

    Returns the numbers that are tried.
    """
    tried: list[int] = []

    def rate(run: Callable[[], None], count: int) -> float:
        run()
        tried.append(count)
        left = rates[count]
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(module, "_rate", rate)
    return tried


class Sessions:
    """A model on all cores, and what else is opened of it."""

    def __init__(self, folder: Path) -> None:
        self._artifact = read_artifact(tiny_model.save(folder))
        self.threads: list[int] = []
        """Of each session that was opened."""
        self.alone_rate = 16.0
        self.callers: list[int] = []
        """For so many it was to be warm."""
        self.opened: list[weakref.ref[Detector]] = []
        self.alone = open_detector(self._artifact, Device("cpu"))

    def share(self, number: SideBySide) -> tuple[Detector, int]:
        canvas = self.alone.metadata.canvas.largest()
        return number.share(
            self.alone, self._open, canvas=canvas, alone_seconds=1 / self.alone_rate
        )

    def _open(self, threads: int, callers: int) -> Detector:
        self.callers.append(callers)
        detector = open_detector(self._artifact, Device("cpu", threads=threads))
        self.threads.append(threads)
        self.opened.append(weakref.ref(detector))
        return detector


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path)


@pytest.mark.parametrize(
    ("rates", "most", "best"),
    [
        ({1: [10.0], 2: [10.4]}, 2, 1),
        ({1: [10.0], 2: [10.6]}, 2, 2),
        ({1: [10.0], 2: [10.6]}, 3, 2),
        ({1: [10.0], 2: [15.0], 4: [15.6]}, 8, 2),
        ({1: [10.0], 2: [15.0], 4: [20.0], 8: [40.0]}, 8, 8),
        # Something else had the machine at first.
        ({1: [10.0], 2: [5.0, 5.0, 13.0]}, 2, 2),
        ({1: [5.0, 10.0], 2: [5.0, 10.0]}, 2, 1),
    ],
)
def test_as_many_as_each_doubling_gains(
    rates: dict[int, list[float]], most: int, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone_rate = rates[1].pop(0) if len(rates[1]) > 1 else rates[1][0]
    machine(monkeypatch, rates)
    assert measure(lambda _: lambda: None, alone_rate, most=most)[0] == best


@pytest.mark.parametrize(("asked", "cores"), [(3, 1), (1, 64), (None, 1)])
def test_nothing_is_opened_where_there_is_nothing_to_choose(
    asked: int | None, cores: int, sessions: Sessions
) -> None:
    number = SideBySide(asked, cores=cores)
    assert sessions.share(number) == (sessions.alone, asked or 1)
    assert sessions.threads == []


@pytest.mark.parametrize(
    ("asked", "cores", "threads"), [(2, 2, 1), (2, 16, 8), (3, 16, 5), (8, 4, 1)]
)
def test_each_of_many_gets_its_share_of_the_cores(
    asked: int, cores: int, threads: int, sessions: Sessions
) -> None:
    detector, count = sessions.share(SideBySide(asked, cores=cores))
    assert isinstance(detector, SharedDetector)
    assert count == asked
    assert sessions.threads == [threads]
    assert sessions.callers == [asked]


def test_it_is_measured_once_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sessions: Sessions
) -> None:
    tried = machine(monkeypatch, {1: [16.0], 2: [20.0]})
    number = SideBySide(None, cores=2)
    with caplog.at_level(logging.INFO):
        assert [sessions.share(number)[1] for _ in range(3)] == [2, 2, 2]
    assert tried == [2], "a lone one has been timed before"
    assert sessions.threads == [1, 1, 1], "what was measured serves"
    (line,) = caplog.messages
    assert "2 CPU cores: 2 (measured 1: 16.0/s, 2: 20.0/s)" in line


def test_none_of_many_has_all_cores_while_it_is_measured(
    monkeypatch: pytest.MonkeyPatch, sessions: Sessions
) -> None:
    machine(monkeypatch, {1: [16.0], 2: [16.0, 20.0]})
    used: list[Detector] = []
    warm = Detector.warm
    monkeypatch.setattr(
        Detector, "warm", lambda self, *args: (used.append(self), warm(self, *args))[1]
    )
    sessions.share(SideBySide(None, cores=2))
    assert used[0] is not sessions.alone
    assert used == [used[0], sessions.alone, used[0]], "the second round has both"


def test_of_several_that_were_tried_the_best_stays(
    monkeypatch: pytest.MonkeyPatch, sessions: Sessions
) -> None:
    machine(monkeypatch, {1: [10.0], 2: [15.0], 4: [20.0], 8: [20.8]})
    sessions.alone_rate = 10.0
    detector, count = sessions.share(SideBySide(None, cores=16))
    assert count == 4
    assert sessions.threads == [8, 4, 2]
    assert [session() is not None for session in sessions.opened] == [False, True, False]
    assert isinstance(detector, SharedDetector)


def test_a_session_that_does_not_gain_is_dropped(
    monkeypatch: pytest.MonkeyPatch, sessions: Sessions
) -> None:
    machine(monkeypatch, {1: [16.0], 2: [16.0]})
    number = SideBySide(None, cores=2)
    assert [sessions.share(number) for _ in range(2)] == [(sessions.alone, 1)] * 2
    assert sessions.threads == [1]
    assert [session() for session in sessions.opened] == [None], "without the cycle collector"


def test_runs_are_really_side_by_side() -> None:
    both = threading.Barrier(2)

    def run() -> None:
        both.wait(SECONDS)

    assert module._rate(run, 2) > 1 / SECONDS


def test_what_holds_one_up_is_not_counted_against_the_other() -> None:
    """On one of the cores something else goes on: the rates of both add up."""
    both = threading.Barrier(2)
    hold_ups = iter((0.0, 1.0))

    def run() -> None:
        both.wait(SECONDS)
        time.sleep(0.05 + next(hold_ups))

    assert module._rate(run, 2) > 2.2, "until both were done it would be 1.9"


def test_a_run_that_fails_chooses_nothing(sessions: Sessions) -> None:
    number = SideBySide(None, cores=2)

    def fail(threads: int, callers: int) -> Detector:
        raise RuntimeError("bad file")

    with pytest.raises(RuntimeError, match="bad file"):
        number.share(
            sessions.alone,
            fail,
            canvas=sessions.alone.metadata.canvas.largest(),
            alone_seconds=1.0,
        )
    assert not number.chosen.done()


def test_every_model_has_its_detector_as_often(tmp_path: Path) -> None:
    for version in (1, 2):
        tiny_model.save(tmp_path, version=version)
    registry = open_registry(
        tmp_path,
        devices=(Device("cpu"),),
        default=None,
        batch=1,
        side_by_side=SideBySide(2, cores=2),
    )
    registry.start()
    try:
        for version in (1, 2):
            registry.load("tiny", version).result(SECONDS)
            detectors = registry.get("tiny", version).detectors
            assert len(detectors) == 2
            (detector,) = set(detectors)
            assert isinstance(detector, SharedDetector)
    finally:
        registry.close(SECONDS)

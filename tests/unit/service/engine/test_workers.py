"""Threads that are watched: deaths, hangs, and the watchdog's own troubles."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from service.engine import workers as module
from service.engine.workers import Watchdog, Worker

LIMIT = 60.0
"""Seconds that anything here may take on the slowest machine."""


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > limit:
            pytest.fail("it never happened")
        time.sleep(0.005)


class Stage:
    """Workers under a watchdog, and what it said of them."""

    def __init__(self) -> None:
        self.deaths: list[list[str]] = []
        self.wedges: list[tuple[str, float]] = []
        self.over = threading.Event()
        self.dog: Watchdog[str] | None = None

    def watch(self, *workers: Worker[str]) -> None:
        self.dog = Watchdog(workers, on_death=self.died, on_wedge=self.wedged)
        for worker in workers:
            worker.start()
        self.dog.start()

    def died(self, worker: Worker[str]) -> None:
        self.deaths.append(list(worker.held))

    def wedged(self, worker: Worker[str], seconds: float) -> None:
        self.wedges.append((worker.name, seconds))


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.over.set()
    if made.dog is not None:
        made.dog.close()


def looks(dog: Watchdog[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Waits for some more looks at one worker."""
    seen = 0
    look = dog._look

    def counted(worker: Worker[str]) -> None:
        nonlocal seen
        look(worker)
        seen += 1

    monkeypatch.setattr(dog, "_look", counted)

    def wait() -> None:
        before = seen
        until(lambda: seen >= before + 5)

    return wait


def test_dead_worker_is_reported_with_its_items_and_replaced(stage: Stage) -> None:
    runs: list[int] = []

    def body(worker: Worker[str]) -> None:
        runs.append(1)
        if len(runs) <= 2:
            worker.hold([f"image {len(runs)}"])
            raise SystemExit("the thread ends here")
        stage.over.wait(LIMIT)

    worker = Worker("device-0", body)
    stage.watch(worker)
    until(lambda: len(runs) == 3)
    assert stage.deaths == [["image 1"], ["image 2"]]
    assert worker.thread.is_alive()
    assert not worker.held, "the new thread has not taken anything yet"


def test_dead_worker_is_replaced_when_the_report_fails(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []

    def body(worker: Worker[str]) -> None:
        runs.append(1)
        if len(runs) == 1:
            raise MemoryError
        stage.over.wait(LIMIT)

    def broken(worker: Worker[str]) -> None:
        stage.deaths.append([])
        raise RuntimeError("nobody listens")

    monkeypatch.setattr(stage, "died", broken)
    stage.watch(Worker("device-0", body))
    until(lambda: len(runs) == 2)
    assert len(stage.deaths) == 1


def test_finished_worker_is_not_replaced(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    worker: Worker[str] = Worker("device-0", lambda _: runs.append(1))
    stage.watch(worker)
    until(lambda: worker.finished)
    assert stage.dog is not None
    looks(stage.dog, monkeypatch)()
    assert (runs, stage.deaths) == ([1], [])


def test_watchdog_reports_a_wedge_once_with_its_duration(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(worker: Worker[str]) -> None:
        worker.hold(["image"], limit=0.05)
        stage.over.wait(LIMIT)

    stage.watch(Worker("device-0", body))
    until(lambda: bool(stage.wedges))
    assert stage.dog is not None
    looks(stage.dog, monkeypatch)()
    ((name, seconds),) = stage.wedges
    assert name == "device-0"
    assert seconds > 0.05


def test_watchdog_ignores_idle_workers(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(worker: Worker[str]) -> None:
        worker.hold(["image"], limit=1e-6)
        worker.hold((), limit=1e-6)
        stage.over.wait(LIMIT)

    worker = Worker("device-0", body)
    worker.hold((), limit=1e-6)
    stage.watch(worker)
    assert stage.dog is not None
    looks(stage.dog, monkeypatch)()
    assert stage.wedges == []


def test_watchdog_ignores_workers_that_make_progress(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    worker: Worker[str] = Worker("device-0", lambda _: None)
    worker.hold(["one", "two", "three"], limit=10.0)
    dog = Watchdog([worker], on_death=lambda _: None, on_wedge=stage.wedged)
    monkeypatch.setattr(worker.thread, "is_alive", lambda: True)
    for _ in range(3):
        for _ in range(9):
            now += 1.0
            dog.tick()
        worker.renew()
    assert stage.wedges == []
    for _ in range(12):
        now += 1.0
        dog.tick()
    assert len(stage.wedges) == 1


def test_watchdog_ignores_pauses_of_the_process(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    worker: Worker[str] = Worker("device-0", lambda _: None)
    monkeypatch.setattr(worker.thread, "is_alive", lambda: True)
    dog = Watchdog([worker], on_death=lambda _: None, on_wedge=stage.wedged)
    dog.tick()
    worker.hold(["image"], limit=10.0)
    # A stopped container, a paused machine: the watchdog does not get to look either.
    now += 3600.0
    dog.tick()
    assert stage.wedges == []
    for _ in range(20):
        now += 1.0
        dog.tick()
    assert [name for name, _ in stage.wedges] == ["device-0"]


def test_watchdog_survives_its_own_failure(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(worker: Worker[str]) -> None:
        worker.hold([worker.name], limit=0.02)
        stage.over.wait(LIMIT)

    def broken(worker: Worker[str], seconds: float) -> None:
        stage.wedges.append((worker.name, seconds))
        raise RuntimeError("nobody listens")

    monkeypatch.setattr(stage, "wedged", broken)
    stage.watch(*(Worker(f"device-{number}", body) for number in range(2)))
    until(lambda: {name for name, _ in stage.wedges} == {"device-0", "device-1"})
    assert len(stage.wedges) == 2


def test_watchdog_close_stops_it(stage: Stage) -> None:
    worker: Worker[str] = Worker("device-0", lambda _: None)
    stage.watch(worker)
    assert stage.dog is not None
    stage.dog.close()
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
    Watchdog([worker], on_death=stage.died, on_wedge=stage.wedged).close()

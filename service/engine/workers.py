"""Watched threads: one that dies is started again, one that hangs is reported."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

_log = logging.getLogger("retinaserve.workers")
_LOOK_SECONDS: Final = 0.25
_STEP_SECONDS: Final = 2.0
"""Most time that counts between two looks. Where more went by, the watchdog itself stood still: the
process was stopped, or the machine asleep, and no worker is to blame."""

Held = TypeVar("Held")


class Worker(Generic[Held]):
    """A thread, and what it works at just now."""

    def __init__(self, name: str, body: Callable[[Worker[Held]], None]) -> None:
        """`body` runs until there is nothing more to do; it keeps `hold` up to date."""
        self.name = name
        self.limit = math.inf
        """Seconds that the work in hand may take."""
        self.held: Sequence[Held] = ()
        """What it has in hand."""
        self.since = 0.0
        """When it began, on the clock of `time.monotonic`."""
        self.finished = False
        """Whether the body has returned, as it does when the service closes."""
        self._body = body
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def hold(self, held: Sequence[Held], *, limit: float = math.inf) -> None:
        """Note what it works at from now on (nothing when empty), and for how long it may."""
        # First: the watchdog takes none of the rest for what was before.
        self.since = time.monotonic()
        self.limit = limit
        self.held = held

    def renew(self) -> None:
        """Restart the clock of the work in hand: one of its steps is done."""
        self.since = time.monotonic()

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def restart(self) -> None:
        """Start a new thread after the old one died."""
        self.held = ()
        self.thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._body(self)
        except BaseException:
            # The watchdog sees that the thread has ended without having finished.
            _log.critical("thread %s died", self.name, exc_info=True)
            return
        self.finished = True


class Watchdog(Generic[Held]):
    """Looks after workers from a thread of its own, a few times a second."""

    def __init__(
        self,
        workers: Sequence[Worker[Held]],
        *,
        on_death: Callable[[Worker[Held]], None],
        on_wedge: Callable[[Worker[Held], float], None],
    ) -> None:
        """`on_death` hears of a dead worker before it is started again.

        `on_wedge` hears, once, of one that has been at the same thing for longer than it may,
        and for how many seconds.
        """
        self._workers = tuple(workers)
        self._on_death = on_death
        self._on_wedge = on_wedge
        self._wedged: set[str] = set()
        self._looked = time.monotonic()
        self._awake = 0.0
        """Seconds that this process was seen running."""
        self._seen: dict[str, tuple[float, float]] = {}
        """Since when each worker is at what it does, and how long this process had run then."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def tick(self) -> None:
        """Look at every worker once."""
        now = time.monotonic()
        self._awake += min(now - self._looked, _STEP_SECONDS)
        self._looked = now
        for worker in self._workers:
            try:
                self._look(worker)
            except Exception:
                _log.exception("the watchdog failed on %s and goes on", worker.name)

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            self.tick()

    def _look(self, worker: Worker[Held]) -> None:
        if not worker.thread.is_alive() and not worker.finished:
            try:
                self._on_death(worker)
            finally:
                worker.restart()
            return
        since = worker.since
        begun, awake = self._seen.get(worker.name, (math.nan, 0.0))
        if begun != since:
            awake = self._awake
            self._seen[worker.name] = since, awake
        seconds = self._awake - awake
        # Looked at in this order: between the two the worker may have gone on to something else.
        late = worker.held and seconds > worker.limit and since == worker.since
        if late and worker.name not in self._wedged:
            self._wedged.add(worker.name)
            self._on_wedge(worker, seconds)

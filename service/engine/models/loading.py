"""From a model file to a warm Servable, in a thread that does one thing at a time."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import math
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from operator import attrgetter
from queue import SimpleQueue
from typing import Final

from service.engine.work import Servable
from service.errors import ArtifactError, DeviceError
from service.imaging.canvas import CanvasRule, Size
from service.runtime.artifact import Artifact, Entry
from service.runtime.cpu_concurrency import CpuConcurrency
from service.runtime.detector import Detector, batch_buckets
from service.runtime.devices import Device, fitted, open_detector, shrink_arena
from service.runtime.shared_detector import SharedDetector

_log = logging.getLogger("retinaserve.loading")
_SETTLED: Final = 1.25
"""A first run that takes at most this many times as long as expected set nothing up."""
_OPENED_TOGETHER: Final = 64 << 20
"""Bytes of a file. To open a session takes several times that, and two at once might take more than
a container has."""
_SETTLE_SECONDS: Final = 0.05
"""After an object is known to go, until it is gone."""

Job = Callable[[], None]


class Loader:
    """Works off jobs in a thread of its own, one after the other."""

    def __init__(self) -> None:
        # Of all queues this one alone may be put to while an object is being finalized.
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model-loader", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Do this after what was submitted before. Any thread, and finalizers too."""
        self._jobs.put(job)

    def close(self, seconds: float) -> None:
        """Do what was submitted, then end; wait so long for that."""
        self._jobs.put(None)
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def watch(self, servable: Servable) -> None:
        """Give the memory of a model back to the system once nothing uses it any more."""
        for detector in dict.fromkeys(servable.detectors):
            end = weakref.finalize(detector, self._jobs.put, _after_release)
            end.atexit = False

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                _log.exception("unhandled exception in a job of the model loader")
            # Otherwise it would hold what it held until the next one comes.
            del job


def open_servable(
    entry: Entry,
    artifact: Artifact,
    *,
    devices: Sequence[Device],
    batch: int,
    cpu_concurrency: CpuConcurrency,
) -> Servable:
    """A model on every device, warm for every batch of up to `batch` images.

    A device that takes several callers at a time is there as often.

    Raises ArtifactError or DeviceError.
    """
    on_cpu = all(each.kind == "cpu" for each in devices)
    canvas = _canvases(artifact.metadata.canvas)[0]
    written, artifact = artifact, fitted(artifact, devices[0])
    # Transformed filters are as large as four times the weights: two sets are too many.
    shared_artifact = artifact if artifact.weights else written
    open_second = partial(_open_second, shared_artifact, devices[0], canvas, cpu_concurrency)
    second: Future[Detector] | None = None
    shared = on_cpu and cpu_concurrency.threads is not None
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="model-loader-second") as pool:
            if shared and len(artifact.content) <= _OPENED_TOGETHER:
                # To open a session takes one core, and there are several.
                second = pool.submit(open_second)
            detectors = tuple(open_detector(artifact, device, batch=batch) for device in devices)
            if on_cpu:
                # What a first run sets up it sets up while the other session does.
                for detector in detectors:
                    detector.prove(canvas, min(batch, 2))
        # The sessions have copies of their own.
        slim = replace(artifact, content=b"")
        servable = Servable(entry.name, entry.version, slim, detectors)
        _warm(servable, batch_buckets(batch), on_cpu=on_cpu)
        if not on_cpu:
            # Here the buffers of a shape are made by its warm-up.
            detectors[0].prove(canvas, min(batch, 2))
        if shared:
            beside = open_second() if second is None else second.result()
            detectors = tuple(SharedDetector(each, beside) for each in detectors)
    except (ArtifactError, DeviceError):
        raise
    except Exception as error:
        # onnxruntime's errors share no base class that it documents.
        raise ArtifactError(f"{artifact.path}: its warm-up failed: {error}") from error
    callers = cpu_concurrency.inferences if on_cpu else devices[0].callers
    return replace(servable, detectors=tuple(each for each in detectors for _ in range(callers)))


def return_free_memory() -> None:
    """Hand memory that was freed back to the system: onnxruntime and the C library keep it.

    A model's weights come in pieces that glibc goes on holding: without this, each swap would
    leave about the size of the file behind.
    """
    shrink_arena()
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        # musl has no such function, and no such habit.
        ctypes.CDLL(None).malloc_trim(0)


def _open_second(
    artifact: Artifact, device: Device, canvas: Size, concurrency: CpuConcurrency
) -> Detector:
    """Open the session that inferences use while others run, warm for all of them."""
    detector = open_detector(artifact, replace(device, threads=concurrency.threads))
    callers = concurrency.inferences
    # Each caller's first run takes memory of its own.
    with ThreadPoolExecutor(callers, thread_name_prefix="warm-up") as pool:
        for run in [pool.submit(detector.warm, canvas) for _ in range(callers)]:
            run.result()
    return detector


def _after_release() -> None:
    time.sleep(_SETTLE_SECONDS)
    return_free_memory()


def _canvases(rule: CanvasRule) -> Sequence[Size]:
    """Every canvas that is known beforehand, the largest first."""
    known = tuple(rule.all_canvases()) or (rule.largest(),)
    return sorted(known, key=attrgetter("area"), reverse=True)


def _warm(servable: Servable, sizes: Sequence[int], *, on_cpu: bool) -> None:
    """Run every canvas and batch size on every device, and learn what each costs.

    So that not even the first requests are let in blindly. On a CPU one canvas needs no more set-up
    than the next: only the largest runs, which has run before, and the others cost their share.
    """
    pace = math.inf if on_cpu else 0.0
    """Seconds that a pixel takes, as far as is known."""
    first, *others = servable.detectors
    largest, *smaller = _canvases(servable.metadata.canvas)
    for canvas in (largest,) if on_cpu else (largest, *smaller):
        for size in sizes:
            for detector in others:
                detector.warm(canvas, size)
            seconds = _timed(first, canvas, size)
            pixels = canvas.area * size
            if seconds > _SETTLED * pace * pixels:
                # It had something to set up.
                seconds = _timed(first, canvas, size)
            pace = seconds / pixels
            servable.costs.observe(canvas, size, seconds)
    if on_cpu:
        # Where a canvas is not known yet, the last one counts: better too much.
        for canvas, size in itertools.product(reversed(smaller), sizes):
            servable.costs.observe(
                canvas, size, servable.costs.of(largest).seconds(size) * canvas.area / largest.area
            )


def _timed(detector: Detector, canvas: Size, batch: int) -> float:
    started = time.monotonic()
    detector.warm(canvas, batch)
    return time.monotonic() - started

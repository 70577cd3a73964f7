"""From a model file to a warm Servable, in a thread that does one thing at a time."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Final

from service.artifact import Artifact, Entry
from service.canvas import Size
from service.detector import Detector, batch_buckets
from service.devices import Device, open_detector
from service.errors import ArtifactError
from service.side_by_side import SideBySide
from service.work import Servable

_log = logging.getLogger("retinaserve.loading")
_SETTLED: Final = 1.25
"""A first run that takes at most so many times as long as expected set nothing up."""
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
                _log.exception("a job of the model loader failed in a way that nobody foresaw")
            # Otherwise it would hold what it held until the next one comes.
            del job


def open_servable(
    entry: Entry,
    artifact: Artifact,
    *,
    devices: Sequence[Device],
    batch: int,
    side_by_side: SideBySide,
) -> Servable:
    """A model on every device, warm for every batch of up to `batch` pictures.

    A device that takes several callers at a time is there as often.

    Raises ArtifactError or DeviceError.
    """
    detectors = tuple(open_detector(artifact, device, batch=batch) for device in devices)
    # The sessions have copies of their own.
    slim = replace(artifact, content=b"")
    servable = Servable(entry.name, entry.version, slim, detectors)
    try:
        _warm(servable, batch_buckets(batch))
        canvas = _canvases(servable)[0]
        shared = [
            side_by_side.share(detector, partial(_open_on, artifact, device), canvas=canvas)
            if device.kind == "cpu"
            else (detector, device.callers)
            for device, detector in zip(devices, detectors, strict=True)
        ]
    except Exception as error:
        # onnxruntime's errors share no base class that it documents.
        raise ArtifactError(f"{artifact.path}: its warm-up failed: {error}") from error
    return replace(
        servable, detectors=tuple(detector for detector, count in shared for _ in range(count))
    )


def return_free_memory() -> None:
    """Hand memory that was freed back to the system, where the C library keeps it otherwise.

    A model's weights come in pieces that glibc goes on holding: without this, each swap would
    leave about the size of the file behind.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        # musl has no such function, and no such habit.
        ctypes.CDLL(None).malloc_trim(0)


def _open_on(artifact: Artifact, device: Device, threads: int) -> Detector:
    return open_detector(artifact, replace(device, threads=threads))


def _after_release() -> None:
    time.sleep(_SETTLE_SECONDS)
    return_free_memory()


def _canvases(servable: Servable) -> Sequence[Size]:
    rule = servable.metadata.canvas
    return tuple(rule.all_canvases()) or (rule.largest(),)


def _warm(servable: Servable, sizes: Sequence[int]) -> None:
    """Run every canvas and batch size on every device, and learn what each costs.

    So that not even the first requests are let in blindly.
    """
    pace = 0.0
    """Seconds that a pixel takes, as far as is known."""
    first, *others = servable.detectors
    for canvas in _canvases(servable):
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


def _timed(detector: Detector, canvas: Size, batch: int) -> float:
    started = time.monotonic()
    detector.warm(canvas, batch)
    return time.monotonic() - started

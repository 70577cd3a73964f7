"""From compressed picture to raw detections: decode threads, then one thread for each device.

A picture passes from thread to thread without the event loop, which wakes only for the answer.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple

import numpy as np

from service.artifact import Artifact, Metadata
from service.batching import BatchQueue, Policy
from service.canvas import Letterbox, Size
from service.detector import Detections, Detector
from service.errors import DeadlineExceeded, InferenceFailed, RetinaserveError, Unavailable
from service.imaging import Prepared, prepare
from service.request_id import request_id

_log = logging.getLogger("retinaserve.pipeline")
_JOIN_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Servable:
    """A model that is loaded and warm: one detector for each device, in the devices' order."""

    name: str
    version: int
    artifact: Artifact
    detectors: tuple[Detector, ...]

    @property
    def metadata(self) -> Metadata:
        """What the file says of itself."""
        return self.artifact.metadata


class BatchKey(NamedTuple):
    """What pictures must have in common to share an inference."""

    model: Servable
    canvas: Size
    iou: float


class Timing(NamedTuple):
    """Seconds that a picture spent in each stage."""

    decode: float
    queue: float
    """Waiting, for a decode thread and for a device."""
    inference: float


class Outcome(NamedTuple):
    """What the pipeline makes of a picture."""

    detections: Detections
    """In canvas pixels."""
    letterbox: Letterbox
    timing: Timing


@dataclass(slots=True, eq=False)
class Work:
    """One picture on its way through the pipeline."""

    make: Callable[[], Prepared]
    """Puts it on its canvas. Raises what `imaging.prepare` raises."""
    model: Servable
    score: float
    """Detections that score lower need not be found."""
    iou: float
    deadline: float
    """On the clock of `time.monotonic`."""
    future: asyncio.Future[Outcome]
    arrived: float = field(default_factory=time.monotonic)
    request_id: str = field(default_factory=request_id.get)
    abandoned: bool = False
    prepared: Prepared | None = None
    decode_seconds: float = 0.0

    @property
    def key(self) -> BatchKey | None:
        """None before decoding: any order will do there but the order of arrival."""
        if self.prepared is None:
            return None
        return BatchKey(self.model, self.prepared.letterbox.canvas, self.iou)

    def fail(self, error: RetinaserveError) -> None:
        """Answer the one who waits, if he still does, with an error. On the event loop."""
        if not self.future.done():
            self.future.set_exception(error)

    def expire(self) -> None:
        """The deadline has passed. On the event loop."""
        self.fail(DeadlineExceeded("the deadline passed before the answer"))


class Pipeline:
    """Owns the threads. `detect` is for one event loop; everything else is inside."""

    def __init__(
        self,
        *,
        devices: int,
        decode_threads: int,
        policy: Policy,
        on_batch: Callable[[int], None],
    ) -> None:
        """`on_batch` hears the size of every batch, in the device's thread."""
        self.fatal: str | None = None
        """Why the device will not answer again, once that is known."""
        self._on_batch = on_batch
        self._pending: set[Work] = set()
        self._arrived: BatchQueue[Work] = BatchQueue(Policy())
        self._ready: BatchQueue[Work] = BatchQueue(policy)
        self._threads = [
            threading.Thread(target=self._decode_forever, name=f"decode-{i}", daemon=True)
            for i in range(decode_threads)
        ] + [
            threading.Thread(target=self._infer_forever, args=(i,), name=f"device-{i}", daemon=True)
            for i in range(devices)
        ]

    @property
    def depth(self) -> int:
        """Pictures that wait: for a decode thread or for a device."""
        return len(self._arrived) + len(self._ready)

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def abort(self, reason: str) -> None:
        """Answer everyone who waits with Unavailable. On the event loop."""
        for work in self._pending:
            work.fail(Unavailable(reason, reason="draining"))

    def close(self) -> None:
        """Stop the threads once they finished what they hold."""
        self._arrived.close()
        self._ready.close()
        limit = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, limit - time.monotonic()))

    async def detect(
        self,
        data: bytes | memoryview,
        model: Servable,
        *,
        score: float,
        iou: float,
        deadline: float,
        max_pixels: int,
    ) -> Outcome:
        """Detect on one compressed picture. Leaves the queue at once when cancelled or late.

        Raises what `imaging.prepare` raises, DeadlineExceeded, or InferenceFailed.
        """
        make = partial(prepare, data, model.metadata.canvas, max_pixels=max_pixels)
        return await self.detect_canvas(make, model, score=score, iou=iou, deadline=deadline)

    async def detect_canvas(
        self,
        make: Callable[[], Prepared],
        model: Servable,
        *,
        score: float,
        iou: float,
        deadline: float,
    ) -> Outcome:
        """Detect on the canvas that `make` makes, in a decode thread. Otherwise as `detect`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()
        work = Work(make, model, score, iou, deadline, future)
        timer = loop.call_later(max(0.0, deadline - time.monotonic()), work.expire)
        self._pending.add(work)
        self._arrived.push(work)
        try:
            return await work.future
        finally:
            self._pending.discard(work)
            timer.cancel()
            self._withdraw(work)
            # An exception's traceback holds this frame, and the future holds the exception:
            # with these names left in the frame the picture would wait for the cycle collector.
            del work, future

    def _withdraw(self, work: Work) -> None:
        # A thread may hold the work just now; the flag stops it at its next step.
        work.abandoned = True
        if not self._arrived.remove(work):
            self._ready.remove(work)

    def _decode_forever(self) -> None:
        while batch := self._arrived.take():
            self._decode(batch[0])
            # Otherwise the last picture stays in memory until the next one comes.
            del batch

    def _decode(self, work: Work) -> None:
        started = time.monotonic()
        try:
            prepared = work.make()
        except RetinaserveError as error:
            # The frames of its traceback hold the picture.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            _deliver([(work, error)])
            return
        except Exception:
            _log.exception(
                "decoding failed in a way that nobody foresaw",
                extra={"request_id": work.request_id},
            )
            _deliver([(work, InferenceFailed("the picture could not be processed"))])
            return
        work.decode_seconds = time.monotonic() - started
        if not work.abandoned:
            work.prepared = prepared
            self._ready.push(work)

    def _infer_forever(self, device: int) -> None:
        while batch := self._ready.take():
            self._on_batch(len(batch))
            _deliver(self._infer(batch, device))
            del batch

    def _infer(self, batch: list[Work], device: int) -> list[tuple[Work, Outcome | Exception]]:
        detector = batch[0].model.detectors[device]
        try:
            return list(zip(batch, _run(detector, batch), strict=True))
        except Exception as error:
            # onnxruntime's errors share no base class that it documents.
            if len(batch) == 1:
                return [(batch[0], self._failed(detector, batch[0], error))]
            _log.warning("a batch of %d failed, each is tried alone: %s", len(batch), error)
        return [answer for work in batch for answer in self._infer([work], device)]

    def _failed(self, detector: Detector, work: Work, error: Exception) -> InferenceFailed:
        """Find out who is to blame, the picture or the device."""
        _log.error(
            "inference failed on %s: %s",
            work.model.name,
            error,
            extra={"request_id": work.request_id},
        )
        assert work.prepared is not None, "only decoded pictures reach a device"
        try:
            detector.warm(work.prepared.letterbox.canvas)
        except Exception as second:
            self.fatal = f"the device does not answer any more: {second}"
            _log.critical("%s", self.fatal)
        return InferenceFailed("the model failed on this picture")


def _run(detector: Detector, batch: Sequence[Work]) -> list[Outcome]:
    prepared = [work.prepared for work in batch if work.prepared is not None]
    assert len(prepared) == len(batch), "only decoded pictures reach a device"
    canvases = (
        prepared[0].canvas[np.newaxis]
        if len(batch) == 1
        else np.stack([each.canvas for each in prepared])
    )
    sizes = np.array([each.letterbox.resized for each in prepared], dtype=np.int64)
    started = time.monotonic()
    found = detector(
        canvases,
        sizes,
        score_threshold=min(work.score for work in batch),
        iou_threshold=batch[0].iou,
    )
    seconds = time.monotonic() - started
    return [
        Outcome(
            detections,
            each.letterbox,
            Timing(work.decode_seconds, started - work.arrived - work.decode_seconds, seconds),
        )
        for work, each, detections in zip(batch, prepared, found, strict=True)
    ]


def _deliver(answers: Sequence[tuple[Work, Outcome | Exception]]) -> None:
    """Hand answers over to their event loop, all in one wake-up."""
    loop = answers[0][0].future.get_loop()
    try:
        loop.call_soon_threadsafe(_settle, answers)
    except RuntimeError:
        # The loop is closed: the server stopped and nobody waits any more.
        _log.debug("%d answers came after the server had stopped", len(answers))


def _settle(answers: Sequence[tuple[Work, Outcome | Exception]]) -> None:
    for work, answer in answers:
        if work.future.done():
            continue
        if isinstance(answer, Exception):
            work.future.set_exception(answer)
        else:
            work.future.set_result(answer)

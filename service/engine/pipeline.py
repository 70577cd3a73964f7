"""From compressed image to raw detections: decode threads, then one thread for each device.

An image passes from thread to thread without the event loop, which wakes only for the answer. On
a CPU the thread that decoded it goes on with it where an inference may begin at once: waking
another one takes longer than much of what there is to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Final, TypeVar, cast

from service.engine.batch_queue import BatchQueue, Policy, Urgency
from service.engine.inference import brief, deliver, finished, run_batch
from service.engine.prediction import Prediction, infers
from service.engine.work import (
    NOTHING_KNOWN,
    BatchKey,
    DecodeKey,
    Estimate,
    Outcome,
    Servable,
    Work,
    as_it_is,
)
from service.engine.workers import Watchdog, Worker
from service.errors import InferenceFailed, RetinaserveError, Unavailable
from service.imaging.canvas import CanvasRule, Size
from service.imaging.decode import Prepared, draft_scale, examine, prepare
from service.imaging.header import Header, read_header
from service.imaging.memory_budget import DecodeMemory
from service.runtime.detector import Detector

_log = logging.getLogger("retinaserve.pipeline")
_JOIN_SECONDS: Final = 0.5

T = TypeVar("T")


class Pipeline:
    """Owns the threads. `detect` is for one event loop; everything else is inside."""

    def __init__(
        self,
        *,
        devices: int,
        decode_threads: int,
        policy: Policy,
        on_batch: Callable[[Servable, int], None],
        callers: int = 1,
        decoders_infer: bool = False,
        watchdog_seconds: float = math.inf,
    ) -> None:
        """`callers` is how many threads use each device, side by side.

        `decoders_infer`: they may be decode threads too. For one device, which must not mind from
        which thread it is used.
        `on_batch` hears the model and size of every batch, in the device's thread.
        A batch that takes longer than `watchdog_seconds` is taken for the end of its device.
        """
        self.fatal: str | None = None
        """Why the device will not answer again, once that is known."""
        self._over: tuple[str, str] | None = None
        """Why work is refused since `abort`: the word for metrics, and the reason."""
        self._on_batch = on_batch
        self._policy = policy
        self._pending: set[Work] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: BatchQueue[Work] = BatchQueue(Policy(), takes_long=_takes_long)
        self._ready: BatchQueue[Work] = BatchQueue(
            policy, self._batch_size, places=callers if decoders_infer else None
        )
        self._decoders_infer = decoders_infer
        # One of several takes nothing long: large images never keep small ones waiting.
        self._decoders = [
            Worker(
                f"decode-{i}", partial(self._decode_forever, short_only=0 < i == decode_threads - 1)
            )
            for i in range(decode_threads)
        ]
        self._watchdog_seconds = watchdog_seconds
        self._devices = [self._device(i) for i in range(devices * callers)]
        """Threads, those of the first device first."""
        self._device_count = devices
        self._watchdog = Watchdog(self._workers, on_death=self._died, on_wedge=self._wedged)
        self.prediction = Prediction(
            arrived=self._arrived,
            ready=self._ready,
            decoders=self._decoders,
            devices=self._devices,
            count=devices,
            max_batch_size=policy.max_batch_size,
        )

    @property
    def decode_threads(self) -> int:
        """How many images are decoded at a time."""
        return len(self._decoders)

    @property
    def depth(self) -> int:
        """Images that wait: for a decode thread or for a device."""
        return len(self._arrived) + len(self._ready)

    @property
    def _workers(self) -> tuple[Worker[Work], ...]:
        return (*self._decoders, *self._devices)

    def start(self) -> None:
        """Start the threads."""
        for worker in self._workers:
            worker.start()
        self._watchdog.start()

    def abort(self, reason: str, word: str) -> None:
        """Answer everyone who waits with Unavailable; `word` is its reason. On the event loop.

        And everyone who comes from now on, such as the other images of a request.
        """
        self._over = word, reason
        for work in self._pending:
            work.fail(Unavailable(reason, reason=word))

    def close(self) -> None:
        """Stop the threads once they finished what they hold."""
        self._watchdog.close()
        self._arrived.close()
        self._ready.close()
        limit = time.monotonic() + _JOIN_SECONDS
        for worker in self._workers:
            if worker.thread.ident is not None:
                worker.thread.join(max(0.0, limit - time.monotonic()))

    def estimate(self, kind: str, pixels: float, canvas: Size | None = None) -> Estimate:
        """What work of a kind will take in a decode thread."""
        return Estimate(canvas, kind, pixels, self.prediction.thread_costs.seconds(kind, pixels))

    async def detect(
        self,
        data: bytes | memoryview,
        model: Servable,
        *,
        score: float,
        iou: float,
        deadline: float,
        max_pixels: int,
        finish: Callable[[Outcome], T],
        memory: DecodeMemory | None = None,
        urgency: Urgency = Urgency.INTERACTIVE,
        estimate: Estimate = NOTHING_KNOWN,
    ) -> T:
        """Detect on one compressed image that was let in.

        It leaves the queue at once when cancelled or late. Raises what `imaging.prepare` raises,
        Unavailable, DeadlineExceeded, InferenceFailed, or what `finish` raises.
        """
        rule = model.metadata.canvas
        return await self.detect_canvas(
            partial(prepare, data, rule, max_pixels=max_pixels, memory=memory),
            model,
            score=score,
            iou=iou,
            deadline=deadline,
            finish=finish,
            urgency=urgency,
            estimate=estimate,
        )

    def decoding(
        self, header: Header | None, rule: CanvasRule, max_pixels: int, *, whole: bool = False
    ) -> Estimate:
        """What an image will take until it is on its canvas; with `whole`, at its full size.

        What will be refused by its header takes nothing.
        """
        if header is None or not 0 < header.size.area <= max_pixels:
            return NOTHING_KNOWN
        kind = header.kind
        if not whole and kind.startswith(("jpeg", "progressive")):
            kind = f"{kind} 1/{draft_scale(header.size, rule)}"
        return self.estimate(kind, header.work, rule.fit(header.size).canvas)

    async def run(
        self,
        function: Callable[[], T],
        model: Servable,
        estimate: Estimate,
        *,
        deadline: float,
        urgency: Urgency = Urgency.INTERACTIVE,
    ) -> T:
        """Do other work of a request in a decode thread, in its turn. Otherwise as `detect_canvas`.

        Raises what `function` raises, and DeadlineExceeded.
        """
        future = asyncio.get_running_loop().create_future
        answer = await self._pass(
            Work(
                function,
                model,
                0.0,
                0.0,
                deadline,
                urgency,
                future(),
                as_it_is,
                estimate,
                infers=False,
            )
        )
        return cast("T", answer)

    async def detect_canvas(
        self,
        make: Callable[[], Prepared],
        model: Servable,
        *,
        score: float,
        iou: float,
        deadline: float,
        finish: Callable[[Outcome], T],
        urgency: Urgency = Urgency.INTERACTIVE,
        estimate: Estimate = NOTHING_KNOWN,
    ) -> T:
        """Detect on the canvas that `make` makes, in a decode thread. Otherwise as `detect`.

        `finish` makes the answer of the outcome: on a CPU in the thread that has it, where what it
        needs is still in the core's caches; otherwise on the event loop, so that no device waits.
        """
        # Held by the work alone: a frame that held it, and an exception in it, would be a cycle.
        future = asyncio.get_running_loop().create_future
        answer = await self._pass(
            Work(make, model, score, iou, deadline, urgency, future(), finish, estimate)
        )
        return cast("T", answer) if self._decoders_infer else finish(answer)

    async def _pass(self, work: Work) -> Any:
        """Hand work to the threads, and wait for what comes of it."""
        self.refuse_if_over()
        loop = self._loop = asyncio.get_running_loop()
        timer = loop.call_later(max(0.0, work.deadline - time.monotonic()), work.expire)
        self._pending.add(work)
        self._arrived.push(work)
        try:
            return await work.future
        except BaseException:
            self._withdraw(work)
            raise
        finally:
            self._pending.discard(work)
            timer.cancel()
            # An exception's traceback holds this frame, and the future holds the exception:
            # with this name left in the frame the image would wait for the cycle collector.
            del work

    def refuse_if_over(self) -> None:
        """Raise Unavailable once no more work is taken."""
        if self.fatal is not None:
            raise Unavailable(self.fatal, reason="device-lost", retry_after=30.0)
        if self._over is not None:
            word, reason = self._over
            raise Unavailable(reason, reason=word)

    def _withdraw(self, work: Work) -> None:
        # A thread may hold the work just now; the flag stops it at its next step.
        work.abandoned = True
        if not self._arrived.remove(work):
            self._ready.remove(work)

    def _device(self, number: int) -> Worker[Work]:
        return Worker(f"device-{number}", partial(self._infer_forever, number))

    def _busy(self, number: int) -> int:
        """How many threads use the same device as this one just now, it among them."""
        callers = len(self._devices) // self._device_count
        first = number // callers * callers
        busy = sum(bool(worker.held) for worker in self._devices[first : first + callers])
        return busy + sum(map(infers, self._decoders))

    def _is_lone(self, worker: Worker[Work]) -> bool:
        """Whether nothing is to be done but what this worker has in hand."""
        waiting = len(self._arrived) + len(self._ready)
        return not waiting and all(each is worker or not each.held for each in self._workers)

    def _batch_size(self, key: Hashable, waiting: int, left: float) -> int:
        assert isinstance(key, BatchKey), "only decoded images reach a device"
        cost = key.model.costs.of(key.canvas)
        return cost.try_batch(waiting, most=self._policy.max_batch_size, left=left)

    def _died(self, worker: Worker[Work]) -> None:
        if worker.held:
            error = InferenceFailed("the server failed on this image; its log says why")
            deliver([(work, error) for work in worker.held])

    def _wedged(self, worker: Worker[Work], seconds: float) -> None:
        self._lose(
            f"a batch of {len(worker.held)} has been on the device for {seconds:.3g} s "
            f"(in {worker.name})"
        )

    def _lose(self, reason: str) -> None:
        """Take the device for lost: every request that waits fails. Any thread."""
        self.fatal = reason
        _log.critical("%s; no more work is taken on", reason)
        assert self._loop is not None, "work has been here"
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.abort, reason, "device-lost")

    def _decode_forever(self, worker: Worker[Work], *, short_only: bool) -> None:
        while batch := self._arrived.take(short_only=short_only):
            worker.hold(batch)
            # Then what became ready meanwhile. No frame but this one has a batch, so that nothing
            # stays in memory while others are inferred.
            goes_on = self._decode(batch[0])
            while goes_on and batch:
                self._infer_in_its_place(batch, worker)
                batch = self._ready.done_for()
            # Otherwise the last image stays in memory until the next one comes.
            worker.hold(())
            del batch

    def _infer_in_its_place(self, batch: list[Work], worker: Worker[Work]) -> None:
        """Infer in a decode thread; the place on the device outlives it, unless the thread dies."""
        try:
            self._infer_batch(batch, 0, worker)
        except BaseException:
            self._ready.done()
            raise

    def _decode(self, work: Work) -> bool:
        """Whether its place on the device is there at once, and it is for this thread to go on."""
        started = work.decoding = time.monotonic()
        try:
            prepared = work.make()
        except RetinaserveError as error:
            # The frames of its traceback hold the image.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            deliver([(work, error)])
            return False
        except Exception:
            _log.exception(
                "unhandled exception in a decode thread",
                extra={"request_id": work.request_id},
            )
            deliver([(work, InferenceFailed("the image could not be processed"))])
            return False
        work.decode_seconds = time.monotonic() - started
        kind, pixels = work.estimate.kind, work.estimate.pixels
        if kind:
            self.prediction.thread_costs.observe(kind, pixels, work.decode_seconds)
        if not work.infers:
            deliver([(work, prepared)])
            return False
        if work.abandoned:
            return False
        work.prepared = prepared
        return self._ready.offer(work)

    def _infer_forever(self, number: int, worker: Worker[Work]) -> None:
        while batch := self._ready.take():
            try:
                self._infer_batch(batch, number, worker)
            finally:
                if self._decoders_infer:
                    self._ready.done()
            worker.hold(())
            del batch

    def _infer_batch(self, batch: list[Work], number: int, worker: Worker[Work]) -> None:
        worker.hold(batch, limit=self._watchdog_seconds)
        self._on_batch(batch[0].model, len(batch))
        answers = self._infer(batch, number, worker)
        if self._decoders_infer:
            answers = [
                (work, finished(work, answer) if isinstance(answer, Outcome) else answer)
                for work, answer in answers
            ]
        deliver(answers)

    def _infer(
        self, batch: list[Work], number: int, worker: Worker[Work]
    ) -> list[tuple[Work, Any]]:
        detector = batch[0].model.detectors[number].suited(lone=self._is_lone(worker))
        # Each attempt has its own time: many that fail one by one are not one that hangs.
        worker.renew()
        try:
            return list(
                zip(batch, run_batch(detector, batch, partial(self._busy, number)), strict=True)
            )
        except Exception as error:
            # onnxruntime's errors share no base class that it documents.
            if len(batch) == 1:
                worker.renew()
                return [(batch[0], self._failed(detector, batch[0], error))]
            _log.warning("a batch of %d failed, each is tried alone: %s", len(batch), error)
        return [answer for work in batch for answer in self._infer([work], number, worker)]

    def _failed(self, detector: Detector, work: Work, error: Exception) -> InferenceFailed:
        """Find out who is to blame, the image or the device."""
        _log.error(
            "inference failed on %s: %s",
            work.model.name,
            error,
            extra={"request_id": work.request_id},
        )
        # On a canvas of the model's own: what a client made up may be at fault itself.
        rule = work.model.metadata.canvas
        canvases = rule.all_canvases() or (rule.largest(),)
        try:
            detector.warm(min(canvases, key=lambda canvas: canvas.area))
        except Exception as second:
            _log.critical("the device fails on an empty image too: %s", second)
            self._lose(f"the device does not answer any more: {brief(second)}")
        return InferenceFailed("the model failed on this image")


async def look_at(data: bytes | memoryview, max_pixels: int) -> Header | None:
    """A compressed image's header; None where decoding will find out what is wrong with it."""
    header = read_header(data)
    if header is not None:
        return header
    try:
        # Counting a JPEG's scans means to go through all of it.
        return await asyncio.to_thread(examine, data, max_pixels=max_pixels)
    except RetinaserveError:
        return None


def _takes_long(key: Hashable) -> bool:
    return isinstance(key, DecodeKey) and key.long

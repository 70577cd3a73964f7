"""Detection without a service, through the same pipeline: for `detect`, `evaluate` and `bulk`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Final, NamedTuple, TypeVar

from service.engine.batch_queue import Policy, Urgency
from service.engine.pipeline import Pipeline
from service.engine.postprocessing import Selection, select
from service.engine.tiling import Canvases, Tile, detect_views, lay_out, merge, plan
from service.engine.work import NOTHING_KNOWN, Outcome, Servable
from service.errors import InferenceFailed, RetinaserveError, Unavailable
from service.imaging.canvas import Size
from service.imaging.decode import DEFAULT_MAX_PIXELS, Prepared, held_image, prepare
from service.imaging.memory_budget import DecodeMemory
from service.observability.record import Timing
from service.runtime.detector import Detections

_FOREVER: Final = 1e7
"""Seconds until an image would be late: no client waits for it."""

T = TypeVar("T")
ONE_BY_ONE: Final = Policy()
Load = Callable[[], bytes | memoryview]
"""Reads a compressed image, in a decode thread. Raises RetinaserveError."""


class Found(NamedTuple):
    """What an image holds."""

    image: Size
    """Upright."""
    detections: Detections
    """In pixels of the image."""
    canvases: int | None
    """How many the image took; None where tiles were not asked for."""
    timing: Timing


class OfflineRunner:
    """Detects on images with a model; as many are on their way as keep every thread busy.

    Not thread-safe. `start` and `close` it, or use it as a context manager.
    """

    def __init__(
        self,
        model: Servable,
        selection: Selection,
        *,
        decode_threads: int,
        devices: int = 1,
        policy: Policy = ONE_BY_ONE,
        decoders_infer: bool = True,
        tile: Tile = "off",
        memory: DecodeMemory | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        watchdog_seconds: float = 1e9,
    ) -> None:
        """`decoders_infer`: on a CPU, where the thread that decoded goes on with the inference."""
        self._model = model
        self._selection = selection
        self._tile = tile
        self._memory = memory or DecodeMemory(1 << 62)
        self._max_pixels = max_pixels
        self._pipeline = Pipeline(
            devices=devices,
            callers=len(model.detectors) // devices,
            decode_threads=decode_threads,
            decoders_infer=decoders_infer,
            policy=policy,
            on_batch=lambda model, size: None,
            watchdog_seconds=watchdog_seconds,
        )
        self.window = 2 * (policy.max_batch_size * len(model.detectors) + decode_threads)
        """Images on their way: each thread has one in hand, and finds the next one waiting."""
        # Large images lie decoded in memory while their tiles are detected.
        self._decoded = asyncio.Semaphore(1 + devices)

    def start(self) -> None:
        """Start the threads."""
        self._pipeline.start()

    def close(self) -> None:
        """Stop the threads; what they have in hand is dropped."""
        self._pipeline.close()

    def __enter__(self) -> OfflineRunner:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def detect_all(self, loads: Iterable[Load]) -> Iterator[Found | RetinaserveError]:
        """Detect on images; the results are in their order. Raises Unavailable for a lost device.

        An image that fails costs its own result alone.
        """
        ahead: deque[Future[Found | RetinaserveError]] = deque()
        with _loop_of_its_own() as loop:
            for load in loads:
                ahead.append(asyncio.run_coroutine_threadsafe(self.settled(load), loop))
                if len(ahead) > self.window:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    async def settled(self, load: Load) -> Found | RetinaserveError:
        """Detect on one image; what is wrong with it where that fails.

        Raises Unavailable: then it is the device that failed, and not the image.
        """
        try:
            return await self._detect(load)
        except Unavailable:
            raise
        except RetinaserveError as error:
            return error
        except Exception as error:
            # Whatever an image makes the code around it raise, the others are not to be lost.
            return InferenceFailed(f"the image could not be processed: {error!r}")

    async def _detect(self, load: Load) -> Found:
        if self._tile == "off":
            return await self._whole(partial(self._prepare, load))
        async with self._decoded:
            canvases = await self._run(partial(self._lay_out, load))
            if canvases.plan.count == 1:
                return (await self._whole(canvases.makers[0]))._replace(canvases=1)
            return await self._tiles(canvases)

    async def _whole(self, make: Callable[[], Prepared]) -> Found:
        return await self._pipeline.detect_canvas(
            make,
            self._model,
            score=self._selection.lowest_score,
            iou=self._selection.iou,
            deadline=time.monotonic() + _FOREVER,
            finish=self._choose,
            urgency=Urgency.BULK,
        )

    def _choose(self, outcome: Outcome) -> Found:
        found = select(outcome.detections, outcome.letterbox, self._selection)
        return Found(outcome.letterbox.original, found, None, outcome.timing)

    async def _tiles(self, canvases: Canvases) -> Found:
        started = time.monotonic()
        outcomes = await detect_views(
            self._pipeline,
            canvases,
            self._model,
            self._selection,
            deadline=started + _FOREVER,
            urgency=Urgency.BULK,
            window=self.window,
        )
        seconds = time.monotonic() - started
        raw = [outcome.detections for outcome in outcomes]
        found = await self._run(partial(merge, canvases.plan, raw, self._selection))
        timing = Timing(sum(each.timing.decode for each in outcomes), 0.0, seconds)
        return Found(canvases.plan.whole.original, found, canvases.plan.count, timing)

    async def _run(self, function: Callable[[], T]) -> T:
        return await self._pipeline.run(
            function,
            self._model,
            NOTHING_KNOWN,
            deadline=time.monotonic() + _FOREVER,
            urgency=Urgency.BULK,
        )

    def _prepare(self, load: Load) -> Prepared:
        rule = self._model.metadata.canvas
        return prepare(load(), rule, max_pixels=self._max_pixels, memory=self._memory)

    def _lay_out(self, load: Load) -> Canvases:
        rule = self._model.metadata.canvas
        with held_image(load(), memory=self._memory, max_pixels=self._max_pixels) as opened:
            return lay_out(opened, plan(opened.size, rule, self._tile), rule)


@contextmanager
def _loop_of_its_own() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread: the caller may run in one already, as in a notebook."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="offline", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

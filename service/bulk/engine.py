"""Detects on parts in one process: the service's pipeline, fed from the listing.

As many images are on their way as keep every thread busy, and no more: memory does not grow with
the run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import pyarrow as pa

from service.bulk.feed import Feed, Part
from service.bulk.parts import Counts, Found, Row, part_name, write_part
from service.bulk.reading import Source
from service.bulk.run import Run
from service.engine.batch_queue import Policy, Urgency
from service.engine.models.loading import open_servable
from service.engine.pipeline import Pipeline
from service.engine.postprocessing import resolve, select
from service.engine.tile_views import detect_views
from service.engine.tiling import Canvases, lay_out, merge, parse_tile, plan
from service.engine.work import Outcome, Servable
from service.errors import BulkFailed, InferenceFailed, RetinaserveError, Unavailable
from service.filenames import one_line
from service.imaging.canvas import Size
from service.imaging.decode import Prepared, held_image, prepare
from service.imaging.memory_budget import DecodeMemory
from service.runtime.artifact import Artifact, Entry
from service.runtime.cpu_concurrency import cpu_concurrency
from service.runtime.detector import Detections
from service.runtime.devices import Hardware
from service.settings import Settings

_FOREVER: Final = 1e7
"""Seconds until an image would be late: nobody waits for it."""
_REMOTE_READERS: Final = 32
"""Decode threads where images come over a network: they mostly wait."""


@dataclass(frozen=True, slots=True)
class Done:
    """A part that is written."""

    number: int
    counts: Counts


class Engine:
    """A model on this process's devices, and the threads around it."""

    def __init__(
        self, run: Run, model: Servable, hardware: Hardware, settings: Settings, *, cores: int
    ) -> None:
        """`cores` is how many images are decoded at a time."""
        parameters = run.manifest.parameters
        self._run = run
        self._model = model
        self._settings = settings
        self._selection = resolve(
            model.metadata,
            score_threshold=parameters.score_threshold,
            iou_threshold=parameters.iou_threshold,
            max_detections=parameters.max_detections,
            classes=parameters.classes,
        )
        self._lowest_score = self._selection.lowest_score
        self._tile = parse_tile(parameters.tile)
        self._memory = DecodeMemory(settings.decode_memory_bytes)
        devices = len(hardware.devices)
        batch = _batch(settings, hardware)
        remote = any("://" in item.file for item in run.listing.part(0))
        threads = max(cores, _REMOTE_READERS) if remote else cores
        self._pipeline = Pipeline(
            devices=devices,
            callers=len(model.detectors) // devices,
            decode_threads=threads,
            decoders_infer=hardware.devices[0].kind == "cpu",
            policy=Policy(batch, settings.max_queue_delay_ms / 1e3),
            on_batch=lambda model, size: None,
            watchdog_seconds=settings.watchdog_seconds,
        )
        self._window = 2 * (batch * len(model.detectors) + threads)
        """Images on their way: each thread has one in hand, and finds the next one waiting."""
        # One thread each: a Parquet file is read in order, and parts are written one by one.
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="listing")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="writing")
        # Large images lie decoded in memory while their tiles are detected.
        self._laying_out = ThreadPoolExecutor(1 + devices, thread_name_prefix="tiles")
        self._decoded = asyncio.Semaphore(1 + devices)

    def start(self) -> None:
        """Start the threads."""
        self._pipeline.start()

    def close(self) -> None:
        """Stop the threads; what they have in hand is dropped."""
        self._pipeline.close()
        for pool in (self._reading, self._laying_out):
            pool.shutdown(wait=False, cancel_futures=True)
        # What has begun to be written is no more than moments from its end.
        self._writing.shutdown(wait=True, cancel_futures=True)

    async def detect(
        self,
        parts: Iterable[int],
        *,
        again: bool = False,
        on_image: Callable[[bool], None] = lambda failed: None,
        on_part: Callable[[Done], None] = lambda done: None,
    ) -> None:
        """Detect on these parts, and write each one once it is complete.

        With `again` they are finished parts, of which only failed images are detected.
        `on_image` hears of each image whether it failed. Raises BulkFailed.
        """
        most = self._settings.max_body_bytes
        feed = Feed(self._run, parts, again=again, most=most, pool=self._reading)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._window):
                    group.create_task(self._work(feed, on_image, on_part))
        except ExceptionGroup as errors:
            first = errors.exceptions[0]
            if isinstance(first, (RetinaserveError, OSError, pa.ArrowException)):
                raise BulkFailed(str(first)) from first
            raise first from None

    async def _work(
        self, feed: Feed, on_image: Callable[[bool], None], on_part: Callable[[Done], None]
    ) -> None:
        """One image after the other, until there is none left."""
        loop = asyncio.get_running_loop()
        while (job := await feed.next()) is not None:
            part, source = job
            row = await self._row(part.paths[source.number], source)
            part.rows[source.number] = row
            part.missing -= 1
            on_image(row.error is not None)
            if not part.missing:
                on_part(await loop.run_in_executor(self._writing, self._write, part))
            # While this waits for its next image, nothing of this one stays in memory.
            del job, part, source, row

    async def _row(self, path: str, source: Source) -> Row:
        try:
            if self._tile == "off":
                image, found = await self._canvas(partial(self._prepare, source))
            else:
                image, found = await self._tiled(source)
        except Unavailable:
            # It is the device that failed, and not the image.
            raise
        except RetinaserveError as error:
            failure = error
        except Exception as error:
            # Whatever an image makes the code around it raise, the others are not to be lost.
            failure = InferenceFailed(f"the image could not be processed: {error!r}")
        else:
            return Row(path, Found(image, found), None)
        return Row(path, None, one_line(f"{failure.slug}: {failure}"))

    async def _canvas(self, make: Callable[[], Prepared]) -> tuple[Size, Detections]:
        return await self._pipeline.detect_canvas(
            make,
            self._model,
            score=self._lowest_score,
            iou=self._selection.iou,
            deadline=time.monotonic() + _FOREVER,
            finish=self._choose,
            urgency=Urgency.BULK,
        )

    def _choose(self, outcome: Outcome) -> tuple[Size, Detections]:
        found = select(outcome.detections, outcome.letterbox, self._selection)
        return outcome.letterbox.original, found

    async def _tiled(self, source: Source) -> tuple[Size, Detections]:
        loop = asyncio.get_running_loop()
        async with self._decoded:
            canvases = await loop.run_in_executor(self._laying_out, self._lay_out, source)
            if canvases.plan.count == 1:
                return await self._canvas(canvases.makers[0])
            outcomes = await detect_views(
                self._pipeline,
                canvases,
                self._model,
                self._selection,
                deadline=time.monotonic() + _FOREVER,
                urgency=Urgency.BULK,
                window=self._window,
            )
        raw = [outcome.detections for outcome in outcomes]
        merged = partial(merge, canvases.plan, raw, self._selection)
        return canvases.plan.whole.original, await loop.run_in_executor(self._laying_out, merged)

    def _prepare(self, source: Source) -> Prepared:
        """In a decode thread."""
        return prepare(
            source.load(),
            self._model.metadata.canvas,
            max_pixels=self._settings.max_image_pixels,
            memory=self._memory,
        )

    def _lay_out(self, source: Source) -> Canvases:
        rule, most = self._model.metadata.canvas, self._settings.max_image_pixels
        with held_image(source.load(), memory=self._memory, max_pixels=most) as opened:
            return lay_out(opened, plan(opened.size, rule, self._tile), rule)

    def _write(self, part: Part) -> Done:
        manifest = self._run.manifest
        counts = write_part(
            part_name(self._run.output, part.number),
            [row for row in part.rows if row is not None],
            classes=manifest.class_names,
            run=manifest.to_json(),
            run_id=manifest.run_id,
        )
        return Done(part.number, counts)


def open_engine(
    run: Run, artifact: Artifact, hardware: Hardware, settings: Settings, *, cores: int
) -> Engine:
    """Load the model, warm it, and find out how many inferences share a CPU, as the service does.

    `cores` is how many CPUs are there for it. Raises ArtifactError or DeviceError.
    """
    devices = [
        replace(device, threads=cores) if device.kind == "cpu" else device
        for device in hardware.devices
    ]
    identity = run.manifest.model
    model = open_servable(
        Entry(identity.name, identity.version or 1, artifact.path),
        artifact,
        devices=devices,
        batch=_batch(settings, hardware),
        cpu_concurrency=cpu_concurrency(settings.cpu_inferences, cores),
    )
    return Engine(run, model, hardware, settings, cores=cores)


def _batch(settings: Settings, hardware: Hardware) -> int:
    suits = max(device.default_batch_size for device in hardware.devices)
    return settings.max_batch_size or suits

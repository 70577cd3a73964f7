"""Detects on parts in one process: the service's pipeline, fed from the listing.

As many images are on their way as keep every thread busy, and no more: memory does not grow with
the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

import pyarrow as pa

from service.bulk.feed import Feed, Part
from service.bulk.parts import Counts, Found, Row, part_name, write_part
from service.bulk.reading import Source
from service.bulk.run import Run
from service.engine.batch_queue import Policy
from service.engine.models.loading import open_servable
from service.engine.offline import OfflineRunner
from service.engine.postprocessing import resolve
from service.engine.tiling import parse_tile
from service.engine.work import Servable
from service.errors import BulkFailed, RetinaserveError
from service.filenames import one_line
from service.imaging.memory_budget import DecodeMemory
from service.runtime.artifact import Artifact, Entry
from service.runtime.cpu_concurrency import cpu_concurrency
from service.runtime.devices import Hardware
from service.settings import Settings

_REMOTE_READERS: Final = 32
"""Decode threads where images come over a network: they mostly wait."""


@dataclass(frozen=True, slots=True)
class Done:
    """A part that was written."""

    number: int
    counts: Counts


class Engine:
    """A model on this process's devices, with its threads."""

    def __init__(
        self, run: Run, model: Servable, hardware: Hardware, settings: Settings, *, cores: int
    ) -> None:
        """`cores` is how many images are decoded at a time."""
        parameters = run.manifest.parameters
        self._run = run
        self._settings = settings
        batch = _batch(settings, hardware)
        remote = any("://" in item.file for item in run.listing.part(0))
        self._runner = OfflineRunner(
            model,
            resolve(
                model.metadata,
                score_threshold=parameters.score_threshold,
                iou_threshold=parameters.iou_threshold,
                max_detections=parameters.max_detections,
                classes=parameters.classes,
            ),
            decode_threads=max(cores, _REMOTE_READERS) if remote else cores,
            devices=len(hardware.devices),
            policy=Policy(batch, settings.max_queue_delay_ms / 1e3),
            decoders_infer=hardware.devices[0].kind == "cpu",
            tile=parse_tile(parameters.tile),
            memory=DecodeMemory(settings.decode_memory_bytes),
            max_pixels=settings.max_image_pixels,
            watchdog_seconds=settings.watchdog_seconds,
        )
        # One thread each: a Parquet file is read in order, and parts are written one by one.
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="listing")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="writing")

    def start(self) -> None:
        """Start the threads."""
        self._runner.start()

    def close(self) -> None:
        """Stop the threads and drop their work."""
        self._runner.close()
        self._reading.shutdown(wait=False, cancel_futures=True)
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
                for _ in range(self._runner.window):
                    group.create_task(self._work(feed, on_image, on_part))
        except ExceptionGroup as errors:
            first = errors.exceptions[0]
            if isinstance(first, (RetinaserveError, OSError, pa.ArrowException)):
                raise BulkFailed(str(first)) from first
            raise first from None

    async def _work(
        self, feed: Feed, on_image: Callable[[bool], None], on_part: Callable[[Done], None]
    ) -> None:
        """Detect on one image after the other until none is left."""
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
        result = await self._runner.settled(source.load)
        if isinstance(result, RetinaserveError):
            return Row(path, None, one_line(f"{result.slug}: {result}"))
        return Row(path, Found(result.image, result.detections), None)

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

"""A run in this process, on the devices of the settings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from service.bulk.engine import Done, Engine, open_engine
from service.bulk.progress import Progress
from service.bulk.run import Run, Todo
from service.bulk.stopping import until_signalled
from service.runtime.artifact import Artifact
from service.runtime.devices import resolve_for
from service.settings import Settings
from service.system.cpus import cpu_count
from service.system.memory import keep_freed_memory


class LocalDetection:
    """Made before the images are listed, so that an unusable device is reported at once."""

    def __init__(self, artifact: Artifact, settings: Settings) -> None:
        """Raises DeviceError."""
        self._artifact = artifact
        self._settings = settings
        self._hardware = resolve_for(settings)

    @property
    def where(self) -> str:
        """The devices, for messages."""
        return self._hardware.name

    def detect(
        self, run: Run, todo: Todo, progress: Progress, on_part: Callable[[Done], None]
    ) -> None:
        """Do the remaining parts. Raises BulkFailed, ArtifactError, DeviceError or Stopped."""
        keep_freed_memory()
        engine = open_engine(run, self._artifact, self._hardware, self._settings, cores=cpu_count())
        engine.start()
        progress.start()
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(until_signalled(_detect(engine, todo, progress, on_part)))
        finally:
            engine.close()


async def _detect(
    engine: Engine, todo: Todo, progress: Progress, on_part: Callable[[Done], None]
) -> None:
    def on_image(failed: bool) -> None:
        progress.add(failed=failed)

    await engine.detect(todo.again, again=True, on_image=on_image, on_part=on_part)
    await engine.detect(todo.parts, on_image=on_image, on_part=on_part)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop of uvloop, or asyncio's where there is none."""
    try:
        import uvloop
    except ImportError:  # pragma: no cover: there is none for Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()

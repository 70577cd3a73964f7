"""Everything that one running application owns."""

from __future__ import annotations

import logging
from asyncio import Semaphore, get_running_loop
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from service.engine.admission import Admission, Places
from service.engine.batch_queue import Policy
from service.engine.drawing import LabelFont
from service.engine.models.collector import RegistryCollector, loaded
from service.engine.models.startup import Models, open_models
from service.engine.pipeline import Pipeline
from service.imaging.memory_budget import DecodeMemory
from service.observability.metrics import Metrics
from service.observability.tracing import Tracing
from service.settings import Settings

_log = logging.getLogger("retinaserve")

P = ParamSpec("P")
T = TypeVar("T")


class Service:
    """Settings, devices, models and threads of one application, shared with no other."""

    def __init__(self, settings: Settings, models: Models | None = None) -> None:
        """Nothing is started. `models` may be loading already.

        Raises DeviceError, ArtifactError or DataError.
        """
        self.settings = settings
        self.label_font = LabelFont(settings.font_file)
        models = open_models(settings) if models is None else models
        self.hardware, self.registry = models.hardware, models.registry
        batch = self.max_batch_size = models.max_batch_size
        """Most canvases in one inference."""
        self.metrics = Metrics()
        self.tracing: Tracing | None = None
        """None: tracing is off."""
        # Two at least, so that one is there for small images while the other has a large one.
        threads = max(2, models.cpus)
        first = self.hardware.devices[0]
        on_cpu = first.kind == "cpu"
        self.pipeline = Pipeline(
            devices=len(self.hardware.devices),
            callers=models.cpu_concurrency.inferences if on_cpu else first.callers,
            decode_threads=threads,
            decoders_infer=on_cpu,
            policy=Policy(batch, settings.max_queue_delay_ms / 1e3),
            on_batch=self.metrics.observe_batch,
            watchdog_seconds=settings.watchdog_seconds,
        )
        self.places = Places(
            settings.max_queue_size,
            bytes_limit=settings.max_queue_bytes,
            pause=self.pipeline.prediction.wait,
        )
        self.unsent = Places(settings.max_queue_size, bytes_limit=settings.max_queue_bytes)
        """Drawn images that clients have not read yet."""
        self.admission = Admission(
            self.places, self.pipeline.prediction, refuse_if_over=self.pipeline.refuse_if_over
        )
        self.decode_memory = DecodeMemory(settings.decode_memory_bytes)
        self.batch_window = min(
            self.places.bulk_limit, 2 * batch * len(self.hardware.devices) + threads
        )
        """Images of one batch request in the pipeline at a time: enough to keep every thread
        busy, and few enough that other clients wait for a part of them only."""
        self.decoded_images = Semaphore(1 + len(self.hardware.devices))
        """Bounds how many large images lie decoded in memory while their tiles are detected:
        one for each device, and the next one, so that no device waits for it."""
        self.draining = False
        self._helpers = ThreadPoolExecutor(threads, thread_name_prefix="helper")
        self.metrics.watch(
            hardware=self.hardware,
            models=RegistryCollector(self.registry),
            loaded=partial(loaded, self.registry),
            waiting=lambda: self.pipeline.depth,
            held=lambda: self.places.held,
            bytes_held=lambda: self.places.bytes_held,
            wait=self.pipeline.prediction.wait,
        )

    def start(self) -> None:
        """Start the threads and begin to load the models."""
        if self.hardware.fallback:
            _log.warning("running on the CPU: %s", self.hardware.fallback)
        self.pipeline.start()
        self.registry.start()

    def close(self) -> None:
        """Stop the threads."""
        self.registry.close()
        self.pipeline.close()
        self._helpers.shutdown(wait=False, cancel_futures=True)

    def not_ready(self) -> str | None:
        """Why new work should go elsewhere; None when this service is ready."""
        if self.draining:
            return "the service is draining"
        return self.pipeline.fatal or self.registry.not_ready()

    def off_loop(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Run what takes more than a moment in a thread, away from the event loop."""
        return get_running_loop().run_in_executor(self._helpers, lambda: function(*args, **kwargs))

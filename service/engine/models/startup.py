"""What takes longest to be ready: the devices, and the models on them.

Nothing here needs the web framework, so models can load while that is being imported.
"""

from __future__ import annotations

from typing import NamedTuple

from service.engine.models.registry import Registry, open_registry
from service.runtime.cpu_concurrency import CpuConcurrency, cpu_concurrency
from service.runtime.devices import Hardware, resolve_for
from service.settings import Settings
from service.system.cpus import cpu_count


class Models(NamedTuple):
    """Devices that are proved, and the models that are to run on them."""

    hardware: Hardware
    registry: Registry
    max_batch_size: int
    """Most canvases in one inference: MAX_BATCH_SIZE, or what suits the devices."""
    cpus: int
    """How many CPUs may be kept busy: CPUS, or all that this process has."""
    cpu_concurrency: CpuConcurrency
    """How inferences share a CPU."""


def open_models(settings: Settings, hardware: Hardware | None = None) -> Models:
    """Prove the devices and look the model repository through; nothing is loaded yet.

    Raises DeviceError, ArtifactError or DataError.
    """
    cpus = settings.cpus or cpu_count()
    if hardware is None:
        hardware = resolve_for(settings, threads=cpus)
    batch = settings.max_batch_size or max(device.default_batch_size for device in hardware.devices)
    concurrency = cpu_concurrency(settings.cpu_inferences, cpus)
    registry = open_registry(
        settings.models_dir,
        devices=hardware.devices,
        default=settings.default_model,
        batch=batch,
        cpu_concurrency=concurrency,
    )
    return Models(hardware, registry, batch, cpus, concurrency)

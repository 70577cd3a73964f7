"""The application on Ray Serve: `serve run service.ray_app:app`.

Each replica holds the whole service of one process, as `create_app` makes it: its models, its
queue, its batches. Ray starts and replaces replicas and hands requests to them. Nothing here is
imported by the rest of the service, and Ray only where its application is built.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from service.engine.models.registry import Registry
from service.engine.models.startup import open_models
from service.engine.process import prepare_process
from service.engine.service import Service
from service.errors import ArtifactError, DataError
from service.http.app import create_app
from service.settings import ENV_PREFIX, Settings, load_settings
from service.system.cpus import cpu_count

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

_log = logging.getLogger("retinaserve.ray")

NAME: Final = "retinaserve"
"""Name of the deployment in a configuration."""
_GPU_CPUS: Final = 4
"""CPUs beside a GPU by default: it waits for images that are decoded on them."""
_BEYOND_QUEUE: Final = 32
"""Requests that a replica takes beyond its queue, so that it refuses them itself: it knows when
there will be room, and it answers probes at the same time."""
_HEALTH_SECONDS: Final = 2.0
"""Period of Ray's health checks; a crash is noticed by the next one, a lost device by the
third."""
_GRACE_SECONDS: Final = 5.0
"""Time to stop beyond the longest time of a request."""
_POLL_SECONDS: Final = 0.02


class Chosen(BaseModel):
    """`user_config`: the model of requests that name none."""

    model_config = ConfigDict(extra="forbid")

    model: str
    version: int | None = None
    """None: the highest one in the folder."""


class Replica:
    """The methods that Ray calls beside requests."""

    app: FastAPI
    """Given by `serve.ingress`."""

    @property
    def _service(self) -> Service:
        service: Service = self.app.state.service
        return service

    async def check_health(self) -> None:
        """Raise once the device is lost for good: Ray then replaces this replica."""
        if self._service.pipeline.fatal is not None:
            raise RuntimeError(self._service.pipeline.fatal)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Load a model version, or load it again if its file changed, and make it the default.

        Requests are served meanwhile, by the version before.
        Raises DataError, UnknownModel, LoadFailed or StateConflict.
        """
        try:
            chosen = Chosen.model_validate(user_config)
        except ValidationError as error:
            raise DataError(
                f"user_config {dict(user_config)} is wrong ({_first(error)}); "
                'write {"model": NAME} or {"model": NAME, "version": N}'
            ) from error
        service = self._service
        future = await service.off_loop(service.registry.load, chosen.model, chosen.version)
        await asyncio.wrap_future(future)
        service.registry.make_default(chosen.model, chosen.version)


def app(arguments: Mapping[str, Any]) -> Application:
    """Return the application for Ray Serve; `arguments` override RETINASERVE_<NAME>.

    Settings come from the environment in which the application is built, and those of them that
    are set nowhere from the environment of each replica.
    Raises DataError for settings that are wrong, or have no meaning here.
    """
    settings = _settings(arguments)
    from ray import serve

    given = settings.model_dump(mode="json", exclude_unset=True)

    def build() -> FastAPI:
        return build_on_replica(given)

    longest = (settings.body_timeout_ms + settings.request_timeout_ms) / 1e3
    gpus = gpu_share(settings.device)
    deployment: Any = serve.deployment(
        name=NAME,
        ray_actor_options={"num_cpus": _GPU_CPUS if gpus else 1, "num_gpus": gpus},
        max_ongoing_requests=settings.max_queue_size + _BEYOND_QUEUE,
        # Where requests wait for a replica to come, at each proxy.
        max_queued_requests=settings.max_queue_size,
        backpressure_config={"retry_after_s": 1},
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=longest + _GRACE_SECONDS,
    )(serve.ingress(build)(Replica))
    application: Application = deployment.bind()
    return application


def gpu_share(device: str) -> int:
    """Return the number of GPUs that a replica needs for a setting of `DEVICE`.

    >>> gpu_share("auto"), gpu_share("cuda"), gpu_share("cuda:0,cuda:1")
    (0, 1, 2)
    """
    return len(device.split(",")) if device.startswith("cuda") else 0


def build_on_replica(given: Mapping[str, Any]) -> FastAPI:
    """Return the application of a replica, within the resources that Ray assigned."""
    import ray

    settings = load_settings(**given)
    prepare_process(settings)
    share: Mapping[str, float] = ray.get_runtime_context().get_assigned_resources()
    return open_app(settings.model_copy(update=fit(settings, share, cpus=cpu_count())))


def open_app(settings: Settings) -> FastAPI:
    """Return the application once its default model is warm.

    Raises what `create_app` raises, or ArtifactError when the default model does not load.
    """
    models = open_models(settings)
    models.registry.start()
    try:
        opened = create_app(settings, loading=models)
        _wait_for_default(models.registry)
    except BaseException:
        models.registry.close()
        raise
    _log.info("serves %s on %s", models.registry.default, models.hardware.name)
    return opened


def fit(settings: Settings, share: Mapping[str, float], *, cpus: int) -> dict[str, object]:
    """Return the settings that follow from a replica's share of a machine with `cpus` CPUs.

    `share` is Ray's: {"CPU": 2.0, "GPU": 0.5}. Ray counts CPUs without limiting a process to them,
    so the number of threads must.

    >>> fit(Settings(device="auto"), {"CPU": 2.0}, cpus=8)
    {'cpus': 2, 'device': 'cpu'}
    >>> fit(Settings(device="auto"), {"CPU": 0.5, "GPU": 0.5}, cpus=8)
    {'cpus': 1, 'device': 'cuda'}
    """
    changes: dict[str, object] = {}
    if settings.cpus is None:
        changes["cpus"] = max(1, min(cpus, int(share.get("CPU", 0))))
    if settings.device == "auto":
        changes["device"] = "cuda" if share.get("GPU") else "cpu"
    return changes


def _settings(arguments: Mapping[str, Any]) -> Settings:
    unknown = sorted(set(arguments) - set(Settings.model_fields))
    if unknown:
        raise DataError(
            f"{', '.join(unknown)}: no such setting; arguments are settings in lower case, "
            "such as models_dir=/models"
        )
    settings = load_settings(**arguments)
    for name in ("admin_port", "grpc_port"):
        if getattr(settings, name) is not None:
            raise DataError(
                f"{ENV_PREFIX}{name.upper()}: Ray's proxies speak HTTP for the replicas, and there "
                "is no such port; unset it"
            )
    return settings


def _wait_for_default(registry: Registry) -> None:
    """Return once the default model serves. Raises ArtifactError when it will not."""
    while (reason := registry.not_ready()) is not None:
        slots = registry.versions(registry.default)
        if all(slot.state not in ("waiting", "loading") for slot in slots):
            raise ArtifactError("; ".join(slot.reason or reason for slot in slots))
        time.sleep(_POLL_SECONDS)


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    return f"{'.'.join(map(str, found['loc'])) or 'the whole'}: {found['msg']}"

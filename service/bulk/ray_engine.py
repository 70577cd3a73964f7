"""The run on a Ray cluster: Ray Data maps a pool of actors, a detector each, over the parts.

A part goes to an actor as its number. The actor reads listing and pictures and writes the part
itself, so that neither pictures nor results travel through the object store; what comes back are
counts. Where an actor or its node is lost, Ray starts another one and gives it the part again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple

from service.artifact import Artifact
from service.bulk.engine import Done, open_engine
from service.bulk.local import new_event_loop
from service.bulk.parts import counts_of
from service.bulk.progress import Progress
from service.bulk.run import Run, Todo, open_run
from service.devices import resolve
from service.errors import BulkFailed, DeviceError
from service.memory import keep_freed_memory
from service.settings import Settings

_CORES: Final = 2
"""CPUs of a detector where nobody says how many detectors there are to be: more of them wait for
each other."""


class Share(NamedTuple):
    """What each detector gets of the cluster."""

    kind: Literal["cpu", "cuda"]
    detectors: int
    cores: int


class RayDetection:
    """Made before the pictures are listed: a cluster that cannot be reached is told at once."""

    def __init__(
        self,
        artifact: Artifact,
        settings: Settings,
        *,
        address: str | None,
        concurrency: int | None,
    ) -> None:
        """Connect to a cluster, or start one on this machine. Raises DeviceError."""
        # It reports how it is used over the network unless it is told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
            import ray.data
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            # Ray's errors of connecting have no common base class.
            raise DeviceError(f"no Ray cluster at {address or 'hand'}: {error}") from error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._share = share(nodes, settings.device, concurrency)
        # Held here: an actor that is started again asks for it once more.
        self._model = ray.put(artifact)
        self._settings = settings

    @property
    def where(self) -> str:
        """What it runs on, in words."""
        kind, detectors, cores = self._share
        each = "a GPU" if kind == "cuda" else f"{cores} CPU cores"
        return f"Ray, {detectors} detectors on {each} each"

    def detect(
        self, run: Run, todo: Todo, progress: Progress, on_part: Callable[[Done], None]
    ) -> None:
        """Do what is left. Raises BulkFailed, or Stopped by a signal."""
        import ray

        jobs = [{"part": part, "again": True} for part in todo.again]
        jobs += [{"part": part, "again": False} for part in todo.parts]
        if not jobs:
            return
        try:
            for row in self._rows(run, jobs):
                counts = counts_of(json.loads(row["counts"]))
                on_part(Done(row["part"], counts))
                progress.add(row["looked_at"], row["failed"])
        except ray.exceptions.RayError as error:
            raise BulkFailed(_reason(error)) from error

    def close(self) -> None:
        """Leave the cluster, and end it where it was started for this."""
        import ray

        ray.shutdown()

    def _rows(self, run: Run, jobs: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        kind, detectors, cores = self._share
        # A part for each task: what is lost with a node is one part of each of its actors.
        parts = ray.data.from_items(jobs, override_num_blocks=len(jobs))
        done = parts.map_batches(
            Detection,
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=min(detectors, len(jobs))),
            num_cpus=cores,
            num_gpus=1 if kind == "cuda" else None,
            fn_constructor_kwargs={
                "output": run.output,
                "model": self._model,
                "settings": self._settings.model_dump(),
                "kind": kind,
                "cores": cores,
            },
        )
        rows: Iterable[dict[str, Any]] = done.iter_rows()
        return rows


class Detection:
    """An actor of the pool: a detector that does one part after the other."""

    def __init__(
        self,
        *,
        output: str,
        model: Any,
        settings: dict[str, Any],
        kind: Literal["cpu", "cuda"],
        cores: int,
    ) -> None:
        """`model` is a reference to the artifact. Ray shows each actor its own GPU alone."""
        import ray

        keep_freed_memory()
        warnings.filterwarnings("ignore", module=r"PIL\.")
        chosen = Settings(**{**settings, "device": kind})
        hardware = resolve(kind, memory_limit=chosen.gpu_memory_bytes, tf32=chosen.gpu_tf32)
        self._runner = asyncio.Runner(loop_factory=new_event_loop)
        self._engine = open_engine(open_run(output), ray.get(model), hardware, chosen, cores=cores)
        self._engine.start()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Do one part; what came of it."""
        number, again = int(batch["part"][0]), bool(batch["again"][0])
        done: list[Done] = []
        looked_at: Counter[bool] = Counter()

        def on_picture(failed: bool) -> None:
            looked_at[failed] += 1

        self._runner.run(
            self._engine.detect([number], again=again, on_picture=on_picture, on_part=done.append)
        )
        (part,) = done
        return {
            "part": [number],
            "counts": [json.dumps(part.counts.to_json())],
            "looked_at": [looked_at.total()],
            "failed": [looked_at[True]],
        }


def share(nodes: Iterable[Mapping[str, float]], device: str, concurrency: int | None) -> Share:
    """How many detectors a cluster of such nodes gets, and what each one gets.

    A detector for each GPU; without GPUs, for every two cores, or `concurrency` of them that share
    the cores. Raises DeviceError.

    >>> share([{"CPU": 8.0}, {"CPU": 4.0}], "auto", None)
    Share(kind='cpu', detectors=6, cores=2)
    >>> share([{"CPU": 8.0}, {"CPU": 4.0}], "auto", 3)
    Share(kind='cpu', detectors=3, cores=4)
    >>> share([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}], "auto", None)
    Share(kind='cuda', detectors=2, cores=4)
    """
    if device not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"--device {device}: on Ray it is auto, cpu or cuda; Ray hands GPUs out")
    nodes = list(nodes)
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    cores = [int(node.get("CPU", 0)) for node in nodes]
    if device == "cuda" and not any(gpus):
        raise DeviceError("--device cuda: no node of the Ray cluster has a GPU")
    if any(gpus) and device != "cpu":
        detectors = min(concurrency or sum(gpus), sum(gpus))
        each = min(cpus // count for cpus, count in zip(cores, gpus, strict=True) if count)
        return Share("cuda", detectors, max(1, each))
    if not any(cores):
        raise DeviceError("no node of the Ray cluster has CPUs for tasks")
    most = max(cores)
    if concurrency is None:
        each = min(_CORES, most)
        return Share("cpu", sum(cpus // each for cpus in cores), each)
    # As many cores for each as still let all of them run at a time.
    each = next(
        (n for n in range(most, 1, -1) if sum(cpus // n for cpus in cores) >= concurrency), 1
    )
    return Share("cpu", min(concurrency, sum(cpus // each for cpus in cores)), each)


def _reason(error: Exception) -> str:
    """What an actor failed of, without Ray's account of where."""
    cause: Any = getattr(error, "cause", None)
    while isinstance(getattr(cause, "cause", None), Exception):
        cause = cause.cause
    lines = str(cause if cause is not None else error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__

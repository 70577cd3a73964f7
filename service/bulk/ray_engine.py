"""A run on a Ray cluster: Ray Data maps a pool of actors, a detector each, over the parts.

A part goes to an actor as its number. The actor reads listing and images and writes the part
itself, so that neither images nor results travel through the object store; what comes back are
counts. Where an actor or its node is lost, Ray starts another one and gives it the part again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, Final, Literal, NamedTuple

import click

from service.bulk.engine import Done, Engine, open_engine
from service.bulk.local import new_event_loop
from service.bulk.parts import Counts, counts_of
from service.bulk.progress import Progress
from service.bulk.run import Run, Todo, open_run
from service.bulk.stopping import stop_on_signals
from service.errors import BulkFailed, DeviceError, RetinaserveError
from service.runtime.artifact import Artifact
from service.runtime.devices import resolve_for
from service.settings import Settings
from service.system.memory import keep_freed_memory

_CORES: Final = 2
"""CPUs of a detector unless --concurrency gives their number: more of them wait for
each other."""


_CONNECT_SECONDS: Final = 5.0


class Share(NamedTuple):
    """The resources of each detector."""

    kind: Literal["cpu", "cuda"]
    detectors: int
    cores: int


@contextmanager
def connected(
    artifact: Artifact, settings: Settings, *, address: str | None, concurrency: int | None
) -> Iterator[RayDetection]:
    """Connect to the cluster at `address`, a running one, or one started for this run.

    Raises DeviceError.
    """
    # It reports how it is used over the network unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        import ray.data
    _check_address(address or os.environ.get("RAY_ADDRESS", ""))
    # What it prints of nodes and actors would get between the lines of the summary.
    with redirect_stdout(sys.stderr):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            # Ray's errors of connecting have no common base class.
            raise DeviceError(f"no Ray cluster at {address or 'hand'}: {error}") from error
        try:
            # Once more: Ray has handlers of its own.
            with stop_on_signals():
                nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
                chosen = share(nodes, settings.device, concurrency)
                yield RayDetection(artifact, settings, chosen)
        finally:
            ray.shutdown()


class RayDetection:
    """Made before the images are listed, so that an unreachable cluster is reported at once."""

    def __init__(self, artifact: Artifact, settings: Settings, chosen: Share) -> None:
        """For a process that is connected."""
        import ray

        self._share = chosen
        # Held here: an actor that is started again asks for it once more.
        self._model = ray.put(artifact)
        self._settings = settings

    @property
    def where(self) -> str:
        """The cluster's devices, for messages."""
        kind, detectors, cores = self._share
        gpus = ", a GPU" if kind == "cuda" else ""
        return f"Ray (detectors: {detectors}; for each {cores} CPU{gpus})"

    def detect(
        self, run: Run, todo: Todo, progress: Progress, on_part: Callable[[Done], None]
    ) -> None:
        """Do the remaining parts. Raises BulkFailed, or Stopped by a signal."""
        import ray

        jobs = [{"part": part, "again": True} for part in todo.again]
        jobs += [{"part": part, "again": False} for part in todo.parts]
        if not jobs:
            return
        try:
            for row in self._rows(run, jobs):
                if row["failure"]:
                    raise BulkFailed(row["failure"])
                counts = counts_of(json.loads(row["counts"]))
                on_part(Done(row["part"], counts))
                progress.add(row["looked_at"], row["failed"])
        except ray.exceptions.RayError as error:
            raise BulkFailed(click.unstyle(str(error)).partition("\n")[0]) from error

    def _rows(self, run: Run, jobs: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
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
        self._runner = asyncio.Runner(loop_factory=new_event_loop)
        self._engine: Engine | None = None
        self._failure = ""
        try:
            hardware = resolve_for(chosen)
            run = open_run(output)
            self._engine = open_engine(run, ray.get(model), hardware, chosen, cores=cores)
        except RetinaserveError as error:
            # Told with the first part: of an exception Ray makes pages.
            self._failure = _on_node(error)
        else:
            self._engine.start()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Do one part. Return its counts, or why no part can be done."""
        number, again = int(batch["part"][0]), bool(batch["again"][0])
        done: list[Done] = []
        looked_at: Counter[bool] = Counter()

        def on_image(failed: bool) -> None:
            looked_at[failed] += 1

        if self._engine is not None:
            job = self._engine.detect([number], again=again, on_image=on_image, on_part=done.append)
            try:
                self._runner.run(job)
            except BulkFailed as error:
                self._failure = _on_node(error)
        counts = done[0].counts if done else Counts()
        return {
            "part": [number],
            "failure": [self._failure],
            "counts": [json.dumps(counts.to_json())],
            "looked_at": [looked_at.total()],
            "failed": [looked_at[True]],
        }


def share(nodes: Iterable[Mapping[str, float]], device: str, concurrency: int | None) -> Share:
    """Return the number of detectors on a cluster of these nodes, and the resources of each.

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


def _check_address(address: str) -> None:
    """Raise DeviceError if nothing listens there; Ray itself would retry for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not (separator and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise DeviceError(f"no Ray cluster at {address}: {error.strerror or error}") from error


def _on_node(error: Exception) -> str:
    return f"{error} (on {socket.gethostname()})"

"""Both GPU engines: throughput and latency by model, precision and batch, alone and over HTTP.

    make gpu-check                                  # the tests that need a GPU, then this
    python benchmarks/gpu_engine.py --device cuda:1
    python benchmarks/gpu_engine.py --rehearse      # every step, small, on the CPU

Measured are the bundled model and a RetinaNet with a ResNet-50 at 800 x 800 (random weights, 91
classes), in float32, TF32 and float16, with the engines `session` and `graphs` of the setting
GPU_ENGINE; then the service at 64 connections. Each engine is driven by as many threads as the
service uses. The figures of `--rehearse` mean nothing and are not kept.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from report import Report, Table, add_options

from service.commands.doctor import gpus
from service.errors import DeviceError
from service.imaging.canvas import Buckets, Size
from service.imaging.decode import prepare
from service.imaging.samples import draw_smear
from service.runtime import devices
from service.runtime.artifact import (
    MODEL_FILE,
    Artifact,
    Thresholds,
    read_artifact,
    scan_repository,
    write_metadata,
)
from service.runtime.detector import Detector, batch_buckets
from service.runtime.gpu.cuda import CaptureGate, HostMemory
from service.runtime.gpu.engine import SLOTS
from service.runtime.gpu.graph_split import split
from service.runtime.gpu.split_detector import open_split
from service.runtime.gpu.whole_detector import WholeDetector
from service.settings import bundled_models

ENGINES = ("session", "graphs")
LARGEST_BATCH = 32
CONNECTIONS = 64
DETECTIONS = 15
"""Of random weights, in each image: what a trained model finds."""
IMAGES = 32


class Model(NamedTuple):
    name: str
    full: Path
    """In float32, in a repository of its own."""
    half: Path
    """In float16."""


class Effort(NamedTuple):
    batches: tuple[int, ...]
    seconds: float
    """Of each measurement."""


def open_engine(artifact: Artifact, device: devices.Device, batch: int, engine: str) -> Detector:
    """The service's own way; in a rehearsal the same engine with the CPU as its device."""
    device = replace(device, graphs=engine == "graphs")
    if device.kind == "cuda":
        return devices.open_detector(artifact, device, batch=batch)
    given, options = devices.providers(device), devices.session_options(device)
    if engine == "session":
        return WholeDetector(
            artifact,
            providers=given,
            options=options,
            device=("cpu", 0),
            gate=CaptureGate(),
            remedy="",
        )
    parts = split(artifact.content)
    if parts is None:
        raise SystemExit(f"{artifact.path}: the graph has no candidate_* values to split it at")
    opened = partial(InferenceSession, sess_options=options, providers=given)
    return open_split(
        artifact,
        parts,
        open_network=opened,
        open_graphs=opened,
        host_options=options,
        memory=HostMemory(),
        gate=CaptureGate(),
        buckets=batch_buckets(batch),
        remedy="",
    )


class Calls:
    """Calls of a detector with batches of the same images."""

    def __init__(self, detector: Detector, canvases: list[NDArray[np.uint8]]) -> None:
        thresholds = detector.metadata.thresholds
        self._detector = detector
        self._canvases = canvases
        self._score = min([thresholds.score, *thresholds.per_class.values()])
        self._iou = thresholds.iou

    def run(self, batch: int) -> int:
        """Call once; the number of detections."""
        canvases = list(itertools.islice(itertools.cycle(self._canvases), batch))
        sizes = np.tile(np.array([canvases[0].shape[:2]], dtype=np.int64), (batch, 1))
        found = self._detector(
            canvases, sizes, score_threshold=self._score, iou_threshold=self._iou
        )
        return sum(map(len, found))

    def per_second(self, batch: int, seconds: float) -> float:
        """Images a second of SLOTS concurrent callers."""
        done = threading.Event()

        def loop() -> int:
            calls = 0
            while not done.is_set():
                self.run(batch)
                calls += 1
            return calls * batch

        with ThreadPoolExecutor(SLOTS) as callers:
            started = time.perf_counter()
            loops = [callers.submit(loop) for _ in range(SLOTS)]
            done.wait(seconds)
            done.set()
            images = sum(each.result() for each in loops)
            return images / (time.perf_counter() - started)

    def latencies_ms(self, batch: int, seconds: float) -> list[float]:
        """Latencies of one caller."""
        found: list[float] = []
        limit = time.perf_counter() + seconds
        while not found or time.perf_counter() < limit:
            begun = time.perf_counter()
            self.run(batch)
            found.append(1e3 * (time.perf_counter() - begun))
        return found


def score_for(detector: Detector, canvases: list[NDArray[np.uint8]]) -> float:
    """The score threshold that leaves about DETECTIONS in an image."""
    sizes = np.array([canvases[0].shape[:2]], dtype=np.int64)
    lowest = []
    for canvas in canvases[:8]:
        (found,) = detector([canvas], sizes, score_threshold=0.0, iou_threshold=0.5)
        lowest.append(float(found.scores[:DETECTIONS][-1]))
    return min(1.0, statistics.median(lowest))


def make_models(scratch: Path, images: list[bytes], *, small: bool) -> Iterator[Model]:
    """Write the model files; `small`: quick ones."""
    # Only here what trains is needed.
    from random_network import random_network

    from model_export.export.graph import export
    from model_export.export.precision import Precision, write_reduced

    def model(name: str, full: Path) -> Model:
        half = scratch / "fp16" / name / "1" / MODEL_FILE
        half.parent.mkdir(parents=True)
        write_reduced(full, half, Precision.FP16, images[:4])
        return Model(name, full, half)

    bundled = scan_repository(bundled_models())[-1]
    full = scratch / "fp32" / bundled.name / "1" / MODEL_FILE
    full.parent.mkdir(parents=True)
    shutil.copyfile(bundled.path, full)
    yield model(bundled.name, full)

    name, canvas = ("resnet18", Size(96, 128)) if small else ("resnet50", Size(800, 800))
    full = scratch / "fp32" / name / "1" / MODEL_FILE
    export(random_network(name, canvas), full, name=name)
    artifact = read_artifact(full)
    detector = devices.open_detector(artifact, devices.Device("cpu"))
    score = score_for(detector, canvases_of(artifact, images))
    thresholds = Thresholds(score=score)
    write_metadata(full, artifact.metadata.model_copy(update={"thresholds": thresholds}))
    yield model(name, full)


def canvases_of(artifact: Artifact, images: list[bytes]) -> list[NDArray[np.uint8]]:
    """The images on the first canvas of a model."""
    rule = artifact.metadata.canvas
    canvas = (rule.all_canvases() or (rule.largest(),))[0]
    return [prepare(each, Buckets(sizes=(canvas,))).canvas for each in images]


def measure(
    table: Table, model: Model, images: list[bytes], device: devices.Device, effort: Effort
) -> None:
    """Rows for one model: every precision, engine and batch."""
    for precision, path, tf32 in (
        ("fp32", model.full, False),
        ("TF32", model.full, True),
        ("fp16", model.half, True),
    ):
        artifact = read_artifact(path)
        canvases = canvases_of(artifact, images)
        for engine in ENGINES:
            chosen = replace(device, tf32=tf32)
            detector = open_engine(artifact, chosen, max(effort.batches), engine)
            calls = Calls(detector, canvases)
            for batch in effort.batches:
                detector.warm(Size(*canvases[0].shape[:2]), batch)
                detections = calls.run(batch) / batch
                rate = calls.per_second(batch, effort.seconds)
                alone = calls.latencies_ms(batch, effort.seconds / 2)
                p50, p99 = np.percentile(alone, [50, 99])
                table.row(
                    model.name, precision, engine, batch, rate, float(p50), float(p99), detections
                )


def measure_http(
    table: Table, model: Model, folder: Path, device: devices.Device, seconds: float
) -> None:
    """Rows for the service with one model in float16, with either engine."""
    import serving

    for engine in ENGINES:
        with serving.served(
            model.half.parents[2],
            default_model=model.name,
            device=device.name,
            gpu_engine=engine,
            max_batch_size=LARGEST_BATCH,
        ) as running:
            load = ("load.py", running.url, folder, "--clients", CONNECTIONS, "--seconds")
            serving.run_script(*load, seconds / 2)
            seen = serving.run_script(*load, seconds)
        table.row(
            model.name, engine, seen["good_per_second"], seen["p50_ms"], seen["p99_ms"],
            seen["requests"] - seen["statuses"].get("200", 0),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU")
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.rehearse:
        device, effort = devices.Device("cpu"), Effort((1, 4), 0.3)
    else:
        try:
            device = devices.resolve(arguments.device).devices[0]
        except DeviceError as error:
            raise SystemExit(f"this benchmark needs a GPU: {error}") from error
        effort = Effort((1, LARGEST_BATCH), 1.0)
        if not arguments.quick:
            effort = Effort(tuple(batch_buckets(LARGEST_BATCH)), 1.5)

    report = Report("gpu_engine", "GPU engines, and the service over them", arguments)
    report.machine["GPU"] = "none" if arguments.rehearse else gpus()[device.index]
    print(f"GPU: {report.machine['GPU']}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        folder = scratch / "images"
        folder.mkdir()
        for seed in range(IMAGES):
            draw_smear(seed)[0].save(folder / f"{seed:02d}.jpg", quality=90)
        images = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
        models = list(make_models(scratch, images, small=arguments.rehearse))
        table = report.table(
            {"model": "", "precision": "", "engine": "", "batch": "d", "images/s": ".1f"}
            | {"one caller, p50 ms": ".2f", "p99 ms": ".2f", "detections": ".1f"},
            f"Engines, {SLOTS} concurrent callers",
        )
        for model in models:
            measure(table, model, images, device, effort)
        table = report.table(
            {"model": "", "engine": "", "images/s": ".1f", "p50, ms": ".1f", "p99, ms": ".1f"}
            | {"not 200": "d"},
            f"The service over HTTP, fp16, {CONNECTIONS} connections",
        )
        for model in models:
            measure_http(table, model, folder, device, 4 * effort.seconds)
    if not arguments.rehearse:
        report.close()


if __name__ == "__main__":
    main()

"""The service's detector beside a bare session of onnxruntime.

    python benchmarks/engine.py                       # bundled model, and a ResNet-50
    python benchmarks/engine.py --models DIR --no-resnet50
    python benchmarks/engine.py --quick               # without the ResNet-50, too

For each canvas of the model and batches of 1, 2, 4 and 8, in turn within one run: a loop over the
service's detector, and one over `InferenceSession.run` on the file, with the same options. The
detector multiplies less (`service/runtime/rewriting.py`).

The ResNet-50 is a RetinaNet of 91 classes as torchvision builds it, exported with random weights,
which needs the training side.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from report import Report, Table, add_options

from service.imaging.canvas import Buckets, Size
from service.imaging.decode import cut
from service.imaging.samples import draw_smear
from service.runtime.artifact import MODEL_FILE, Artifact, read_artifact, scan_repository
from service.runtime.detector import OUTPUTS
from service.runtime.devices import Device, open_detector, providers, session_options
from service.settings import bundled_models

BATCHES = (1, 2, 4, 8)
DEVICE = Device("cpu")
RESNET50 = "resnet50"
RESNET50_CANVAS = Size(800, 1088)
"""What torchvision's rule makes of an image of 3 : 4, rounded."""


def inputs(artifact: Artifact, canvas: Size, batch: int) -> dict[str, Any]:
    """Drawn images that fill the canvas, and the model's own thresholds."""
    thresholds = artifact.metadata.thresholds
    placed = Buckets(sizes=(canvas,)).fit(canvas)
    drawn = [draw_smear(seed, width=canvas.width, height=canvas.height)[0] for seed in range(batch)]
    return {
        "images": np.stack([cut(image, (0, 0), placed).canvas for image in drawn]),
        "image_sizes": np.tile(np.array([canvas], dtype=np.int64), (batch, 1)),
        "score_threshold": np.array([thresholds.score], dtype=np.float32),
        "iou_threshold": np.array([thresholds.iou], dtype=np.float32),
        "max_detections": np.array([thresholds.max_detections], dtype=np.int64),
    }


class Times(NamedTuple):
    """Of a call, the median of every round."""

    seconds: list[float]
    core_seconds: list[float]


def alternate(works: Sequence[Callable[[], object]], *, rounds: int, seconds: float) -> list[Times]:
    """What a call of each costs. Calls take turns."""
    for work in works:
        work()
    found = [Times([], []) for _ in works]
    for _ in range(rounds):
        took = [Times([], []) for _ in works]
        started = time.perf_counter()
        while not took[0].seconds or time.perf_counter() - started < seconds:
            for work, times in zip(works, took, strict=True):
                begun, busy = time.perf_counter(), time.process_time()
                work()
                times.seconds.append(time.perf_counter() - begun)
                times.core_seconds.append(time.process_time() - busy)
        for medians, times in zip(found, took, strict=True):
            medians.seconds.append(statistics.median(times.seconds))
            medians.core_seconds.append(statistics.median(times.core_seconds))
    return found


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


class Figures(NamedTuple):
    """Of all canvases and batches of a model."""

    ratios: list[float]
    costs: list[float]


def measure(
    table: Table,
    artifact: Artifact,
    batches: Sequence[int],
    *,
    rounds: int,
    seconds: float,
) -> Figures:
    """Rows for each canvas and batch."""
    rule = artifact.metadata.canvas
    detector = open_detector(artifact, DEVICE)
    session = ort.InferenceSession(
        artifact.content, session_options(DEVICE), providers=providers(DEVICE)
    )
    figures = Figures([], [])
    for canvas in rule.all_canvases() or (rule.largest(),):
        for batch in batches:
            given = inputs(artifact, canvas, batch)

            def bare(given: dict[str, Any] = given) -> object:
                return session.run(OUTPUTS, given)

            def served(given: dict[str, Any] = given) -> object:
                return detector(
                    given["images"],
                    given["image_sizes"],
                    score_threshold=float(given["score_threshold"][0]),
                    iou_threshold=float(given["iou_threshold"][0]),
                    max_detections=int(given["max_detections"][0]),
                )

            alone, ours = alternate((bare, served), rounds=rounds, seconds=seconds)
            figures.ratios.append(_ratio(alone.seconds, ours.seconds))
            figures.costs.append(_ratio(ours.core_seconds, alone.core_seconds))
            table.row(
                artifact.metadata.name,
                f"{canvas.height} x {canvas.width}",
                batch,
                1e3 * statistics.median(alone.seconds) / batch,
                1e3 * statistics.median(ours.seconds) / batch,
                figures.ratios[-1],
                figures.costs[-1],
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=bundled_models())
    parser.add_argument("--no-resnet50", action="store_true", help="only the model of --models")
    add_options(parser)
    arguments = parser.parse_args()
    with_resnet50 = not (arguments.no_resnet50 or arguments.quick)
    if with_resnet50 and find_spec("torch") is None:
        parser.error("torch, which exports the ResNet-50, is not installed: add --no-resnet50")
    rounds, seconds = (3, 0.6) if arguments.quick else (5, 1.2)
    batches = (BATCHES[0], BATCHES[-1]) if arguments.quick else BATCHES

    report = Report("engine", "Detector beside a bare session", arguments)
    table = report.table(
        {
            "model": "",
            "canvas": "",
            "batch": "d",
            "bare, ms": ".1f",
            "detector, ms": ".1f",
            "ratio": ".3f",
            "core-ms, ratio": ".3f",
        },
        "Times are for each image",
    )
    artifact = read_artifact(scan_repository(arguments.models)[-1].path)
    own = measure(table, artifact, batches, rounds=rounds, seconds=seconds)
    name = artifact.metadata.name
    if with_resnet50:
        with tempfile.TemporaryDirectory() as folder:
            large = read_artifact(write_resnet50(Path(folder)))
        theirs = measure(table, large, BATCHES[:1], rounds=rounds, seconds=seconds)
        report.figure(f"detector over bare session, {RESNET50}", theirs.ratios, better="higher")
    report.figure(f"detector over bare session, {name}", own.ratios, better="higher")
    report.figure(
        f"core-ms of the detector over a bare session's, {name}", own.costs, better="lower"
    )
    report.close()


def write_resnet50(folder: Path) -> Path:
    """Export a network of random weights."""
    # Only here what trains is needed.
    from random_network import random_network

    from model_export.export.graph import export

    path = folder / MODEL_FILE
    export(random_network("resnet50", RESNET50_CANVAS), path, name=RESNET50)
    return path


if __name__ == "__main__":
    main()

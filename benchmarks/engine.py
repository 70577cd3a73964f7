"""The service's detector beside a bare session, and both beside what the network must cost.

    python benchmarks/engine.py                       # bundled model
    python benchmarks/engine.py --models DIR --quick

For each canvas of the model and batches of 1, 2, 4 and 8, in turn within one run: a loop over the
service's detector, and one over `InferenceSession.run` with the same options. `floor.py` says what
the arithmetic and the memory traffic of the same pictures would take at the machine's own peak.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import floor
import numpy as np
import onnxruntime as ort
from report import Report, add_options

from service.artifact import Artifact, read_artifact, scan_repository
from service.canvas import Buckets, Size
from service.detector import OUTPUTS
from service.devices import Device, open_detector, providers, session_options
from service.imaging import cut
from service.samples import draw_smear
from service.settings import bundled_models

BATCHES = (1, 2, 4, 8)
DEVICE = Device("cpu")


def inputs(artifact: Artifact, canvas: Size, batch: int) -> dict[str, Any]:
    """Drawn pictures that fill the canvas, and the model's own thresholds."""
    thresholds = artifact.metadata.thresholds
    placed = Buckets(sizes=(canvas,)).fit(canvas)
    drawn = [draw_smear(seed, width=canvas.width, height=canvas.height)[0] for seed in range(batch)]
    return {
        "images": np.stack([cut(picture, (0, 0), placed).canvas for picture in drawn]),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=bundled_models())
    add_options(parser)
    arguments = parser.parse_args()
    rounds, seconds = (3, 0.6) if arguments.quick else (5, 1.2)
    batches = (BATCHES[0], BATCHES[-1]) if arguments.quick else BATCHES

    artifact = read_artifact(scan_repository(arguments.models)[-1].path)
    rule = artifact.metadata.canvas
    canvases = rule.all_canvases() or (rule.largest(),)
    detector = open_detector(artifact, DEVICE)
    session = ort.InferenceSession(
        artifact.content, session_options(DEVICE), providers=providers(DEVICE)
    )
    report = Report("engine", "Detector beside a bare session", arguments)
    peak = floor.measure()
    table = report.table(
        {
            "canvas": "",
            "batch": "d",
            "bare, pictures/s": ".1f",
            "detector, pictures/s": ".1f",
            "ratio": ".3f",
            "core-ms, ratio": ".3f",
            "GFLOP": ".2f",
            "arithmetic floor, ms": ".2f",
            "memory floor, ms": ".2f",
            "bare, ms": ".2f",
            "of peak arithmetic": ".0%",
        },
        f"Peak of the same cores: {peak.operations / 1e9:.0f} GFLOP/s (matrix product), "
        f"{peak.bytes / 1e9:.1f} GB/s (copying)",
    )
    ratios: list[float] = []
    costs: list[float] = []
    shares: list[float] = []
    for canvas in canvases:
        demand = floor.count(artifact.path, inputs(artifact, canvas, 1))
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
            arithmetic, memory = peak.seconds(demand, batch)
            median = statistics.median(alone.seconds)
            ratios.append(_ratio(alone.seconds, ours.seconds))
            costs.append(_ratio(ours.core_seconds, alone.core_seconds))
            shares.append(arithmetic / median)
            table.row(
                f"{canvas.height} x {canvas.width}",
                batch,
                batch / median,
                batch / statistics.median(ours.seconds),
                ratios[-1],
                costs[-1],
                demand.operations / 1e9,
                1e3 * arithmetic / batch,
                1e3 * memory / batch,
                1e3 * median / batch,
                shares[-1],
            )
    report.figure("detector over bare session", ratios, better="higher")
    report.figure("core-ms of the detector over a bare session's", costs, better="lower")
    report.figure("share of the cores' peak arithmetic", shares, better="higher")
    report.close()


if __name__ == "__main__":
    main()

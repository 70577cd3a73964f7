"""Size, latency and AP of model files of one network in several precisions, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from model_export.data.datasets import Dataset
from model_export.evaluation.coco_metrics import Evaluation
from model_export.evaluation.inference import evaluate_file
from model_export.export.precision import Precision
from model_export.export.verify import VerificationError
from service.engine import postprocessing as results
from service.imaging.decode import Prepared, prepare
from service.runtime import devices
from service.runtime.artifact import read_artifact
from service.runtime.detector import Detections, Detector

ACCEPTED_LOSS: Final[Mapping[Precision, float]] = {Precision.FP16: 0.5, Precision.INT8: 1.5}
"""AP in points of 100 that a file may lose against float32."""

_ROUNDS: Final = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One file beside others, measured in the same run."""

    precision: Precision
    megabytes: float
    session: float
    """Median of the session alone in milliseconds, one image per call."""
    core: float
    """Median of the CPU time of the same call, over all cores, in milliseconds."""
    ap: float | None = None
    """In [0, 1]; None where nothing was measured."""
    ap50: float | None = None


def side_by_side(
    files: dict[Precision, Path], held_out: Dataset | None, images: Sequence[bytes]
) -> tuple[list[Row], dict[Precision, tuple[Evaluation, list[Detections]]]]:
    """Return rows for files of one network, and what was found in `held_out`, if it is given.

    On the device that `auto` chooses. The session is timed on the images, the files in turn.
    """
    device = devices.resolve("auto").devices[0]
    detectors = [devices.open_detector(read_artifact(file), device) for file in files.values()]
    times = _race(detectors, [prepare(each, detectors[0].metadata.canvas) for each in images])
    measured = {}
    if held_out is not None:
        measured = {name: evaluate_file(file, held_out) for name, file in files.items()}
    rows = []
    for (name, file), (session, core) in zip(files.items(), times, strict=True):
        evaluation = measured[name][0] if name in measured else None
        rows.append(
            Row(
                precision=name,
                megabytes=file.stat().st_size / 1e6,
                session=session,
                core=core,
                ap=None if evaluation is None else evaluation.ap,
                ap50=None if evaluation is None else evaluation.ap50,
            )
        )
    return rows, measured


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Return rows as lines of text, AP in points of 100."""
    yield f"{'':4}  {'AP':>6}  {'AP50':>6}  {'MB':>6}  session ms  core ms"
    for row in rows:
        ap, ap50 = (
            f"{'-' if v is None else format(100 * v, '.2f'):>6}" for v in (row.ap, row.ap50)
        )
        yield (
            f"{row.precision:4}  {ap}  {ap50}  {row.megabytes:6.1f}  {row.session:10.1f}"
            f"  {row.core:7.1f}"
        )


def check_loss(full: Row, reduced: Row, accepted: float | None = None) -> None:
    """Raise VerificationError if a file lost more AP than is accepted, in points of 100."""
    limit = ACCEPTED_LOSS[reduced.precision] if accepted is None else accepted
    if full.ap is None or reduced.ap is None:
        return
    loss = 100 * (full.ap - reduced.ap)
    if loss > limit:
        raise VerificationError(
            f"{reduced.precision} loses {loss:.2f} points of AP ({100 * full.ap:.2f} to "
            f"{100 * reduced.ap:.2f}), and at most {limit:g} are accepted; keep --precision fp32, "
            "or accept more with --max-loss"
        )


def _race(detectors: Sequence[Detector], images: Sequence[Prepared]) -> list[tuple[float, float]]:
    """Median milliseconds of clock and of CPU for each detector, one image per call.

    They take turns, so that what else runs on the machine slows all of them.
    """
    spent: list[list[tuple[float, float]]] = [[] for _ in detectors]
    for turn in range(-1, _ROUNDS):
        for image in images:
            sizes = np.array([image.letterbox.resized], dtype=np.int64)
            for detector, own in zip(detectors, spent, strict=True):
                defaults = results.resolve(detector.metadata)
                clock, core = time.perf_counter(), time.process_time()
                detector(
                    image.canvas[np.newaxis],
                    sizes,
                    score_threshold=defaults.lowest_score,
                    iou_threshold=defaults.iou,
                )
                # The first turn pays for set-up.
                if turn >= 0:
                    own.append((time.perf_counter() - clock, time.process_time() - core))
    return [
        (
            1000 * statistics.median(clock for clock, _ in own),
            1000 * statistics.median(core for _, core in own),
        )
        for own in spent
    ]

"""Detections of a model file on a data set through the service's own pipeline, with timings."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from tqdm import tqdm

from model_export.data.datasets import Dataset, Sample
from model_export.evaluation.coco_metrics import (
    KEPT_DETECTIONS,
    SCORE,
    Evaluation,
    Timing,
    coco_metrics,
)
from service.engine import postprocessing as results
from service.engine.batch_queue import Policy
from service.engine.offline import OfflineRunner
from service.engine.work import Servable
from service.errors import DataError, RetinaserveError, Unreadable
from service.imaging import decode as imaging
from service.imaging.canvas import Buckets, ShortSide
from service.runtime import devices
from service.runtime.artifact import Artifact, read_artifact
from service.runtime.detector import Detections, Detector
from service.system.cpus import cpu_count

_DECODE_THREADS: Final = 4

_TIMED_IMAGES: Final = 24

_TIMED_BATCHES: Final = 5


def evaluate_file(
    model: Path,
    dataset: Dataset,
    *,
    device: str = "auto",
    batch_size: int | None = None,
) -> tuple[Evaluation, list[Detections]]:
    """Measure a model file on a data set, with a progress bar and timings.

    `dataset` is read with the file's own class list. Without `batch_size` it is the device's.
    The detections are in original pixels, one entry per sample. Raises ArtifactError, DeviceError
    or DataError.
    """
    artifact = read_artifact(model)
    if dataset.classes != artifact.metadata.classes:
        raise DataError(
            f"{model}: its classes are {', '.join(artifact.metadata.classes)}, but those of "
            f"{dataset.root} were read as {', '.join(dataset.classes)}; they must be the same"
        )
    chosen = devices.resolve(device).devices[0]
    detector = devices.open_detector(artifact, chosen)
    size = batch_size or chosen.default_batch_size
    for canvas in artifact.metadata.canvas.all_canvases():
        detector.warm(canvas, size)
    started = time.perf_counter()
    found = detect(detector, dataset.samples, batch_size=size)
    pipeline = (time.perf_counter() - started) / max(1, len(dataset.samples))
    timing = _time(detector, dataset.samples[:_TIMED_IMAGES], chosen, pipeline, size)
    metrics = coco_metrics(dataset.samples, found, dataset.classes)
    return dataclasses.replace(metrics, timing=timing), found


def detect(
    detector: Detector, samples: Sequence[Sample], *, batch_size: int, score: float = SCORE
) -> list[Detections]:
    """Return detections of every image in original pixels, above a score, at most 300 each.

    Images with equal canvases share a batch, as in the service. Raises DataError for an image that
    cannot be read.
    """
    metadata = detector.metadata
    runner = OfflineRunner(
        # The session has the file's content.
        Servable(metadata.name, 1, Artifact(Path(), b"", metadata, ""), (detector,)),
        results.resolve(metadata, score_threshold=score, max_detections=KEPT_DETECTIONS),
        decode_threads=min(_DECODE_THREADS, cpu_count()),
        policy=Policy(batch_size),
        decoders_infer=detector.providers[0] == "CPUExecutionProvider",
    )
    found = []
    # Without a terminal there is no bar.
    with runner, tqdm(total=len(samples), desc="evaluating", unit="image", disable=None) as bar:
        loads = (partial(_read, sample) for sample in samples)
        for sample, result in zip(samples, runner.detect_all(loads), strict=True):
            if isinstance(result, RetinaserveError):
                raise DataError(f"{sample.path}: {result}; replace the image") from result
            found.append(result.detections)
            bar.update()
    return found


def _read(sample: Sample) -> bytes:
    try:
        return sample.path.read_bytes()
    except OSError as error:
        raise Unreadable(str(error)) from error


def _prepare(sample: Sample, rule: Buckets | ShortSide) -> imaging.Prepared:
    return imaging.prepare(_read(sample), rule)


def _time(
    detector: Detector,
    samples: Sequence[Sample],
    device: devices.Device,
    pipeline: float,
    batch_size: int,
) -> Timing:
    """Time the session as requests would see it, nothing else running.

    `pipeline` is what the whole pipeline took in seconds per image.
    """
    images = [_prepare(sample, detector.metadata.canvas) for sample in samples]
    alone = [_seconds(detector, [each]) for each in images]
    first = images[0].letterbox.canvas
    alike = [each for each in images if each.letterbox.canvas == first]
    full = [alike[index % len(alike)] for index in range(batch_size)]
    # One image per call has been timed already.
    batches = [_seconds(detector, full) for _ in range(_TIMED_BATCHES)] if batch_size > 1 else alone
    return Timing(
        session=1000 * statistics.median(alone),
        session_p95=1000 * float(np.percentile(alone, 95)),
        batch=1000 * statistics.median(batches) / batch_size,
        pipeline=1000 * pipeline,
        batch_size=batch_size,
        device=device.name,
    )


def _seconds(detector: Detector, images: Sequence[imaging.Prepared]) -> float:
    defaults = results.resolve(detector.metadata)
    canvases = np.stack([each.canvas for each in images])
    sizes = np.array([each.letterbox.resized for each in images], dtype=np.int64)
    started = time.perf_counter()
    detector(canvases, sizes, score_threshold=defaults.lowest_score, iou_threshold=defaults.iou)
    return time.perf_counter() - started

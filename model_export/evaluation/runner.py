"""How well detections agree with the truth: COCO metrics, and what is derived from the matches.

Detections come from the exported file through the service's own pipeline: the same decoding, the
same letterbox, the same session, the same selection. The matching of detections with objects and
the metrics are pycocotools' own.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from model_export.data.datasets import Dataset, Sample
from model_export.evaluation.coco_metrics import evaluator, silence
from service.engine import postprocessing as results
from service.errors import DataError, MalformedImage
from service.imaging import decode as imaging
from service.imaging.canvas import Buckets, ShortSide, Size
from service.runtime import devices
from service.runtime.artifact import read_artifact
from service.runtime.detector import Detections, Detector
from service.system.cpus import cpu_count

MAX_DETECTIONS: Final = 100
"""Per image and class, the best-scored first: COCO's maxDets."""

SCORE: Final = 0.01
"""Detections below are not measured: low enough to leave the tail of the curve in."""

KEPT_DETECTIONS: Final = 300
"""Per image, over all classes."""

_FEW: Final = (1, 10)
"""COCO also tells the recall with so few detections per image and class."""
_AREAS: Final = 4
"""All, small, medium, large."""

_DECODE_THREADS: Final = 4
_TIMED_IMAGES: Final = 24
_TIMED_BATCHES: Final = 5


@dataclass(frozen=True, slots=True)
class ClassResult:
    """One class's share of an evaluation; None where the truth holds no object of the class."""

    ap: float | None
    ap50: float | None
    ap75: float | None
    ar100: float | None
    count: int
    """Objects in the truth."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds per image on the machine that evaluated."""

    session: float
    """Median of the session alone, one image per call, at the file's own thresholds."""
    session_p95: float
    """What one call in twenty takes longer than."""
    batch: float
    """The session alone, `batch_size` images per call."""
    pipeline: float
    """Whole pipeline: reading, decoding, letterbox, batched session, mapping back."""
    batch_size: int
    device: str
    """As settings write it: "cpu", "cuda:0"."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """COCO metrics in [0, 1]; None where nothing in the truth could be measured."""

    ap: float | None
    """Mean over IoU 0.50:0.05:0.95 and over the classes."""
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    """Objects below 32^2 pixels of the original image."""
    ap_medium: float | None
    ap_large: float | None
    """Objects above 96^2 pixels of the original image."""
    ar1: float | None
    """Mean of the highest recall over the IoUs and the classes, with one detection per image
    and class."""
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    """Recall of objects by size, like `ap_small`, with 100 detections."""
    ar_medium: float | None
    ar_large: float | None
    per_class: dict[str, ClassResult]
    images: int
    boxes: int
    timing: Timing | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what could not be measured is None."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Matches:
    """The detections of one class over all images, in falling score, and what they hit."""

    scores: NDArray[np.float64]
    """(D,)"""
    images: NDArray[np.int64]
    """(D,) index of the image."""
    hits: NDArray[np.bool_]
    """(T, D) whether the detection matched an object at IoU 0.50, 0.55 .. 0.95."""
    ignored: NDArray[np.bool_]
    """(T, D) neither hit nor miss: it lies where the truth does not tell objects apart."""
    objects: NDArray[np.int64]
    """(I,) objects in each image."""

    def at_50(self) -> Judged:
        """The detections that count at IoU 0.50."""
        counted = ~self.ignored[0]
        return Judged(self.scores[counted], self.hits[0, counted], self.images[counted])


class Judged(NamedTuple):
    """Detections in falling score at one IoU, all (D,)."""

    scores: NDArray[np.float64]
    hits: NDArray[np.bool_]
    images: NDArray[np.int64]
    """Index of the image."""


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
    """Detections of every image in original pixels, above a score, at most 300 each.

    Images with equal canvases share a batch.
    """
    metadata = detector.metadata
    selection = results.resolve(metadata, score_threshold=score, max_detections=KEPT_DETECTIONS)
    found: dict[int, Detections] = {}
    waiting: dict[Size, dict[int, imaging.Prepared]] = {}

    def run(batch: dict[int, imaging.Prepared]) -> None:
        raw = detector(
            np.stack([each.canvas for each in batch.values()]),
            np.array([each.letterbox.resized for each in batch.values()], dtype=np.int64),
            score_threshold=selection.lowest_score,
            iou_threshold=selection.iou,
        )
        for (index, each), detections in zip(batch.items(), raw, strict=True):
            found[index] = results.select(detections, each.letterbox, selection)

    # Without a terminal there is no bar.
    with tqdm(total=len(samples), desc="evaluating", unit="image", disable=None) as bar:
        for index, prepared in enumerate(_prepare_all(samples, metadata.canvas)):
            batch = waiting.setdefault(prepared.letterbox.canvas, {})
            batch[index] = prepared
            if len(batch) == batch_size:
                run(waiting.pop(prepared.letterbox.canvas))
            bar.update()
        for batch in waiting.values():
            run(batch)
    return [found[index] for index in range(len(samples))]


def coco_metrics(
    truth: Sequence[Sample],
    found: Sequence[Detections],
    classes: Sequence[str],
    *,
    max_detections: int = MAX_DETECTIONS,
) -> Evaluation:
    """COCO metrics of detections in original pixels, found[i] being those of truth[i].

    The same numbers as pycocotools' own summary, to the last digit, if each object's area is that
    of its box. `max_detections`, at least 10, counts per image and class. Images without
    objects count through their false positives. Works without any detection and without any
    object.
    """
    with silence():
        run = evaluator(truth, found, classes)
        run.params.maxDets = [*_FEW, max_detections]
        run.evaluate()
        run.accumulate()
    # Last axis: at most 1, 10 and max_detections of a class in an image; -1: no objects.
    precision: NDArray[np.float64] = run.eval["precision"]  # (T, R, K, A, 3)
    recall: NDArray[np.float64] = run.eval["recall"]  # (T, K, A, 3)
    counts = _count_labels(truth, len(classes))
    ap = [_mean(precision[:, :, :, area, 2]) for area in range(_AREAS)]
    ar = [_mean(recall[:, :, area, 2]) for area in range(_AREAS)]
    return Evaluation(
        ap=ap[0],
        ap50=_mean(precision[0, :, :, 0, 2]),
        ap75=_mean(precision[5, :, :, 0, 2]),
        ap_small=ap[1],
        ap_medium=ap[2],
        ap_large=ap[3],
        ar1=_mean(recall[:, :, 0, 0]),
        ar10=_mean(recall[:, :, 0, 1]),
        ar100=ar[0],
        ar_small=ar[1],
        ar_medium=ar[2],
        ar_large=ar[3],
        per_class={
            name: _class_result(precision[:, :, k, 0, 2], recall[:, k, 0, 2], int(counts[k]))
            for k, name in enumerate(classes)
        },
        images=len(truth),
        boxes=int(counts.sum()),
    )


def match(
    truth: Sequence[Sample],
    found: Sequence[Detections],
    classes: Sequence[str],
    *,
    max_detections: int = MAX_DETECTIONS,
) -> list[Matches]:
    """Match detections with objects as `coco_metrics` does, without the mean over them."""
    with silence():
        run = evaluator(truth, found, classes)
        run.params.maxDets = [max_detections]
        run.params.areaRng = run.params.areaRng[:1]
        run.params.areaRngLbl = run.params.areaRngLbl[:1]
        run.evaluate()
    cells: list[dict[str, Any] | None] = run.evalImgs  # class-major, then images
    images = len(truth)
    return [
        _collect(cells[k * images : (k + 1) * images], len(run.params.iouThrs))
        for k in range(len(classes))
    ]


def _prepare_all(
    samples: Sequence[Sample], rule: Buckets | ShortSide
) -> Iterator[imaging.Prepared]:
    """Decode ahead of the session, but only a few images: they are large."""
    ahead: deque[Future[imaging.Prepared]] = deque()
    threads = min(_DECODE_THREADS, cpu_count())
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for sample in samples:
            ahead.append(pool.submit(_prepare, sample, rule))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _prepare(sample: Sample, rule: Buckets | ShortSide) -> imaging.Prepared:
    try:
        return imaging.prepare(sample.path.read_bytes(), rule)
    except (OSError, MalformedImage) as error:
        # Reading the data set looked at the headers only.
        raise DataError(f"{sample.path}: {error}; replace the image") from error


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


def _class_result(
    precision: NDArray[np.float64], recall: NDArray[np.float64], count: int
) -> ClassResult:
    """From (T, R) precisions and (T,) recalls of one class."""
    return ClassResult(
        ap=_mean(precision),
        ap50=_mean(precision[0]),
        ap75=_mean(precision[5]),
        ar100=_mean(recall),
        count=count,
    )


def _collect(cells: Sequence[dict[str, Any] | None], thresholds: int) -> Matches:
    scores = [np.zeros(0)]
    images = [np.zeros(0, dtype=np.int64)]
    hits = [np.zeros((thresholds, 0), dtype=bool)]
    ignored = [np.zeros((thresholds, 0), dtype=bool)]
    objects = np.zeros(len(cells), dtype=np.int64)
    for index, cell in enumerate(cells):
        if cell is None:
            continue
        scores.append(np.asarray(cell["dtScores"], dtype=np.float64))
        images.append(np.full(len(cell["dtScores"]), index, dtype=np.int64))
        ignored.append(cell["dtIgnore"])
        hits.append((cell["dtMatches"] > 0) & ~cell["dtIgnore"])
        objects[index] = np.count_nonzero(cell["gtIgnore"] == 0)
    joined = np.concatenate(scores)
    order = np.argsort(-joined, kind="stable")
    return Matches(
        scores=joined[order],
        images=np.concatenate(images)[order],
        hits=np.concatenate(hits, axis=1)[:, order],
        ignored=np.concatenate(ignored, axis=1)[:, order],
        objects=objects,
    )


def _count_labels(truth: Sequence[Sample], classes: int) -> NDArray[np.int64]:
    counts = np.zeros(classes, dtype=np.int64)
    for sample in truth:
        counts += np.bincount(np.asarray(sample.labels, dtype=np.int64), minlength=classes)
    return counts


def _mean(values: NDArray[np.float64]) -> float | None:
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else None

"""COCO metrics and the matches behind them, as pycocotools computes them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model_export.data.datasets import Sample
from service.runtime.detector import Detections

MAX_DETECTIONS: Final = 100
"""Per image and class, the best-scored first: COCO's maxDets."""

SCORE: Final = 0.01
"""Detections below are not measured: low enough to leave the tail of the curve in."""

KEPT_DETECTIONS: Final = 300
"""Per image, over all classes."""

_FEW: Final = (1, 10)
"""Detections per image and class at which COCO also reports the recall."""

_AREAS: Final = 4
"""All, small, medium, large."""


@dataclass(frozen=True, slots=True)
class ClassResult:
    """One class's share of an evaluation; None where the truth holds no object of the class."""

    ap: float | None
    ap50: float | None
    ap75: float | None
    ar100: float | None
    count: int
    """Objects in the truth, those marked difficult aside."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds per image on the machine that evaluated."""

    session: float
    """Median of the session alone, one image per call, at the file's own thresholds."""
    session_p95: float
    """95th percentile of the same."""
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
    """Objects below 32^2 pixels of the original image: their annotated area, else their box's."""
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
    """(T, D) neither hit nor miss: it lies in a crowd, or is that of a difficult object."""
    objects: NDArray[np.int64]
    """(I,) objects in each image, those marked difficult aside."""

    def at_50(self) -> MatchesAt50:
        """Return the detections that count at IoU 0.50."""
        counted = ~self.ignored[0]
        return MatchesAt50(self.scores[counted], self.hits[0, counted], self.images[counted])


class MatchesAt50(NamedTuple):
    """Detections in falling score at one IoU, all (D,)."""

    scores: NDArray[np.float64]
    hits: NDArray[np.bool_]
    images: NDArray[np.int64]
    """Index of the image."""


def coco_metrics(
    truth: Sequence[Sample],
    found: Sequence[Detections],
    classes: Sequence[str],
    *,
    max_detections: int = MAX_DETECTIONS,
) -> Evaluation:
    """Return COCO metrics of detections in original pixels, found[i] being those of truth[i].

    The same numbers as pycocotools' own summary, to the last digit. `max_detections`, at least
    10, counts per image and class. Images without objects count through their false positives.
    Objects marked difficult are not counted, nor any detection that overlaps one as a hit would
    and hits no other object. Works without any detection and without any object.
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
        counts += np.bincount(sample.labels[sample.counted], minlength=classes)
    return counts


def _mean(values: NDArray[np.float64]) -> float | None:
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else None


Boxes = NDArray[np.floating[Any]]


class _Evaluator(COCOeval):  # type: ignore[misc]  # pycocotools is untyped
    """COCOeval that ignores objects marked difficult as the VOC devkit does.

    Their overlap is the IoU, as that of any object, and any number of detections may match them,
    as with a crowd. pycocotools itself overwrites an annotation's `ignore`.
    """

    def evaluateImg(self, image: int, label: int, sizes: Any, most: int) -> Any:  # noqa: N802
        # By now all overlaps are computed, which alone tell a crowd from a difficult object.
        for each in self._gts[image, label]:
            if each["difficult"]:
                each["iscrowd"] = each["ignore"] = 1
        return super().evaluateImg(image, label, sizes, most)


def evaluator(
    truth: Sequence[Sample], found: Sequence[Detections], classes: Sequence[str]
) -> COCOeval:
    """Return a COCOeval over detections in original pixels, found[i] being those of truth[i].

    Image i has id i, class k has id k. Raises ValueError if the counts differ.
    """
    if len(truth) != len(found):
        raise ValueError(f"{len(truth)} images, but detections of {len(found)}")
    images = [
        {"id": index, "width": sample.size.width, "height": sample.size.height}
        for index, sample in enumerate(truth)
    ]
    categories = [{"id": index, "name": name} for index, name in enumerate(classes)]
    objects = [
        {**_annotation(index, box, label), "area": float(area), "difficult": not counted}
        for index, sample in enumerate(truth)
        for box, label, area, counted in zip(
            sample.boxes, sample.labels, sample.areas, sample.counted, strict=True
        )
    ]
    objects += [
        {**_annotation(index, box, label), "iscrowd": 1}
        for index, sample in enumerate(truth)
        for box, label in zip(sample.crowds, sample.crowd_labels, strict=True)
    ]
    detections = [
        {**_annotation(index, box, label), "score": float(score)}
        for index, each in enumerate(found)
        for box, label, score in zip(each.boxes, each.labels, each.scores, strict=True)
    ]
    return _Evaluator(
        _index(images, categories, objects), _index(images, categories, detections), "bbox"
    )


def overlaps(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """(D, N) IoU of (D, 4) boxes with (N, 4) others, as pycocotools computes it."""
    return _overlaps(boxes, others, crowd=0)


def shares_inside(boxes: Boxes, crowds: Boxes) -> NDArray[np.float64]:
    """(D, C) share of each of (D, 4) boxes inside (C, 4) regions: COCO's overlap with a crowd."""
    return _overlaps(boxes, crowds, crowd=1)


def silence() -> contextlib.redirect_stdout[io.StringIO]:
    """Suppress stdout, to which pycocotools prints its progress."""
    return contextlib.redirect_stdout(io.StringIO())


def _overlaps(boxes: Boxes, others: Boxes, *, crowd: int) -> NDArray[np.float64]:
    if not len(boxes) or not len(others):
        return np.zeros((len(boxes), len(others)))
    found = mask.iou(_corner_and_size(boxes), _corner_and_size(others), [crowd] * len(others))
    return np.asarray(found, dtype=np.float64)


def _corner_and_size(boxes: Boxes) -> NDArray[np.float64]:
    exact = boxes.astype(np.float64)
    return np.concatenate([exact[:, :2], exact[:, 2:] - exact[:, :2]], axis=1)


def _index(
    images: list[dict[str, Any]],
    categories: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
) -> COCO:
    # Not COCO.loadRes: it cannot take an empty list.
    coco = COCO()
    # Ids start at 1: pycocotools writes the matched id into a table where 0 means "no match".
    numbered = [{**each, "id": number} for number, each in enumerate(annotations, start=1)]
    coco.dataset = {"images": images, "categories": categories, "annotations": numbered}
    coco.createIndex()
    return coco


def _annotation(image: int, box: NDArray[np.floating[Any]], label: int) -> dict[str, Any]:
    x1, y1, x2, y2 = (float(side) for side in box)
    return {
        "image_id": image,
        "category_id": int(label),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": 0,
        "difficult": False,
    }

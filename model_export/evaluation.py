"""How well detections agree with the truth: COCO metrics, and what is derived from the matches.

The matching of detections with objects and the metrics are pycocotools' own. What pycocotools
does not offer is computed here from its per-picture matches: F1 over the score threshold, and the
difference of two models with a bootstrap interval.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model_export.datasets import Sample
from service.detector import Detections

MAX_DETECTIONS: Final = 100
"""Per picture and class, the best-scored first: COCO's maxDets."""


@dataclass(frozen=True, slots=True)
class ClassResult:
    """One class's share of an evaluation; None where the truth holds no object of the class."""

    ap: float | None
    ap50: float | None
    count: int
    """Objects in the truth."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds per picture on the machine that evaluated."""

    session: float
    """Median of the session alone, one picture per call, at the file's own thresholds."""
    pipeline: float
    """Whole pipeline: reading, decoding, letterbox, batched session, mapping back."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """COCO metrics in [0, 1]; None where nothing in the truth could be measured."""

    ap: float | None
    """Mean over IoU 0.50:0.05:0.95 and over the classes."""
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    """Objects below 32^2 pixels of the original picture."""
    ap_medium: float | None
    ap_large: float | None
    """Objects above 96^2 pixels of the original picture."""
    ar100: float | None
    """Mean of the highest recall over the IoUs and the classes."""
    per_class: dict[str, ClassResult]
    images: int
    boxes: int
    timing: Timing | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what could not be measured is None."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Matches:
    """The detections of one class over all pictures, in falling score, and what they hit."""

    scores: NDArray[np.float64]
    """(D,)"""
    images: NDArray[np.int64]
    """(D,) index of the picture."""
    hits: NDArray[np.bool_]
    """(T, D) whether the detection matched an object at IoU 0.50, 0.55 .. 0.95."""
    objects: NDArray[np.int64]
    """(I,) objects in each picture."""


def coco_metrics(
    truth: Sequence[Sample],
    found: Sequence[Detections],
    classes: Sequence[str],
    *,
    max_detections: int = MAX_DETECTIONS,
) -> Evaluation:
    """COCO metrics of detections in original pixels, found[i] being those of truth[i].

    Pictures without objects count through their false positives. Works without any detection and
    without any object.
    """
    with _silence():
        run = _evaluator(truth, found, classes)
        run.params.maxDets = [max_detections]
        run.evaluate()
        run.accumulate()
    precision: NDArray[np.float64] = run.eval["precision"]  # (T, R, K, A, 1), -1: no objects
    recall: NDArray[np.float64] = run.eval["recall"]  # (T, K, A, 1)
    counts = _count_labels(truth, len(classes))
    return Evaluation(
        ap=_mean(precision[:, :, :, 0]),
        ap50=_mean(precision[0, :, :, 0]),
        ap75=_mean(precision[5, :, :, 0]),
        ap_small=_mean(precision[:, :, :, 1]),
        ap_medium=_mean(precision[:, :, :, 2]),
        ap_large=_mean(precision[:, :, :, 3]),
        ar100=_mean(recall[:, :, 0]),
        per_class={
            name: ClassResult(
                _mean(precision[:, :, k, 0]), _mean(precision[0, :, k, 0]), int(counts[k])
            )
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
    with _silence():
        run = _evaluator(truth, found, classes)
        run.params.maxDets = [max_detections]
        run.params.areaRng = run.params.areaRng[:1]
        run.params.areaRngLbl = run.params.areaRngLbl[:1]
        run.evaluate()
    cells: list[dict[str, Any] | None] = run.evalImgs  # class-major, then pictures
    pictures = len(truth)
    return [
        _collect(cells[k * pictures : (k + 1) * pictures], len(run.params.iouThrs))
        for k in range(len(classes))
    ]


def _collect(cells: Sequence[dict[str, Any] | None], thresholds: int) -> Matches:
    scores = [np.zeros(0)]
    images = [np.zeros(0, dtype=np.int64)]
    hits = [np.zeros((thresholds, 0), dtype=bool)]
    objects = np.zeros(len(cells), dtype=np.int64)
    for index, cell in enumerate(cells):
        if cell is None:
            continue
        scores.append(np.asarray(cell["dtScores"], dtype=np.float64))
        images.append(np.full(len(cell["dtScores"]), index, dtype=np.int64))
        hits.append(cell["dtMatches"] > 0)
        objects[index] = len(cell["gtIds"])
    joined = np.concatenate(scores)
    order = np.argsort(-joined, kind="stable")
    return Matches(
        scores=joined[order],
        images=np.concatenate(images)[order],
        hits=np.concatenate(hits, axis=1)[:, order],
        objects=objects,
    )


def _evaluator(
    truth: Sequence[Sample], found: Sequence[Detections], classes: Sequence[str]
) -> COCOeval:
    if len(truth) != len(found):
        raise ValueError(f"{len(truth)} pictures, but detections of {len(found)}")
    images = [
        {"id": index, "width": sample.size.width, "height": sample.size.height}
        for index, sample in enumerate(truth)
    ]
    categories = [{"id": index, "name": name} for index, name in enumerate(classes)]
    objects = [
        _annotation(index, box, label)
        for index, sample in enumerate(truth)
        for box, label in zip(sample.boxes, sample.labels, strict=True)
    ]
    detections = [
        {**_annotation(index, box, label), "score": float(score)}
        for index, each in enumerate(found)
        for box, label, score in zip(each.boxes, each.labels, each.scores, strict=True)
    ]
    return COCOeval(
        _index(images, categories, objects), _index(images, categories, detections), "bbox"
    )


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
    }


def _count_labels(truth: Sequence[Sample], classes: int) -> NDArray[np.int64]:
    counts = np.zeros(classes, dtype=np.int64)
    for sample in truth:
        counts += np.bincount(np.asarray(sample.labels, dtype=np.int64), minlength=classes)
    return counts


def _mean(values: NDArray[np.float64]) -> float | None:
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else None


def _silence() -> contextlib.redirect_stdout[io.StringIO]:
    """pycocotools prints its progress."""
    return contextlib.redirect_stdout(io.StringIO())

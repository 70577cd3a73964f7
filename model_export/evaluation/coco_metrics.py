"""pycocotools without files and without its printing: the one place that calls it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model_export.data.datasets import Sample
from service.runtime.detector import Detections

Boxes = NDArray[np.floating[Any]]


def evaluator(
    truth: Sequence[Sample], found: Sequence[Detections], classes: Sequence[str]
) -> COCOeval:
    """A run over detections in original pixels, found[i] being those of truth[i].

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
        _annotation(index, box, label)
        for index, sample in enumerate(truth)
        for box, label in zip(sample.boxes, sample.labels, strict=True)
    ]
    objects += [
        _annotation(index, box, label, crowd=True)
        for index, sample in enumerate(truth)
        for box, label in zip(sample.crowds, sample.crowd_labels, strict=True)
    ]
    detections = [
        {**_annotation(index, box, label), "score": float(score)}
        for index, each in enumerate(found)
        for box, label, score in zip(each.boxes, each.labels, each.scores, strict=True)
    ]
    return COCOeval(
        _index(images, categories, objects), _index(images, categories, detections), "bbox"
    )


def overlaps(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """(D, N) IoU of (D, 4) boxes with (N, 4) others, as pycocotools computes it."""
    return _overlaps(boxes, others, crowd=0)


def shares_inside(boxes: Boxes, crowds: Boxes) -> NDArray[np.float64]:
    """(D, C) share of each of (D, 4) boxes inside (C, 4) regions: COCO's overlap with a crowd."""
    return _overlaps(boxes, crowds, crowd=1)


def silence() -> contextlib.redirect_stdout[io.StringIO]:
    """pycocotools prints its progress."""
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


def _annotation(
    image: int, box: NDArray[np.floating[Any]], label: int, *, crowd: bool = False
) -> dict[str, Any]:
    x1, y1, x2, y2 = (float(side) for side in box)
    return {
        "image_id": image,
        "category_id": int(label),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": int(crowd),
    }

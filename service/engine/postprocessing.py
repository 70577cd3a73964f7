"""From a detector's raw output to what a request asked for, and the shapes it is written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidParameter, shown_list
from service.imaging.canvas import Letterbox, Size
from service.runtime.artifact import MAX_DETECTIONS_CAP, Metadata
from service.runtime.detector import Detections


@dataclass(frozen=True, slots=True)
class Selection:
    """Which of an image's detections a request gets. Made by `resolve`."""

    scores: NDArray[np.float32]
    """(K,) a detection of class k scores strictly above scores[k]; inf for classes not wanted."""
    iou: float
    max_detections: int
    max_when_tiled: int
    """The same for an image that is cut into tiles: the model's default is made for one canvas."""
    lowest_score: float
    """The threshold that the graph may apply without losing anything wanted."""


def resolve(
    metadata: Metadata,
    *,
    score_threshold: float | None = None,
    iou_threshold: float | None = None,
    max_detections: int | None = None,
    classes: Sequence[str] | None = None,
) -> Selection:
    """Fill what a request left open with the model's own thresholds.

    An explicit `score_threshold` replaces both the model's general and its per-class thresholds.
    Raises InvalidParameter for an unknown class.
    """
    defaults = metadata.thresholds
    if score_threshold is None:
        per_class = [defaults.of(name) for name in metadata.classes]
    else:
        per_class = [score_threshold] * len(metadata.classes)
    scores = np.array(per_class, dtype=np.float32)
    if classes is not None:
        known = set(metadata.classes)
        unknown = [name for name in classes if name not in known]
        if unknown:
            raise InvalidParameter(
                f"unknown class {shown_list(unknown)}; "
                f"the model knows {', '.join(metadata.classes)}"
            )
        wanted = np.isin(metadata.classes, classes)
        scores = np.where(wanted, scores, np.float32(np.inf))
    return Selection(
        scores=scores,
        iou=defaults.iou if iou_threshold is None else iou_threshold,
        max_detections=defaults.max_detections if max_detections is None else max_detections,
        max_when_tiled=MAX_DETECTIONS_CAP if max_detections is None else max_detections,
        lowest_score=float(scores.min(initial=1.0)),
    )


def select(raw: Detections, letterbox: Letterbox, selection: Selection) -> Detections:
    """Score filter, classes, cut, in that order; boxes go to original pixels, empty ones go.

    Filtering by score after NMS equals filtering before it: NMS goes by falling score, so a box
    is only ever suppressed by a better one, which passes the filter whenever it does.
    """
    boxes = letterbox.to_original(raw.boxes)
    chosen = raw.scores > selection.scores[raw.labels]
    chosen &= boxes[:, 2] > boxes[:, 0]
    chosen &= boxes[:, 3] > boxes[:, 1]
    mapped = Detections(boxes, raw.scores, raw.labels)
    # Mostly that is all of them, and nothing need be copied.
    if not chosen.all():
        mapped = mapped.pick(chosen)
    if len(mapped) <= selection.max_detections:
        return mapped
    return mapped.pick(slice(selection.max_detections))


def split_classes(asked: Sequence[str], known: Sequence[str]) -> list[str]:
    """Class names that were given one by one or as comma lists.

    >>> split_classes(["cat,dog", "salt, pepper"], ["cat", "dog", "salt, pepper"])
    ['cat', 'dog', 'salt, pepper']
    """
    names: list[str] = []
    for value in asked:
        # A class may have a comma in its name.
        names.extend([value] if value in known else [part.strip() for part in value.split(",")])
    return names


def rounded(detections: Detections) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Boxes (D, 4) and scores (D,) as every answer has them.

    Boxes to 1/100 pixel, scores to 1e-4, well inside what is promised.
    """
    boxes = detections.boxes.astype(np.float64).round(2)
    return boxes, detections.scores.astype(np.float64).round(4)


def native(detections: Detections, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The API's own shape."""
    return [
        {
            "label": classes[label],
            "class_id": label,
            "score": score,
            "box": {"x1": x1, "y1": y1, "x2": x2, "y2": y2},
        }
        for label, score, (x1, y1, x2, y2) in _rows(detections)
    ]


def image(size: Size, canvases: int | None = None) -> dict[str, int]:
    """An image's size in the API's own shape, with its canvases where tiles were asked for."""
    document = {"width": size.width, "height": size.height}
    return document if canvases is None else document | {"tiles": canvases}


def coco(detections: Detections, *, image_id: int = 0) -> list[dict[str, Any]]:
    """COCO results: bbox is x, y, width, height; category_id is our class_id."""
    return [
        {
            "image_id": image_id,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for label, score, (x1, y1, x2, y2) in _rows(detections)
    ]


def roboflow(detections: Detections, classes: Sequence[str], image: Size) -> dict[str, Any]:
    """Roboflow's hosted API: boxes by centre and size."""
    return {
        "image": {"width": image.width, "height": image.height},
        "predictions": [
            {
                "x": (x1 + x2) / 2,
                "y": (y1 + y2) / 2,
                "width": x2 - x1,
                "height": y2 - y1,
                "confidence": score,
                "class": classes[label],
                "class_id": label,
            }
            for label, score, (x1, y1, x2, y2) in _rows(detections)
        ],
    }


def hugging_face(detections: Detections, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Hugging Face's object-detection pipeline."""
    return [
        {
            "label": classes[label],
            "score": score,
            "box": {"xmin": x1, "ymin": y1, "xmax": x2, "ymax": y2},
        }
        for label, score, (x1, y1, x2, y2) in _rows(detections)
    ]


def _rows(detections: Detections) -> list[tuple[int, float, list[float]]]:
    """Plain numbers."""
    boxes, scores = rounded(detections)
    return list(zip(detections.labels.tolist(), scores.tolist(), boxes.tolist(), strict=True))

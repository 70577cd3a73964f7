"""Canvases to detect on, and answers to compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.imaging.canvas import Size
from service.runtime.detector import Detections, Detector


def noise(seed: int, count: int, canvas: Size) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *canvas, 3), dtype=np.uint8)


def sizes_of(count: int, canvas: Size, *, less: int = 0) -> NDArray[np.int64]:
    return np.array([[canvas.height - less, canvas.width - 2 * less]] * count)


def same(one: Sequence[Detections], other: Sequence[Detections]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.boxes, b.boxes)
        and np.array_equal(a.scores, b.scores)
        and np.array_equal(a.labels, b.labels)
        for a, b in zip(one, other, strict=True)
    )


def found(
    detector: Detector,
    canvases: NDArray[np.uint8] | list[NDArray[np.uint8]],
    sizes: NDArray[np.int64],
    *,
    score: float = 0.45,
    iou: float = 0.5,
    most: int = 300,
) -> list[Detections]:
    return detector(canvases, sizes, score_threshold=score, iou_threshold=iou, max_detections=most)

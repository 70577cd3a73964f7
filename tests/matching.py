"""Detections against the boxes that were drawn."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from service.imaging.samples import Box
from service.runtime.detector import Detections


def overlap(box: Box, others: NDArray[np.float32]) -> NDArray[np.float32]:
    """(D,) IoU of one box with (D, 4) others."""
    near = np.maximum(others[:, :2], box[:2])
    far = np.minimum(others[:, 2:], box[2:])
    shared = np.clip(far - near, 0, None).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1)
    ious: NDArray[np.float32] = shared / (areas + (box[2] - box[0]) * (box[3] - box[1]) - shared)
    return ious


def found(cells: Iterable[tuple[str, Box]], seen: Detections, classes: tuple[str, ...]) -> int:
    """How many cells have a detection of their class at IoU 0.5, each detection once."""
    free, hits = set(range(len(seen))), 0
    for name, box in cells:
        ious = overlap(box, seen.boxes)
        fits = [i for i in free if classes[seen.labels[i]] == name and ious[i] >= 0.5]
        if fits:
            free.remove(max(fits, key=lambda i: ious[i]))
            hits += 1
    return hits

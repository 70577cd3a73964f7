"""Which unlabelled images to label next: those a model is in doubt about, spread over the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from service.imaging.canvas import Buckets, Size
from service.imaging.decode import prepare

NEAR: Final = 2.0
"""Images whose descriptors differ by less are near-duplicates: frames of a video, copies. In grey
levels."""
HIT_IOU: Final = 0.5
"""Overlap from which boxes of two models are one object."""

_SIDE: Final = 16
_CANVAS: Final = Buckets(sizes=(Size(2 * _SIDE, 2 * _SIDE),))
_LEAST: Final = 0.05
"""Share of the highest score that images without doubts have: they are picked last, but apart."""

Descriptors = NDArray[np.float32]
"""(N, 768) small images; their distance is the root mean square difference, in grey levels."""


def describe(data: bytes | memoryview, *, max_pixels: int) -> NDArray[np.float32]:
    """Return the descriptor of an image: 16 x 16 pixels of it. Raises RetinaserveError."""
    canvas = prepare(data, _CANVAS, max_pixels=max_pixels).canvas
    parts = canvas.reshape(_SIDE, 2, _SIDE, 2, 3)
    small: NDArray[np.float32] = parts.mean(axis=(1, 3), dtype=np.float32).ravel()
    return small


def distances(some: Descriptors, others: Descriptors) -> NDArray[np.float32]:
    """Return the distance of each descriptor to the nearest of the others; inf without others."""
    nearest = np.full(len(some), np.inf, dtype=np.float32)
    for other in others:
        difference = some - other
        square = np.einsum("ij,ij->i", difference, difference) / some.shape[1]
        np.minimum(nearest, np.sqrt(square), out=nearest)
    return nearest


def doubts(scores: NDArray[np.float32], thresholds: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return how near each score is to the threshold of its class.

    1 at the threshold, falling in straight lines to 0 at half of it and half way from it to 1.

    >>> doubts(np.float32([0.25, 0.375, 0.5, 0.625, 0.9]), np.float32([0.5] * 5)).tolist()
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    s, t = scores.astype(np.float64), thresholds.astype(np.float64)
    width = np.maximum(np.where(s < t, t, 1 - t) / 2, 1e-9)
    near: NDArray[np.float64] = np.maximum(0.0, 1 - np.abs(s - t) / width)
    return near


def unmatched(
    ours: tuple[NDArray[np.float32], Sequence[str]],
    theirs: tuple[NDArray[np.float32], Sequence[str]],
) -> tuple[int, int]:
    """Return how many objects one model alone found, ours and theirs: (boxes, classes) of each."""
    (boxes, names), (others, other_names) = ours, theirs
    left = dict.fromkeys(range(len(others)))
    alone = 0
    for box, name in zip(boxes, names, strict=True):
        same = [(_iou(box, others[i]), -i) for i in left if other_names[i] == name]
        best, place = max(same, default=(0.0, 0))
        if best >= HIT_IOU:
            del left[-place]
        else:
            alone += 1
    return alone, len(left)


def _iou(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    if sides.min() <= 0:
        return 0.0
    shared = float(sides.prod())
    return shared / (float((a[2:] - a[:2]).prod()) + float((b[2:] - b[:2]).prod()) - shared)


@dataclass(frozen=True, slots=True)
class Pick:
    """An image that was chosen."""

    index: int
    distance: float
    """From the nearest image that is labelled or was chosen before it; inf for the first."""


def pick(
    scores: NDArray[np.float64], descriptors: Descriptors, labelled: Descriptors, count: int
) -> list[Pick]:
    """Choose up to `count` images, one by one: the highest product of score and distance.

    The distance is that from the nearest image that is labelled or chosen; those nearer than NEAR
    are left out. On ties the first wins, so the order of the images decides nothing else.
    """
    weights = scores / max(float(scores.max(initial=0.0)), 1e-9) + _LEAST
    nearest = distances(descriptors, labelled)
    chosen: list[Pick] = []
    for _ in range(count):
        # Before there is anything to be far from, the score alone decides.
        gain = np.where(nearest < NEAR, -1.0, weights * np.minimum(nearest, 255.0))
        index = int(gain.argmax()) if len(gain) else 0
        if not len(gain) or gain[index] < 0:
            break
        chosen.append(Pick(index, float(nearest[index])))
        nearest = np.minimum(nearest, distances(descriptors, descriptors[index : index + 1]))
    return chosen

"""Precision, recall and F1 of each class over the score threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model_export.data.datasets import Sample
from model_export.evaluation.coco_metrics import SCORE, Matches, match
from service.runtime.detector import Detections

RECALLS: Final = np.linspace(0.0, 1.0, 101)
"""COCO's AP is the mean of the interpolated precision at these."""


@dataclass(frozen=True, slots=True)
class OperatingPoints:
    """One class at IoU 0.50; point i keeps the detections that score at least scores[i]."""

    scores: NDArray[np.float64]
    """(P,) strictly falling."""
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]

    @property
    def f1(self) -> NDArray[np.float64]:
        """(P,) harmonic mean of precision and recall; 0 where both are 0."""
        total = self.precision + self.recall
        product = 2 * self.precision * self.recall
        return np.divide(product, total, out=np.zeros_like(total), where=total > 0)

    def at(self, threshold: float) -> tuple[float | None, float, float]:
        """Precision, recall and F1 of the detections that score strictly above a threshold.

        Precision is None where nothing is detected.
        """
        kept = int(np.count_nonzero(self.scores > threshold))
        if kept == 0:
            return None, 0.0, 0.0
        last = kept - 1
        return float(self.precision[last]), float(self.recall[last]), float(self.f1[last])

    def interpolated(self) -> NDArray[np.float64]:
        """(101,) the best precision at each of `RECALLS` or beyond it; 0 beyond the highest."""
        envelope = np.append(np.maximum.accumulate(self.precision[::-1])[::-1], 0.0)
        return np.asarray(envelope[np.searchsorted(self.recall, RECALLS, side="left")])

    def best_threshold(self) -> float | None:
        """Return the score threshold of highest F1; None where no detection ever hits.

        Detections are kept strictly above a threshold, so it lies midway between the last score
        kept and the next, where small changes of the scores change least.
        """
        f1 = self.f1
        if not f1.size or f1.max() <= 0:
            return None
        best = int(f1.argmax())
        last = float(self.scores[best])
        if best + 1 < len(self.scores):
            following = float(self.scores[best + 1])
        else:
            following = SCORE if last > SCORE else 0.0
        middle = (last + following) / 2
        # Four digits read better in the file, if they say the same.
        rounded = round(middle, 4)
        return rounded if following <= rounded < last else middle


def operating_points(matches: Matches) -> OperatingPoints | None:
    """Return precision and recall after each distinct score; None where the truth has no object."""
    total = int(matches.objects.sum())
    if total == 0:
        return None
    judged = matches.at_50()
    # Detections with equal scores pass a threshold together.
    ends = np.flatnonzero(np.diff(judged.scores, append=-np.inf))
    hits = np.cumsum(judged.hits)[ends]
    return OperatingPoints(
        scores=judged.scores[ends], precision=hits / (ends + 1), recall=hits / total
    )


def best_thresholds(
    truth: Sequence[Sample], found: Sequence[Detections], classes: Sequence[str]
) -> dict[str, float]:
    """Score threshold of highest F1 at IoU 0.50 by class name; classes without a hit are absent."""
    thresholds = {}
    for name, matches in zip(classes, match(truth, found, classes), strict=True):
        points = operating_points(matches)
        threshold = None if points is None else points.best_threshold()
        if threshold is not None:
            thresholds[name] = threshold
    return thresholds

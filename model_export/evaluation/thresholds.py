"""Precision, recall and F1 over the score threshold, and the thresholds chosen by them.

The threshold of highest F1 of a class with few objects fits those few and no others. Each class's
own threshold is therefore shrunk towards the one of highest F1 over all classes together: it has
the weight n / (n + 10), n being the class's objects in the images chosen on. Cross-validation
tells what thresholds that are chosen this way are worth on images they were not chosen on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model_export.data.datasets import Sample
from model_export.data.splits import folds_of
from model_export.evaluation.coco_metrics import SCORE, Matches
from service.runtime.artifact import Thresholds

RECALLS: Final = np.linspace(0.0, 1.0, 101)
"""COCO's AP is the mean of the interpolated precision at these."""

_SHARED_WEIGHT: Final = 10
"""Objects of a class whose own threshold weighs as much as that of all classes."""


@dataclass(frozen=True, slots=True)
class OperatingPoints:
    """One or several classes at IoU 0.50; point i keeps the detections of at least scores[i]."""

    scores: NDArray[np.float64]
    """(P,) strictly falling float32 values."""
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    """Harmonic mean of precision and recall; 0 where both are 0."""

    def at(self, threshold: float) -> tuple[float | None, float, float]:
        """Precision, recall and F1 of the detections that the service keeps at a threshold.

        Precision is None where nothing is detected.
        """
        kept = int(np.count_nonzero(passes(self.scores, threshold)))
        if kept == 0:
            return None, 0.0, 0.0
        last = kept - 1
        return float(self.precision[last]), float(self.recall[last]), float(self.f1[last])

    def interpolated(self) -> NDArray[np.float64]:
        """(101,) the best precision at each of `RECALLS` or beyond it; 0 beyond the highest."""
        envelope = np.append(np.maximum.accumulate(self.precision[::-1])[::-1], 0.0)
        return np.asarray(envelope[np.searchsorted(self.recall, RECALLS, side="left")])

    def best_threshold(self) -> float | None:
        """Return the score threshold of highest F1, exactly; None where no detection ever hits.

        Detections are kept strictly above a threshold, so it lies midway between the last score
        kept and the next, where small changes of the scores change least.
        """
        if not self.f1.any():
            return None
        # Of equals the highest.
        best = int(self.f1.argmax())
        last = float(self.scores[best])
        if best + 1 < len(self.scores):
            following = float(self.scores[best + 1])
        else:
            following = SCORE if last > SCORE else 0.0
        return (last + following) / 2

    def written(self, threshold: float) -> float:
        """Return a threshold as files and reports have it: short, with the same detections kept.

        Four digits where they keep the same ones, else the next lower float32, which always does.
        """
        rounded = round(threshold, 4)
        if np.array_equal(passes(self.scores, rounded), self.scores > threshold):
            return rounded
        below = np.float32(threshold)
        if float(below) > threshold:
            below = np.nextafter(below, np.float32(0))
        return float(str(below))


def passes(scores: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """(D,) whether the service keeps detections of (D,) scores, which it compares in float32."""
    return scores > np.float32(threshold)


def operating_points(*matches: Matches) -> OperatingPoints | None:
    """Return precision and recall after each distinct score, of all given classes together.

    None where the truth has no object of them.
    """
    total = sum(int(each.objects.sum()) for each in matches)
    if total == 0:
        return None
    judged = [each.at_50() for each in matches]
    scores = np.concatenate([each.scores for each in judged])
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    # Detections with equal scores pass a threshold together.
    ends = np.flatnonzero(np.diff(scores, append=-np.inf))
    hits = np.cumsum(np.concatenate([each.hits for each in judged])[order])[ends]
    kept = ends + 1
    return OperatingPoints(
        scores=scores[ends],
        precision=hits / kept,
        recall=hits / total,
        f1=2 * hits / (kept + total),
    )


class F1(NamedTuple):
    """F1 at IoU 0.50 and one threshold for each class, in [0, 1]."""

    micro: float
    """Of the objects and detections of all classes together."""
    macro: float
    """Mean over the classes that have objects."""

    def __str__(self) -> str:
        return f"F1 {self.micro:.4f} micro, {self.macro:.4f} macro"

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return {"micro": round(self.micro, 4), "macro": round(self.macro, 4)}


@dataclass(frozen=True, slots=True)
class ChosenThresholds:
    """Thresholds chosen on labelled images, and what they are worth."""

    thresholds: Thresholds
    """`score` is that of all classes together; a class without objects or hits has no other."""
    images: int
    in_sample: F1
    """On the images that the thresholds were chosen on."""
    folds: int
    cross_validated: F1 | None
    """Each image judged by thresholds that were chosen without its fold; None for one image."""

    def __str__(self) -> str:
        there = f"thresholds chosen on {self.images} images: {self.in_sample} there; "
        if self.cross_validated is None:
            return f"{there}one image cannot be cross-validated"
        return f"{there}{self.cross_validated} by {self.folds}-fold cross-validation"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: all but the thresholds."""
        cross_validated = self.cross_validated
        return {
            "images": self.images,
            "f1": self.in_sample.to_dict(),
            "folds": self.folds,
            "f1_cross_validated": None if cross_validated is None else cross_validated.to_dict(),
        }


def choose_thresholds(
    samples: Sequence[Sample], matches: Sequence[Matches], classes: Sequence[str]
) -> ChosenThresholds | None:
    """Choose thresholds by the matches of each class, and cross-validate the choice.

    None where no detection hits an object.
    """
    chosen = choose(matches, classes)
    if chosen is None:
        return None
    folds = folds_of([each.path for each in samples], classes)
    count = int(folds.max()) + 1
    cross_validated = None
    if count > 1:
        judged = np.zeros((len(classes), 3), dtype=np.int64)
        for fold in range(count):
            others = choose([_on(each, folds != fold) for each in matches], classes)
            held_out = [_on(each, folds == fold) for each in matches]
            judged += _count(held_out, classes, others or Thresholds())
        cross_validated = _f1(judged)
    in_sample = _f1(_count(matches, classes, chosen))
    return ChosenThresholds(chosen, len(samples), in_sample, count, cross_validated)


def choose(matches: Sequence[Matches], classes: Sequence[str]) -> Thresholds | None:
    """Return each class's threshold, shrunk towards the one of all classes together.

    A class without objects or hits has that one. None where no detection hits an object.
    """
    together = operating_points(*matches)
    shared = None if together is None else together.best_threshold()
    if together is None or shared is None:
        return None
    per_class = {}
    for name, each in zip(classes, matches, strict=True):
        points = operating_points(each)
        own = None if points is None else points.best_threshold()
        if points is not None and own is not None:
            count = int(each.objects.sum())
            shrunk = (count * own + _SHARED_WEIGHT * shared) / (count + _SHARED_WEIGHT)
            per_class[name] = points.written(shrunk)
    return Thresholds(score=together.written(shared), per_class=per_class)


def _on(matches: Matches, images: NDArray[np.bool_]) -> Matches:
    """Return the matches of an (I,) selection of images."""
    chosen = images[matches.images]
    return dataclasses.replace(
        matches,
        scores=matches.scores[chosen],
        images=matches.images[chosen],
        hits=matches.hits[:, chosen],
        ignored=matches.ignored[:, chosen],
        objects=matches.objects * images,
    )


def _count(
    matches: Sequence[Matches], classes: Sequence[str], thresholds: Thresholds
) -> NDArray[np.int64]:
    """(K, 3) hits, detections and objects of each class at IoU 0.50."""
    counts = []
    for name, each in zip(classes, matches, strict=True):
        judged = each.at_50()
        kept = passes(judged.scores, thresholds.of(name))
        counts.append([np.sum(judged.hits[kept]), np.sum(kept), np.sum(each.objects)])
    return np.array(counts, dtype=np.int64)


def _f1(counts: NDArray[np.int64]) -> F1:
    """From (K, 3) hits, detections and objects; one class at least has objects."""
    present = counts[counts[:, 2] > 0]
    hits, detections, objects = counts.sum(axis=0).tolist()
    own = 2 * present[:, 0] / present[:, 1:].sum(axis=1)
    return F1(micro=2 * hits / (detections + objects), macro=float(own.mean()))

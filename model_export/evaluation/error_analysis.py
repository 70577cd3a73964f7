"""Error analysis: the outcome of each detection at the file's thresholds, and the worst mistakes.

Detections and objects of an image are paired at IoU 0.50 in falling score, as COCO does: each
detection takes the free object of its class that it overlaps most. The rest is
classified by the first of these that fits:

- ignored: at least half of it lies in a crowd of its class, or it overlaps an object of its class
  that is marked difficult by at least 0.50;
- confused: it overlaps a free object of another class by at least 0.50;
- duplicate: it overlaps an object that is taken by at least 0.50;
- misplaced: it overlaps a free object of its class by at least 0.10, but less than 0.50;
- false: none of it.

An object that no detection hit, confused or misplaced is missed. Objects marked difficult have no
other part in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model_export.data.samples import Sample
from model_export.evaluation.coco_metrics import overlaps, shares_inside
from service.engine.postprocessing import Selection
from service.runtime.detector import Detections

HIT_IOU: Final = 0.5
NEAR_IOU: Final = 0.1
"""Below this overlap a detection is not related to an object."""


class Outcome(StrEnum):
    """Outcome of a detection, or of an object."""

    HIT = "hit"
    IGNORED = "ignored"
    CONFUSED = "confused"
    DUPLICATE = "duplicate"
    MISPLACED = "misplaced"
    FALSE = "false"
    MISSED = "missed"


MISTAKES: Final = (
    Outcome.MISSED,
    Outcome.FALSE,
    Outcome.CONFUSED,
    Outcome.MISPLACED,
    Outcome.DUPLICATE,
)


@dataclass(frozen=True, slots=True)
class ImageAnalysis:
    """The outcomes of the detections of one image."""

    shown: Detections
    """Those above the thresholds."""
    outcomes: tuple[Outcome, ...]
    """(D,) of each detection shown."""
    objects: NDArray[np.int64]
    """(D,) the object that the outcome is about, -1 where there is none."""
    missed: NDArray[np.int64]
    """(M,) the objects that are missed."""
    faint: NDArray[np.float64]
    """(M,) best score of a detection of each missed object that no threshold let pass, or 0."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """One detection that is wrong, or one object that is missed."""

    outcome: Outcome
    image: int
    score: float
    """Of the detection; of a missed object, of the best detection that was held back."""
    detection: int | None
    """Index among those shown."""
    thing: int | None
    """Index among the image's objects."""
    iou: float | None


def shown(found: Detections, selection: Selection) -> Detections:
    """Return the detections that pass the thresholds, of those in original pixels."""
    kept = found.pick(found.scores > selection.scores[found.labels])
    return kept.pick(slice(selection.max_detections))


def analyse(sample: Sample, found: Detections, selection: Selection) -> ImageAnalysis:
    """Classify each detection of an image. `found` is in falling score."""
    passing = shown(found, selection)
    iou = overlaps(passing.boxes, sample.boxes)
    own = passing.labels[:, np.newaxis] == sample.labels
    outcomes = [Outcome.FALSE] * len(passing)
    objects = np.full(len(passing), -1, dtype=np.int64)
    counted = sample.counted
    free = counted.copy()
    _claim(Outcome.HIT, np.where(own & (iou >= HIT_IOU), iou, 0.0), outcomes, objects, free)
    for index, ignored in enumerate(_ignored(sample, passing, iou)):
        if ignored and outcomes[index] is Outcome.FALSE:
            outcomes[index] = Outcome.IGNORED
    other = np.where(~own & (iou >= HIT_IOU), iou, 0.0)
    _claim(Outcome.CONFUSED, other, outcomes, objects, free)
    again = np.where(counted & ~free & (iou >= HIT_IOU), iou, 0.0)
    for index, row in enumerate(again):
        if outcomes[index] is Outcome.FALSE and row.any():
            outcomes[index], objects[index] = Outcome.DUPLICATE, int(row.argmax())
    near = np.where(own & (iou >= NEAR_IOU), iou, 0.0)
    _claim(Outcome.MISPLACED, near, outcomes, objects, free)
    missed = np.flatnonzero(free)
    held_back = found.pick(found.scores <= selection.scores[found.labels])
    faint = _best_scores(held_back, sample, missed)
    return ImageAnalysis(passing, tuple(outcomes), objects, missed, faint)


def find_mistakes(samples: Sequence[Sample], analyses: Sequence[ImageAnalysis]) -> list[Mistake]:
    """Return all mistakes, the worst first.

    A wrong detection is the worse the higher it scores; a missed object the worse the less any
    detection held back speaks for it, and then the larger it is.
    """

    def badness(mistake: Mistake) -> tuple[float, float]:
        if mistake.outcome is not Outcome.MISSED:
            return -mistake.score, 0.0
        return mistake.score, -float(samples[mistake.image].areas[mistake.thing])

    found = [
        mistake
        for image, (sample, each) in enumerate(zip(samples, analyses, strict=True))
        for mistake in _of_image(image, sample, each)
    ]
    return sorted(found, key=badness)


def _of_image(image: int, sample: Sample, analysis: ImageAnalysis) -> Iterator[Mistake]:
    for index, outcome in enumerate(analysis.outcomes):
        if outcome in (Outcome.HIT, Outcome.IGNORED):
            continue
        thing = int(analysis.objects[index])
        box = analysis.shown.boxes[index : index + 1]
        yield Mistake(
            outcome,
            image,
            score=float(analysis.shown.scores[index]),
            detection=index,
            thing=None if thing < 0 else thing,
            iou=None if thing < 0 else float(overlaps(box, sample.boxes[thing : thing + 1])[0, 0]),
        )
    for thing, score in zip(analysis.missed, analysis.faint, strict=True):
        yield Mistake(Outcome.MISSED, image, float(score), None, int(thing), None)


def _claim(
    outcome: Outcome,
    iou: NDArray[np.float64],
    outcomes: list[Outcome],
    objects: NDArray[np.int64],
    free: NDArray[np.bool_],
) -> None:
    """Match each remaining detection, in falling score, with the free object it overlaps most.

    `iou` (D, N) is 0 where a pair is not allowed. Writes into the other three.
    """
    for index, row in enumerate(iou):
        allowed = np.where(free, row, 0.0)
        if outcomes[index] is not Outcome.FALSE or not allowed.any():
            continue
        # Of equal overlaps the last, as pycocotools does.
        best = len(allowed) - 1 - int(allowed[::-1].argmax())
        outcomes[index], objects[index] = outcome, best
        free[best] = False


def _ignored(sample: Sample, found: Detections, iou: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(D,) whether each detection lies in a crowd, or is of a difficult object, of its class.

    `iou` (D, N) is that of the detections with the objects.
    """
    labels = found.labels[:, np.newaxis]
    crowd = (labels == sample.crowd_labels) & (shares_inside(found.boxes, sample.crowds) >= HIT_IOU)
    difficult = (labels == sample.labels) & (iou >= HIT_IOU) & ~sample.counted
    return np.asarray(crowd.any(axis=1) | difficult.any(axis=1))


def _best_scores(
    found: Detections, sample: Sample, objects: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(M,) best score among the detections that would hit each of the (M,) objects, 0 if none."""
    own = found.labels[:, np.newaxis] == sample.labels[objects]
    there = own & (overlaps(found.boxes, sample.boxes[objects]) >= HIT_IOU)
    scores = np.where(there, found.scores[:, np.newaxis].astype(np.float64), 0.0)
    return np.asarray(scores.max(axis=0, initial=0.0), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Confusion:
    """Confusion matrix: objects by labelled and by detected class.

    A detection is paired with an object at IoU 0.50, of its own class first, each with one at most
    (`model_export.evaluation.error_analysis`). The diagonal are therefore COCO's hits.
    """

    counts: NDArray[np.int64]
    """(K + 1, K + 1) row: true class, the last no object there; column: detected class, the last
    not detected."""

    def precision(self) -> NDArray[np.float64]:
        """(K,) share of each class's detections that hit; nan where there is none."""
        return _share(self._hits, self.counts[:, :-1].sum(axis=0))

    def recall(self) -> NDArray[np.float64]:
        """(K,) share of each class's objects that are hit; nan where there is none."""
        return _share(self._hits, self.counts[:-1].sum(axis=1))

    def row_shares(self) -> NDArray[np.float64]:
        """(K + 1, K + 1) counts over the sum of their row, 0 in empty rows."""
        return np.nan_to_num(_share(self.counts, self.counts.sum(axis=1, keepdims=True)))

    @property
    def _hits(self) -> NDArray[np.int64]:
        return np.diagonal(self.counts)[:-1]


def confusion(
    samples: Sequence[Sample], analyses: Sequence[ImageAnalysis], classes: int
) -> Confusion:
    """Return the matrix over all images. `samples` and `analyses` are of the same images."""
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for sample, analysis in zip(samples, analyses, strict=True):
        paired = np.isin(analysis.outcomes, (Outcome.HIT, Outcome.CONFUSED))
        true = np.full(len(paired), classes)
        true[paired] = sample.labels[analysis.objects[paired]]
        counted = ~np.isin(analysis.outcomes, Outcome.IGNORED)
        np.add.at(counts, (true[counted], analysis.shown.labels[counted]), 1)
        left = np.delete(sample.labels, [*analysis.objects[paired], *sample.difficult])
        counts[:, classes] += np.bincount(left, minlength=classes + 1)
    return Confusion(counts)


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    empty = np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan)
    return np.asarray(np.divide(part, whole, out=empty, where=whole > 0))

"""Differences of two models on the same images, with paired bootstrap intervals.

Images are drawn with replacement, the same for both models. Matching does not cross images,
so it is done once; a draw only weighs each image's matches by how often it was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model_export.data.datasets import Sample
from model_export.evaluation.coco_metrics import Matches, match
from model_export.evaluation.reliability import reliability
from model_export.evaluation.thresholds import RECALLS
from service.errors import DataError
from service.runtime.detector import Detections

RESAMPLES: Final = 1000

SEEDS_NOTE: Final = (
    "The interval is that of these two files. It leaves out the spread over training seeds: to "
    "compare recipes, train each with several seeds."
)

_INTERVAL: Final = (2.5, 97.5)
_AT_ONCE: Final = 32
"""Draws; all of them times all detections would not fit into memory."""


@dataclass(frozen=True, slots=True)
class Difference:
    """First model minus second, with the ends of the 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences of two models on the same images."""

    ap: Difference
    ap50: Difference
    d_ece: Difference | None
    """Less is better. None if a model detects nothing to bin."""


def compare(
    truth: Sequence[Sample],
    first: Sequence[Detections],
    second: Sequence[Detections],
    classes: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Return the metrics of `first` minus those of `second`. Raises DataError without objects."""
    matched = [match(truth, found, classes) for found in (first, second)]
    if not any(each.objects.any() for each in matched[0]):
        raise DataError("no object is labelled in these images: there is nothing to compare on")
    generator = np.random.default_rng(seed)
    count = len(truth)
    draws = np.array(
        [np.ones(count, dtype=np.int64)]
        + [
            np.bincount(generator.integers(count, size=count), minlength=count)
            for _ in range(resamples)
        ]
    )
    precisions = [mean_precisions(each, draws) for each in matched]
    ap, ap50 = (_difference(column) for column in (precisions[0] - precisions[1]).T)
    errors = [calibration_errors(each, draws) for each in matched]
    d_ece = _difference(errors[0] - errors[1])
    return Comparison(ap=ap, ap50=ap50, d_ece=None if np.isnan(d_ece.value) else d_ece)


def calibration_errors(
    matches: Sequence[Matches], weights: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(R,) D-ECE over all classes when image i counts weights[r, i] times.

    nan with nothing to bin.
    """
    judged = [each.at_50() for each in matches]
    scores = np.concatenate([each.scores for each in judged])
    hits = np.concatenate([each.hits for each in judged])
    images = np.concatenate([each.images for each in judged])
    errors = (reliability(scores, hits, weights=draw[images]).error for draw in weights)
    return np.array([np.nan if error is None else error for error in errors])


def mean_precisions(matches: Sequence[Matches], weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """(R, 2) AP and AP50 over the classes when image i counts weights[r, i] times.

    nan where there is no object of any class.
    """
    table = np.stack([average_precisions(each, weights) for each in matches])  # (K, R, T)
    measured = ~np.isnan(table[:, :, 0])  # (K, R)
    classes = measured.sum(axis=0)
    total = np.stack([table.mean(axis=2), table[:, :, 0]], axis=2).sum(
        axis=0, where=measured[:, :, np.newaxis]
    )
    mean = np.full(total.shape, np.nan)
    np.divide(total, classes[:, np.newaxis], out=mean, where=classes[:, np.newaxis] > 0)
    return mean


def average_precisions(matches: Matches, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """(R, T) one class's AP at each IoU when image i counts weights[r, i] times.

    nan where there is no object then.
    """
    parts = range(0, len(weights), _AT_ONCE)
    return np.concatenate([_precisions(matches, weights[i : i + _AT_ONCE]) for i in parts])


def _precisions(matches: Matches, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    objects = weights @ matches.objects
    counted = weights[:, matches.images]
    # Precision can only rise where something hits, so the curve is needed there alone.
    hitting = np.flatnonzero(matches.hits.any(axis=0))
    found = np.cumsum(counted, axis=1)
    averages = np.full((len(weights), len(matches.hits)), np.nan)
    for threshold, (hit, ignored) in enumerate(zip(matches.hits, matches.ignored, strict=True)):
        if ignored.any():
            found = np.cumsum(counted * ~ignored, axis=1)
        hits = np.cumsum(counted[:, hitting] * hit[hitting], axis=1)
        averages[:, threshold] = _average(hits, found[:, hitting], objects)
    averages[objects == 0] = np.nan
    return averages


def _average(
    hits: NDArray[np.int64], found: NDArray[np.int64], objects: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(R,) mean of the interpolated precision at COCO's recalls.

    `hits` (R, H) and `found` (R, H) are counts down to each of the H detections.
    """
    precision = np.divide(hits, found, out=np.zeros(hits.shape), where=found > 0)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    # Beyond the highest recall the precision is 0.
    padded = np.concatenate([envelope, np.zeros((len(envelope), 1))], axis=1)
    recall = hits / np.maximum(objects, 1)[:, np.newaxis]
    where = np.stack([np.searchsorted(each, RECALLS, side="left") for each in recall])
    return np.asarray(np.take_along_axis(padded, where, axis=1).mean(axis=1))


def _difference(values: NDArray[np.float64]) -> Difference:
    """From (1 + resamples,) differences, that of all the images first."""
    if np.isnan(values).all():
        return Difference(float("nan"), float("nan"), float("nan"))
    # A draw of images without any object measures nothing.
    low, high = np.nanpercentile(values[1:], _INTERVAL)
    return Difference(float(values[0]), float(low), float(high))

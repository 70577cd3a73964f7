"""Two models on the same pictures: the differences, with paired bootstrap intervals.

Pictures are drawn with replacement, the same for both models. Matching does not cross pictures,
so it is done once; a draw only weighs each picture's matches by how often it was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model_export.calibration_error import reliability
from model_export.datasets import Sample
from model_export.evaluation import Matches, match
from model_export.operating_points import RECALLS
from service.detector import Detections
from service.errors import DataError

RESAMPLES: Final = 1000

_INTERVAL: Final = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Difference:
    """First model minus second, with the ends of the 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences of two models on the same pictures."""

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
    """How much better `first` is than `second`. Raises DataError if the truth has no object."""
    matched = [match(truth, found, classes) for found in (first, second)]
    if not any(each.objects.any() for each in matched[0]):
        raise DataError("no object is labelled in these pictures: there is nothing to compare on")
    generator = np.random.default_rng(seed)
    count = len(truth)
    draws = [np.ones(count, dtype=np.int64)] + [
        np.bincount(generator.integers(count, size=count), minlength=count)
        for _ in range(resamples)
    ]
    figures = [np.array([_figures(each, draw) for draw in draws]) for each in matched]
    ap, ap50, d_ece = (_difference(column) for column in (figures[0] - figures[1]).T)
    return Comparison(ap=ap, ap50=ap50, d_ece=None if np.isnan(d_ece.value) else d_ece)


def calibration_error(matches: Sequence[Matches], weights: NDArray[np.int64]) -> float:
    """D-ECE over all classes when picture i counts weights[i] times; nan with nothing to bin."""
    judged = [each.at_50() for each in matches]
    error = reliability(
        np.concatenate([each.scores for each in judged]),
        np.concatenate([each.hits for each in judged]),
        weights=np.concatenate([weights[each.images] for each in judged]),
    ).error
    return float("nan") if error is None else error


def mean_precision(matches: Sequence[Matches], weights: NDArray[np.int64]) -> tuple[float, float]:
    """(AP, AP50) over classes when picture i counts weights[i] times; nan without any object."""
    rows = [average_precision(each, weights) for each in matches]
    measured = [row for row in rows if row is not None]
    if not measured:
        return float("nan"), float("nan")
    table = np.stack(measured)
    return float(table.mean()), float(table[:, 0].mean())


def average_precision(matches: Matches, weights: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """(T,) one class's AP at each IoU when picture i counts weights[i] times.

    None if there is no object then.
    """
    objects = int((matches.objects * weights).sum())
    if objects == 0:
        return None
    counted = weights[matches.images]
    # Precision can only rise where something hits, so the curve is needed there alone.
    hitting = np.flatnonzero(matches.hits.any(axis=0) & (counted > 0))
    passing = counted * ~matches.ignored if matches.ignored.any() else counted
    found = np.cumsum(passing, axis=-1)[..., hitting]
    hits = np.cumsum(matches.hits[:, hitting] * counted[hitting], axis=1)
    recall = hits / objects
    envelope = np.maximum.accumulate((hits / found)[:, ::-1], axis=1)[:, ::-1]
    # Beyond the highest recall the precision is 0.
    padded = np.concatenate([envelope, np.zeros((len(envelope), 1))], axis=1)
    return np.array(
        [
            line[np.searchsorted(reached, RECALLS, side="left")].mean()
            for line, reached in zip(padded, recall, strict=True)
        ]
    )


def _figures(matches: Sequence[Matches], weights: NDArray[np.int64]) -> tuple[float, float, float]:
    return *mean_precision(matches, weights), calibration_error(matches, weights)


def _difference(values: NDArray[np.float64]) -> Difference:
    """From (1 + resamples,) differences, that of all the pictures first."""
    if np.isnan(values).all():
        return Difference(float("nan"), float("nan"), float("nan"))
    # A draw of pictures without any object measures nothing.
    low, high = np.nanpercentile(values[1:], _INTERVAL)
    return Difference(float(values[0]), float(low), float(high))

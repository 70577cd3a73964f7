"""Which class is taken for which, at the thresholds that a file recommends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_export.data.samples import Sample
from model_export.evaluation.error_analysis import Judgement, Outcome


@dataclass(frozen=True, slots=True)
class Confusion:
    """Objects by what they are and what they were detected as.

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
    samples: Sequence[Sample], judgements: Sequence[Judgement], classes: int
) -> Confusion:
    """Count over all images. `samples` and `judgements` are of the same images."""
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for sample, judgement in zip(samples, judgements, strict=True):
        paired = np.isin(judgement.outcomes, (Outcome.HIT, Outcome.CONFUSED))
        true = np.full(len(paired), classes)
        true[paired] = sample.labels[judgement.objects[paired]]
        counted = ~np.isin(judgement.outcomes, Outcome.IGNORED)
        np.add.at(counts, (true[counted], judgement.shown.labels[counted]), 1)
        left = np.delete(sample.labels, judgement.objects[paired])
        counts[:, classes] += np.bincount(left, minlength=classes + 1)
    return Confusion(counts)


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    empty = np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan)
    return np.asarray(np.divide(part, whole, out=empty, where=whole > 0))

"""Reliability of scores: detection calibration error and its bins.

D-ECE is the expected calibration error of detections (Küppers et al., "Multivariate Confidence
Calibration for Object Detection", arXiv 2004.13546; the case that looks at the confidence alone):
detections are binned by score, and the distance between a bin's mean score and the share of its
detections that hit is averaged over the bins, each weighted by its detections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

BINS: Final = 10
"""Equally wide over [0, 1]; some hundreds of detections a class leave few for more."""

MIN_SCORE: Final = 0.05
"""Only detections strictly above are binned: RetinaNet's threshold of inference (Focal Loss,
arXiv 1708.02002, section 4). A tail of near-zero scores is always right and would hide the rest."""


@dataclass(frozen=True, slots=True)
class Reliability:
    """Mean score and precision of the detections of each score bin.

    Bin i holds scores in (edges[i], edges[i + 1]].
    """

    edges: NDArray[np.float64]
    """(B + 1,) from 0 to 1."""
    counts: NDArray[np.int64]
    """(B,) detections."""
    confidence: NDArray[np.float64]
    """(B,) mean score; nan in an empty bin."""
    precision: NDArray[np.float64]
    """(B,) share of the detections that hit; nan in an empty bin."""

    @property
    def total(self) -> int:
        """Detections in all bins."""
        return int(self.counts.sum())

    @property
    def error(self) -> float | None:
        """D-ECE in [0, 1]; None without any detection."""
        return self._mean(np.abs(self.confidence - self.precision))

    @property
    def bias(self) -> float | None:
        """Mean score minus precision over all detections: above 0 is overconfident."""
        return self._mean(self.confidence - self.precision)

    def _mean(self, values: NDArray[np.float64]) -> float | None:
        filled = self.counts > 0
        if not filled.any():
            return None
        return float(np.average(values[filled], weights=self.counts[filled]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the error, the bias and the bins; None in empty bins."""
        rows = zip(
            self.edges[:-1],
            self.edges[1:],
            self.counts,
            self.confidence,
            self.precision,
            strict=True,
        )
        return {
            "d_ece": self.error,
            "bias": self.bias,
            "detections": self.total,
            "bins": [
                {
                    "above": float(low),
                    "up_to": float(high),
                    "detections": int(count),
                    "mean_score": float(score) if count else None,
                    "precision": float(share) if count else None,
                }
                for low, high, count, score, share in rows
            ],
        }


def reliability(
    scores: NDArray[np.floating[Any]],
    hits: NDArray[np.bool_],
    *,
    bins: int = BINS,
    min_score: float = MIN_SCORE,
    weights: NDArray[np.int64] | None = None,
) -> Reliability:
    """Bin detections by score.

    `scores` (D,) in [0, 1], `hits` (D,) whether each matched an object. With `weights` (D,)
    detection i counts weights[i] times.

    >>> found = np.array([0.9, 0.8, 0.8, 0.7, 0.01])
    >>> kept = reliability(found, np.array([True, True, False, True, False]), bins=2)
    >>> kept.counts.tolist(), kept.precision[1].item(), round(kept.error, 6)
    ([0, 4], 0.75, 0.05)
    """
    chosen = scores > min_score
    score = scores[chosen].astype(np.float64)
    weight = np.ones(len(score)) if weights is None else weights[chosen].astype(np.float64)
    # Not linspace: 3 / 10 is the 0.3 that a reader writes.
    edges = np.arange(bins + 1) / bins
    index = np.searchsorted(edges[1:-1], score, side="left")
    counts = np.bincount(index, weights=weight, minlength=bins)
    promised = np.bincount(index, weights=weight * score, minlength=bins)
    kept = np.bincount(index, weights=weight * hits[chosen], minlength=bins)
    empty = np.full(bins, np.nan)
    return Reliability(
        edges=edges,
        counts=counts.astype(np.int64),
        confidence=np.divide(promised, counts, out=empty.copy(), where=counts > 0),
        precision=np.divide(kept, counts, out=empty.copy(), where=counts > 0),
    )

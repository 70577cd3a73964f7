"""Calibration of scores: of the detections that score p, a share p should hit an object.

Per class a calibrated score is sigmoid(a z + b) of the logit z, a > 0 (Platt scaling; for detectors
Küppers et al., arXiv 2004.13546, without the box). Every class is fitted by maximum likelihood and
drawn towards the one map that fits all classes together: a class with few detections has mostly
that map, one without any has nothing else. How strongly is chosen by held-out images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_export.data.datasets import Sample
from model_export.data.splits import FOLDS, folds_of
from model_export.evaluation.coco_metrics import KEPT_DETECTIONS, Matches, match
from model_export.evaluation.reliability import reliability
from service.errors import DataError
from service.runtime.detector import Detections

Array = NDArray[np.float64]

STRENGTHS: Final = (1.0, 10.0, 100.0, 1000.0, np.inf)
"""Pulls towards the shared map that are tried; `inf` is the shared map itself."""
LEAST: Final = 20
"""Detections that hit, and such that miss, without which no map is fitted."""

_SATURATED: Final = 2.0**-25
"""A float32 score is 1 from 1 - 2^-25 on, and sigmoid kernels stop near as low: |logit| <= 17.3."""
_SHARED_STRENGTH: Final = 1.0
"""Pull of the shared map towards the identity: finite even where every detection hits."""
_CEILING: Final = 10.0
"""Highest calibrated logit, a score of 0.99995, which no images here can tell from certainty.
Above it float32 has too few values left below 1: detections would share a score, and lose their
order."""
_STEPS: Final = 60


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One class's detections and whether they hit."""

    logits: Array
    """(D,)"""
    hits: Array
    """(D,) 1 where the detection matched an object at IoU 0.50, else 0."""
    images: NDArray[np.int64]
    """(D,) index of the image."""

    def pick(self, chosen: NDArray[np.bool_]) -> Outcomes:
        """Return the detections that a (D,) mask chooses."""
        return Outcomes(self.logits[chosen], self.hits[chosen], self.images[chosen])


@dataclass(frozen=True, slots=True)
class ScoreMap:
    """Per class, calibrated logit = scale * logit + offset."""

    scales: Array
    """(K,) above 0: within a class the order stays, and with it what NMS keeps."""
    offsets: Array
    """(K,)"""

    def scores(self, scores: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> Array:
        """(D,) calibrated scores of (D,) scores."""
        return _sigmoid(self.scales[labels] * logits(scores) + self.offsets[labels])

    def detections(self, found: Detections) -> Detections:
        """Return the same detections with calibrated scores, in falling score."""
        scores = self.scores(found.scores, found.labels).astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        return Detections(found.boxes[order], scores[order], found.labels[order])

    def fold(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that change when the map is folded into a network.

        The map is affine, and so is the last classification convolution: it costs nothing there.
        """
        weight, bias = (weights[f"classification_head.out.{name}"] for name in ("weight", "bias"))
        # Its output channels are (anchor, class), the class running fastest.
        anchors = len(weight) // len(self.scales)
        scales = torch.from_numpy(self.scales).repeat(anchors)
        offsets = torch.from_numpy(self.offsets).repeat(anchors)
        return {
            "classification_head.out.weight": (weight * scales[:, None, None, None]).to(weight),
            "classification_head.out.bias": (bias * scales + offsets).to(bias),
        }


@dataclass(frozen=True, slots=True)
class Calibration:
    """A score map, and its effect on images that it was not fitted on."""

    score_map: ScoreMap
    strength: float
    """The pull towards the shared map that held-out images chose."""
    before: float
    """Detection calibration error of the scores as they are, in [0, 1]."""
    after: float
    """The same of scores by maps that were fitted without the detection's image."""
    detections: int
    images: int


def logits(scores: NDArray[np.floating[Any]]) -> Array:
    """Return the float64 logits of float32 scores.

    >>> logits(np.array([0.5, 1.0], np.float32)).round(2).tolist()
    [0.0, 17.33]
    """
    inside = np.clip(np.asarray(scores, dtype=np.float64), _SATURATED, 1 - _SATURATED)
    answer: Array = np.log(inside) - np.log1p(-inside)
    return answer


def calibrate(
    truth: Sequence[Sample], found: Sequence[Detections], classes: Sequence[str]
) -> Calibration:
    """Fit a score map on detections in original pixels, found[i] being those of truth[i].

    Raises DataError where there is too little to fit on.
    """
    matched = outcomes(match(truth, found, classes, max_detections=KEPT_DETECTIONS))
    check_enough(matched, len(truth))
    folds = folds_of([each.path for each in truth], classes)
    strength = choose_strength(matched, folds)
    hits = np.concatenate([each.hits for each in matched]) > 0
    before, after = (
        reliability(np.concatenate(scores), hits).error or 0.0
        for scores in ([_sigmoid(each.logits) for each in matched], cross_validated(matched, folds))
    )
    return Calibration(
        score_map=fit(matched, strength),
        strength=strength,
        before=before,
        after=after,
        detections=len(hits),
        images=len(truth),
    )


def outcomes(matches: Iterable[Matches]) -> list[Outcomes]:
    """Return logits and hits of each class's matches."""
    judged = [each.at_50() for each in matches]
    return [
        Outcomes(logits(each.scores), each.hits.astype(np.float64), each.images) for each in judged
    ]


def check_enough(classes: Sequence[Outcomes], images: int) -> None:
    """Raise DataError where there is too little to fit on."""
    hits = int(sum(each.hits.sum() for each in classes))
    misses = sum(len(each.hits) for each in classes) - hits
    if images < FOLDS or min(hits, misses) < LEAST:
        raise DataError(
            f"--calibrate: on {images} images {hits} detections hit an object and {misses} "
            f"miss; {FOLDS} images and {LEAST} of each are needed: give more labelled images"
        )


def fit(classes: Sequence[Outcomes], strength: float) -> ScoreMap:
    """Return the score map of highest likelihood, each class pulled towards the shared map."""
    shared = _fit_one(
        np.concatenate([each.logits for each in classes]),
        np.concatenate([each.hits for each in classes]),
        towards=np.zeros(2),
        strength=_SHARED_STRENGTH,
    )
    found = np.stack([_fit_class(each, shared, strength) for each in classes])
    return ScoreMap(scales=np.exp(found[:, 0]), offsets=found[:, 1])


def choose_strength(classes: Sequence[Outcomes], folds: NDArray[np.int64]) -> float:
    """Return the pull of least log loss on images that the map was not fitted on.

    `folds` has the fold of each image, (I,).
    """
    losses = [
        sum(
            log_loss(_apply(fit(kept, strength), held), held)
            for _, kept, held in _parts(classes, folds)
        )
        for strength in STRENGTHS
    ]
    # Of equals the stronger pull: the simpler map.
    return STRENGTHS[len(losses) - 1 - int(np.argmin(losses[::-1]))]


def cross_validated(classes: Sequence[Outcomes], folds: NDArray[np.int64]) -> list[Array]:
    """Return each class's scores by maps that were fitted without their image's fold.

    The choice of the strength, on the other folds, is part of what is repeated without it.
    """
    answer = [np.zeros_like(each.logits) for each in classes]
    for inside, kept, held in _parts(classes, folds):
        scores = _apply(fit(kept, choose_strength(kept, folds)), held)
        for whole, own, mask in zip(answer, scores, inside, strict=True):
            whole[mask] = own
    return answer


def log_loss(scores: Sequence[Array], classes: Sequence[Outcomes]) -> float:
    """Return the sum over all detections of -log(probability of the outcome)."""
    total = 0.0
    for own, each in zip(scores, classes, strict=True):
        right = np.where(each.hits > 0, own, 1 - own)
        total -= float(np.log(np.maximum(right, _SATURATED)).sum())
    return total


def _fit_class(outcomes: Outcomes, shared: Array, strength: float) -> Array:
    """(log a, b) of one class, its best detection not above the ceiling."""
    z, hits = outcomes.logits, outcomes.hits
    found = shared if np.isinf(strength) else _fit_one(z, hits, towards=shared, strength=strength)
    highest = z.max(initial=0.0)
    if np.exp(found[0]) * highest + found[1] <= _CEILING:
        return found
    # The loss is convex, so the best that is allowed lies where the ceiling is just reached.
    return _least(
        lambda log_scale: np.array([log_scale, _CEILING - np.exp(log_scale) * highest]),
        lambda at: _penalised(at, z, hits, shared, _SHARED_STRENGTH),
    )


def _least(line: Callable[[float], Array], loss: Callable[[Array], float]) -> Array:
    """Return the point of a curve with the least loss, by golden-section search (one minimum)."""
    low, high = -5.0, 5.0
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(_STEPS):
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        if loss(line(first)) < loss(line(second)):
            high = second
        else:
            low = first
    return line((low + high) / 2)


def _fit_one(z: Array, hits: Array, *, towards: Array, strength: float) -> Array:
    """(log a, b) of highest penalised likelihood, by Fisher scoring with halved steps.

    The penalty is strength / 2 times the squared distance from `towards`. log a keeps a above 0;
    Fisher's matrix, unlike the Hessian then, is always positive definite.
    """
    found = towards.copy()
    loss = _penalised(found, z, hits, towards, strength)
    for _ in range(_STEPS):
        scale = np.exp(found[0])
        p = _sigmoid(scale * z + found[1])
        jacobian = np.stack([scale * z, np.ones_like(z)])  # of the logit, (2, D)
        gradient = jacobian @ (p - hits) + strength * (found - towards)
        fisher = (jacobian * (p * (1 - p))) @ jacobian.T + strength * np.eye(2)
        step = np.linalg.solve(fisher, gradient)
        before = loss
        for _ in range(_STEPS):
            loss = _penalised(found - step, z, hits, towards, strength)
            if loss <= before:
                found = found - step
                break
            step = step / 2
        if before - loss <= 1e-10 * (1 + before):
            break
    return found


def _penalised(at: Array, z: Array, hits: Array, towards: Array, strength: float) -> float:
    mapped = np.exp(at[0]) * z + at[1]
    likelihood = float((np.logaddexp(0, mapped) - hits * mapped).sum())
    return likelihood + strength / 2 * float(((at - towards) ** 2).sum())


def _apply(score_map: ScoreMap, classes: Sequence[Outcomes]) -> list[Array]:
    return [
        _sigmoid(scale * each.logits + offset)
        for scale, offset, each in zip(score_map.scales, score_map.offsets, classes, strict=True)
    ]


def _parts(
    classes: Sequence[Outcomes], folds: NDArray[np.int64]
) -> Iterator[tuple[list[NDArray[np.bool_]], list[Outcomes], list[Outcomes]]]:
    """Yield (whether a detection is inside, those outside, those inside) of each fold in use."""
    for fold in np.unique(folds[np.concatenate([each.images for each in classes])]):
        inside = [folds[each.images] == fold for each in classes]
        yield (
            inside,
            [each.pick(~mask) for each, mask in zip(classes, inside, strict=True)],
            [each.pick(mask) for each, mask in zip(classes, inside, strict=True)],
        )


def _sigmoid(z: Array) -> Array:
    # Of -|z| alone, which cannot overflow.
    small = np.exp(-np.abs(z))
    answer: Array = np.where(z >= 0, 1, small) / (1 + small)
    return answer

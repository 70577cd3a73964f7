"""Fit of anchors to boxes, and a search for the best anchors on a lattice of log sizes.

Sizes and boxes are in canvas pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model_export.retinanet.anchors import (
    LEVELS,
    AnchorConfig,
    cell_strides,
    level_base_anchors,
    level_shapes,
)
from model_export.retinanet.matching import AtssMatcher, IouMatcher, Matcher
from service.imaging.canvas import Size

STEPS: Final = 6
"""Lattice points per doubling of the size: 12 % apart."""

FOREGROUND_IOU: Final = 0.5
"""At this overlap an anchor is assigned to an object (Focal Loss, section 4)."""

_SMALLEST: Final = 8.0
"""P3's anchors are no smaller than its stride: between smaller ones boxes are missed."""
_DOUBLINGS: Final = 3
"""P3's smallest anchor is sought from 8 to 64 px."""
_MOST_SIZES: Final = 3
_MOST_RATIOS: Final = 3
_USUAL_RATIOS: Final = ((1.0,), (0.5, 1.0, 2.0))
_REACH_SLACK: Final = 0.005
_OVERLAP_SLACK: Final = 0.015
_ROUNDS: Final = 50


@dataclass(frozen=True, slots=True)
class Fit:
    """Fit of anchors to a set of boxes."""

    reached: float
    """Share of the boxes that an anchor reaches."""
    overlap: float
    """Mean over the boxes of their best IoU."""


@dataclass(frozen=True, slots=True)
class Boxes:
    """Boxes on canvases of one size."""

    canvas: Size
    boxes: NDArray[np.float32]
    """(N, 4) x1, y1, x2, y2."""
    weights: NDArray[np.float64]
    """(N,)"""


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes for each level, and ratios, as AnchorConfig has them."""

    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[float, ...]

    @property
    def per_cell(self) -> int:
        """Anchors per cell."""
        return len(self.sizes[0]) * len(self.ratios)


def best_ious(
    boxes: NDArray[np.float32], canvas: Size, config: AnchorConfig
) -> NDArray[np.float64]:
    """(N,) the highest IoU of each box with any anchor of its canvas."""
    best = np.zeros(len(boxes))
    for level, base in enumerate(level_base_anchors(config)):
        for x1, y1, x2, y2 in base.double().numpy():
            # Not at the origin where corners are rounded.
            middle = np.array([x1 + x2, y1 + y2]) / 2
            apart = _distances(_centres(boxes) - middle, canvas, level, config)
            anchor = np.array([x2 - x1, y2 - y1])
            np.maximum(best, _shape_ious(boxes, apart, anchor), out=best)
    return best


def reached(
    boxes: NDArray[np.float32], canvas: Size, config: AnchorConfig, matching: Matcher
) -> NDArray[np.bool_]:
    """(N,) whether an anchor reaches each box.

    By fixed thresholds an anchor at FOREGROUND_IOU does, by ATSS one whose centre lies inside.
    """
    if isinstance(matching, IouMatcher):
        return best_ious(boxes, canvas, config) >= FOREGROUND_IOU
    halves = (boxes[:, 2:].astype(np.float64) - boxes[:, :2]) / 2
    apart = [_distances(_centres(boxes), canvas, level, config) for level in range(len(LEVELS))]
    return np.asarray((np.array(apart) < halves).all(axis=2).any(axis=0))


def fit_of(
    ious: NDArray[np.float64], reached: NDArray[np.bool_], weights: NDArray[np.float64]
) -> Fit:
    """Return the fit of boxes with these best IoUs, each counted by its weight."""
    total = max(float(weights.sum()), np.finfo(np.float64).tiny)
    return Fit(float(weights[reached].sum()) / total, float((ious * weights).sum()) / total)


def search(groups: Sequence[Boxes], like: AnchorConfig, matching: Matcher) -> AnchorConfig:
    """Return the fewest anchors per cell that fit about as well as any; other settings as `like`.

    For ATSS that is one square: more do not help (docs/focal-loss-study.md).

    Each level has 1 to 3 sizes at equal steps within a doubling, and doubles those below; ratios
    are the means of 1 to 3 clusters of log(height / width), or the usual ones. "About as well":
    half a percent of the boxes and 0.03 of mean IoU below the best.
    """
    weights = np.concatenate([group.weights for group in groups])
    found: list[tuple[Fit, Shapes]] = []
    one = isinstance(matching, AtssMatcher)
    for ratios in [(1.0,)] if one else _ratio_sets(groups, weights):
        table = _lattice(groups, ratios, like)  # (levels, lattice, N)
        counts = range(1, 2 if one else _MOST_SIZES + 1)
        found += [_best_start(table, weights, ratios, count) for count in counts]
    reach = max(fit.reached for fit, _ in found) - _REACH_SLACK
    overlap = max(fit.overlap for fit, _ in found) - _OVERLAP_SLACK
    good = [each for each in found if each[0].reached >= reach and each[0].overlap >= overlap]
    # Possibly none has both: reach decides.
    good = good or [each for each in found if each[0].reached >= reach]
    chosen = min(good, key=lambda each: (each[1].per_cell, -each[0].overlap))[1]
    return like.model_copy(update={"sizes": chosen.sizes, "ratios": chosen.ratios})


def cluster(values: NDArray[np.float64], weights: NDArray[np.float64], count: int) -> list[float]:
    """Return means of `count` clusters of numbers, rising; k-means from evenly spread quantiles.

    >>> cluster(np.array([0.0, 0.1, 5.0, 5.1]), np.ones(4), 2)
    [0.05, 5.05]
    """
    order = np.argsort(values, kind="stable")
    values, weights = values[order], weights[order]
    cumulative = np.cumsum(weights) / weights.sum()
    quantiles = (np.arange(count) + 0.5) / count
    means = values[np.minimum(np.searchsorted(cumulative, quantiles), len(values) - 1)]
    for _ in range(_ROUNDS):
        member = np.abs(values[:, None] - means).argmin(axis=1)
        mass = np.bincount(member, weights, count)
        sums = np.bincount(member, weights * values, count)
        moved = np.where(mass > 0, sums / np.where(mass > 0, mass, 1), means)
        if np.array_equal(moved, means):
            break
        means = moved
    return [round(float(mean), 6) for mean in sorted(set(means.tolist()))]


def _centres(boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray((boxes[:, :2].astype(np.float64) + boxes[:, 2:]) / 2)


def _distances(
    points: NDArray[np.float64], canvas: Size, level: int, config: AnchorConfig
) -> NDArray[np.float64]:
    """(N, 2) x, y from each point to the middle of the nearest cell of a level."""
    grid = level_shapes(canvas.height, canvas.width)[level]
    rows, columns = grid
    y, x = cell_strides(config.stride, level=LEVELS[level], canvas=canvas, grid=grid)
    strides = np.array([x, y])
    cells = np.clip(np.round(points / strides - config.offset), 0, [columns - 1, rows - 1])
    return np.asarray(np.abs(points - (cells + config.offset) * strides))


def _shape_ious(
    boxes: NDArray[np.float32], apart: NDArray[np.float64], anchor: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(N,) IoU with an anchor of (width, height) at the given distance between the centres.

    The nearest anchor of a shape is the best one: along each axis the overlap falls with distance.
    """
    sides = boxes[:, 2:].astype(np.float64) - boxes[:, :2]
    shared = np.minimum(np.minimum(sides, anchor), (sides + anchor) / 2 - apart).clip(min=0)
    overlap = shared.prod(axis=1)
    return np.asarray(overlap / (sides.prod(axis=1) + anchor.prod() - overlap))


def _ratio_sets(
    groups: Sequence[Boxes], weights: NDArray[np.float64]
) -> Iterator[tuple[float, ...]]:
    sides = np.concatenate([group.boxes[:, 2:] - group.boxes[:, :2] for group in groups])
    logs = np.log(sides[:, 1].astype(np.float64) / sides[:, 0])
    own = (
        tuple(_ratio(np.exp(mean)) for mean in cluster(logs, weights, count))
        for count in range(1, _MOST_RATIOS + 1)
    )
    yield from dict.fromkeys([*_USUAL_RATIOS, *own])


def _ratio(value: float) -> float:
    """Return a ratio with two decimal places, or as many as a small one needs for two digits.

    >>> _ratio(1.234), _ratio(0.1234), _ratio(0.001234)
    (1.23, 0.12, 0.0012)
    """
    return round(float(value), max(2, 1 - math.floor(math.log10(value))))


def _lattice(
    groups: Sequence[Boxes], ratios: Sequence[float], like: AnchorConfig
) -> NDArray[np.float32]:
    """(levels, sizes, N) best IoU over `ratios` with the lattice's anchors of each level."""
    places = _DOUBLINGS * STEPS + STEPS
    columns = []
    for group in groups:
        table = np.zeros((len(LEVELS), places, len(group.boxes)), dtype=np.float32)
        for level in range(len(LEVELS)):
            apart = _distances(_centres(group.boxes), group.canvas, level, like)
            for place in range(places):
                size = _lattice_size(place, level)
                for ratio in ratios:
                    anchor = np.array([size / ratio**0.5, size * ratio**0.5])
                    ious = _shape_ious(group.boxes, apart, anchor)
                    np.maximum(table[level, place], ious, out=table[level, place])
        columns.append(table)
    return np.concatenate(columns, axis=2)


def _lattice_size(place: int, level: int) -> float:
    size = float(_SMALLEST * 2.0 ** (place / STEPS + level))
    # As it is written into the config.
    return float(round(size)) if size >= 20 else round(size, 1)


def _best_start(
    table: NDArray[np.float32],
    weights: NDArray[np.float64],
    ratios: tuple[float, ...],
    count: int,
) -> tuple[Fit, Shapes]:
    """Return the best smallest size for `count` sizes per level and these ratios."""
    steps = [round(STEPS * number / count) for number in range(count)]
    best: tuple[Fit, int] | None = None
    for start in range(_DOUBLINGS * STEPS + 1):
        ious = table[:, [start + step for step in steps]].max(axis=(0, 1)).astype(np.float64)
        fit = fit_of(ious, ious >= FOREGROUND_IOU, weights)
        if best is None or (fit.reached, fit.overlap) > (best[0].reached, best[0].overlap):
            best = fit, start
    assert best is not None, "the lattice is never empty"
    sizes = tuple(
        tuple(_lattice_size(best[1] + step, level) for step in steps)
        for level in range(len(LEVELS))
    )
    return best[0], Shapes(sizes, ratios)

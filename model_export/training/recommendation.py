"""Recommendation of canvas and anchors for a data set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import yaml
from numpy.typing import NDArray

from model_export.config import TrainConfig
from model_export.data.anchor_fit import (
    Boxes,
    Fit,
    best_ious,
    fit_of,
    reached,
    search,
)
from model_export.data.datasets import Dataset
from model_export.data.samples import Sample
from model_export.retinanet.anchors import AnchorConfig
from model_export.retinanet.matching import Matcher
from model_export.training.speed import NO_LIMIT, Limit
from service.errors import DataError
from service.imaging.canvas import MULTIPLE, Buckets, ShortSide, Size

CLEAR_SIDE: Final = 32.0
"""Canvas pixels, root of the area: objects below are what COCO calls small."""

CLEAR_SHARE: Final = 0.95
"""Share of the boxes, the classes' mean, that a canvas must show clearly."""

TINY_SIDE: Final = 12.0
"""Canvas pixels, root of the area: below one and a half cells of P3, anchors miss by their grid."""

REACHED_SHARE: Final = 0.95
"""Share of the boxes that anchors should reach; below, the recommendation says why they do not."""

_SMALLEST_CANVAS: Final = 256
_LARGEST_CANVAS: Final = 1024
_SQUARE: Final = 1.15
"""Images whose sides differ by less get a square canvas."""
_LONG: Final = 4.0
"""Aspect of a panorama: its canvas has no more pixels than one of this aspect."""
_RARE_SHAPE: Final = 0.02
_SEARCHED: Final = 2000
"""Boxes that the search looks at; the figures are of all."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Canvas and anchors, and their fit to the data."""

    canvas: Buckets | ShortSide
    anchors: AnchorConfig
    balanced: Fit
    """The mean over the classes, as AP is."""
    overall: Fit
    """Every box counts the same."""
    clear: float
    """Share of the boxes, the classes' mean, of at least CLEAR_SIDE on the canvas."""
    missed_tiny: float
    """Share of the boxes without an anchor that are smaller than TINY_SIDE; 0 without such."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The recommended setup beside the configured one."""

    before: Setup
    after: Setup
    canvas_kept: bool
    """The canvas is the one that was asked for."""
    smallest_canvas: Buckets
    """The smallest one that shows the objects clearly, or the images' own size."""
    limit: Limit
    """What may keep the canvas smaller than that."""

    def settings(self) -> dict[str, Any]:
        """Return the part of a config that is recommended."""
        anchors = self.after.anchors.model_dump(mode="json", include={"sizes", "ratios"})
        return {
            "canvas": self.after.canvas.model_dump(mode="json", include={"rule", "sizes"})
            if isinstance(self.after.canvas, Buckets)
            else self.after.canvas.model_dump(mode="json"),
            "model": {"anchors": anchors},
        }

    def apply(self, config: TrainConfig) -> TrainConfig:
        """Return the config with the recommendation in it."""
        model = config.model.model_copy(update={"anchors": self.after.anchors})
        return config.model_copy(update={"canvas": self.after.canvas, "model": model})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "settings": self.settings(),
            "canvas_kept": self.canvas_kept,
            "smallest_canvas": [list(size) for size in self.smallest_canvas.sizes],
            "before": _figures(self.before),
            "after": _figures(self.after),
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        before, after = self.before, self.after
        yield f"recommended canvas: {_canvas(after.canvas)} (before: {_canvas(before.canvas)})"
        yield _row("", "before", "after")
        yield _row("anchors per cell", before.anchors.per_cell, after.anchors.per_cell)
        yield _row("objects that an anchor reaches", *_shares(before.overall, after.overall))
        yield _row("  the mean over the classes", *_shares(before.balanced, after.balanced))
        yield _row(
            "  their best IoU, the mean",
            f"{before.balanced.overlap:.3f}",
            f"{after.balanced.overlap:.3f}",
        )
        yield _row(
            f"  {CLEAR_SIDE:g} px and more, the mean", f"{before.clear:.1%}", f"{after.clear:.1%}"
        )
        own = _canvas(self.smallest_canvas)
        too_large = after.canvas.largest().area > self.limit.area
        if self.canvas_kept:
            yield f"the canvas is the one asked for; of itself it would be {own}"
        elif too_large or self.smallest_canvas != after.canvas:
            rest = f", and {_canvas(after.canvas)} is the smallest" if too_large else ""
            yield f"the objects ask for {own}; {self.limit.reason}{rest}"
        if after.overall.reached < REACHED_SHARE:
            yield (
                f"{1 - after.overall.reached:.0%} of the objects are reached by no anchor; "
                f"{after.missed_tiny:.0%} of these are smaller than {TINY_SIDE:g} px on the canvas "
                "and fall between the cells of its grid, the others have rare shapes"
            )
        if after.clear < CLEAR_SHARE:
            yield (
                f"{1 - after.clear:.0%} of the objects stay below {CLEAR_SIDE:g} px: a larger "
                "canvas has a finer grid; larger images, or tiles of these, show more"
            )
        yield "settings (train takes them where its config names none):"
        yield yaml.safe_dump(self.settings(), sort_keys=False, default_flow_style=None).rstrip()


def recommend(
    training: Dataset,
    config: TrainConfig,
    *,
    limit: Limit = NO_LIMIT,
    keep_anchors: bool = False,
) -> Recommendation:
    """Recommend canvas and anchors for a train split; a canvas that the config names is kept.

    With `keep_anchors` its anchors are, too.

    The canvas is the smallest that shows CLEAR_SHARE of the objects at CLEAR_SIDE, no larger than
    the images, which enlarging makes no clearer, and within the limit. Raises DataError without
    objects.
    """
    samples = [sample for sample in training.samples if len(sample.boxes)]
    if not samples:
        raise DataError(f"{training.root}: no object to choose anchors for; label some")
    kept = "canvas" in config.model_fields_set
    smallest = choose_canvas(training.samples)
    canvas = config.canvas if kept else choose_canvas(training.samples, limit.area)
    anchors = config.model.anchors
    if not keep_anchors:
        searched = _sample(_on_canvas(samples, canvas))
        if config.augmentation.transpose > 0:
            searched += [_transposed(group) for group in searched]
        anchors = search(searched, anchors, config.matching)
    return Recommendation(
        before=_measure(samples, config.canvas, config.model.anchors, config.matching),
        after=_measure(samples, canvas, anchors, config.matching),
        canvas_kept=kept,
        smallest_canvas=smallest,
        limit=limit,
    )


def choose_canvas(samples: Sequence[Sample], area: float = math.inf) -> Buckets:
    """Return the smallest canvases, by the shapes of the images, that show the objects clearly.

    The largest of them has at most `area` pixels, if one of the smallest does.
    """
    sides = np.array([sample.size for sample in samples], dtype=np.float64)
    # Of a panorama the short side of this area at the aspect _LONG.
    short_sides = np.maximum(sides.min(axis=1), np.sqrt(sides.prod(axis=1) / _LONG))
    own = float(np.percentile(short_sides, 90))
    largest = min(_up(own), _LARGEST_CANVAS)
    labelled = [sample for sample in samples if len(sample.boxes)]
    shortest = min(_SMALLEST_CANVAS, largest)
    chosen = _buckets(sides, shortest)
    for short in range(shortest, largest + 1, MULTIPLE):
        rule = _buckets(sides, short)
        if rule.largest().area > area:
            break
        chosen = rule
        if _clear_share(_on_canvas(labelled, rule)) >= CLEAR_SHARE:
            break
    return chosen


def _buckets(sides: NDArray[np.float64], short: int) -> Buckets:
    """Return canvases for landscape, portrait and square images that occur, commonest first."""
    aspects = sides[:, 1] / sides[:, 0]
    kinds = np.sign(np.log(aspects)) * (np.abs(np.log(aspects)) > np.log(_SQUARE))
    sizes: dict[Size, int] = {}
    for kind in (1, -1, 0):
        members = aspects[kinds == kind]
        if len(members) < max(1, _RARE_SHAPE * len(aspects)):
            continue
        aspect = float(np.median(members))
        low, long = _sides(short, max(aspect, 1 / aspect))
        size = {1: Size(low, long), -1: Size(long, low), 0: Size(short, short)}[kind]
        sizes[size] = len(members)
    return Buckets(sizes=tuple(sorted(sizes, key=lambda size: -sizes[size])))


def _sides(short: int, aspect: float) -> tuple[int, int]:
    """Return the sides of a canvas of about this aspect: the shorter is `short`, or a panorama's.

    >>> _sides(256, 1.5), _sides(256, 16.0), _sides(256, 5000.0)
    ((256, 384), (128, 2048), (32, 8192))
    """
    low = MULTIPLE * max(1, int(short * min(1.0, _LONG / aspect) ** 0.5) // MULTIPLE)
    # Where the least height is too high for the aspect, the area decides.
    long = min(low * aspect, _LONG * short**2 / low)
    return low, max(low, MULTIPLE * round(long / MULTIPLE))


def _up(side: float) -> int:
    return MULTIPLE * max(1, int(np.ceil(side / MULTIPLE)))


def _on_canvas(samples: Sequence[Sample], rule: Buckets | ShortSide) -> list[Boxes]:
    """Return the boxes of each canvas; a class's weights sum up to 1 over all of them."""
    counts = np.bincount(np.concatenate([sample.labels for sample in samples]))
    members: dict[Size, list[tuple[NDArray[np.float32], NDArray[np.float64]]]] = {}
    for sample in samples:
        placed = rule.fit(sample.size)
        there = placed.to_canvas(sample.boxes), 1 / counts[sample.labels]
        members.setdefault(placed.canvas, []).append(there)
    return [
        Boxes(canvas, np.concatenate([b for b, _ in each]), np.concatenate([w for _, w in each]))
        for canvas, each in members.items()
    ]


def _measure(
    samples: Sequence[Sample],
    canvas: Buckets | ShortSide,
    anchors: AnchorConfig,
    matching: Matcher,
) -> Setup:
    groups = _on_canvas(samples, canvas)
    ious = np.concatenate([best_ious(group.boxes, group.canvas, anchors) for group in groups])
    weights = np.concatenate([group.weights for group in groups])
    sides = np.sqrt(np.concatenate([_areas(group) for group in groups]))
    hit = np.concatenate([reached(each.boxes, each.canvas, anchors, matching) for each in groups])
    return Setup(
        canvas=canvas,
        anchors=anchors,
        balanced=fit_of(ious, hit, weights),
        overall=fit_of(ious, hit, np.ones(len(ious))),
        clear=_clear_share(groups),
        missed_tiny=0.0 if hit.all() else float((sides[~hit] < TINY_SIDE).mean()),
    )


def _areas(group: Boxes) -> NDArray[np.float64]:
    return np.asarray((group.boxes[:, 2:].astype(np.float64) - group.boxes[:, :2]).prod(axis=1))


def _clear_share(groups: Sequence[Boxes]) -> float:
    areas = np.concatenate([_areas(group) for group in groups])
    weights = np.concatenate([group.weights for group in groups])
    return float(weights[areas >= CLEAR_SIDE**2].sum() / weights.sum())


def _sample(groups: Sequence[Boxes]) -> list[Boxes]:
    """Draw about _SEARCHED boxes by weight, so that rare classes stay; deterministic."""
    weights = np.concatenate([group.weights for group in groups])
    if len(weights) <= _SEARCHED:
        return list(groups)
    # Drawing by weight makes every class as likely, so those drawn count the same.
    drawn = np.random.default_rng(0).choice(
        len(weights), _SEARCHED, replace=True, p=weights / weights.sum()
    )
    times = np.bincount(drawn, minlength=len(weights)).astype(np.float64)
    sampled: list[Boxes] = []
    first = 0
    for group in groups:
        own = times[first : first + len(group.boxes)]
        first += len(group.boxes)
        if own.any():
            sampled.append(Boxes(group.canvas, group.boxes[own > 0], own[own > 0]))
    return sampled


def _transposed(group: Boxes) -> Boxes:
    swapped = Size(group.canvas.width, group.canvas.height)
    return Boxes(swapped, group.boxes[:, [1, 0, 3, 2]], group.weights)


def _canvas(rule: Buckets | ShortSide) -> str:
    if isinstance(rule, ShortSide):
        return f"short-side:{rule.short},{rule.long}"
    return ",".join(f"{size.height}x{size.width}" for size in rule.sizes)


def _shares(*fits: Fit) -> tuple[str, ...]:
    return tuple(f"{fit.reached:.1%}" for fit in fits)


def _row(name: str, before: object, after: object) -> str:
    return f"{name:<34}  {before!s:>9}  {after!s:>9}"


def _figures(setup: Setup) -> dict[str, Any]:
    return {
        "anchors_per_cell": setup.anchors.per_cell,
        "reached": setup.overall.reached,
        "reached_mean_over_classes": setup.balanced.reached,
        "mean_best_iou": setup.balanced.overlap,
        "clear": setup.clear,
    }

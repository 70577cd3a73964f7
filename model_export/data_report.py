"""What is in a data set, in words: classes, box sizes, what no anchor reaches, what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model_export.datasets import Dataset
from model_export.problems import Problem, problem_listing
from service.canvas import Buckets, ShortSide, Size

FOREGROUND_IOU: Final = 0.5
"""At this overlap an anchor is assigned to an object (Focal Loss, section 4)."""

UNREACHED_WARNING: Final = 0.02
"""Share of a class's boxes; above it the canvas or the anchors do not suit the data."""

_CHUNK: Final = 1 << 21
_NAMED: Final = 5


def unreached(
    boxes: NDArray[np.float32], anchors: NDArray[np.float32], threshold: float = FOREGROUND_IOU
) -> NDArray[np.bool_]:
    """(N,) whether no anchor overlaps the box by an IoU of at least `threshold`, in (0, 1].

    `boxes` (N, 4) and `anchors` (A, 4) are x1, y1, x2, y2 in pixels of the same canvas.
    """
    best = np.zeros(len(boxes))
    if not len(anchors):
        return best < threshold
    # IoU is at most the ratio of the areas, so that only anchors of about a box's area matter.
    box_areas, anchor_areas = _areas(boxes), _areas(anchors)
    box_order, anchor_order = np.argsort(box_areas), np.argsort(anchor_areas)
    sorted_areas = anchor_areas[anchor_order]
    first = 0
    while first < len(boxes):
        chunk = box_order[first : first + 64]
        # The margin is for rounding in the areas.
        low = np.searchsorted(sorted_areas, box_areas[chunk[0]] * threshold * 0.999)
        high = np.searchsorted(sorted_areas, box_areas[chunk[-1]] / threshold * 1.001)
        for start in range(low, high, _CHUNK // 64):
            near = anchor_order[start : min(start + _CHUNK // 64, high)]
            iou = _iou(boxes[chunk], anchors[near])
            best[chunk] = np.maximum(best[chunk], iou.max(axis=1))
        first += len(chunk)
    return best < threshold


def _areas(boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    sides = boxes[:, 2:].astype(np.float64) - boxes[:, :2]
    return np.asarray(sides.prod(axis=1))


def _iou(boxes: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, M) intersection over union."""
    near = np.maximum(boxes[:, None, :2], others[None, :, :2])
    far = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    overlap = np.clip(far - near, 0, None, dtype=np.float64).prod(axis=2)
    union = _areas(boxes)[:, None] + _areas(others)[None, :] - overlap
    return np.asarray(overlap / union)


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """One class of a data set."""

    name: str
    objects: int
    pictures: int
    """With at least one object of the class."""
    median: tuple[float, float]
    """(width, height) in canvas pixels; 0 without objects."""
    unreached: int
    """Objects that no anchor overlaps by FOREGROUND_IOU."""

    @property
    def unreached_share(self) -> float:
        """In [0, 1]."""
        return self.unreached / self.objects if self.objects else 0.0


@dataclass(frozen=True, slots=True)
class DataReport:
    """A data set on its canvases; `str()` of it is a table."""

    split: str
    pictures: int
    negatives: int
    """Pictures without objects."""
    classes: tuple[ClassSummary, ...]
    problems: tuple[Problem, ...]

    def warnings(self) -> list[str]:
        """What somebody should look at before training."""
        warnings = [
            f"warning: no {item.name!r} in the split {self.split!r}; label some, or leave the "
            "class out"
            for item in self.classes
            if not item.objects
        ]
        poor = sorted(
            (item for item in self.classes if item.unreached_share > UNREACHED_WARNING),
            key=lambda item: -item.unreached_share,
        )
        if poor:
            named = ", ".join(
                f"{100 * item.unreached_share:.1f} % of {item.name}" for item in poor[:_NAMED]
            )
            if len(poor) > _NAMED:
                named += f" and too much of {len(poor) - _NAMED} classes more"
            warnings.append(
                f"warning: no anchor reaches {named} (IoU {FOREGROUND_IOU:g}); a larger canvas or "
                "other anchor sizes and ratios would"
            )
        return warnings

    def __str__(self) -> str:
        total = sum(item.objects for item in self.classes)
        head = (
            f"{self.split}: {self.pictures} pictures, {self.negatives} of them without objects; "
            f"{total} objects"
        )
        parts = [head, *self._table(), *self.warnings()]
        if self.problems:
            parts.append(problem_listing(self.problems))
        return "\n".join(parts)

    def _table(self) -> list[str]:
        width = max([len("class"), *(len(item.name) for item in self.classes)])
        rows = [f"{'class':<{width}}  objects  pictures  median size   no anchor"]
        for item in self.classes:
            median = f"{item.median[0]:.0f} x {item.median[1]:.0f} px" if item.objects else "-"
            rows.append(
                f"{item.name:<{width}}  {item.objects:>7}  {item.pictures:>8}  {median:>12}  "
                f"{100 * item.unreached_share:>7.1f} %"
            )
        return rows


def summarise(
    dataset: Dataset,
    rule: Buckets | ShortSide,
    anchors: Callable[[Size], NDArray[np.float32]],
) -> DataReport:
    """Measure a data set; `anchors` gives a canvas's (A, 4) anchors in canvas pixels."""
    by_canvas: dict[Size, list[tuple[NDArray[np.float32], NDArray[np.int64]]]] = {}
    pictures: Counter[int] = Counter()
    for sample in dataset.samples:
        placed = rule.fit(sample.size)
        by_canvas.setdefault(placed.canvas, []).append(
            (placed.to_canvas(sample.boxes), sample.labels)
        )
        pictures.update(np.unique(sample.labels).tolist())
    boxes = np.zeros((0, 4), dtype=np.float32)
    labels = np.zeros(0, dtype=np.int64)
    missed = np.zeros(0, dtype=np.bool_)
    for canvas, members in by_canvas.items():
        there = np.concatenate([item[0] for item in members])
        boxes = np.concatenate([boxes, there])
        labels = np.concatenate([labels, *(item[1] for item in members)])
        missed = np.concatenate([missed, unreached(there, anchors(canvas))])
    return DataReport(
        split=dataset.split,
        pictures=len(dataset.samples),
        negatives=sum(1 for sample in dataset.samples if not len(sample.boxes)),
        classes=tuple(
            _summarise_class(name, boxes[labels == index], missed[labels == index], pictures[index])
            for index, name in enumerate(dataset.classes)
        ),
        problems=dataset.problems,
    )


def _summarise_class(
    name: str, boxes: NDArray[np.float32], missed: NDArray[np.bool_], pictures: int
) -> ClassSummary:
    median = (0.0, 0.0)
    if len(boxes):
        sides = np.median(boxes[:, 2:] - boxes[:, :2], axis=0)
        median = (float(sides[0]), float(sides[1]))
    return ClassSummary(name, len(boxes), pictures, median, int(missed.sum()))

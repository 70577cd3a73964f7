"""Summary of a data set: classes, box sizes, objects that no anchor reaches, problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from model_export.data.anchor_fit import reached
from model_export.data.datasets import Dataset, Sample
from model_export.data.problems import Problem, problem_listing
from model_export.retinanet.anchors import AnchorConfig
from model_export.retinanet.matching import Matcher
from service.imaging.canvas import Buckets, ShortSide, Size

UNREACHED_WARNING: Final = 0.02
"""Share of a class's boxes; above it the canvas or the anchors do not suit the data."""

FEW: Final = 50
RARE_SHARE: Final = 0.1
"""Of the commonest class's objects; a class with fewer, and fewer than FEW, is called rare."""

SHARES: Final = (0.05, 0.5, 0.95)

_NAMED: Final = 5


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """One class of a data set."""

    name: str
    objects: int
    images: int
    """With at least one object of the class."""
    median: tuple[float, float]
    """(width, height) in canvas pixels; 0 without objects."""
    unreached: int
    """Objects that no anchor reaches."""

    @property
    def unreached_share(self) -> float:
        """In [0, 1]."""
        return self.unreached / self.objects if self.objects else 0.0


@dataclass(frozen=True, slots=True)
class Missed:
    """An object that no anchor reaches."""

    image: Path
    name: str
    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels of the upright image."""
    sides: tuple[float, float]
    """(width, height) in canvas pixels."""

    def __str__(self) -> str:
        x1, y1, x2, y2 = self.box
        width, height = self.sides
        return (
            f"{self.image}: {self.name!r} at {x1:g},{y1:g},{x2:g},{y2:g}, "
            f"{width:.0f} x {height:.0f} px on the canvas"
        )


@dataclass(frozen=True, slots=True)
class DataReport:
    """A data set on its canvases; `str()` of it is a table."""

    split: str
    images: int
    negatives: int
    """Images without objects."""
    classes: tuple[ClassSummary, ...]
    problems: tuple[Problem, ...]
    sides: tuple[float, ...]
    """Roots of the areas on the canvas, in pixels, at the shares SHARES of the objects."""
    missed: tuple[Missed, ...]
    """Smallest first."""

    def warnings(self) -> list[str]:
        """Return the warnings to check before training."""
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
                f"warning: no anchor reaches {named}; a larger canvas or other anchors would"
            )
        return warnings + self._balance_warnings()

    def _balance_warnings(self) -> list[str]:
        most = max(self.classes, key=lambda item: item.objects, default=None)
        if most is None:
            return []
        limit = min(FEW, RARE_SHARE * most.objects)
        rare = [item for item in self.classes if 0 < item.objects < limit]
        if not rare:
            return []
        rare.sort(key=lambda item: item.objects)
        named = ", ".join(f"{item.name} ({item.objects})" for item in rare[:_NAMED])
        if len(rare) > _NAMED:
            named += f" and {len(rare) - _NAMED} classes more"
        warning = (
            f"warning: few objects beside the {most.objects} of {most.name}: {named}; label more "
            "of these, join them by --remap, or expect their AP to vary from run to run"
        )
        return [warning]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "pictures": self.images,
            "pictures_without_objects": self.negatives,
            "objects": sum(item.objects for item in self.classes),
            "classes": {
                item.name: {
                    "objects": item.objects,
                    "pictures": item.images,
                    "median_width": item.median[0],
                    "median_height": item.median[1],
                    "unreached": item.unreached,
                }
                for item in self.classes
            },
            "root_of_area": dict(zip(map(str, SHARES), self.sides, strict=False)),
            "warnings": self.warnings(),
            "problems": [problem.to_dict() for problem in self.problems],
            "unreached": [
                {"picture": str(each.image), "class": each.name, "box": list(each.box)}
                for each in self.missed
            ],
        }

    def __str__(self) -> str:
        total = sum(item.objects for item in self.classes)
        head = (
            f"{self.split}: {self.images} images, {self.negatives} of them without objects; "
            f"{total} objects"
        )
        parts = [head, *self._table(), *self._sizes(), *self.warnings()]
        if self.problems:
            parts.append(problem_listing(self.problems))
        return "\n".join(parts)

    def _table(self) -> list[str]:
        width = max([len("class"), *(len(item.name) for item in self.classes)])
        rows = [f"{'class':<{width}}  objects  images  median size   no anchor"]
        for item in self.classes:
            median = f"{item.median[0]:.0f} x {item.median[1]:.0f} px" if item.objects else "-"
            rows.append(
                f"{item.name:<{width}}  {item.objects:>7}  {item.images:>8}  {median:>12}  "
                f"{100 * item.unreached_share:>7.1f} %"
            )
        return rows

    def _sizes(self) -> list[str]:
        if not self.sides:
            return []
        shares = ", ".join(
            f"{100 * share:g} % below {side:.0f}"
            for share, side in zip(SHARES, self.sides, strict=True)
        )
        return [f"objects on the canvas, root of the area in px: {shares}"]


def summarise(
    dataset: Dataset,
    rule: Buckets | ShortSide,
    anchors: AnchorConfig,
    matching: Matcher,
) -> DataReport:
    """Measure a data set on the canvases of `rule`."""
    by_canvas: dict[Size, list[tuple[Sample, NDArray[np.float32]]]] = {}
    images: Counter[int] = Counter()
    for sample in dataset.samples:
        placed = rule.fit(sample.size)
        there = placed.to_canvas(sample.boxes)
        by_canvas.setdefault(placed.canvas, []).append((sample, there))
        images.update(np.unique(sample.labels).tolist())
    boxes = np.zeros((0, 4), dtype=np.float32)
    labels = np.zeros(0, dtype=np.int64)
    missed = np.zeros(0, dtype=np.bool_)
    named: list[Missed] = []
    for canvas, members in by_canvas.items():
        there = np.concatenate([item[1] for item in members])
        out = ~reached(there, canvas, anchors, matching)
        boxes = np.concatenate([boxes, there])
        labels = np.concatenate([labels, *(item[0].labels for item in members)])
        missed = np.concatenate([missed, out])
        named += _name_missed(members, out, dataset.classes)
    named.sort(key=lambda each: each.sides[0] * each.sides[1])
    areas = (boxes[:, 2:].astype(np.float64) - boxes[:, :2]).prod(axis=1)
    return DataReport(
        split=dataset.split,
        images=len(dataset.samples),
        negatives=sum(1 for sample in dataset.samples if not len(sample.boxes)),
        classes=tuple(
            _summarise_class(name, boxes[labels == index], missed[labels == index], images[index])
            for index, name in enumerate(dataset.classes)
        ),
        problems=dataset.problems,
        sides=tuple(np.sqrt(np.quantile(areas, SHARES)).tolist()) if len(areas) else (),
        missed=tuple(named),
    )


def _name_missed(
    members: Iterable[tuple[Sample, NDArray[np.float32]]],
    missed: NDArray[np.bool_],
    classes: Sequence[str],
) -> Iterator[Missed]:
    """Yield the missed objects of the images on one canvas; `missed` covers all their objects."""
    first = 0
    for sample, there in members:
        for index in np.flatnonzero(missed[first : first + len(there)]):
            x1, y1, x2, y2 = sample.boxes[index].tolist()
            width, height = (there[index, 2:] - there[index, :2]).tolist()
            name = classes[sample.labels[index]]
            yield Missed(sample.path, name, (x1, y1, x2, y2), (width, height))
        first += len(there)


def _summarise_class(
    name: str, boxes: NDArray[np.float32], missed: NDArray[np.bool_], images: int
) -> ClassSummary:
    median = (0.0, 0.0)
    if len(boxes):
        sides = np.median(boxes[:, 2:] - boxes[:, :2], axis=0)
        median = (float(sides[0]), float(sides[1]))
    return ClassSummary(name, len(boxes), images, median, int(missed.sum()))

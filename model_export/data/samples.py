"""Samples: the annotations of one image, checked, in pixels and class indices."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model_export.data.annotations import Edges, LabelledImage, LabelledObject
from model_export.data.problems import Kind, Problem
from service.errors import MalformedImage, RetinaserveError
from service.imaging import decode as imaging
from service.imaging.canvas import Size

CLIP_TOLERANCE: Final = 2.0
"""Pixels. Tools that count from 1 or round put edges this far outside; not worth a line each."""

MIN_SIDE: Final = 1.0
"""Pixels. A box with a shorter side is dropped as a slip of the mouse."""

CROWD: Final = -1
"""Label of a crowd's region among the objects that a network learns from."""

_HEADER_BYTES: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its labels."""

    path: Path
    size: Size
    """Of the upright image, that is after EXIF orientation."""
    boxes: NDArray[np.float32]
    """(N, 4) x1, y1, x2, y2 in pixels of the upright image; N may be 0."""
    labels: NDArray[np.int64]
    """(N,) index into the data set's classes."""
    crowds: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), dtype=np.float32))
    """(C, 4) regions of many objects (COCO's iscrowd): not trained on, and detections inside
    count neither as hits nor as mistakes."""
    crowd_labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """(C,) index into the data set's classes."""
    difficult: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """(M,) index of the objects marked difficult: trained on as any other, but neither they nor
    their detections count in evaluation."""
    annotated_areas: NDArray[np.float64] | None = None
    """(N,) areas of the objects where they are annotated, nan elsewhere; None: nowhere."""

    @property
    def counted(self) -> NDArray[np.bool_]:
        """(N,) whether evaluation counts each object."""
        counted = np.ones(len(self.labels), dtype=bool)
        counted[self.difficult] = False
        return counted

    @property
    def areas(self) -> NDArray[np.float64]:
        """(N,) areas by which objects are small or large: as annotated, else those of the boxes."""
        boxes = self.boxes.astype(np.float64)
        areas: NDArray[np.float64] = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        if self.annotated_areas is None:
            return areas
        return np.where(np.isnan(self.annotated_areas), areas, self.annotated_areas)


class SampleReader:
    """Turns the annotations of one image into a sample and collects their problems."""

    def __init__(
        self, labelled: LabelledImage, classes: tuple[str, ...], choice: ClassSelection
    ) -> None:
        self._labelled = labelled
        self._classes = classes
        self._choice = choice
        self.problems: list[Problem] = []
        self.left_out: Counter[str] = Counter()
        """Objects of each annotated class that the selection leaves out."""
        self.emptied = False
        """Whether the selection left none of the image's objects."""
        self.rotated = 0
        """Boxes with a rotation, which the upright ones around them replace."""
        self.duplicates = 0
        """Boxes dropped because the same box of the same class is there already."""
        self.difficult = 0
        """Objects marked difficult."""

    @property
    def name(self) -> str:
        """The image's file name."""
        return self._labelled.image.name

    def read(self) -> Sample | None:
        """Return the sample, or None if the image is left out or unusable."""
        path = self._labelled.image
        try:
            size, turned = _probe(path)
        except (RetinaserveError, OSError) as error:
            self.problems.append(Problem(path, None, f"{error}; replace it", fatal=True))
            return None
        if not self._size_agrees(size, turned=turned):
            return None
        boxes: list[Edges] = []
        labels: list[int] = []
        difficult: list[int] = []
        areas: list[float] = []
        crowds: list[Edges] = []
        crowd_labels: list[int] = []
        seen: set[tuple[str, bool, Edges]] = set()
        for item in self._labelled.objects:
            name = self._choice.name(item.name)
            if name is not None:
                key = (name, item.crowd, _rounded(self._in_pixels(item, size)))
                if key in seen:
                    self.duplicates += 1
                    continue
                seen.add(key)
                self.rotated += bool(item.rotation % 180)
            if item.crowd:
                region = self._box(item, size)
                if name in self._classes and region is not None:
                    crowds.append(region)
                    crowd_labels.append(self._classes.index(name))
                continue
            if name is None:
                self.left_out[item.name] += 1
                continue
            label = self._label(item, name)
            box = self._box(item, size)
            if label is not None and box is not None:
                if item.difficult:
                    difficult.append(len(boxes))
                areas.append(math.nan if item.area is None else item.area)
                boxes.append(box)
                labels.append(label)
        self.difficult = len(difficult)
        self.emptied = not boxes and bool(self.left_out)
        return Sample(
            path=path,
            size=size,
            boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
            labels=np.array(labels, dtype=np.int64),
            crowds=np.array(crowds, dtype=np.float32).reshape(-1, 4),
            crowd_labels=np.array(crowd_labels, dtype=np.int64),
            difficult=np.array(difficult, dtype=np.int64),
            annotated_areas=None if all(map(math.isnan, areas)) else np.array(areas),
        )

    def _note(self, line: int | None, what: str, *, fatal: bool, kind: Kind) -> None:
        self.problems.append(Problem(self._labelled.annotation, line, what, fatal, kind))

    def _size_agrees(self, size: Size, *, turned: bool) -> bool:
        labelled = self._labelled.size
        if labelled is None or labelled == (size.height, size.width):
            return True
        what = (
            f"labelled at {labelled[1]:g} x {labelled[0]:g}, but the image "
            f"{self._labelled.image.name} is {size.width} x {size.height}"
        )
        if labelled == (size.width, size.height):
            what += " once turned upright (EXIF orientation)" if turned else ", the other way round"
        fields = self._labelled.size_fields
        what += f": the boxes would be wrong; label it anew, or correct {fields} if the boxes fit"
        self.problems.append(
            Problem(
                self._labelled.annotation,
                self._labelled.size_line,
                what,
                fatal=False,
                kind=Kind.WRONG_SIZE,
                files=(self._labelled.image,),
            )
        )
        return False

    def _label(self, item: LabelledObject, name: str) -> int | None:
        if name in self._classes:
            return self._classes.index(name)
        known = ", ".join(self._classes[:40]) or "none"
        what = f"{item.tag}unknown class {name!r}; known: {known}"
        hint = nearest(name, self._classes)
        what += f"; did you mean {hint!r}?" if hint else "; rename it, or add it to the train split"
        self._note(item.line, what, fatal=True, kind=Kind.UNKNOWN_CLASS)
        return None

    def _box(self, item: LabelledObject, size: Size) -> Edges | None:
        x1, y1, x2, y2 = box = self._in_pixels(item, size)
        text = f"{item.tag}box {x1:g},{y1:g},{x2:g},{y2:g} of {item.name!r}"
        image = f"the image of {size.width} x {size.height}"
        if x2 - x1 < MIN_SIDE or y2 - y1 < MIN_SIDE:
            remedy = "draw it anew" if self._labelled.relative else "draw it anew, in pixels"
            what = f"{text} is {x2 - x1:g} x {y2 - y1:g} px; {remedy}"
            self._note(item.box_line, what, fatal=False, kind=Kind.NO_AREA)
            return None
        clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, size.width), min(y2, size.height))
        if clipped[2] - clipped[0] < MIN_SIDE or clipped[3] - clipped[1] < MIN_SIDE:
            what = f"{text} lies outside {image}; draw it anew"
            self._note(item.box_line, what, fatal=False, kind=Kind.OUTSIDE)
            return None
        beyond = max(abs(a - b) for a, b in zip(box, clipped, strict=True))
        if beyond > CLIP_TOLERANCE:
            what = f"{text} reaches {beyond:g} px out of {image}; clipped"
            self._note(item.box_line, what, fatal=False, kind=Kind.CLIPPED)
        return clipped

    def _in_pixels(self, item: LabelledObject, size: Size) -> Edges:
        x1, y1, x2, y2 = item.box
        if self._labelled.relative:
            return x1 * size.width, y1 * size.height, x2 * size.width, y2 * size.height
        if item.rotation % 180 == 0:
            return item.box
        angle = math.radians(item.rotation)
        cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
        across = ((x2 - x1) * cos + (y2 - y1) * sin) / 2
        down = ((x2 - x1) * sin + (y2 - y1) * cos) / 2
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        return x - across, y - down, x + across, y + down


def nearest(name: str, known: Collection[str]) -> str | None:
    """Return the most similar known name, or None."""
    near = difflib.get_close_matches(name.lower(), [each.lower() for each in known], n=1)
    return next((each for each in known if [each.lower()] == near), None)


def _rounded(box: Edges) -> Edges:
    """Return edges to a tenth of a pixel: fractions are written with few digits."""
    x1, y1, x2, y2 = (round(edge, 1) for edge in box)
    return x1, y1, x2, y2


def _probe(path: Path) -> tuple[Size, bool]:
    """(upright size, whether EXIF turns the image by a quarter)."""
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
        try:
            header = imaging.open_image(head)
        except MalformedImage:
            # Long EXIF blocks and colour profiles push the size further back.
            header = imaging.open_image(head + file.read())
        return header.size, header.is_turned


@dataclass(frozen=True, slots=True)
class ClassSelection:
    """A mapping of class names and a subset of the new names."""

    keep: tuple[str, ...] | None = None
    """Classes, by their new names, whose objects are used; None: all of them."""
    remap: Mapping[str, str] = field(default_factory=dict)
    """New name of a class by the one that is written. Several may become one."""

    def name(self, written: str) -> str | None:
        """Return the new name of an annotated class; None if it is left out.

        >>> choice = ClassSelection(keep=("cat",), remap={"kitten": "cat"})
        >>> choice.name("cat"), choice.name("kitten"), choice.name("dog")
        ('cat', 'cat', None)
        """
        name = self.remap.get(written, written)
        return name if self.keep is None or name in self.keep else None

    def count(self, written: Mapping[str, int]) -> Counter[str]:
        """Return the objects of each new class from those of the annotated ones."""
        counts: Counter[str] = Counter()
        for each, number in written.items():
            name = self.name(each)
            if name is not None:
                counts[name] += number
        return counts

"""The content of annotation files in one form for all formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model_export.data.problems import Problem

Edges = tuple[float, float, float, float]
"""x1, y1, x2, y2"""


@dataclass(frozen=True, slots=True)
class LabelledObject:
    """One object as annotated; only finiteness is checked."""

    name: str
    """Its class."""
    box: Edges
    """In the units of its image's `LabelledImage.relative`."""
    line: int | None = None
    """Line of the class; None where entries have ids, as in JSON."""
    box_line: int | None = None
    crowd: bool = False
    """Whether it is a region of many objects (COCO's iscrowd)."""
    difficult: bool = False
    """Whether it is hard to recognise (VOC's difficult): evaluation does not count it."""
    area: float | None = None
    """In pixels of the image, as annotated: that of its outline. None: that of the box."""
    rotation: float = 0.0
    """Degrees by which the box is turned about its centre, clockwise."""
    tag: str = ""
    """Prefix of problems that finds the entry, such as "annotation 17: "."""


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image that exists, and its annotations."""

    image: Path
    annotation: Path
    """File that holds the labels, and which problems name."""
    objects: tuple[LabelledObject, ...]
    size: tuple[float, float] | None = None
    """(height, width) as annotated; None if unusable."""
    size_line: int | None = None
    size_fields: str = ""
    """The format's name of the size."""
    relative: bool = False
    """Boxes are fractions of the upright image's sides, not pixels."""


@dataclass(frozen=True, slots=True)
class SplitAnnotations:
    """The annotations of one split."""

    images: tuple[LabelledImage, ...]
    names: Mapping[str, int] = field(default_factory=dict)
    """Objects of each class in the images that name the classes: train's, or all of them where
    the split is by hash. Empty unless requested."""
    problems: Sequence[Problem] = ()

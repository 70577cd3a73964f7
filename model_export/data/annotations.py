"""What annotation files say, in one form whatever the format: the readers' common language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model_export.data.problems import Problem

Edges = tuple[float, float, float, float]
"""x1, y1, x2, y2"""


@dataclass(frozen=True, slots=True)
class LabelledObject:
    """One object as it is written, unchecked but for being finite."""

    name: str
    """Its class."""
    box: Edges
    """In the units of its image's `LabelledImage.relative`."""
    line: int | None = None
    """Line of the class; None where entries have ids, as in JSON."""
    box_line: int | None = None
    crowd: bool = False
    """Not one object, but a region of many that are not told apart."""
    tag: str = ""
    """What finds the object within a line, such as "annotation 17: "; begins a problem's text."""


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image that is there, and what is written about it."""

    image: Path
    annotation: Path
    """File that holds the labels, and which problems name."""
    objects: tuple[LabelledObject, ...]
    size: tuple[float, float] | None = None
    """(height, width) as written; None where nothing usable is."""
    size_line: int | None = None
    size_fields: str = ""
    """What the format calls the size."""
    relative: bool = False
    """Boxes are fractions of the upright image's sides, not pixels."""


@dataclass(frozen=True, slots=True)
class SplitAnnotations:
    """One split of a folder, as its format's reader found it."""

    images: tuple[LabelledImage, ...]
    names: Mapping[str, int] = field(default_factory=dict)
    """Objects of each class in the images that name the classes: train's, or all of them where
    nobody chose the splits. Empty where it was not asked for."""
    problems: Sequence[Problem] = ()

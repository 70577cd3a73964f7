"""Labelled folders to one sample type; bad data is found here, by file and line, before training.

Boxes are x1, y1, x2, y2 in pixels of the upright picture, continuous edges from 0 to the
picture's side: VOC's xmin..xmax are taken as they are written.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model_export import voc
from model_export.problems import Kind, Problem, describe_all, refuse_fatal
from model_export.splits import (
    Entry,
    Folder,
    find_entries,
    find_naming_entries,
    leaked,
    open_folder,
)
from service import imaging
from service.canvas import Size
from service.errors import DataError, MalformedImage, RetinaserveError

CLIP_TOLERANCE: Final = 2.0
"""Pixels. Tools that count from 1 or round put edges this far outside; not worth a line each."""

MIN_SIDE: Final = 1.0
"""Pixels. A box with a shorter side is taken as a slip of the mouse, not as an object."""

_HEADER_BYTES: Final = 1 << 18
_THREADS: Final = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture with its labels."""

    path: Path
    size: Size
    """Of the upright picture, that is after EXIF orientation."""
    boxes: NDArray[np.float32]
    """(N, 4) x1, y1, x2, y2 in pixels of the upright picture; N may be 0."""
    labels: NDArray[np.int64]
    """(N,) index into the data set's classes."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """One split of a labelled folder."""

    root: Path
    split: str
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    """None of them fatal."""


def load_voc(root: Path, split: str, *, classes: Sequence[str] | None = None) -> Dataset:
    """Read one split of a Pascal VOC folder, or of a flat folder of NAME.xml beside NAME.jpg.

    Without ImageSets/Main a fifth of the pictures is "val", chosen by a hash of the file stem,
    the rest "train". Without `classes` they are the names found in the train split (without
    ImageSets/Main in all of the folder), whichever split is read, by falling count and then by
    name. Objects marked difficult are kept, pictures without objects are negatives. Raises
    DataError with every problem that stops training.
    """
    folder = open_folder(root)
    entries, problems = find_entries(folder, split)
    problems += leaked(folder, entries, split)
    naming: list[Entry] = []
    if classes is None:
        naming, found = find_naming_entries(folder)
        problems = list(dict.fromkeys(problems + found))
    annotations, found = _parse_all(dict.fromkeys([*entries, *naming]))
    problems += found
    if classes is None:
        classes = _by_count(annotations[entry] for entry in naming if entry in annotations)
    readers = [
        _SampleReader(entry, annotations[entry], folder, tuple(classes))
        for entry in entries
        if entry in annotations
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        samples = list(pool.map(_SampleReader.read, readers))
    for reader in readers:
        problems += reader.problems
    kept = tuple(sample for sample in samples if sample is not None)
    refuse_fatal(problems, what=f"{root}, split {split!r}")
    if not kept:
        raise DataError(
            f"{root}: every picture of the split {split!r} is left out\n{describe_all(problems)}"
        )
    if not classes:
        raise DataError(f"{root}: no object is labelled in the train split; label some")
    return Dataset(root, split, tuple(classes), kept, tuple(problems))


def _parse_all(entries: Iterable[Entry]) -> tuple[dict[Entry, voc.Annotation], list[Problem]]:
    annotations: dict[Entry, voc.Annotation] = {}
    problems: list[Problem] = []
    for entry in entries:
        try:
            annotations[entry] = voc.parse(entry.annotation.read_bytes())
        except voc.AnnotationError as error:
            problems.append(Problem(entry.annotation, error.line, str(error), fatal=True))
        except OSError as error:
            what = f"cannot be read ({error.strerror})"
            problems.append(Problem(entry.annotation, None, what, fatal=True))
    return annotations, problems


def _by_count(annotations: Iterable[voc.Annotation]) -> tuple[str, ...]:
    """Class names by falling count, then by name."""
    counts = Counter(item.name for annotation in annotations for item in annotation.objects)
    return tuple(sorted(counts, key=lambda name: (-counts[name], name)))


class _SampleReader:
    """Turns one annotation into a sample and collects what is wrong with it."""

    def __init__(
        self, entry: Entry, annotation: voc.Annotation, folder: Folder, classes: tuple[str, ...]
    ) -> None:
        self._entry = entry
        self._annotation = annotation
        self._folder = folder
        self._classes = classes
        self.problems: list[Problem] = []

    def read(self) -> Sample | None:
        """None if the picture is left out or unusable."""
        path = self._picture()
        if path is None:
            self._note(1, f"no picture {self._entry.stem}.jpg (or .png, .webp); add it", fatal=True)
            return None
        try:
            size = _probe(path)
        except (RetinaserveError, OSError) as error:
            self.problems.append(Problem(path, None, f"{error}; replace it", fatal=True))
            return None
        if not self._size_agrees(size):
            return None
        boxes: list[tuple[float, float, float, float]] = []
        labels: list[int] = []
        for item in self._annotation.objects:
            label = self._label(item)
            box = self._box(item, size)
            if label is not None and box is not None:
                boxes.append(box)
                labels.append(label)
        return Sample(
            path=path,
            size=size,
            boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
            labels=np.array(labels, dtype=np.int64),
        )

    def _note(self, line: int, what: str, *, fatal: bool, kind: Kind = Kind.UNUSABLE) -> None:
        self.problems.append(Problem(self._entry.annotation, line, what, fatal, kind))

    def _picture(self) -> Path | None:
        # Tools write Windows paths here as well.
        name = self._annotation.filename.replace("\\", "/").rsplit("/", 1)[-1]
        same_stem = self._folder.pictures.get(self._entry.stem, ())
        named = self._folder.pictures.get(Path(name).stem, ())
        exact = [path for path in named if path.name == name]
        if same_stem:
            return next((path for path in same_stem if path.name == name), same_stem[0])
        return exact[0] if exact else None

    def _size_agrees(self, size: Size) -> bool:
        labelled = self._annotation.size
        if labelled is None or labelled == (size.height, size.width):
            return True
        what = (
            f"labelled at {labelled[1]:g} x {labelled[0]:g}, but the picture is "
            f"{size.width} x {size.height}"
        )
        if labelled == (size.width, size.height):
            what += " once turned upright (EXIF orientation)"
        what += ": the boxes would be wrong; label it anew, or correct <size> if the boxes fit"
        self._note(self._annotation.size_line, what, fatal=False, kind=Kind.WRONG_SIZE)
        return False

    def _label(self, item: voc.VocObject) -> int | None:
        if item.name in self._classes:
            return self._classes.index(item.name)
        known = ", ".join(self._classes[:40]) or "none"
        near = difflib.get_close_matches(item.name.lower(), map(str.lower, self._classes), n=1)
        hint = next((name for name in self._classes if [name.lower()] == near), None)
        what = f"unknown class {item.name!r}; known: {known}"
        what += f"; did you mean {hint!r}?" if hint else "; rename it, or add it to the train split"
        self._note(item.line, what, fatal=True, kind=Kind.UNKNOWN_CLASS)
        return None

    def _box(self, item: voc.VocObject, size: Size) -> tuple[float, float, float, float] | None:
        x1, y1, x2, y2 = item.box
        text = f"box {x1:g},{y1:g},{x2:g},{y2:g} of {item.name!r}"
        picture = f"the picture of {size.width} x {size.height}"
        if x2 - x1 < MIN_SIDE or y2 - y1 < MIN_SIDE:
            what = f"{text} is {x2 - x1:g} x {y2 - y1:g} px; draw it anew, in pixels"
            self._note(item.box_line, what, fatal=False, kind=Kind.NO_AREA)
            return None
        clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, size.width), min(y2, size.height))
        if clipped[2] - clipped[0] < MIN_SIDE or clipped[3] - clipped[1] < MIN_SIDE:
            what = f"{text} lies outside {picture}; draw it anew"
            self._note(item.box_line, what, fatal=False, kind=Kind.OUTSIDE)
            return None
        beyond = max(abs(a - b) for a, b in zip(item.box, clipped, strict=True))
        if beyond > CLIP_TOLERANCE:
            what = f"{text} reaches {beyond:g} px out of {picture}; clipped"
            self._note(item.box_line, what, fatal=False, kind=Kind.CLIPPED)
        return clipped


def _probe(path: Path) -> Size:
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
        try:
            return imaging.probe(head)
        except MalformedImage:
            # Long EXIF blocks and colour profiles push the size further back.
            return imaging.probe(head + file.read())

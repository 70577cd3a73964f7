"""Labelled folders to one sample type; bad data is found here, by file and line, before training.

Boxes are x1, y1, x2, y2 in pixels of the upright picture, continuous edges from 0 to the
picture's side: VOC's xmin..xmax are taken as they are written.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model_export import voc
from service import imaging
from service.canvas import Size
from service.errors import DataError, MalformedImage, RetinaserveError

LISTED_PROBLEMS: Final = 20
"""So many problems are spelled out in an error; the rest are counted."""

CLIP_TOLERANCE: Final = 2.0
"""Pixels. Tools that count from 1 or round put edges this far outside; not worth a line each."""

MIN_SIDE: Final = 1.0
"""Pixels. A box with a shorter side is taken as a slip of the mouse, not as an object."""

_PICTURES: Final = frozenset(
    [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".avif", ".heic"]
)
"""More than are accepted, so that a TIFF is called unaccepted rather than missing."""

_HEADER_BYTES: Final = 1 << 18
_HELD_OUT: Final = 5
_THREADS: Final = 4


class Kind(StrEnum):
    """What sort of thing is wrong; the value is what a count of them is called."""

    UNUSABLE = "unusable"
    UNKNOWN_CLASS = "unknown class"
    NO_AREA = "box without area, dropped"
    OUTSIDE = "box outside the picture, dropped"
    CLIPPED = "box clipped to the picture"
    WRONG_SIZE = "picture left out, its size is not the labelled one"
    UNLABELLED = "picture left out, it has no annotation"
    TWICE = "listed twice, taken once"
    LEAKED = "picture of this split that is in train too"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with the data, and the remedy."""

    file: Path
    line: int | None
    what: str
    fatal: bool
    kind: Kind = Kind.UNUSABLE

    def __str__(self) -> str:
        place = f"{self.file}" if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.what}"


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


@dataclass(frozen=True, slots=True)
class _Entry:
    """A picture that belongs to the split, before anything of it was read."""

    stem: str
    annotation: Path
    listed: tuple[Path, int] | None
    """Split file and line that name it."""


@dataclass(frozen=True, slots=True)
class _Folder:
    root: Path
    annotations: Path
    pictures: Mapping[str, tuple[Path, ...]]
    """By file stem."""
    lists: Path | None


def load_voc(root: Path, split: str, *, classes: Sequence[str] | None = None) -> Dataset:
    """Read one split of a Pascal VOC folder, or of a flat folder of NAME.xml beside NAME.jpg.

    Without ImageSets/Main a fifth of the pictures is "val", chosen by a hash of the file stem,
    the rest "train". Without `classes` they are the names found in the train split, whichever
    split is read, by falling count and then by name. Objects marked difficult are kept, pictures
    without objects are negatives. Raises DataError with every problem that stops training.
    """
    folder = _open(root)
    entries, problems = _entries(folder, split)
    annotations, found = _parse_all(entries)
    problems += found
    if classes is None:
        named = annotations
        if split != "train":
            train, missing = _entries(folder, "train")
            named, found = _parse_all(train)
            problems += missing + found + _leaked(entries, train)
            problems = list(dict.fromkeys(problems))
        classes = _by_count(named.values())
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
    _refuse_fatal(problems, what=f"{root}, split {split!r}")
    if not kept:
        raise DataError(
            f"{root}: no picture of the split {split!r} can be used; "
            + _listing(problems, none="it names none")
        )
    if not classes:
        raise DataError(f"{root}: no object is labelled in the train split; label some")
    return Dataset(root, split, tuple(classes), kept, tuple(problems))


def describe_all(problems: Sequence[Problem], *, limit: int = LISTED_PROBLEMS) -> str:
    """One line per problem; what exceeds `limit` is counted."""
    lines = [str(problem) for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"... and {len(problems) - limit} more")
    return "\n".join(lines)


def _refuse_fatal(problems: Iterable[Problem], *, what: str) -> None:
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        counted = "1 problem stops" if len(fatal) == 1 else f"{len(fatal)} problems stop"
        raise DataError(f"{what}: {counted} training\n{describe_all(fatal)}")


def _listing(problems: Sequence[Problem], *, none: str) -> str:
    return f"each is left out:\n{describe_all(problems)}" if problems else none


# --- the folder and its splits -------------------------------------------------------------------


def _open(root: Path) -> _Folder:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; name one with labelled pictures")
    annotations, pictures, lists = (
        root / "Annotations",
        root / "JPEGImages",
        root / "ImageSets" / "Main",
    )
    if not annotations.is_dir() or not pictures.is_dir():
        if annotations.is_dir() != pictures.is_dir():
            missing = pictures if annotations.is_dir() else annotations
            raise DataError(f"{root}: {missing.name}/ is missing beside its other half; add it")
        if not any(_files(root, {".xml"})):
            raise DataError(
                f"{root}: no annotations here; expected Annotations/*.xml with JPEGImages/*, "
                "or NAME.xml beside each picture"
            )
        annotations = pictures = root
    by_stem: dict[str, list[Path]] = {}
    for path in _files(pictures, _PICTURES):
        by_stem.setdefault(path.stem, []).append(path)
    if not by_stem:
        raise DataError(f"{pictures}: no pictures here; send {imaging.ACCEPTED} files")
    return _Folder(
        root=root,
        annotations=annotations,
        pictures={stem: tuple(paths) for stem, paths in by_stem.items()},
        lists=lists if lists.is_dir() else None,
    )


def _files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    wanted = frozenset(suffixes)
    # Files whose name begins with a dot are leftovers of editors and of macOS archives.
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in wanted and not path.name.startswith(".")
    )


def _entries(folder: _Folder, split: str) -> tuple[list[_Entry], list[Problem]]:
    if folder.lists is not None:
        return _listed_entries(folder, folder.lists, split)
    if split not in ("train", "val"):
        raise DataError(
            f"{folder.root}: no split {split!r}; without ImageSets/Main there are train and val"
        )
    xmls = {path.stem: path for path in _files(folder.annotations, {".xml"})}
    members = _split_by_hash(sorted(xmls), split)
    problems = [
        Problem(
            folder.pictures[stem][0],
            None,
            f"no annotation {stem}.xml; if nothing is on it write one without <object>",
            fatal=False,
            kind=Kind.UNLABELLED,
        )
        for stem in sorted(folder.pictures.keys() - xmls.keys())
    ]
    if not members:
        raise DataError(
            f"{folder.root}: no picture falls into the split {split!r}; at least 2 annotated "
            f"pictures are needed, {len(xmls)} found"
        )
    return [_Entry(stem, xmls[stem], None) for stem in members], problems


def _split_by_hash(stems: Sequence[str], split: str) -> list[str]:
    """Adding pictures moves no picture from one side to the other, tiny folders aside."""
    digest = {stem: int(hashlib.sha256(stem.encode()).hexdigest(), 16) for stem in stems}
    held_out = {stem for stem in stems if digest[stem] % _HELD_OUT == 0}
    if len(stems) >= 2 and len(held_out) in (0, len(stems)):
        held_out ^= {min(stems, key=digest.__getitem__)}
    return [stem for stem in stems if (stem in held_out) == (split == "val")]


def _listed_entries(folder: _Folder, lists: Path, split: str) -> tuple[list[_Entry], list[Problem]]:
    file = lists / f"{split}.txt"
    if not file.is_file():
        there = ", ".join(path.stem for path in _files(lists, {".txt"})) or "none"
        raise DataError(
            f"{file}: no such split file (splits there: {there}); write it with one file stem "
            "per line, or remove ImageSets to have a fifth of the pictures held out"
        )
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    entries: dict[str, _Entry] = {}
    problems: list[Problem] = []
    for number, line in enumerate(lines, start=1):
        stem = _stem(line)
        if not stem:
            continue
        xml = folder.annotations / f"{stem}.xml"
        if stem in entries:
            problems.append(
                Problem(file, number, f"{stem} is listed twice", fatal=False, kind=Kind.TWICE)
            )
        elif "\0" in stem or not xml.is_file():
            problems.append(
                Problem(file, number, f"{stem!r} has no annotation {xml}; add it", fatal=True)
            )
        else:
            entries[stem] = _Entry(stem, xml, (file, number))
    if not entries and not problems:
        raise DataError(f"{file}: names no picture; write one file stem per line")
    return list(entries.values()), problems


def _stem(line: str) -> str:
    """The file stem on a line of a split file, which may carry the suffix."""
    name = line.strip()
    suffix = Path(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in _PICTURES else name


def _leaked(entries: Iterable[_Entry], train: Iterable[_Entry]) -> list[Problem]:
    stems = {entry.stem for entry in train}
    return [
        Problem(
            *entry.listed,
            f"{entry.stem} is in train.txt too; take it out of one of them",
            fatal=False,
            kind=Kind.LEAKED,
        )
        for entry in entries
        if entry.stem in stems and entry.listed is not None
    ]


# --- annotations ---------------------------------------------------------------------------------


def _parse_all(entries: Iterable[_Entry]) -> tuple[dict[_Entry, voc.Annotation], list[Problem]]:
    annotations: dict[_Entry, voc.Annotation] = {}
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
    counts = Counter(item.name for annotation in annotations for item in annotation.objects)
    return tuple(sorted(counts, key=lambda name: (-counts[name], name)))


class _SampleReader:
    """Turns one annotation into a sample and collects what is wrong with it."""

    def __init__(
        self, entry: _Entry, annotation: voc.Annotation, folder: _Folder, classes: tuple[str, ...]
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

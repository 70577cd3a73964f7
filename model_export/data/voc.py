"""Pascal VOC: one XML file per image, in VOC's folders or as NAME.xml beside NAME.jpg."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Final
from xml.parsers import expat

from model_export.data.annotations import LabelledImage, LabelledObject, SplitAnnotations
from model_export.data.problems import Kind, Problem
from model_export.data.splits import IMAGES, files, leaks, split_by_hash, split_called
from service.errors import DataError
from service.imaging import decode as imaging

EDGES: Final = ("xmin", "ymin", "xmax", "ymax")

_OBJECT: Final = ("annotation", "object")
_SIZE: Final = ("annotation", "size")
_TEXTS: Final = frozenset(
    [
        ("annotation", "filename"),
        (*_SIZE, "width"),
        (*_SIZE, "height"),
        (*_OBJECT, "name"),
        *((*_OBJECT, "bndbox", edge) for edge in EDGES),
    ]
)
"""Full paths, because VOC's body parts nest another <name> and <bndbox> inside <object>."""


class AnnotationError(ValueError):
    """An invalid annotation at `line`; the message names the remedy."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True, slots=True)
class Annotation:
    """The content of one file."""

    filename: str
    """<filename>, or "" without it."""
    size: tuple[float, float] | None
    """(height, width) as written; None where it is absent, zero or no number."""
    size_line: int
    objects: tuple[LabelledObject, ...]


def parse(text: bytes) -> Annotation:
    """Parse an annotation file. Raises AnnotationError."""
    parser = expat.ParserCreate()
    reader = _Reader(parser)
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.characters
    parser.buffer_text = True
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise AnnotationError(
            error.lineno, f"not well-formed XML ({error}); write the annotation anew"
        ) from error
    except (LookupError, UnicodeError) as error:
        raise AnnotationError(1, f"unknown text encoding ({error}); save it as UTF-8") from error
    return reader.annotation()


@dataclass(slots=True)
class _Field:
    text: str
    line: int


@dataclass(slots=True)
class _Reader:
    """Expat handlers that keep only the relevant elements in memory."""

    parser: expat.XMLParserType
    path: list[str] = field(default_factory=list)
    text: list[str] | None = None
    line: int = 1
    top: dict[str, _Field] = field(default_factory=dict)
    current: dict[str, _Field] = field(default_factory=dict)
    objects: list[LabelledObject] = field(default_factory=list)

    def start(self, tag: str, _attributes: Mapping[str, str]) -> None:
        if not self.path and tag != "annotation":
            raise AnnotationError(
                self.parser.CurrentLineNumber,
                f"the root element is <{tag}>, not <annotation>; Pascal VOC XML is needed",
            )
        self.path.append(tag)
        path = tuple(self.path)
        if path in _TEXTS:
            self.text, self.line = [], self.parser.CurrentLineNumber
        elif path == _OBJECT:
            self.current = {"object": _Field("", self.parser.CurrentLineNumber)}
        elif path == (*_OBJECT, "bndbox"):
            self.current["bndbox"] = _Field("", self.parser.CurrentLineNumber)
        elif path == _SIZE:
            self.top["size"] = _Field("", self.parser.CurrentLineNumber)

    def characters(self, text: str) -> None:
        if self.text is not None:
            self.text.append(text)

    def end(self, tag: str) -> None:
        path = tuple(self.path)
        if self.text is not None and path in _TEXTS:
            fields = self.current if path[:2] == _OBJECT else self.top
            fields[tag] = _Field("".join(self.text).strip(), self.line)
            self.text = None
        elif path == _OBJECT:
            self.objects.append(_to_object(self.current))
        self.path.pop()

    def annotation(self) -> Annotation:
        filename = self.top.get("filename")
        size = self.top.get("size")
        return Annotation(
            filename=filename.text if filename else "",
            size=self._size(),
            size_line=size.line if size else 1,
            objects=tuple(self.objects),
        )

    def _size(self) -> tuple[float, float] | None:
        height, width = (
            _number(self.top[tag].text) if tag in self.top else None for tag in ("height", "width")
        )
        # Labelling tools write 0 when they did not open the image.
        if not height or not width or min(height, width) < 0:
            return None
        return height, width


def _to_object(fields: Mapping[str, _Field]) -> LabelledObject:
    line = fields["object"].line
    name = fields.get("name")
    if name is None or not name.text:
        raise AnnotationError(line, "the object has no <name>; write its class there")
    if "bndbox" not in fields:
        raise AnnotationError(
            line, f"the object {name.text!r} has no <bndbox>; boxes are needed, not outlines alone"
        )
    box: list[float] = []
    for edge in EDGES:
        if edge not in fields:
            raise AnnotationError(
                fields["bndbox"].line, f"<bndbox> has no <{edge}>; it needs {', '.join(EDGES)}"
            )
        number = _number(fields[edge].text)
        if number is None:
            raise AnnotationError(
                fields[edge].line,
                f"<{edge}> is {fields[edge].text!r}; it must be a number of pixels",
            )
        box.append(number)
    x1, y1, x2, y2 = box
    return LabelledObject(name.text, (x1, y1, x2, y2), name.line, fields["bndbox"].line)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


LOOKED_FOR: Final = "VOC: Annotations/*.xml with JPEGImages/*, or NAME.xml beside NAME.jpg"


@dataclass(frozen=True, slots=True)
class Entry:
    """An image of the split, not yet read."""

    stem: str
    annotation: Path
    listed: tuple[Path, int] | None
    """Split file and line that name it."""


@dataclass(frozen=True, slots=True)
class Folder:
    """The files of a labelled folder, by name alone."""

    root: Path
    annotations: Mapping[str, Path]
    """By file stem."""
    images: Mapping[str, tuple[Path, ...]]
    """By file stem."""
    lists: Path | None
    """ImageSets/Main, or None where there is none."""


def evidence(root: Path) -> str | None:
    """Return the files that indicate this format, or None."""
    for name in ("Annotations", ""):
        count = len(files(root / name, {".xml"})) if (root / name).is_dir() else 0
        if count:
            return f"{count} .xml in {name}/" if name else f"{count} .xml"
    by_split = _split_folders(root)
    return (
        f".xml in {', '.join(f'{path.name}/' for path in by_split.values())}" if by_split else None
    )


def split_names(root: Path) -> tuple[str, ...]:
    """Return the names of the splits. Raises DataError."""
    by_split = _split_folders(root)
    if by_split:
        return tuple(by_split)
    folder = open_folder(root)
    if folder.lists is None:
        return ("train", "val")
    return tuple(path.stem for path in files(folder.lists, {".txt"}))


def read(root: Path, split: str, *, naming: bool) -> SplitAnnotations:
    """Read one split; `naming`: also count the classes. Raises DataError.

    Objects marked difficult are kept. Without ImageSets/Main and without a folder for each split
    the images are split by a hash.
    """
    by_split = _split_folders(root)
    if by_split:
        return _read_split_folder(root, by_split, split, naming=naming)
    folder = open_folder(root)
    entries, problems = find_entries(folder, split)
    problems += leaked(folder, entries, split)
    naming_entries: list[Entry] = []
    if naming:
        naming_entries, found = find_naming_entries(folder)
        problems = list(dict.fromkeys(problems + found))
    return _read_entries(folder, entries, naming_entries, problems)


def _read_split_folder(
    root: Path, by_split: Mapping[str, Path], split: str, *, naming: bool
) -> SplitAnnotations:
    wanted = split_called(split) or split
    if wanted not in by_split:
        raise DataError(f"{root}: no split {split!r}; there are folders for {', '.join(by_split)}")
    folder = open_folder(by_split[wanted])
    problems = _unlabelled(folder)
    train = open_folder(by_split["train"]) if "train" in by_split else None
    if wanted != "train" and train is not None:
        problems += leaks(
            {path: (path, None) for paths in folder.images.values() for path in paths},
            [path for paths in train.images.values() for path in paths],
        )
    names: list[Entry] = []
    if naming:
        if train is None:
            raise DataError(f"{root}: no folder train/, which names the classes; give them")
        names = _all_entries(train)
    return _read_entries(folder, _all_entries(folder), names, problems)


def _read_entries(
    folder: Folder, entries: list[Entry], naming: list[Entry], problems: list[Problem]
) -> SplitAnnotations:
    annotations, found = _parse_all(dict.fromkeys([*entries, *naming]))
    problems = problems + found
    names = Counter(
        item.name for entry in naming if entry in annotations for item in annotations[entry].objects
    )
    images: list[LabelledImage] = []
    for entry in entries:
        if entry not in annotations:
            continue
        annotation = annotations[entry]
        path = _image(folder, entry, annotation)
        if path is None:
            what = f"no image {entry.stem}.jpg (or .png, .webp); add it"
            problems.append(Problem(entry.annotation, 1, what, fatal=True))
            continue
        images.append(
            LabelledImage(
                image=path,
                annotation=entry.annotation,
                objects=annotation.objects,
                size=annotation.size,
                size_line=annotation.size_line,
                size_fields="<size>",
            )
        )
    return SplitAnnotations(tuple(images), names, tuple(problems))


def _parse_all(entries: Iterable[Entry]) -> tuple[dict[Entry, Annotation], list[Problem]]:
    annotations: dict[Entry, Annotation] = {}
    problems: list[Problem] = []
    for entry in entries:
        try:
            annotations[entry] = parse(entry.annotation.read_bytes())
        except AnnotationError as error:
            problems.append(Problem(entry.annotation, error.line, str(error), fatal=True))
        except OSError as error:
            what = f"cannot be read ({error.strerror})"
            problems.append(Problem(entry.annotation, None, what, fatal=True))
    return annotations, problems


def _image(folder: Folder, entry: Entry, annotation: Annotation) -> Path | None:
    # Tools write Windows paths here as well.
    name = annotation.filename.replace("\\", "/").rsplit("/", 1)[-1]
    same_stem = folder.images.get(entry.stem, ())
    named = folder.images.get(Path(name).stem, ())
    exact = [path for path in named if path.name == name]
    if same_stem:
        return next((path for path in same_stem if path.name == name), same_stem[0])
    return exact[0] if exact else None


def open_folder(root: Path) -> Folder:
    """List a folder. Raises DataError if it is neither laid out as Pascal VOC nor flat."""
    annotations, images, lists = (
        root / "Annotations",
        root / "JPEGImages",
        root / "ImageSets" / "Main",
    )
    if not annotations.is_dir() or not images.is_dir():
        if annotations.is_dir() != images.is_dir():
            missing = images if annotations.is_dir() else annotations
            raise DataError(f"{root}: {missing.name}/ is missing beside its other half; add it")
        if not files(root, {".xml"}):
            raise DataError(
                f"{root}: no annotations here; expected Annotations/*.xml with JPEGImages/*, "
                "or NAME.xml beside each image"
            )
        annotations = images = root
    by_stem: dict[str, list[Path]] = {}
    for path in files(images, IMAGES):
        by_stem.setdefault(path.stem, []).append(path)
    if not by_stem:
        raise DataError(f"{images}: no images here; it needs {imaging.ACCEPTED} files")
    return Folder(
        root=root,
        annotations={path.stem: path for path in files(annotations, {".xml"})},
        images={stem: tuple(paths) for stem, paths in by_stem.items()},
        lists=lists if lists.is_dir() else None,
    )


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the folders named after splits that hold .xml files, if the root holds none itself."""
    if (root / "Annotations").is_dir() or files(root, {".xml"}):
        return {}
    return {
        split: path
        for path in sorted(root.iterdir())
        if path.is_dir() and (split := split_called(path.name)) and files(path, {".xml"})
    }


def find_entries(folder: Folder, split: str) -> tuple[list[Entry], list[Problem]]:
    """Return the images of one split and the problems of their list. Raises DataError if empty."""
    if folder.lists is not None:
        return _listed_entries(folder, folder.lists, split)
    members = split_by_hash(folder.root, folder.annotations, split, unsplit="ImageSets/Main")
    entries = [each for each in _all_entries(folder) if each.stem in members]
    return entries, _unlabelled(folder)


def _all_entries(folder: Folder) -> list[Entry]:
    return [Entry(stem, path, None) for stem, path in sorted(folder.annotations.items())]


def _unlabelled(folder: Folder) -> list[Problem]:
    return [
        Problem(
            folder.images[stem][0],
            None,
            f"no annotation {stem}.xml; if nothing is on it write one without <object>",
            fatal=False,
            kind=Kind.UNLABELLED,
        )
        for stem in sorted(folder.images.keys() - folder.annotations.keys())
    ]


def find_naming_entries(folder: Folder) -> tuple[list[Entry], list[Problem]]:
    """Return the images whose objects name the classes: train's, so that every split agrees."""
    if folder.lists is not None:
        return find_entries(folder, "train")
    # With a split by hash a class may have fallen into one of the splits alone.
    return _all_entries(folder), []


def _listed_entries(folder: Folder, lists: Path, split: str) -> tuple[list[Entry], list[Problem]]:
    file = lists / f"{split}.txt"
    if not file.is_file():
        there = ", ".join(path.stem for path in files(lists, {".txt"})) or "none"
        raise DataError(
            f"{file}: no such split file (splits there: {there}); write it with one file stem "
            "per line, or remove ImageSets to have a fifth of the images held out"
        )
    entries: dict[str, Entry] = {}
    problems: list[Problem] = []
    for number, stem in _read_list(file):
        if stem in entries:
            problems.append(
                Problem(file, number, f"{stem} is listed twice", fatal=False, kind=Kind.TWICE)
            )
        elif stem not in folder.annotations:
            missing = "annotation" if stem in folder.images else "image and no annotation"
            what = f"no {missing} is named {stem[:80]!r}; add it, or take the line out"
            problems.append(Problem(file, number, what, fatal=True))
        else:
            entries[stem] = Entry(stem, folder.annotations[stem], (file, number))
    if not entries and not problems:
        raise DataError(f"{file}: names no image; write one file stem per line")
    return list(entries.values()), problems


def _read_list(file: Path) -> list[tuple[int, str]]:
    """(line, file stem) of a split file's lines, which may carry the suffix."""
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    named: list[tuple[int, str]] = []
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        suffix = PurePath(name).suffix
        stem = name.removesuffix(suffix) if suffix.lower() in IMAGES else name
        if stem:
            named.append((number, stem))
    return named


def leaked(folder: Folder, entries: Iterable[Entry], split: str) -> list[Problem]:
    """Return a problem for each listed image of another split that train has too."""
    train = folder.lists / "train.txt" if folder.lists else None
    if split == "train" or train is None or not train.is_file():
        return []
    stems = {stem for _, stem in _read_list(train)}
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

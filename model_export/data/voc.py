"""Pascal VOC: one XML file per image, in folders of their own or as NAME.xml beside NAME.jpg."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Final
from xml.parsers import expat

from model_export.data.annotations import LabelledImage, LabelledObject, SplitAnnotations
from model_export.data.folder import (
    IMAGES,
    ImageFinder,
    LabelledFolder,
    NotText,
    alike,
    decoded,
    in_split_folder,
    lines_of,
    not_read,
    path_parts,
    shown,
)
from model_export.data.problems import Kind, Problem
from model_export.data.splits import leaks, split_by_hash, split_called
from service.errors import DataError
from service.imaging import decode as imaging

EDGES: Final = ("xmin", "ymin", "xmax", "ymax")

_OBJECT: Final = ("annotation", "object")
_SIZE: Final = ("annotation", "size")
_TURNED: Final = ("cx", "cy", "w", "h", "angle")
"""Of roLabelImg's <robndbox>; the angle in radians."""
_TEXTS: Final = frozenset(
    [
        ("annotation", "filename"),
        (*_SIZE, "width"),
        (*_SIZE, "height"),
        (*_OBJECT, "name"),
        (*_OBJECT, "difficult"),
        *((*_OBJECT, "bndbox", edge) for edge in EDGES),
        (*_OBJECT, "attributes", "attribute", "name"),
        (*_OBJECT, "attributes", "attribute", "value"),
        *((*_OBJECT, "robndbox", side) for side in _TURNED),
    ]
)
"""Full paths, because VOC's body parts nest another <name> and <bndbox> inside <object>."""
_DIFFICULT: Final = {"1": True, "true": True} | dict.fromkeys(
    ("", "0", "false", "unspecified"), False
)
"""<difficult>, in lower case; some tools write Unspecified, which VOC has for the pose."""
_DECLARED: Final = re.compile(rb"""^\s*<\?xml[^>]*encoding\s*=\s*["']([\w.-]+)["']""")


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
        parser.Parse(_text(text), True)
    except expat.ExpatError as error:
        raise AnnotationError(
            error.lineno, f"not well-formed XML ({error}); write the annotation anew"
        ) from error
    return reader.annotation()


def _text(content: bytes) -> str:
    """Decode XML as it declares itself, else as UTF-8. Raises AnnotationError."""
    declared = _DECLARED.match(content)
    try:
        if declared is None:
            return decoded(content)
        return content.decode(declared[1].decode("ascii")).removeprefix("\ufeff")
    except NotText as error:
        raise AnnotationError(1, str(error)) from error
    except (LookupError, UnicodeError) as error:
        raise AnnotationError(1, f"unknown text encoding ({error}); save it as UTF-8") from error


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
            # Of a nested element the name of the one around it, too.
            inner = path[len(_OBJECT) :] if path[:2] == _OBJECT else path[-1:]
            fields["/".join(inner)] = _Field("".join(self.text).strip(), self.line)
            self.text = None
        elif path == (*_OBJECT, "attributes", "attribute"):
            name = self.current.pop("attributes/attribute/name", None)
            value = self.current.pop("attributes/attribute/value", None)
            if name and value and name.text == "rotation":
                self.current["rotation"] = value
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
    difficult = _is_difficult(fields)
    if "robndbox/cx" in fields:
        return replace(_turned(name, fields), difficult=difficult)
    if "bndbox" not in fields:
        raise AnnotationError(
            line, f"the object {name.text!r} has no <bndbox>; boxes are needed, not outlines alone"
        )
    x1, y1, x2, y2 = _numbers(fields, "bndbox", EDGES, fields["bndbox"].line)
    rotation = 0.0
    if "rotation" in fields:
        (rotation,) = _numbers(fields, "", ("rotation",), line)
    return LabelledObject(
        name.text,
        (x1, y1, x2, y2),
        name.line,
        fields["bndbox"].line,
        difficult=difficult,
        rotation=rotation,
    )


def _is_difficult(fields: Mapping[str, _Field]) -> bool:
    found = fields.get("difficult")
    if found is None:
        return False
    if found.text.lower() not in _DIFFICULT:
        raise AnnotationError(found.line, f"<difficult> is {found.text!r}; it must be 0 or 1")
    return _DIFFICULT[found.text.lower()]


def _turned(name: _Field, fields: Mapping[str, _Field]) -> LabelledObject:
    line = fields["robndbox/cx"].line
    x, y, width, height, angle = _numbers(fields, "robndbox", _TURNED, line)
    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return LabelledObject(name.text, box, name.line, line, rotation=math.degrees(angle))


def _numbers(
    fields: Mapping[str, _Field], around: str, tags: Sequence[str], line: int
) -> Iterator[float]:
    for tag in tags:
        found = fields.get(f"{around}/{tag}" if around else tag)
        if found is None:
            raise AnnotationError(line, f"<{around}> has no <{tag}>; it needs {', '.join(tags)}")
        number = _number(found.text)
        if number is None:
            unit = "degrees" if tag == "rotation" else "pixels"
            raise AnnotationError(
                found.line, f"<{tag}> is {found.text!r}; it must be a number of {unit}"
            )
        yield number


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


LOOKED_FOR: Final = (
    "VOC: Annotations/*.xml with JPEGImages/* or images/*, or NAME.xml beside NAME.jpg"
)

_ANNOTATIONS: Final = frozenset(["annotations", "labels", "xmls"])
_IMAGE_FOLDERS: Final = ("JPEGImages", "images", "Images")
_LISTS: Final = ("ImageSets", "Main")


@dataclass(frozen=True, slots=True)
class Entry:
    """An annotation file of the folder, not yet read."""

    annotation: Path
    name: str
    """Path below the annotations' folder without suffix, as lists of splits have it."""
    listed: tuple[Path, int] | None = None
    """Split file and line that name it."""

    @property
    def stem(self) -> str:
        """The name of the image without its suffix."""
        return _without_suffix(PurePath(self.name).name)


@dataclass(frozen=True, slots=True)
class _Layout:
    """The annotation files of a folder, by name alone."""

    folder: LabelledFolder
    entries: tuple[Entry, ...]
    by_split: Mapping[str, tuple[Entry, ...]]
    """Where each split has a folder."""
    lists: Mapping[str, tuple[Path, ...]]
    """The files in ImageSets/Main by split, or by their stem if it is none; one of each tree."""


def evidence(folder: LabelledFolder) -> str | None:
    """Return the files that indicate this format, or None."""
    places = Counter(path.relative_to(folder.root).parts[:-1][:1] for path in _annotations(folder))
    found = [
        f"{count} .xml in {place[0]}/" if place else f"{count} .xml"
        for place, count in sorted(places.items())
    ]
    return ", ".join(found[:3]) or None


def label_files(folder: LabelledFolder, paths: Iterable[Path]) -> list[Path]:
    """Return those of a folder's files that are annotations, used or not."""
    used = frozenset(_annotations(folder))
    hidden = frozenset(folder.hidden)
    return [
        path for path in paths if path.suffix.lower() == ".xml" and (path in used or path in hidden)
    ]


def split_names(folder: LabelledFolder) -> tuple[str, ...]:
    """Return the names of the splits. Raises DataError."""
    layout = _lay_out(folder)
    own = tuple(layout.by_split) or tuple(layout.lists)
    return own or folder.image_splits or ("train", "val")


def read(folder: LabelledFolder, split: str, *, naming: bool) -> SplitAnnotations:
    """Read one split; `naming`: also count the classes. Raises DataError.

    Without ImageSets/Main and without a folder for each split
    the images are split by a hash.
    """
    layout = _lay_out(folder)
    if layout.by_split:
        return _read_split_folder(layout, split, naming=naming)
    if layout.lists:
        return _read_listed(layout, split, naming=naming)
    images, problems = _images(layout, layout.entries)
    problems += _unlabelled(layout, images, folder.images)
    if folder.image_splits:
        chosen, train, leaked = in_split_folder(folder, images, split)
        return _split(chosen, train if naming else [], [*problems, *leaked])
    members, problems = split_by_hash(
        folder.root,
        (each.image for each in images),
        split,
        problems=problems,
        unsplit="ImageSets/Main",
        classes={item.name for each in images for item in each.objects},
    )
    chosen = [each for each in images if each.image in members]
    return _split(chosen, images if naming else [], problems)


def _read_split_folder(layout: _Layout, split: str, *, naming: bool) -> SplitAnnotations:
    root, by_split = layout.folder.root, layout.by_split
    wanted = split_called(split) or split
    if wanted not in by_split:
        raise DataError(f"{root}: no split {split!r}; there are folders for {', '.join(by_split)}")
    if naming and "train" not in by_split:
        raise DataError(f"{root}: no folder train/, which names the classes; give them")
    images, problems = _images(layout, by_split[wanted], wanted)
    here = [path for path in layout.folder.images if layout.folder.split_of(path) == wanted]
    problems += _unlabelled(layout, images, here)
    train: list[LabelledImage] = []
    if wanted == "train":
        train = images
    elif "train" in by_split:
        train, found = _images(layout, by_split["train"], "train")
        places = {each.image: (each.image, None) for each in images}
        problems += leaks(places, [each.image for each in train])
        problems += [each for each in found if naming and each.fatal]
    return _split(images, train if naming else [], problems)


def _read_listed(layout: _Layout, split: str, *, naming: bool) -> SplitAnnotations:
    entries, problems = _listed_entries(layout, split)
    images, found = _images(layout, entries)
    problems += found + _leaked(layout, entries, split)
    named = images
    if naming and split != "train":
        training, found = _listed_entries(layout, "train")
        named, more = _images(layout, training)
        problems += found + more
    return _split(images, named if naming else [], list(dict.fromkeys(problems)))


def _split(
    images: Sequence[LabelledImage], named: Iterable[LabelledImage], problems: Sequence[Problem]
) -> SplitAnnotations:
    names = Counter(item.name for each in named for item in each.objects)
    return SplitAnnotations(tuple(images), names, tuple(problems))


# --- layouts -------------------------------------------------------------------------------------


def _lay_out(folder: LabelledFolder) -> _Layout:
    """List a folder. Raises DataError if it is not laid out as Pascal VOC."""
    root = folder.root
    annotations = _annotations(folder)
    if not annotations:
        raise DataError(
            f"{root}: no annotations here; expected Annotations/*.xml with JPEGImages/* or "
            "images/*, or NAME.xml beside each image"
        )
    if not folder.images and not folder.not_read:
        raise DataError(f"{root}: no images here; it needs {imaging.ACCEPTED} files")
    entries = tuple(Entry(path, _name(root, path)) for path in annotations)
    by_split: dict[str, list[Entry]] = defaultdict(list)
    splits = [folder.split_of(entry.annotation) for entry in entries]
    for entry, split in zip(entries, splits, strict=True):
        if split is not None:
            by_split[split].append(entry)
    top = any(split_called(path.relative_to(root).parts[0]) for path in annotations)
    if not top and None in splits:
        # Folders of Annotations/ that are called so by chance.
        by_split.clear()
    lists: dict[str, list[Path]] = defaultdict(list)
    for path in folder.having(".txt"):
        if path.parent.parts[-2:] == _LISTS:
            lists[split_called(path.stem) or path.stem].append(path)
    if not any(map(split_called, lists)):
        # One list of everything, as CVAT writes it.
        lists.clear()
    return _Layout(
        folder,
        entries,
        {split: tuple(found) for split, found in by_split.items()},
        {split: tuple(paths) for split, paths in lists.items()},
    )


def _annotations(folder: LabelledFolder) -> list[Path]:
    """Return the .xml files of a folder for annotations, of a split, and beside images."""
    with_images = {path.parent for path in folder.images}
    return [
        path
        for path in folder.having(".xml")
        if not _ANNOTATIONS.isdisjoint(map(str.lower, path.relative_to(folder.root).parts))
        or (
            (
                path.parent == folder.root
                or path.parent in with_images
                or folder.split_of(path) is not None
            )
            and folder.once(_may_be_voc, path)
        )
    ]


def _may_be_voc(path: Path) -> bool:
    """Return whether a file is not well-formed XML of another root element."""
    elements: list[str] = []
    parser = expat.ParserCreate()
    parser.StartElementHandler = lambda tag, _: elements.append(tag)
    try:
        parser.Parse(path.read_bytes(), True)
    except (OSError, ValueError, expat.ExpatError):
        return True
    return elements[0] == "annotation"


def _name(root: Path, annotation: Path) -> str:
    parts = list(annotation.relative_to(root).parts)
    places = [place for place, part in enumerate(parts[:-1]) if part.lower() in _ANNOTATIONS]
    below = places[0] + 1 if places else 0
    return _without_suffix("/".join(parts[below:]).removesuffix(annotation.suffix))


def _without_suffix(name: str) -> str:
    """Take the suffix of an image off: some write a.jpg.xml."""
    suffix = PurePath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in IMAGES else name


# --- images --------------------------------------------------------------------------------------


def _images(
    layout: _Layout, entries: Iterable[Entry], split: str | None = None
) -> tuple[list[LabelledImage], list[Problem]]:
    """Read annotation files and find the image of each."""
    folder = layout.folder
    images: dict[Path, LabelledImage] = {}
    problems: list[Problem] = []
    beside: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for each in folder.images:
        for name in (each.name, each.stem):
            beside[each.parent, name].append(each)
    finder = ImageFinder(folder, split)
    for entry in entries:
        file = entry.annotation
        try:
            annotation = folder.once(_parse_file, file)
            path = _image(folder, entry, annotation, beside, finder)
        except AnnotationError as error:
            problems.append(Problem(file, error.line, str(error), fatal=True))
            continue
        except OSError as error:
            what = f"cannot be read ({error.strerror})"
            problems.append(Problem(file, None, what, fatal=True))
            continue
        if path is None:
            problems.append(_no_image(folder, entry, annotation, finder))
        elif path in images:
            other = folder.inside(images[path].annotation)
            what = (
                f"the image {folder.inside(path)} is that of {other} too: two label files for one "
                "image; take one away, or add the other image"
            )
            problems.append(Problem(file, 1, what, fatal=True, files=(images[path].annotation,)))
        else:
            images[path] = LabelledImage(
                image=path,
                annotation=file,
                objects=annotation.objects,
                size=annotation.size,
                size_line=annotation.size_line,
                size_fields="<size>",
            )
    return list(images.values()), problems + finder.notes(folder.root)


def _parse_file(path: Path) -> Annotation:
    return parse(path.read_bytes())


def _no_image(
    folder: LabelledFolder, entry: Entry, annotation: Annotation, finder: ImageFinder
) -> Problem:
    bases = list(_image_folders(folder.root, entry.annotation))
    unread = finder.unread(f"{entry.stem}.jpg", bases) or finder.unread(annotation.filename, bases)
    if unread is not None:
        what = f"its image {not_read(unread)}"
        return Problem(entry.annotation, 1, what, fatal=False, kind=Kind.NOT_READ, files=(unread,))
    what = finder.missing(f"{entry.stem}.jpg", where=" (or .png, .webp)") + "; add it"
    if annotation.filename and path_parts(annotation.filename)[-1:] != (f"{entry.stem}.jpg",):
        what = f"{what} (<filename> is {shown(annotation.filename)})"
    return Problem(entry.annotation, 1, what, fatal=True)


def _image_folders(root: Path, annotation: Path) -> Iterator[Path]:
    """Yield the folders in which an annotation's image may be, the likeliest first."""
    yield annotation.parent
    parts = annotation.parent.relative_to(root).parts
    for place, part in enumerate(parts):
        if part.lower() in _ANNOTATIONS:
            for name in (*_IMAGE_FOLDERS, ""):
                yield Path(root, *parts[:place], name, *parts[place + 1 :])


def _image(
    folder: LabelledFolder,
    entry: Entry,
    annotation: Annotation,
    beside: Mapping[tuple[Path, str], Sequence[Path]],
    finder: ImageFinder,
) -> Path | None:
    """Return the image of the same stem, or else the one that <filename> names."""
    bases = list(_image_folders(folder.root, entry.annotation))
    named = path_parts(annotation.filename)[-1:]
    # a.jpg.xml is of a.jpg, or else of a.jpg.png.
    for stem in dict.fromkeys([entry.annotation.stem, entry.stem]):
        same = dict.fromkeys(path for base in bases for path in beside.get((base, stem), ()))
        exact = [path for path in same if path.name == stem or (path.name,) == named]
        if len(same) > 1 and not exact:
            raise AnnotationError(
                1,
                f"two images for one label file: {' and '.join(path.name for path in same)}; "
                "write the labelled one into <filename>, or take the other away",
            )
        if same:
            return (exact or list(same))[0]
    name = annotation.filename
    below = entry.name.rpartition("/")[0]
    if below and len(path_parts(name)) == 1:
        # The annotation's folder is part of a name that has none.
        name = f"{below}/{name}"
    return finder.find(name, bases) or finder.find(f"{entry.name}.jpg", bases)


def _unlabelled(
    layout: _Layout, images: Iterable[LabelledImage], there: Iterable[Path]
) -> list[Problem]:
    used = {each.image for each in images}
    known = {each.stem for each in layout.entries}
    return [
        Problem(
            path,
            None,
            f"no annotation {path.stem}.xml; if nothing is on it write one without <object>",
            fatal=False,
            kind=Kind.UNLABELLED,
        )
        for path in there
        if path not in used and path.stem not in known
    ]


# --- lists of splits -----------------------------------------------------------------------------


def _listed_entries(layout: _Layout, split: str) -> tuple[list[Entry], list[Problem]]:
    files = layout.lists.get(split_called(split) or split)
    if not files:
        raise DataError(
            f"{layout.folder.root}: no such split file {'/'.join(_LISTS)}/{split}.txt (splits "
            f"there: {', '.join(layout.lists)}); write it with one file stem per line, or remove "
            "ImageSets to have a fifth of the images held out"
        )
    stems = {path.stem for path in layout.folder.images}
    entries: dict[Path, Entry] = {}
    problems: list[Problem] = []
    for file in files:
        known = _known_names(layout, file)
        for number, line in lines_of(file):
            name = _without_suffix(line)
            there = next(filter(None, (known.get(alike(each)) for each in _ends(name))), [])
            if len(there) != 1:
                missing = (
                    "annotation" if PurePath(name).name in stems else "image and no annotation"
                )
                what = f"no {missing} is named {shown(name)}; add it, or take the line out"
                if there:
                    what = f"{len(there)} annotations are named {shown(name)}; write the folder too"
                problems.append(Problem(file, number, what, fatal=True))
            elif there[0].annotation in entries:
                what = f"{name} is listed twice"
                problems.append(Problem(file, number, what, fatal=False, kind=Kind.TWICE))
            else:
                entry = Entry(there[0].annotation, there[0].name, (file, number))
                entries[entry.annotation] = entry
    if not entries and not problems:
        raise DataError(f"{files[0]}: names no image; write one file stem per line")
    return list(entries.values()), problems


def _known_names(layout: _Layout, file: Path) -> Mapping[str, list[Entry]]:
    """Return the annotations of the list's own tree by the names that its lines may have."""
    tree = file.parent.parent.parent
    known: dict[str, list[Entry]] = defaultdict(list)
    for entry in layout.entries:
        if entry.annotation.is_relative_to(tree):
            for name in {alike(entry.name), alike(entry.stem)}:
                known[name].append(entry)
    return known


def _ends(name: str) -> Iterator[str]:
    """Yield a path, and its ends down to the last part."""
    parts = path_parts(name)
    for start in range(len(parts)):
        yield "/".join(parts[start:])


def _leaked(layout: _Layout, entries: Iterable[Entry], split: str) -> list[Problem]:
    """Return a problem for each listed image of another split that train has too."""
    if split_called(split) == "train" or "train" not in layout.lists:
        return []
    train = {each.annotation for each in _listed_entries(layout, "train")[0]}
    return [
        Problem(
            *entry.listed,
            f"{entry.name} is in train.txt too; take it out of one of them",
            fatal=False,
            kind=Kind.LEAKED,
        )
        for entry in entries
        if entry.listed is not None and entry.annotation in train
    ]

"""COCO: JSON annotation files, in any of the usual folder layouts."""

from __future__ import annotations

import json
import math
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from model_export.data.annotations import Edges, LabelledImage, LabelledObject, SplitAnnotations
from model_export.data.folder import (
    ImageFinder,
    LabelledFolder,
    NotText,
    decoded,
    in_split_folder,
    not_read,
    path_parts,
)
from model_export.data.problems import Kind, Problem
from model_export.data.splits import leaks, split_by_hash, split_called
from service.errors import DataError

TABLES: Final = ("images", "annotations", "categories")

_REMEDY: Final = "; write the annotations anew, or fetch the file again"


@dataclass(slots=True)
class CocoImage:
    """One entry of `images`, with its objects."""

    file_name: str
    tag: str
    """What finds the entry in the file, such as "image 17 (id 5): "."""
    size: tuple[float, float] | None
    """(height, width); None where it is missing or 0."""
    objects: list[LabelledObject]


@dataclass(frozen=True, slots=True)
class CocoFile:
    """The content of one file without the entries of fatal problems."""

    path: Path
    images: tuple[CocoImage, ...]
    names: Counter[str]
    """Objects of each category, crowds not counted."""
    unused: tuple[str, ...]
    """Categories without an object."""
    problems: tuple[Problem, ...]


def read_coco(path: Path) -> CocoFile:
    """Read a file. Everything wrong with it is returned as problems."""
    try:
        tables = json.loads(decoded(path.read_bytes()))
    except OSError as error:
        return _unusable(path, None, f"cannot be read ({error.strerror})")
    except NotText as error:
        return _unusable(path, None, f"not COCO's JSON: {error}{_REMEDY}")
    except json.JSONDecodeError as error:
        what = f"not COCO's JSON: {error.msg}, column {error.colno}{_REMEDY}"
        return _unusable(path, error.lineno, what)
    except (RecursionError, ValueError) as error:
        # Nested too deeply, or an integer of thousands of digits.
        return _unusable(path, None, f"not COCO's JSON: {_short(str(error))}{_REMEDY}")
    if not isinstance(tables, dict):
        return _unusable(path, 1, f"not COCO's JSON: {_short(tables)} is not an object{_REMEDY}")
    for name in TABLES:
        if name not in tables:
            there = ", ".join(list(tables)[:8]) or "nothing"
            what = f"no {name!r} (there is {there}); COCO's files have {', '.join(TABLES)}"
            return _unusable(path, None, what)
        if not isinstance(tables[name], list):
            return _unusable(path, None, f"{name!r} is not an array; make it one")
    return _Reader(path).read(tables)


def _unusable(path: Path, line: int | None, what: str) -> CocoFile:
    return CocoFile(path, (), Counter(), (), (Problem(path, line, what, fatal=True),))


class _Wrong(ValueError):
    """An invalid entry; the message names the remedy."""


class _Reader:
    """Reads the tables: categories and images first, then the annotations that refer to them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._categories: dict[str, str] = {}
        self._images: dict[str, CocoImage] = {}
        self._by_file_name: dict[str, CocoImage] = {}
        self._crowds: list[str] = []
        self._problems: list[Problem] = []
        self._names: Counter[str] = Counter()

    def read(self, tables: Mapping[str, list[Any]]) -> CocoFile:
        self._each("category", tables["categories"], self._category)
        self._each("image", tables["images"], self._image)
        self._each("annotation", tables["annotations"], self._annotation)
        if self._crowds:
            what = (
                f"{len(self._crowds)} annotations with iscrowd 1, the first of them "
                f"{self._crowds[0].removesuffix(': ')}, are regions of many objects: left out of "
                "training; detections inside count neither way"
            )
            self._problems.append(Problem(self._path, None, what, fatal=False, kind=Kind.CROWD))
        unused = dict.fromkeys(self._categories.values()).keys() - self._names.keys()
        return CocoFile(
            path=self._path,
            images=tuple(self._images.values()),
            names=self._names,
            unused=tuple(sorted(unused)),
            problems=tuple(self._problems),
        )

    def _each(self, word: str, entries: Sequence[Any], add: Callable[[Any, str], None]) -> None:
        for number, entry in enumerate(entries):
            tag = _tag(word, number, entry)
            try:
                add(entry, tag)
            except _Wrong as error:
                self._problems.append(Problem(self._path, None, f"{tag}{error}", fatal=True))

    def _category(self, entry: Any, _tag: str) -> None:
        key = _id(entry, "id")
        name = _name(entry, "name", "write the class there")
        if key in self._categories:
            raise _Wrong(f"the id {key} is that of {self._categories[key]!r} too; number it anew")
        self._categories[key] = name.strip()

    def _image(self, entry: Any, tag: str) -> None:
        key = _id(entry, "id")
        name = _name(entry, "file_name", "write the image's there")
        if key in self._images:
            raise _Wrong(
                f"the id {key} is that of {self._images[key].file_name!r} too; number the images "
                "anew, and their annotations with them"
            )
        if name in self._by_file_name:
            other = self._by_file_name[name].tag.removesuffix(": ")
            raise _Wrong(
                f"{name!r} is that of {other} too; make them one image, with the annotations of "
                "both"
            )
        self._images[key] = self._by_file_name[name] = CocoImage(name, tag, _size(entry), [])

    def _annotation(self, entry: Any, tag: str) -> None:
        image = _id(entry, "image_id")
        category = _id(entry, "category_id")
        if image not in self._images:
            raise _Wrong(f"its image_id {image} is not in 'images'; add it there, or take it out")
        if category not in self._categories:
            known = ", ".join(f"{key} {name}" for key, name in [*self._categories.items()][:12])
            raise _Wrong(
                f"its category_id {category} is not in 'categories' ({known or 'none'}); add it "
                "there, or correct it"
            )
        crowd = entry.get("iscrowd")
        if crowd not in (None, 0, 1, "0", "1"):
            raise _Wrong(f"its 'iscrowd' is {_short(crowd)}; it must be 0 or 1")
        crowd = crowd in (1, "1")
        box = _box(entry)
        name = self._categories[category]
        if crowd:
            self._crowds.append(tag)
        else:
            self._names[name] += 1
        self._images[image].objects.append(
            LabelledObject(
                name, box, crowd=crowd, area=_area(entry), rotation=_rotation(entry), tag=tag
            )
        )


def _tag(word: str, number: int, value: Any) -> str:
    """Return the position and id of an entry, which find it in a file of one long line."""
    key = value.get("id") if isinstance(value, dict) else None
    return f"{word} {number}: " if key is None else f"{word} {number} (id {_short(key)}): "


def _id(value: Any, field: str) -> str:
    """Return an id as text: some tools write 7 in one table and "7" or 7.0 in the other."""
    found = _field(value, field, (int, float, str), "a whole number or text")
    if isinstance(found, float) and found.is_integer():
        return str(int(found))
    if isinstance(found, float):
        raise _Wrong(f"its {field!r} is {_short(found)}; it must be a whole number or text")
    return str(found).strip()


def _rotation(value: Mapping[str, Any]) -> float:
    """Return the degrees in CVAT's attribute; 0 without it."""
    attributes = value.get("attributes")
    rotation = attributes.get("rotation") if isinstance(attributes, dict) else None
    try:
        degrees = float(rotation or 0)
    except (TypeError, ValueError, OverflowError):
        degrees = math.nan
    if not math.isfinite(degrees):
        raise _Wrong(f"its 'rotation' is {_short(rotation)}; it must be a number of degrees")
    return degrees


def _area(value: Mapping[str, Any]) -> float | None:
    """Return the area of the object's outline; None without it."""
    area = value.get("area")
    if area is None:
        return None
    if not _is_finite(area) or area < 0:
        raise _Wrong(
            f"its 'area' is {_short(area)}; it must be a number of square pixels, at least 0, or "
            "absent: then it is that of the box"
        )
    return float(area)


def _name(value: Any, field: str, remedy: str) -> str:
    name: str = _field(value, field, str, "text")
    if not name.isascii() and name != name.encode(errors="replace").decode():
        raise _Wrong(f"its {field!r} is {ascii(name)[:80]}, which is no text; write it anew")
    if not name.strip():
        raise _Wrong(f"its {field!r} is empty; {remedy}")
    return name


def _field(value: Any, field: str, kinds: Any, words: str) -> Any:
    if not isinstance(value, dict):
        raise _Wrong(f"it is {_short(value)}; it must be an object in braces")
    if field not in value:
        raise _Wrong(f"it has no {field!r}; add it")
    found = value[field]
    if not isinstance(found, kinds) or isinstance(found, bool):
        raise _Wrong(f"its {field!r} is {_short(found)}; it must be {words}")
    return found


def _box(value: Mapping[str, Any]) -> Edges:
    """COCO's [x, y, width, height] as edges."""
    if "bbox" not in value:
        raise _Wrong("it has no 'bbox'; boxes are needed, not outlines alone")
    numbers = value["bbox"]
    if (
        not isinstance(numbers, list)
        or len(numbers) != 4
        or not all(_is_finite(number) for number in numbers)
    ):
        raise _Wrong(
            f"its 'bbox' is {_short(numbers)}; it must be four numbers of pixels: "
            "[x, y, width, height]"
        )
    x, y, width, height = map(float, numbers)
    return x, y, x + width, y + height


def _size(value: Mapping[str, Any]) -> tuple[float, float] | None:
    height, width = value.get("height", 0), value.get("width", 0)
    if not _is_finite(height) or not _is_finite(width) or min(height, width) <= 0:
        # Missing, or what tools write that did not open the image: the image itself tells.
        return None
    return float(height), float(width)


def _is_finite(number: Any) -> bool:
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


LOOKED_FOR: Final = (
    "COCO: annotations/instances_train.json, train/_annotations.coco.json, "
    "or a .json with images, annotations and categories beside the images"
)

_UNSPLIT: Final = "a .json for each split"
_OTHER_TASKS: Final = ("captions_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")
"""What COCO itself lays beside its instances."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """The annotation files of a folder."""

    folder: LabelledFolder
    by_split: Mapping[str, Path]
    whole: Path | None
    """One file for all splits; `by_split` is then empty."""

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.by_split) or self.folder.image_splits or ("train", "val")


def evidence(folder: LabelledFolder) -> str | None:
    """Return the files that indicate this format, or None."""
    found = [path.relative_to(folder.root).as_posix() for path in _candidates(folder)]
    if not found:
        return None
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def label_files(folder: LabelledFolder, paths: Iterable[Path]) -> list[Path]:
    """Return the annotation files, those of other tasks, too."""
    return [path for path in paths if path.suffix.lower() == ".json" and _is_coco(path)]


def split_names(folder: LabelledFolder) -> tuple[str, ...]:
    """Return the names of the splits. Raises DataError."""
    return _lay_out(folder).splits


def read(folder: LabelledFolder, split: str, *, naming: bool) -> SplitAnnotations:
    """Read one split; `naming`: also count the classes. Raises DataError.

    Where one file holds everything, the images are split by a hash of their names.
    """
    layout = _lay_out(folder)
    if layout.whole is not None:
        content = counted = folder.once(read_coco, layout.whole)
        images, problems = _hashed(folder, content, split)
    else:
        content = folder.once(read_coco, _file_of(layout, split))
        train = _train(layout, content)
        images, problems = _listed(layout, content, train, split_called(split) or split)
        if naming and train is None:
            raise DataError(
                f"{folder.root}: no annotations of the train split, which name the classes"
            )
        counted = train or content
    problems = [*content.problems, *problems]
    if not naming:
        return SplitAnnotations(tuple(images), problems=tuple(problems))
    if counted is not content:
        problems += [each for each in counted.problems if each.fatal]
    return SplitAnnotations(tuple(images), counted.names, (*problems, *_unused(counted)))


def _hashed(
    folder: LabelledFolder, content: CocoFile, split: str
) -> tuple[list[LabelledImage], list[Problem]]:
    """Return the images of a split by hash, or by the folders that they are in."""
    if not content.images:
        return [], _no_images(content)
    found, problems = _find_images(folder, content, None)
    images = [each for _, each in found]
    if folder.image_splits:
        chosen, _, leaked = in_split_folder(folder, images, split)
        return chosen, problems + leaked
    members, problems = split_by_hash(
        folder.root,
        (each.image for each in images),
        split,
        problems=problems,
        unsplit=_UNSPLIT,
        classes=(*content.names, *content.unused),
    )
    return [each for each in images if each.image in members], problems


def _listed(
    layout: _Layout, content: CocoFile, train: CocoFile | None, split: str
) -> tuple[list[LabelledImage], list[Problem]]:
    """Return all images of a file, and a problem for each that is in train, too."""
    found, problems = _find_images(layout.folder, content, split)
    images = [each for _, each in found]
    problems += _no_images(content)
    if train is not None and train is not content:
        others, _ = _find_images(layout.folder, train, "train")
        places = {each.image: (each.annotation, None) for each in images}
        problems += leaks(places, [each.image for _, each in others])
        named = {each.image: entry for entry, each in others}
        for entry, each in found:
            other = named.get(each.image)
            if other is not None and path_parts(other.file_name) != path_parts(entry.file_name):
                problems.append(_one_image(layout.folder, content, each.image, entry, other))
    return images, problems


def _train(layout: _Layout, content: CocoFile) -> CocoFile | None:
    path = layout.by_split.get("train")
    if path is None:
        return None
    return content if path == content.path else layout.folder.once(read_coco, path)


def _no_images(content: CocoFile) -> list[Problem]:
    if content.images or any(problem.fatal for problem in content.problems):
        return []
    what = "no image in 'images'; list the images there"
    return [Problem(content.path, None, what, fatal=True)]


def _unused(content: CocoFile) -> Iterator[Problem]:
    if content.unused:
        what = f"categories without an object are not used: {', '.join(content.unused[:20])}"
        yield Problem(content.path, None, what, fatal=False, kind=Kind.UNUSED_CLASS)


def _file_of(layout: _Layout, split: str) -> Path:
    path = layout.by_split.get(split_called(split) or split)
    if path is None:
        raise DataError(
            f"{layout.folder.root}: no annotations of the split {split!r}; there are "
            f"{', '.join(layout.by_split)}; add them, or put everything into one file, of which a "
            "fifth is then held out"
        )
    return path


# --- layouts -------------------------------------------------------------------------------------


def _lay_out(folder: LabelledFolder) -> _Layout:
    root, candidates = folder.root, _candidates(folder)
    if not candidates:
        raise DataError(f"{root}: no annotations here; expected {LOOKED_FOR}")
    by_split: dict[str, Path] = {}
    rest: list[Path] = []
    for path in candidates:
        around = "" if path.parent in (root, root / "annotations") else path.parent.name
        split = split_called(path.stem) or split_called(around)
        if split is None:
            rest.append(path)
        elif split in by_split:
            raise DataError(
                f"{root}: two files for the split {split!r}, {by_split[split]} and {path}; take "
                "one away"
            )
        else:
            by_split[split] = path
    if by_split:
        return _Layout(folder, dict(sorted(by_split.items())), None)
    if len(rest) > 1:
        listed = ", ".join(str(path.relative_to(root)) for path in rest[:8])
        raise DataError(
            f"{root}: several annotation files, none named after a split: {listed}; name them "
            "train.json and val.json, or leave one"
        )
    return _Layout(folder, {}, rest[0])


def _candidates(folder: LabelledFolder) -> list[Path]:
    """Return the annotation files: in annotations/, in a split's folder, or at the top."""
    root = folder.root
    there = folder.having(".json")
    inside = [path for path in there if path.parent == root / "annotations"]
    instances = [path for path in inside if path.name.startswith("instances")]
    kept = instances or [
        path for path in inside if not path.name.startswith(_OTHER_TASKS) and _is_coco(path)
    ]
    if kept:
        return kept
    in_splits = [
        path
        for path in there
        if path.parent.parent == root and split_called(path.parent.name) and _is_coco(path)
    ]
    return in_splits or [path for path in there if path.parent == root and _is_coco(path)]


def _is_coco(path: Path) -> bool:
    """Return whether a file is COCO's, by its name or by two of its keys; it may be truncated."""
    if path.name.lower().endswith(".coco.json") or split_called(path.stem):
        return True
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return sum(text.find(f'"{name}"'.encode()) >= 0 for name in TABLES) >= 2
    except (OSError, ValueError):
        # Unreadable or empty.
        return False


# --- images ------------------------------------------------------------------------------------


def _find_images(
    folder: LabelledFolder, content: CocoFile, split: str | None
) -> tuple[list[tuple[CocoImage, LabelledImage]], list[Problem]]:
    """Return the images that are here, each with its entry, and the missing ones."""
    bases = [base for base in _bases(folder.root, content.path) if base.is_dir()]
    finder = ImageFinder(folder, split)
    images: dict[Path, tuple[CocoImage, LabelledImage]] = {}
    problems: list[Problem] = []
    for image in content.images:
        path = finder.find(image.file_name, bases)
        if path is None:
            problems.append(_missing(folder, content, image, finder, bases))
        elif path in images:
            problems.append(_one_image(folder, content, path, image, images[path][0]))
        else:
            labelled = LabelledImage(
                image=path,
                annotation=content.path,
                objects=tuple(image.objects),
                size=image.size,
                size_fields="width and height",
            )
            images[path] = image, labelled
    return list(images.values()), problems + finder.notes(content.path)


def _one_image(
    folder: LabelledFolder, content: CocoFile, path: Path, entry: CocoImage, other: CocoImage
) -> Problem:
    what = (
        f"{entry.tag}{entry.file_name!r} and {other.file_name!r} of {other.tag.removesuffix(': ')} "
        f"are one image here, {folder.inside(path)}: two entries for one image; add the other "
        "image, or take one entry out"
    )
    return Problem(content.path, None, what, fatal=True, files=(path,))


def _missing(
    folder: LabelledFolder,
    content: CocoFile,
    image: CocoImage,
    finder: ImageFinder,
    bases: Sequence[Path],
) -> Problem:
    unread = finder.unread(image.file_name, bases)
    if unread is not None:
        what = f"{image.tag}{not_read(unread)}"
        return Problem(content.path, None, what, fatal=False, kind=Kind.NOT_READ, files=(unread,))
    looked = ", ".join(f"{folder.inside(base)}/" for base in bases)
    what = f"{image.tag}{finder.missing(image.file_name, where=f', looked in {looked}')}; add it"
    return Problem(content.path, None, what, fatal=True)


def _bases(root: Path, annotations: Path) -> list[Path]:
    """Return the folders that may hold the images, the likeliest first."""
    stem = annotations.stem.removeprefix("instances_")
    split = split_called(stem)
    names = [
        stem,
        *([split] if split else []),
        *(["valid", "validation"] if split == "val" else []),
    ]
    bases = [] if annotations.parent.name == "annotations" else [annotations.parent]
    for name in dict.fromkeys(names):
        bases += [root / name, root / "images" / name, root / name / "images"]
    bases += [root / "images", root / "data", root, annotations.parent / "images"]
    return list(dict.fromkeys(bases))

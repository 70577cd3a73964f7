"""One COCO annotation file: JSON to images and objects that remember their line."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from model_export.data.formats.json_tables import JsonError, Located, parse_tables
from model_export.data.labels import Edges, LabelledObject
from model_export.data.problems import Kind, Problem

TABLES: Final = ("images", "annotations", "categories")

_REMEDY: Final = "; write the annotations anew, or fetch the file again"


@dataclass(slots=True)
class CocoImage:
    """One entry of `images`, with its objects."""

    file_name: str
    line: int
    size: tuple[float, float] | None
    """(height, width); None where it is missing or 0."""
    objects: list[LabelledObject]

    @property
    def relative(self) -> PurePosixPath:
        """The file name as a path, also where Windows wrote it."""
        return PurePosixPath(self.file_name.replace("\\", "/"))


@dataclass(frozen=True, slots=True)
class CocoFile:
    """What one file says; fatal problems leave out what they are about."""

    path: Path
    images: tuple[CocoImage, ...]
    names: Counter[str]
    """Objects of each category, crowds not counted."""
    unused: tuple[str, ...]
    """Categories without an object."""
    problems: tuple[Problem, ...]


def read_coco(path: Path) -> CocoFile:
    """Read a file. What is wrong with it comes back as problems, whatever it is."""
    try:
        tables = parse_tables(path.read_bytes())
    except OSError as error:
        return _unusable(path, None, f"cannot be read ({error.strerror})")
    except JsonError as error:
        return _unusable(path, error.line, f"not COCO's JSON: {error}{_REMEDY}")
    for name in TABLES:
        if name not in tables:
            there = ", ".join(list(tables)[:8]) or "nothing"
            what = f"no {name!r} (there is {there}); COCO's files have {', '.join(TABLES)}"
            return _unusable(path, 1, what)
        if not isinstance(tables[name].value, list):
            return _unusable(path, tables[name].line, f"{name!r} is no array; make it one")
    return _Reader(path).read(tables)


def _unusable(path: Path, line: int | None, what: str) -> CocoFile:
    return CocoFile(path, (), Counter(), (), (Problem(path, line, what, fatal=True),))


class _Wrong(ValueError):
    """An entry cannot be used; the message names the remedy."""


class _Reader:
    """Goes through the tables: categories and images first, then what refers to them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._categories: dict[int | str, str] = {}
        self._images: dict[int | str, CocoImage] = {}
        self._file_names: dict[str, int] = {}
        self._crowds: list[int] = []
        self._problems: list[Problem] = []
        self._names: Counter[str] = Counter()

    def read(self, tables: Mapping[str, Located]) -> CocoFile:
        steps = zip(
            ("categories", "images", "annotations"),
            ("category", "image", "annotation"),
            (self._category, self._image, self._annotation),
            strict=True,
        )
        for table, word, add in steps:
            elements: Sequence[Located] = tables[table].value
            for number, item in enumerate(elements):
                tag = _tag(word, number, item.value)
                try:
                    add(item, tag)
                except _Wrong as error:
                    self._problems.append(
                        Problem(self._path, item.line, f"{tag}{error}", fatal=True)
                    )
        if self._crowds:
            what = (
                f"{len(self._crowds)} annotations with iscrowd 1, the first on this line, are "
                "regions of many objects: left out of training; detections inside count neither way"
            )
            first = self._crowds[0]
            self._problems.append(Problem(self._path, first, what, fatal=False, kind=Kind.CROWD))
        unused = dict.fromkeys(self._categories.values()).keys() - self._names.keys()
        return CocoFile(
            path=self._path,
            images=tuple(self._images.values()),
            names=self._names,
            unused=tuple(sorted(unused)),
            problems=tuple(self._problems),
        )

    def _category(self, item: Located, _tag: str) -> None:
        key = _id(item.value, "id")
        name = _field(item.value, "name", str, "text")
        if not name.strip():
            raise _Wrong("its 'name' is empty; write the class there")
        if key in self._categories:
            raise _Wrong(f"the id {key!r} is that of {self._categories[key]!r} too; number it anew")
        self._categories[key] = name.strip()

    def _image(self, item: Located, _tag: str) -> None:
        key = _id(item.value, "id")
        name = _field(item.value, "file_name", str, "text")
        if not name.strip():
            raise _Wrong("its 'file_name' is empty; write the image's there")
        if key in self._images:
            other = self._images[key]
            raise _Wrong(
                f"the id {key!r} is that of {other.file_name!r} (line {other.line}) too; number "
                "the images anew, and their annotations with them"
            )
        if name in self._file_names:
            raise _Wrong(
                f"{name!r} is on line {self._file_names[name]} already; make them one image, with "
                "the annotations of both"
            )
        self._file_names[name] = item.line
        self._images[key] = CocoImage(name, item.line, _size(item.value), [])

    def _annotation(self, item: Located, tag: str) -> None:
        image = _id(item.value, "image_id")
        category = _id(item.value, "category_id")
        if image not in self._images:
            raise _Wrong(f"its image_id {image!r} is not in 'images'; add it there, or take it out")
        if category not in self._categories:
            known = ", ".join(f"{key!r} {name}" for key, name in [*self._categories.items()][:12])
            raise _Wrong(
                f"its category_id {category!r} is not in 'categories' ({known or 'none'}); add it "
                "there, or correct it"
            )
        crowd = item.value.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise _Wrong(f"its 'iscrowd' is {_short(crowd)}; it must be 0 or 1")
        box = _box(item.value)
        name = self._categories[category]
        if crowd:
            self._crowds.append(item.line)
        else:
            self._names[name] += 1
        self._images[image].objects.append(
            LabelledObject(name, box, item.line, item.line, crowd=bool(crowd), tag=tag)
        )


def _tag(word: str, number: int, value: Any) -> str:
    """What finds an entry in a file that is one long line."""
    key = value.get("id") if isinstance(value, dict) else None
    return f"{word} {number}: " if key is None else f"{word} {number} (id {_short(key)}): "


def _id(value: Any, field: str) -> int | str:
    found = _field(value, field, (int, str), "a whole number or text")
    assert isinstance(found, int | str), "checked just now"
    return found


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

"""YOLO's text files: label lines to objects, and the YAML that names classes and folders."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from model_export.data.labels import LabelledObject
from model_export.data.problems import Problem
from service.errors import DataError

_MAX_YAML_BYTES: Final = 1 << 20
_TOLERANCE: Final = 0.01
"""Fractions this far below 0 or above 1 are rounding, further ones are other units."""
_SPLITS: Final = ("train", "val", "test")
_LINE: Final = "class x y width height, the last four as fractions of the image's sides"


@dataclass(frozen=True, slots=True)
class Description:
    """What the YAML says."""

    path: Path
    names: Mapping[int, str]
    root: str | None
    """`path`, as it is written."""
    splits: Mapping[str, tuple[tuple[str, int], ...]]
    """Folders and lists of each split, as they are written, with the line of the split."""
    keypoints: bool
    """Label lines are a box and keypoints."""


class _Wrong(ValueError):
    """A label line cannot be used; the message names the remedy."""


def read_labels(path: Path, description: Description) -> tuple[list[LabelledObject], list[Problem]]:
    """Objects of one label file, boxes in fractions of the image, and what is wrong with it."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        return [], [Problem(path, None, what, fatal=True)]
    except UnicodeDecodeError:
        what = f"not text; a label file has lines of {_LINE}"
        return [], [Problem(path, 1, what, fatal=True)]
    objects: list[LabelledObject] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        try:
            objects.append(_object(words, number, description))
        except _Wrong as error:
            problems.append(Problem(path, number, str(error), fatal=True))
    return objects, problems


def _object(words: list[str], line: int, description: Description) -> LabelledObject:
    name = _class_name(words[0], description)
    numbers = [_number(word) for word in words[1:]]
    if len(numbers) == 5 and not description.keypoints:
        raise _Wrong(f"six values; a line is {_LINE}: take the score at its end off")
    if description.keypoints and len(numbers) > 4:
        numbers = numbers[:4]
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        raise _Wrong(
            f"{len(words)} values; a line is {_LINE}, or class x y x y x y ... of an outline"
        )
    # A box of negative sides is reported as one without area, as in every format.
    places = numbers[:2] if len(numbers) == 4 else numbers
    for number in (max(numbers), min(places)):
        if not -_TOLERANCE <= number <= 1 + _TOLERANCE:
            raise _Wrong(
                f"{number:g} is no fraction of the image's side; divide pixels by its width or "
                "height"
            )
    if len(numbers) == 4:
        x, y, width, height = numbers
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    else:
        box = (min(numbers[0::2]), min(numbers[1::2]), max(numbers[0::2]), max(numbers[1::2]))
    return LabelledObject(name, box, line, line)


def _class_name(word: str, description: Description) -> str:
    try:
        number = float(word)
        index = int(number)
    except (ValueError, OverflowError):
        number, index = math.nan, -1
    if index != number:
        raise _Wrong(f"{word[:40]!r} is no class index; a line is {_LINE}")
    if index not in description.names:
        known = ", ".join(f"{key} {name}" for key, name in [*description.names.items()][:12])
        raise _Wrong(
            f"class {index} is not among the names in {description.path.name} ({known}); correct "
            "it, or name it there"
        )
    return description.names[index]


def _number(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _Wrong(f"{word[:40]!r} is no number; a line is {_LINE}")
    return number


# --- the YAML ------------------------------------------------------------------------------------


def read_description(path: Path) -> Description:
    """Read data.yaml. Raises DataError that names file, line and remedy."""
    lines, values = _load(path)

    def refuse(key: str, what: str) -> DataError:
        line = lines.get(key)
        return DataError(f"{path}:{line}: {what}" if line else f"{path}: {what}")

    names = values.get("names")
    if names is None:
        raise refuse("names", "no 'names'; list the classes there, as names: [cat, dog]")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise refuse("names", f"'names' is {_short(names)}; it must be a list, as [cat, dog]")
    for key, name in names.items():
        if isinstance(key, bool) or not isinstance(key, int) or key < 0:
            raise refuse("names", f"'names' has the key {_short(key)}; keys are class indices")
        if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip():
            raise refuse(
                "names", f"class {key} in 'names' is {_short(name)}; write its name in quotes"
            )
    count = values.get("nc", len(names))
    if count != len(names):
        raise refuse("nc", f"'nc' is {_short(count)}, but there are {len(names)} names; correct it")
    root = values.get("path")
    if root is not None and not isinstance(root, str):
        raise refuse("path", f"'path' is {_short(root)}; it must be a folder")
    splits: dict[str, tuple[tuple[str, int], ...]] = {}
    for key in (*_SPLITS, "valid"):
        entry = values.get(key)
        if entry is None or entry == "" or entry == []:
            continue
        members = entry if isinstance(entry, list) else [entry]
        if not all(isinstance(member, str) for member in members):
            raise refuse(key, f"{key!r} is {_short(entry)}; it must be folders or .txt lists")
        split = "val" if key == "valid" else key
        splits.setdefault(split, tuple((member, lines.get(key, 1)) for member in members))
    return Description(
        path=path,
        names={key: str(name).strip() for key, name in sorted(names.items())},
        root=root,
        splits=splits,
        keypoints=values.get("kpt_shape") is not None,
    )


def read_class_list(path: Path) -> Description:
    """The description that a classes.txt gives: a name on each line. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text; write a class on each line") from error
    names = dict(enumerate(line.strip() for line in lines if line.strip()))
    if not names:
        raise DataError(f"{path}: names no class; write one on each line")
    return Description(path, names, None, {}, keypoints=False)


def mentions_classes(path: Path) -> bool:
    """Whether a YAML file has the keys of a data set, readable or not."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_YAML_BYTES)
    except OSError:
        return False
    return any(line.startswith((b"names:", b"train:")) for line in text.splitlines())


def _load(path: Path) -> tuple[dict[str, int], dict[Any, Any]]:
    """(lines of the top-level keys, values)."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > _MAX_YAML_BYTES:
        raise DataError(f"{path}: {len(content)} bytes are too many for names and folders")
    try:
        node = yaml.compose(content, Loader=yaml.SafeLoader)
        values = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else f"{path}"
        reason = getattr(error, "problem", None) or type(error).__name__
        raise DataError(f"{place}: not YAML ({reason}); write it anew") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: no mapping; it needs names, train and val")
    return dict(_lines(node)), values


def _lines(node: Any) -> Iterator[tuple[str, int]]:
    for key, _ in node.value:
        yield str(key.value), key.start_mark.line + 1


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

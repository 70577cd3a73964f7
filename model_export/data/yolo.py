"""YOLO: one text file per image, and a YAML file that names classes and folders."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

import yaml

from model_export.data.annotations import LabelledImage, LabelledObject, SplitAnnotations
from model_export.data.folder import (
    ImageFinder,
    LabelledFolder,
    NotText,
    decoded,
    lines_of,
    not_read,
    path_parts,
    shown,
)
from model_export.data.problems import Kind, Problem
from model_export.data.splits import leaks, split_by_hash, split_called
from service.errors import DataError

_MAX_YAML_BYTES: Final = 1 << 20
_TOLERANCE: Final = 0.01
"""Fractions this far below 0 or above 1 are rounding, further ones are other units."""
_LINE: Final = "class x y width height, the last four as fractions of the image's sides"


@dataclass(frozen=True, slots=True)
class Description:
    """The content of the YAML file."""

    path: Path
    names: Mapping[int, str]
    root: str | None
    """`path`, as it is written."""
    splits: Mapping[str, tuple[tuple[str, int], ...]]
    """Folders and lists of each split, as they are written, with the line of the split."""
    keypoints: bool
    """Label lines are a box and keypoints."""


class _Wrong(ValueError):
    """An invalid label line; the message names the remedy."""


def read_labels(path: Path, description: Description) -> tuple[list[LabelledObject], list[Problem]]:
    """Return the objects of one label file, boxes as fractions of the image, and its problems."""
    try:
        lines = decoded(path.read_bytes()).splitlines()
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        return [], [Problem(path, None, what, fatal=True)]
    except NotText as error:
        what = f"{error}; a label file has lines of {_LINE}"
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
                f"{number:g} is not a fraction of the image's side; divide pixels by its width or "
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
        raise _Wrong(f"{word[:40]!r} is not a class index; a line is {_LINE}")
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
        raise _Wrong(f"{word[:40]!r} is not a number; a line is {_LINE}")
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
    names = {int(key) if str(key).isdecimal() else key: name for key, name in names.items()}
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
    for key, entry in values.items():
        split = split_called(str(key))
        if split is None or entry is None or entry == "" or entry == []:
            continue
        members = entry if isinstance(entry, list) else [entry]
        if not all(isinstance(member, str) for member in members):
            raise refuse(key, f"{key!r} is {_short(entry)}; it must be folders or .txt lists")
        splits.setdefault(split, tuple((member, lines.get(key, 1)) for member in members))
    return Description(
        path=path,
        names={key: str(name).strip() for key, name in sorted(names.items())},
        root=root,
        splits=splits,
        keypoints=values.get("kpt_shape") is not None,
    )


def read_class_list(path: Path) -> Description:
    """Return the description of a classes.txt: a name on each line. Raises DataError."""
    try:
        lines = [line.strip() for line in decoded(path.read_bytes()).rstrip().splitlines()]
    except NotText as error:
        raise DataError(f"{path}: {error}; a class list has a name on each line") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not lines:
        raise DataError(f"{path}: names no class; write one on each line")
    if "" in lines:
        blank = lines.index("")
        raise DataError(
            f"{path}:{blank + 1}: a blank line among the classes: is class {blank} "
            f"{next(filter(None, lines[blank:]))!r}, or the blank? Take the line out, or write the "
            "class there"
        )
    return Description(path, dict(enumerate(lines)), None, {}, keypoints=False)


def mentions_classes(path: Path) -> bool:
    """Return whether a YAML file has the keys of a data set, readable or not."""
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
        text = decoded(content)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except NotText as error:
        raise DataError(f"{path}: not YAML: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
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


LOOKED_FOR: Final = (
    "YOLO: data.yaml with names, train and val, or images/ and labels/ with classes.txt, "
    "or obj.names"
)

_CLASS_LIST: Final = "classes.txt"


@dataclass(frozen=True, slots=True)
class _Member:
    """An image of a split, and the file that lists it."""

    image: Path
    label: Path
    is_labelled: bool
    """Whether the label file is there, readable or not."""
    listed: tuple[Path, int | None]


@dataclass(frozen=True, slots=True)
class _Layout:
    """A folder's description, and where the images of each split are."""

    folder: LabelledFolder
    description: Description
    sources: Mapping[str, tuple[tuple[Path, int], ...]]
    """Folders or .txt lists of each split, with the line of the YAML; "" for a split by hash."""
    notes: tuple[Problem, ...] = ()

    @property
    def root(self) -> Path:
        return self.folder.root

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "val") if "" in self.sources else tuple(self.sources)


def evidence(folder: LabelledFolder) -> str | None:
    """Return the files that indicate this format, or None."""
    root, described = folder.root, _descriptions(folder)
    if described:
        return ", ".join(path.name for path in described)
    labels = label_files(folder, folder.files)
    if not labels:
        return None
    listed = _class_lists(folder)
    if listed:
        return folder.inside(listed[0])
    places = {path.parent for path in labels if path.is_relative_to(root / "labels")}
    if places and (root / "images").is_dir():
        return "images/ and labels/"
    by_split = sorted(
        {
            path.parent
            for path in labels
            if path.parent.name == "labels"
            and path.parent.parent.parent == root
            and split_called(path.parent.parent.name)
        }
    )
    return ", ".join(f"{folder.inside(path)}/" for path in by_split[:3]) or None


def label_files(folder: LabelledFolder, paths: Iterable[Path]) -> list[Path]:
    """Return the .txt files that are in labels/ or hold lines of labels."""
    return [
        path
        for path in paths
        if path.suffix.lower() == ".txt"
        and (
            _holds_labels(path)
            or ("labels" in path.relative_to(folder.root).parts and path.name != _CLASS_LIST)
        )
    ]


def split_names(folder: LabelledFolder) -> tuple[str, ...]:
    """Return the names of the splits. Raises DataError."""
    return _lay_out(folder).splits


def read(folder: LabelledFolder, split: str, *, naming: bool) -> SplitAnnotations:
    """Read one split; `naming`: also count the classes. Raises DataError.

    An image without a label file, or with an empty one, has no objects. Where the YAML names one
    folder only, the images are split by a hash of their names.
    """
    layout = _lay_out(folder)
    members, training, problems = _choose(layout, split)
    images, found = _read_members(members, layout)
    problems = [*layout.notes, *problems, *found]
    if not naming:
        return SplitAnnotations(tuple(images), problems=tuple(problems))
    if "" not in layout.sources and "train" not in layout.sources:
        raise DataError(f"{layout.description.path}: no 'train' folder, which names the classes")
    named = images
    if training is not members:
        named, found = _read_members(training, layout)
    names = Counter(item.name for each in named for item in each.objects)
    problems = list(dict.fromkeys([*problems, *(each for each in found if each.fatal)]))
    return SplitAnnotations(tuple(images), names, (*problems, *_unused(layout.description, names)))


def _choose(layout: _Layout, split: str) -> tuple[list[_Member], list[_Member], list[Problem]]:
    """(the split's images, those that name the classes, what is wrong with folders and lists)."""
    wanted = split_called(split) or split
    found = {name: _members(layout, name) for name in layout.sources}
    shared = list(_shared_labels([each for members, _ in found.values() for each in members]))
    if "" in layout.sources:
        everything, problems = found[""]
        problems = [*problems, *shared, *_unused_labels(layout, found, "")]
        chosen, problems = split_by_hash(
            layout.root,
            (each.image for each in everything),
            wanted,
            problems=problems,
            unsplit="a val folder",
            classes=layout.description.names.values(),
        )
        mine = [each for each in everything if each.image in chosen]
        return mine, everything, problems
    if wanted not in layout.sources:
        raise DataError(
            f"{layout.description.path}: no split {split!r}; there are {', '.join(layout.splits)}; "
            f"name its folder there, as {wanted}: images/{wanted}"
        )
    members, problems = found[wanted]
    problems = [*problems, *shared, *_unused_labels(layout, found, wanted)]
    if wanted == "train":
        return members, members, problems
    training = found["train"][0] if "train" in found else []
    listed = {each.image: each.listed for each in members}
    problems += leaks(listed, [each.image for each in training])
    return members, training, problems


def _unused(description: Description, names: Mapping[str, int]) -> Iterator[Problem]:
    unused = [name for name in dict.fromkeys(description.names.values()) if name not in names]
    if unused:
        what = f"names without an object are not used: {', '.join(unused[:20])}"
        yield Problem(description.path, None, what, fatal=False, kind=Kind.UNUSED_CLASS)


def _read_members(
    members: Iterable[_Member], layout: _Layout
) -> tuple[list[LabelledImage], list[Problem]]:
    images: list[LabelledImage] = []
    problems: list[Problem] = []
    unwritten: list[Path] = []
    elsewhere: list[Path] = []

    def read_file(path: Path) -> tuple[list[LabelledObject], list[Problem]]:
        return read_labels(path, layout.description)

    for member in members:
        objects: Sequence[LabelledObject] = []
        if member.is_labelled:
            objects, found = layout.folder.once(read_file, member.label)
            problems += found
        else:
            unwritten.append(member.label)
        if member.is_labelled and member.label not in _candidates(member.image, layout.root):
            elsewhere.append(member.label)
        images.append(LabelledImage(member.image, member.label, tuple(objects), relative=True))
    if elsewhere:
        what = (
            f"{len(elsewhere)} label files are named otherwise than their images (case, Unicode "
            f"form or suffix): {layout.folder.inside(elsewhere[0])}"
        )
        place = elsewhere[0].parent
        problems.append(Problem(place, None, what, fatal=False, kind=Kind.FOUND))
    if unwritten:
        what = (
            f"no label file for {len(unwritten)} images, the first of them {unwritten[0].name}: "
            "they count as images without objects"
        )
        place = unwritten[0].parent
        problems.append(Problem(place, None, what, fatal=False, kind=Kind.NEGATIVE))
    return images, problems


# --- layouts -------------------------------------------------------------------------------------


def _descriptions(folder: LabelledFolder) -> list[Path]:
    """Return the YAML files that describe a data set; data.yaml alone where there is one."""
    usual = folder.root / "data.yaml"
    if usual.is_file():
        return [usual]
    there = (path for path in folder.having(".yaml", ".yml") if path.parent == folder.root)
    return [path for path in there if mentions_classes(path)]


def _class_lists(folder: LabelledFolder) -> list[Path]:
    """Return the files of class names, the nearest to the root first."""
    named = [
        path
        for path in folder.files
        if path.name in (_CLASS_LIST, "_darknet.labels") or path.suffix == ".names"
    ]
    return sorted(named, key=lambda path: (len(path.parts), path))


def _class_list(folder: LabelledFolder) -> Path | None:
    """Return the file of class names. Raises DataError if there are several that differ."""
    lists = _class_lists(folder)
    top = [path for path in lists if path.parent == folder.root] or lists
    if len({path.read_bytes() for path in top}) > 1:
        names = ", ".join(folder.inside(path) for path in top[:8])
        raise DataError(f"{folder.root}: the class lists {names} differ; keep the right one")
    return top[0] if top else None


def _lay_out(folder: LabelledFolder) -> _Layout:
    root, described = folder.root, _descriptions(folder)
    if len(described) > 1:
        names = ", ".join(path.name for path in described)
        raise DataError(f"{root}: {names} each describe data; name the right one data.yaml")
    if described:
        description = read_description(described[0])
    else:
        there = _class_list(folder)
        if there is None:
            raise DataError(
                f"{root}: no data.yaml here; write one with names: [cat, dog], train: "
                "images/train and val: images/val"
            )
        description = replace(read_class_list(there), splits=_darknet_lists(folder))
    if description.splits:
        return _declared(folder, description)
    return _Layout(folder, description, _undeclared(folder))


def _darknet_lists(folder: LabelledFolder) -> dict[str, tuple[tuple[str, int], ...]]:
    """Return the lists that darknet's obj.data names: lines of KEY = FILE."""
    splits: dict[str, tuple[tuple[str, int], ...]] = {}
    for file in folder.having(".data"):
        for number, line in lines_of(file):
            key, _, text = line.partition("=")
            split = split_called(key.strip())
            if split is not None and text.strip() and file.parent == folder.root:
                # "data/" is darknet's own folder.
                name = path_parts(text.strip())[-1]
                splits.setdefault(split, ((name, number),))
    there = {split: each for split, each in splits.items() if (folder.root / each[0][0]).exists()}
    return there if "train" in there else {}


def _undeclared(folder: LabelledFolder) -> dict[str, tuple[tuple[Path, int], ...]]:
    """Return the usual folders and lists: images/train, train/images, train, train.txt, images."""
    root = folder.root
    images = root / "images"
    lists = [path for path in folder.having(".txt") if path.parent == root]
    with_images = {parent for path in folder.images for parent in path.parents}
    candidates = [
        *(path for path in lists if not _holds_labels(path)),
        *(path for path in folder.folders(root) if path in with_images),
        *folder.folders(images),
        *(path / "images" for path in folder.folders(root)),
    ]
    sources: dict[str, tuple[tuple[Path, int], ...]] = {}
    for path in candidates:
        split = split_called(path.stem) or split_called(path.parent.name)
        if split is not None and path.exists():
            sources[split] = ((path, 1),)
    if list(sources) == ["train"] and sources["train"][0][0].is_file():
        # The one list of everything, as darknet has it.
        return {"": sources["train"]}
    return sources or {"": ((images if images.is_dir() else root, 1),)}


def _declared(folder: LabelledFolder, description: Description) -> _Layout:
    """Find the folders and lists that the YAML names. Raises DataError if one is not there."""
    root = folder.root
    bases = [root]
    if description.root is not None:
        # Written on another machine, or relative to a place that only its tool knows.
        bases = [base for base in (root / description.root,) if base.is_dir()] + bases
    sources: dict[str, tuple[tuple[Path, int], ...]] = {}
    notes: list[Problem] = []
    written: dict[Path, dict[str, str]] = {}
    for split, entries in description.splits.items():
        found = []
        for text, line in entries:
            place, is_shortened = _resolve(text, bases)
            if place is None:
                raise DataError(
                    f"{description.path}:{line}: {split!r} is {text!r}, which is not below "
                    f"{bases[0]}; correct it, or add the folder"
                )
            if is_shortened:
                what = f"{split!r} is {text!r}, found as {folder.inside(place)}"
                notes.append(Problem(description.path, line, what, fatal=False, kind=Kind.FOUND))
            for other, named in written.get(place, {}).items():
                if other != split and named != text:
                    raise DataError(
                        f"{description.path}:{line}: {split!r} is {text!r} and {other!r} is "
                        f"{named!r}, but they are one folder here, {folder.inside(place)}; add the "
                        "other, or correct one"
                    )
            written.setdefault(place, {})[split] = text
            found.append((place, line))
        alone = len(description.splits) == 1 and split == "train"
        sources["" if alone else split] = tuple(found)
    return _Layout(folder, description, sources, tuple(notes))


def _resolve(text: str, bases: Sequence[Path]) -> tuple[Path | None, bool]:
    """(a folder or list, whether only the end of its path is here).

    As it is written, or else by the longest end that is here; the last part alone only of absolute
    paths, which are of another machine, or if it is named after a split: "valid/images" does not
    mean "images".
    """
    written = text.replace("\\", "/")
    parts = path_parts(text)
    is_foreign = written.startswith("/") or written[1:2] == ":"
    ends = ["/".join(parts[start:]) for start in range(len(parts))]
    if len(parts) > 1 and not is_foreign and not split_called(PurePosixPath(parts[-1]).stem):
        ends.pop()
    for number, each in enumerate((written, *ends)):
        for base in bases:
            try:
                if (base / each).exists():
                    return Path(os.path.normpath(base / each)), number > 1
            except (OSError, ValueError):
                return None, False
    return None, False


# --- images ------------------------------------------------------------------------------------


def _members(layout: _Layout, split: str) -> tuple[list[_Member], list[Problem]]:
    """Return the images of a split, and what is wrong with its lists and folders."""
    members: dict[Path, _Member] = {}
    problems: list[Problem] = []
    for source, line in layout.sources[split]:
        find = _in_folder if source.is_dir() else _in_list
        inside, found = find(layout, source)
        problems += found
        for member in inside:
            if member.image in members:
                file, at = member.listed
                what = f"{member.image.name} is listed twice"
                problems.append(Problem(file, at, what, fatal=False, kind=Kind.TWICE))
            else:
                members[member.image] = member
        if not inside and not found:
            what = f"no image in {source}; add some, or correct the folder"
            problems.append(Problem(layout.description.path, line, what, fatal=True))
    return list(members.values()), problems


def _shared_labels(members: Iterable[_Member]) -> Iterator[Problem]:
    by_label: dict[Path, list[Path]] = defaultdict(list)
    for member in members:
        if member.is_labelled:
            by_label[member.label].append(member.image)
    for label, takers in by_label.items():
        images = list(dict.fromkeys(takers))
        if len(images) > 1:
            what = (
                f"two images for one label file: {' and '.join(path.name for path in images)}; "
                "take away the one that was not labelled"
            )
            yield Problem(label, 1, what, fatal=True, files=tuple(images))


def _in_folder(layout: _Layout, source: Path) -> tuple[list[_Member], list[Problem]]:
    folder = layout.folder
    real = source.resolve()
    if real.is_relative_to(folder.root.resolve()):
        # Behind a link, too.
        source = folder.root / real.relative_to(folder.root.resolve())
    elif not source.is_relative_to(folder.root):
        folder = LabelledFolder(source)
    images = [path for path in folder.images if path.is_relative_to(source)]
    members = [_member(layout.folder, path, (path, None)) for path in images]
    unread = [path for path in folder.not_read if path.is_relative_to(source)]
    if unread and not members:
        what = f"no image of a format that is read; {not_read(unread[0])}"
        return [], [Problem(source, None, what, fatal=True, files=tuple(unread))]
    return members, []


def _unused_labels(
    layout: _Layout, found: Mapping[str, tuple[list[_Member], list[Problem]]], split: str
) -> Iterator[Problem]:
    """Yield the labels where a split has its own that no image takes."""
    folder = layout.folder
    every = [each for members, _ in found.values() for each in members]
    used = {each.label for each in every if each.is_labelled}
    label_of = {each.image: each.label for each in every if each.is_labelled}
    image_of = {path: image for image in folder.images for path in _candidates(image, folder.root)}
    unread = {path: image for image in folder.not_read for path in _candidates(image, folder.root)}
    places = {
        path.parent: each.image.parent
        for each in found[split][0]
        for path in _candidates(each.image, folder.root)
    }
    for path in folder.having(".txt"):
        if path.parent not in places or path in used or not _holds_labels(path):
            continue
        if path in image_of:
            # One that is in no split has its labels left out with it.
            if image_of[path] in label_of:
                other = folder.inside(label_of[image_of[path]])
                what = f"two label files for one image, this and {other}; take the wrong one away"
                yield Problem(path, 1, what, fatal=True)
        elif path in unread:
            what = f"its image {not_read(unread[path])}"
            yield Problem(path, 1, what, fatal=False, kind=Kind.NOT_READ, files=(unread[path],))
        else:
            what = f"no image {path.stem}.jpg (or .png, .webp) in {places[path.parent]}; add it"
            yield Problem(path, 1, f"{what}, or remove the labels", fatal=True)


def _holds_labels(path: Path) -> bool:
    """Return whether a .txt begins as labels do: read-me files and lists lie beside them."""
    if path.name == _CLASS_LIST:
        return False
    try:
        with path.open("rb") as file:
            words = file.read(400).split(maxsplit=5)
    except OSError:
        return False
    try:
        return len(words) > 4 and words[0].isdigit() and len([*map(float, words[1:4])]) == 3
    except ValueError:
        return False


def _in_list(layout: _Layout, file: Path) -> tuple[list[_Member], list[Problem]]:
    try:
        lines = lines_of(file)
    except DataError as error:
        what = f"{error}; it must be a folder or a list of images"
        return [], [Problem(file, None, what, fatal=True)]
    finder, bases = ImageFinder(layout.folder), (file.parent, layout.root)
    named: dict[Path, str] = {}
    members: list[_Member] = []
    problems: list[Problem] = []
    for number, text in lines:
        image = _existing(text) or finder.find(text, bases)
        if image is None:
            unread = finder.unread(text, bases)
            if unread is not None:
                what = not_read(unread)
                problems.append(
                    Problem(file, number, what, fatal=False, kind=Kind.NOT_READ, files=(unread,))
                )
                continue
            what = f"{finder.missing(text)}; add it, or take the line out"
            problems.append(Problem(file, number, what, fatal=True))
        elif path_parts(named.setdefault(image, text)) != path_parts(text):
            what = (
                f"{shown(named[image])} and {shown(text)} are one image here, {image.name}; add "
                "the other, or take one line out"
            )
            problems.append(Problem(file, number, what, fatal=True))
        else:
            members.append(_member(layout.folder, image, (file, number)))
    return members, problems + finder.notes(file)


def _existing(text: str) -> Path | None:
    """Return the image of an absolute path, if it is one of this machine."""
    try:
        path = Path(os.path.normpath(text))
        return path if path.is_absolute() and path.is_file() else None
    except (OSError, ValueError):
        return None


def _member(folder: LabelledFolder, image: Path, listed: tuple[Path, int | None]) -> _Member:
    candidates = _candidates(image, folder.root)
    for path in candidates:
        # An image outside the folder has its labels outside, too.
        label = folder.text(path) or (path if path.exists() else None)
        if label is not None:
            return _Member(image, label, True, listed)
    return _Member(image, candidates[0], False, listed)


def _candidates(image: Path, root: Path) -> tuple[Path, ...]:
    """Return the places of an image's labels: in labels/ if it is in images/, then beside it.

    >>> [path.as_posix() for path in _candidates(Path("images/a/images/val/b.png"), Path("images"))]
    ['images/a/labels/val/b.txt', 'images/a/images/val/b.txt']
    """
    outside = len(root.parts) if image.is_relative_to(root) else 0
    parts = list(image.parent.parts)
    beside = image.with_suffix(".txt")
    for place in reversed(range(outside, len(parts))):
        if parts[place].lower() == "images":
            parts[place] = "labels"
            return Path(*parts, beside.name), beside
    return (beside,)

"""A folder of YOLO label files, in any of its usual layouts, to labelled images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from model_export.data.formats.yolo import (
    Description,
    mentions_classes,
    read_class_list,
    read_description,
    read_labels,
)
from model_export.data.labels import LabelledImage, Reading
from model_export.data.problems import Kind, Problem
from model_export.data.splits import IMAGES, files, leaks, split_by_hash, split_called
from service.errors import DataError

LOOKED_FOR: Final = (
    "YOLO: data.yaml with names, train and val, or images/ and labels/ with classes.txt"
)

_CLASS_LIST: Final = "classes.txt"


@dataclass(frozen=True, slots=True)
class _Member:
    """An image of a split and what put it there."""

    image: Path
    label: Path
    listed: tuple[Path, int | None]


@dataclass(frozen=True, slots=True)
class _Layout:
    """A folder's description, and where the images of each split are."""

    root: Path
    description: Description
    sources: Mapping[str, tuple[tuple[Path, int], ...]]
    """Folders or .txt lists of each split, with the line of the YAML; "" where nobody split."""

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "val") if "" in self.sources else tuple(self.sources)


def evidence(root: Path) -> str | None:
    """What in a folder speaks for this format; None if nothing does."""
    described = _descriptions(root)
    if described:
        return ", ".join(path.name for path in described)
    labels = root / "labels"
    if labels.is_dir() and (root / "images").is_dir():
        return "images/ and labels/"
    by_split = [path.parent.name for path in sorted(root.glob("*/labels")) if path.is_dir()]
    by_split = [name for name in by_split if split_called(name)]
    if by_split:
        return ", ".join(f"{name}/labels/" for name in by_split)
    if (root / _CLASS_LIST).is_file():
        return _CLASS_LIST
    return None


def split_names(root: Path) -> tuple[str, ...]:
    """The splits that there are. Raises DataError."""
    return _lay_out(root).splits


def read(root: Path, split: str, *, naming: bool) -> Reading:
    """Read one split; `naming`: also count the classes. Raises DataError.

    An image without a label file, or with an empty one, has no objects. Where the YAML names one
    folder only, the images are split by a hash of their file names' stems.
    """
    layout = _lay_out(root)
    members, training, problems = _choose(layout, split)
    images, found = _read_members(members, layout.description)
    problems += found
    if not naming:
        return Reading(tuple(images), problems=tuple(problems))
    if "" not in layout.sources and "train" not in layout.sources:
        raise DataError(f"{layout.description.path}: no 'train' folder, which names the classes")
    named = images
    if training is not members:
        named, found = _read_members(training, layout.description)
    names = Counter(item.name for each in named for item in each.objects)
    problems = list(dict.fromkeys([*problems, *(each for each in found if each.fatal)]))
    return Reading(tuple(images), names, (*problems, *_unused(layout.description, names)))


def _choose(layout: _Layout, split: str) -> tuple[list[_Member], list[_Member], list[Problem]]:
    """(the split's images, those that name the classes, what is wrong with folders and lists)."""
    wanted = split_called(split) or split
    if "" in layout.sources:
        everything, problems = _members(layout, "")
        stems = (each.image.stem for each in everything)
        chosen = split_by_hash(layout.root, stems, wanted, unsplit="a val folder")
        return [each for each in everything if each.image.stem in chosen], everything, problems
    if wanted not in layout.sources:
        raise DataError(
            f"{layout.description.path}: no split {split!r}; there are {', '.join(layout.splits)}; "
            f"name its folder there, as {wanted}: images/{wanted}"
        )
    members, problems = _members(layout, wanted)
    if wanted == "train":
        return members, members, problems
    training = _members(layout, "train")[0] if "train" in layout.sources else []
    listed = {each.image: each.listed for each in members}
    problems += leaks(listed, [each.image for each in training])
    return members, training, problems


def _unused(description: Description, names: Mapping[str, int]) -> Iterator[Problem]:
    unused = [name for name in dict.fromkeys(description.names.values()) if name not in names]
    if unused:
        what = f"names without an object are not used: {', '.join(unused[:20])}"
        yield Problem(description.path, None, what, fatal=False, kind=Kind.UNUSED_CLASS)


def _read_members(
    members: Iterable[_Member], description: Description
) -> tuple[list[LabelledImage], list[Problem]]:
    images: list[LabelledImage] = []
    problems: list[Problem] = []
    unwritten: list[Path] = []
    for member in members:
        if member.label.exists():
            objects, found = read_labels(member.label, description)
            problems += found
        else:
            objects = []
            unwritten.append(member.label)
        images.append(LabelledImage(member.image, member.label, tuple(objects), relative=True))
    if unwritten:
        what = (
            f"no label file for {len(unwritten)} images, the first of them {unwritten[0].name}: "
            "they count as images without objects"
        )
        place = unwritten[0].parent
        problems.append(Problem(place, None, what, fatal=False, kind=Kind.NEGATIVE))
    return images, problems


# --- layouts -------------------------------------------------------------------------------------


def _descriptions(root: Path) -> list[Path]:
    """The YAML files that describe a data set; data.yaml alone where there is one."""
    usual = root / "data.yaml"
    if usual.is_file():
        return [usual]
    return [path for path in files(root, {".yaml", ".yml"}) if mentions_classes(path)]


def _lay_out(root: Path) -> _Layout:
    described = _descriptions(root)
    if len(described) > 1:
        names = ", ".join(path.name for path in described)
        raise DataError(f"{root}: {names} each describe data; name the right one data.yaml")
    if described:
        description = read_description(described[0])
        if description.splits:
            return _Layout(root, description, dict(_declared(root, description)))
    else:
        lists = [root / _CLASS_LIST, root / "labels" / _CLASS_LIST]
        there = next((path for path in lists if path.is_file()), None)
        if there is None:
            raise DataError(
                f"{root}: no data.yaml here; write one with names: [cat, dog], train: "
                "images/train and val: images/val"
            )
        description = read_class_list(there)
    return _Layout(root, description, _undeclared(root))


def _undeclared(root: Path) -> dict[str, tuple[tuple[Path, int], ...]]:
    """Folders by their usual names: images/train, train/images or images."""
    images = root / "images"
    candidates = [*_folders(images), *(path / "images" for path in _folders(root))]
    sources: dict[str, tuple[tuple[Path, int], ...]] = {}
    for path in candidates:
        split = split_called(path.name) or split_called(path.parent.name)
        if split is not None and path.is_dir():
            sources[split] = ((path, 1),)
    return sources or {"": ((images if images.is_dir() else root, 1),)}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _declared(
    root: Path, description: Description
) -> Iterator[tuple[str, tuple[tuple[Path, int], ...]]]:
    """The folders and lists that the YAML names. Raises DataError if one is not there."""
    bases = [root]
    if description.root is not None:
        # Written on another machine, or relative to a place that only its tool knows.
        bases = [base for base in (root / description.root,) if base.is_dir()] + bases
    for split, entries in description.splits.items():
        found = []
        for text, line in entries:
            place = _resolve(text, bases)
            if place is None:
                raise DataError(
                    f"{description.path}:{line}: {split!r} is {text!r}, which is not below "
                    f"{bases[0]}; correct it, or add the folder"
                )
            found.append((place, line))
        yield split if len(description.splits) > 1 or split != "train" else "", tuple(found)


def _resolve(text: str, bases: Iterable[Path]) -> Path | None:
    relative = text.replace("\\", "/")
    for base in bases:
        # "../train/images" means "train/images" in what Roboflow writes.
        for each in (relative, relative.removeprefix("../")):
            try:
                if (base / each).exists():
                    return base / each
            except (OSError, ValueError):
                return None
    return None


# --- images ------------------------------------------------------------------------------------


def _members(layout: _Layout, split: str) -> tuple[list[_Member], list[Problem]]:
    """The images of a split, and what is wrong with its lists and folders."""
    members: dict[Path, _Member] = {}
    problems: list[Problem] = []
    for source, line in layout.sources[split]:
        find: Callable[[_Layout, Path], tuple[list[_Member], list[Problem]]]
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


def _in_folder(layout: _Layout, folder: Path) -> tuple[list[_Member], list[Problem]]:
    members: list[_Member] = []
    problems: list[Problem] = []
    for base, folders, names in os.walk(folder):
        folders.sort()
        here = Path(base)
        visible = sorted(name for name in names if not name.startswith("."))
        images = [here / name for name in visible if Path(name).suffix.lower() in IMAGES]
        members += [_Member(path, label_of(path, layout.root), (path, None)) for path in images]
        if not images:
            continue
        labels = label_of(images[0], layout.root).parent
        stems = {path.stem for path in images}
        if labels.is_dir():
            for path in files(labels, {".txt"}):
                if path.stem not in stems and _holds_labels(path):
                    what = f"no image {path.stem}.jpg (or .png, .webp) in {here}; add it"
                    problems.append(Problem(path, 1, f"{what}, or remove the labels", fatal=True))
    return members, problems


def _holds_labels(path: Path) -> bool:
    """Whether a .txt begins as labels do: read-me files and class lists lie beside them."""
    if path.name == _CLASS_LIST:
        return False
    try:
        with path.open("rb") as file:
            words = file.read(200).split(maxsplit=1)
    except OSError:
        return False
    return bool(words) and words[0].isdigit()


def _in_list(layout: _Layout, file: Path) -> tuple[list[_Member], list[Problem]]:
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        what = f"cannot be read ({error.strerror}); it must be a folder or a list of images"
        return [], [Problem(file, None, what, fatal=True)]
    members: list[_Member] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        path = _resolve(text, (file.parent, layout.root))
        if path is None or not path.is_file():
            what = f"no image {text[:80]!r}; add it, or take the line out"
            problems.append(Problem(file, number, what, fatal=True))
        else:
            # "./images/a.jpg" and "images/a.jpg" are one image.
            image = Path(os.path.normpath(path))
            members.append(_Member(image, label_of(image, layout.root), (file, number)))
    return members, problems


def label_of(image: Path, root: Path) -> Path:
    """The label file of an image: in labels/ if that is in images/ below `root`, else beside.

    >>> label_of(Path("images/cells/images/val/a.png"), Path("images/cells")).as_posix()
    'images/cells/labels/val/a.txt'
    """
    outside = len(root.parts) if image.is_relative_to(root) else 0
    parts = list(image.parent.parts)
    for place in reversed(range(outside, len(parts))):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts, f"{image.stem}.txt")

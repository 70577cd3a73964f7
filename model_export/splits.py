"""Which pictures belong to a split: ImageSets where there are any, else a hash of the stem."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

from model_export.problems import Kind, Problem
from service import imaging
from service.errors import DataError

_PICTURES: Final = frozenset(
    [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".avif", ".heic"]
)
"""More than are accepted, so that a TIFF is called unaccepted rather than missing."""

_HELD_OUT: Final = 5


@dataclass(frozen=True, slots=True)
class Entry:
    """A picture that belongs to the split, before anything of it was read."""

    stem: str
    annotation: Path
    listed: tuple[Path, int] | None
    """Split file and line that name it."""


@dataclass(frozen=True, slots=True)
class Folder:
    """What lies in a labelled folder, by name alone."""

    root: Path
    annotations: Mapping[str, Path]
    """By file stem."""
    pictures: Mapping[str, tuple[Path, ...]]
    """By file stem."""
    lists: Path | None
    """ImageSets/Main, or None where there is none."""


def open_folder(root: Path) -> Folder:
    """Look into a folder. Raises DataError if it is not laid out as Pascal VOC, nor flat."""
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
        if not _files(root, {".xml"}):
            raise DataError(
                f"{root}: no annotations here; expected Annotations/*.xml with JPEGImages/*, "
                "or NAME.xml beside each picture"
            )
        annotations = pictures = root
    by_stem: dict[str, list[Path]] = {}
    for path in _files(pictures, _PICTURES):
        by_stem.setdefault(path.stem, []).append(path)
    if not by_stem:
        raise DataError(f"{pictures}: no pictures here; it needs {imaging.ACCEPTED} files")
    return Folder(
        root=root,
        annotations={path.stem: path for path in _files(annotations, {".xml"})},
        pictures={stem: tuple(paths) for stem, paths in by_stem.items()},
        lists=lists if lists.is_dir() else None,
    )


def _files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    wanted = frozenset(suffixes)
    try:
        # Files whose name begins with a dot are leftovers of editors and of macOS archives.
        return sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in wanted and not path.name.startswith(".")
        )
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error


def find_entries(folder: Folder, split: str) -> tuple[list[Entry], list[Problem]]:
    """The pictures of one split and what is wrong with their list. Raises DataError if empty."""
    if folder.lists is not None:
        return _listed_entries(folder, folder.lists, split)
    if split not in ("train", "val"):
        raise DataError(
            f"{folder.root}: no split {split!r}; without ImageSets/Main there are train and val"
        )
    xmls = folder.annotations
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
    return [Entry(stem, xmls[stem], None) for stem in members], problems


def find_naming_entries(folder: Folder) -> tuple[list[Entry], list[Problem]]:
    """The pictures whose objects name the classes: train's, so that every split agrees."""
    if folder.lists is not None:
        return find_entries(folder, "train")
    # Nobody chose these splits, so a class may well have fallen into one of them alone.
    return [Entry(stem, path, None) for stem, path in folder.annotations.items()], []


def _split_by_hash(stems: Sequence[str], split: str) -> list[str]:
    """Adding pictures moves no picture from one side to the other, tiny folders aside."""
    digest = {stem: int(hashlib.sha256(os.fsencode(stem)).hexdigest(), 16) for stem in stems}
    held_out = {stem for stem in stems if digest[stem] % _HELD_OUT == 0}
    if len(stems) >= 2 and len(held_out) in (0, len(stems)):
        held_out ^= {min(stems, key=digest.__getitem__)}
    return [stem for stem in stems if (stem in held_out) == (split == "val")]


def _listed_entries(folder: Folder, lists: Path, split: str) -> tuple[list[Entry], list[Problem]]:
    file = lists / f"{split}.txt"
    if not file.is_file():
        there = ", ".join(path.stem for path in _files(lists, {".txt"})) or "none"
        raise DataError(
            f"{file}: no such split file (splits there: {there}); write it with one file stem "
            "per line, or remove ImageSets to have a fifth of the pictures held out"
        )
    entries: dict[str, Entry] = {}
    problems: list[Problem] = []
    for number, stem in _read_list(file):
        if stem in entries:
            problems.append(
                Problem(file, number, f"{stem} is listed twice", fatal=False, kind=Kind.TWICE)
            )
        elif stem not in folder.annotations:
            missing = "annotation" if stem in folder.pictures else "picture and no annotation"
            what = f"no {missing} is named {stem[:80]!r}; add it, or take the line out"
            problems.append(Problem(file, number, what, fatal=True))
        else:
            entries[stem] = Entry(stem, folder.annotations[stem], (file, number))
    if not entries and not problems:
        raise DataError(f"{file}: names no picture; write one file stem per line")
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
        stem = name.removesuffix(suffix) if suffix.lower() in _PICTURES else name
        if stem:
            named.append((number, stem))
    return named


def leaked(folder: Folder, entries: Iterable[Entry], split: str) -> list[Problem]:
    """A problem for each listed picture of another split that train has too."""
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

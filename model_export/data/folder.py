"""A labelled folder: every file below it, once, and images found by the names that labels give."""

from __future__ import annotations

import codecs
import difflib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from functools import cached_property
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar

from model_export.data.problems import Kind, Problem
from service.errors import DataError
from service.imaging.decode import SUFFIXES

NOT_READ: Final = frozenset(
    [".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".tif", ".tiff"]
)
"""Suffixes of images that are counted, but not read."""
IMAGES: Final = SUFFIXES | NOT_READ

_LITTER: Final = frozenset([".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX"])
_MOST_COMPARED: Final = 5000

T = TypeVar("T")


class LabelledFolder:
    """Every file below a folder, links followed, loops once. What is parsed is kept."""

    def __init__(self, root: Path) -> None:
        """Raises DataError if there is no such folder, or one below it cannot be listed."""
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; name one with labelled images")
        self.root = root
        files = sorted(_walk(root, {root.resolve()}))
        self.hidden = tuple(path for path in files if self._is_hidden(path))
        """Files whose name, or a folder's above them, begins with a dot: leftovers of editors."""
        self.files = tuple(sorted(frozenset(files) - frozenset(self.hidden)))
        self._read: dict[Path, Any] = {}

    def _is_hidden(self, path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(self.root).parts)

    def having(self, *suffixes: str, below: Path | None = None) -> list[Path]:
        """Return the files with one of the lower-case suffixes, below a folder or everywhere."""
        return [
            path
            for path in self.files
            if path.suffix.lower() in suffixes and (below is None or path.is_relative_to(below))
        ]

    @cached_property
    def images(self) -> tuple[Path, ...]:
        """The images of the suffixes that are read."""
        return tuple(self.having(*SUFFIXES))

    @cached_property
    def not_read(self) -> tuple[Path, ...]:
        """The images of other formats."""
        return tuple(self.having(*NOT_READ))

    def folders(self, folder: Path) -> list[Path]:
        """Return the folders in a folder that hold files at any depth."""
        depth = len(folder.parts)
        inside = (path for path in self.files if path.is_relative_to(folder))
        return sorted(
            {Path(*path.parts[: depth + 1]) for path in inside if len(path.parts) > depth + 1}
        )

    def once(self, read: Callable[[Path], T], path: Path) -> T:
        """Return `read(path)`, computed on the first call alone."""
        if path not in self._read:
            self._read[path] = read(path)
        found: T = self._read[path]
        return found

    def index(self, step: Step) -> dict[str, list[Path]]:
        """Return the images by their whole path, as the step compares paths."""
        return self._indices[step]

    def last_names(self, step: Step) -> dict[str, list[Path]]:
        """Return the images by their file name, as the step compares names."""
        return self._last_indices[step]

    @cached_property
    def _indices(self) -> dict[Step, dict[str, list[Path]]]:
        return {step: _by(self.images, step, Path.as_posix) for step in Step}

    @cached_property
    def _last_indices(self) -> dict[Step, dict[str, list[Path]]]:
        return {step: _by(self.images, step, attrgetter("name")) for step in Step}


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error
    for entry in entries:
        # macOS writes a ._NAME beside each file on foreign disks and into archives.
        if entry.name in _LITTER or entry.name.startswith("._"):
            continue
        path = folder / entry.name
        if not entry.is_dir():
            yield path
            continue
        real = path.resolve()
        if real not in seen:
            seen.add(real)
            yield from _walk(path, seen)


# --- images by name ------------------------------------------------------------------------------


class Step(StrEnum):
    """How a name in a label file leads to an image, in the order in which they are tried."""

    WRITTEN = "as it is written"
    FORM = "in another Unicode form"
    CASE = "in other case"
    STEM = "with another suffix"
    TAIL = "by the end of the path"


def _key(text: str, step: Step) -> str:
    if step in (Step.WRITTEN, Step.TAIL):
        return text
    text = unicodedata.normalize("NFC", text)
    if step is Step.FORM:
        return text
    text = unicodedata.normalize("NFC", text.casefold())
    if step is Step.STEM:
        suffix = PurePosixPath(text).suffix
        return text.removesuffix(suffix) if suffix in IMAGES else text
    return text


def _by(paths: Iterable[Path], step: Step, name: Callable[[Path], str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        found[_key(name(path), step)].append(path)
    return dict(found)


class ImageFinder:
    """Finds the images that one label file, or one split, names."""

    def __init__(self, folder: LabelledFolder, bases: Sequence[Path]) -> None:
        """`bases` are the folders that names may be relative to, the likeliest first."""
        self._folder = folder
        self._bases = [os.path.normpath(base) for base in bases]
        self._found: dict[Step, list[str]] = defaultdict(list)

    def find(self, name: str) -> Path | None:
        """Return the image of a name: a path of this folder, or of another machine.

        In turn: as it is written; in another Unicode form; in other case; with another suffix;
        then the same for the end of the path, the longest that is here; then the file name alone,
        if that is unique in the folder. Where two images fit equally well there is none.
        """
        parts = path_parts(name)
        for start in range(len(parts)):
            tail = "/".join(parts[start:])
            for step in (Step.WRITTEN, Step.FORM, Step.CASE, Step.STEM):
                for base in self._bases:
                    path = self._at(base, tail, step)
                    if path is not None:
                        return self._noted(name, path, Step.TAIL if start else step)
        for step in (Step.WRITTEN, Step.FORM, Step.CASE):
            there = self._folder.last_names(step).get(_key(parts[-1], step), []) if parts else []
            if len(there) == 1:
                return self._noted(name, there[0], Step.TAIL)
        return None

    def _at(self, base: str, tail: str, step: Step) -> Path | None:
        path = Path(base, tail).as_posix()
        there = self._folder.index(step).get(_key(path, step), [])
        return there[0] if len(there) == 1 else None

    def _noted(self, name: str, path: Path, step: Step) -> Path:
        if step is not Step.WRITTEN:
            self._found[step].append(f"{shown(name)} is {shown(path.name)}")
        return path

    def unread(self, name: str) -> Path | None:
        """Return the file of a name, or of its stem, whose format is not read."""
        parts = path_parts(name)
        wanted = _key(parts[-1], Step.STEM) if parts else ""
        fitting = (path for path in self._folder.not_read if _key(path.name, Step.STEM) == wanted)
        return next(fitting, None)

    def missing(self, name: str, *, where: str = "") -> str:
        """Return what is wrong with a name that no image has, and what would be right."""
        parts = path_parts(name)
        what = f"no image {shown(name)}{where}"
        if not parts:
            return what
        same = self._folder.last_names(Step.STEM).get(_key(parts[-1], Step.STEM), [])
        if len(same) > 1:
            fitting = " and ".join(shown(self.inside(path)) for path in same[:3])
            return f"{what}, but {len(same)} images fit it: {fitting}"
        names = [path.name for path in self._folder.images[:_MOST_COMPARED]]
        near = difflib.get_close_matches(parts[-1], names, n=1, cutoff=0.75)
        return f"{what}; the most similar name here is {shown(near[0])}" if near else what

    def inside(self, path: Path) -> str:
        """Return a path relative to the folder."""
        root = self._folder.root
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)

    def notes(self, place: Path) -> list[Problem]:
        """Return a note for each way but the first in which images were found."""
        return [
            Problem(
                place,
                None,
                f"{len(names)} images found {step}, not as they are named: {names[0]}"
                + (" and others" if len(names) > 1 else ""),
                fatal=False,
                kind=Kind.FOUND,
            )
            for step, names in self._found.items()
        ]


def path_parts(name: str) -> tuple[str, ...]:
    r"""Return the parts of a path of any machine, without its drive and root.

    >>> path_parts("D:\\data\\a.jpg"), path_parts("../x/./a.jpg")
    (('data', 'a.jpg'), ('x', 'a.jpg'))
    """
    parts = name.replace("\\", "/").split("/")
    if len(parts[0]) == 2 and parts[0][1] == ":":
        parts = parts[1:]
    return tuple(part for part in parts if part not in ("", ".", ".."))


def shown(name: str) -> str:
    r"""Return a name in quotes, so that names that look alike differ.

    >>> shown("Küche"), shown("Ku\u0308che")
    ("'Küche'", "'Ku\\u0308che'")
    """
    text = name if len(name) <= 80 else f"{name[:77]}..."
    marked = "".join(
        each if each.isprintable() and not unicodedata.combining(each) else ascii(each)[1:-1]
        for each in text
    )
    return f"'{marked}'"


# --- text ----------------------------------------------------------------------------------------

_ENCODINGS: Final = ("cp1252", "gb18030", "shift_jis", "euc_kr", "cp1251", "big5")
_MOST_SHOWN: Final = 40


class NotText(ValueError):
    """Content that is no UTF-8; the message shows it in the encodings that it may be in."""


def decoded(content: bytes) -> str:
    """Return text in UTF-8, or in UTF-16 with a byte-order mark. Raises NotText.

    Other encodings are named and not read: a wrong guess would train on wrong names.
    """
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[content.rfind(b"\n", 0, error.start) + 1 :].split(b"\n", 1)[0]
    readings = []
    for encoding in ("utf-16-le", "utf-16-be") if b"\0" in content else _ENCODINGS:
        try:
            text = line.decode(encoding).strip()
        except UnicodeDecodeError:
            continue
        if text.isprintable():
            readings.append(f"{text[:_MOST_SHOWN]!r} in {encoding}")
    if not readings:
        raise NotText("not text")
    raise NotText(
        f"not UTF-8: a line of it is {', '.join(readings)}; save it as UTF-8 "
        "(iconv -f ENCODING -t UTF-8)"
    )

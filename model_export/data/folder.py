"""A labelled folder: every file below it, once, and images found by the names that labels give."""

from __future__ import annotations

import codecs
import difflib
import os
import re
import unicodedata
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar

from model_export.data.annotations import LabelledImage
from model_export.data.problems import Kind, Problem
from model_export.data.splits import leaks, split_called
from service.contents import is_lfs_pointer
from service.errors import DataError
from service.filenames import url_path
from service.imaging.decode import ACCEPTED, SUFFIXES

NOT_READ: Final = frozenset(
    [".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".tif", ".tiff"]
)
"""Suffixes of images that are counted, but not read."""
IMAGES: Final = SUFFIXES | NOT_READ

_LITTER: Final = frozenset([".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX"])
_ORDER: Final = ("train", "val", "test")
_MOST_COMPARED: Final = 5000
_MOST_MISSING: Final = 20

T = TypeVar("T")


class LabelledFolder:
    """Every file below a folder, links followed, loops once. What is parsed is kept."""

    def __init__(self, root: Path) -> None:
        """Raises DataError if there is no such folder, or one below it cannot be listed."""
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; name one with labelled images")
        self.root = Path(os.path.normpath(root.absolute()))
        files = sorted(_walk(self.root))
        self.hidden = tuple(path for path in files if self._is_hidden(path))
        """Files whose name, or a folder's above them, begins with a dot: leftovers of editors."""
        self.files = tuple(sorted(frozenset(files) - frozenset(self.hidden)))
        self._read: dict[tuple[str, Path], Any] = {}

    def _is_hidden(self, path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(self.root).parts)

    def having(self, *suffixes: str) -> list[Path]:
        """Return the files with one of the lower-case suffixes."""
        return [path for path in self.files if path.suffix.lower() in suffixes]

    @cached_property
    def images(self) -> tuple[Path, ...]:
        """The images of the suffixes that are read."""
        return tuple(self.having(*SUFFIXES))

    @cached_property
    def not_read(self) -> tuple[Path, ...]:
        """The images of other formats."""
        return tuple(self.having(*NOT_READ))

    @cached_property
    def image_folders(self) -> frozenset[str]:
        """The names of all folders that hold images at any depth."""
        parents = {path.parent.relative_to(self.root) for path in self.images}
        return frozenset(part for parent in parents for part in parent.parts)

    @cached_property
    def by_stem(self) -> dict[str, list[Path]]:
        """The images by their file name, as the last of the steps compares names."""
        return _by_stem(self.images)

    @cached_property
    def not_read_by_stem(self) -> dict[str, list[Path]]:
        """The same of the images that are not read."""
        return _by_stem(self.not_read)

    @cached_property
    def texts(self) -> dict[str, list[Path]]:
        """The .txt files by their path without suffixes, in any case and Unicode form."""
        found: dict[str, list[Path]] = defaultdict(list)
        for path in self.having(".txt"):
            found[_key(path.with_suffix("").as_posix(), Step.STEM)].append(path)
        return dict(found)

    def text(self, path: Path) -> Path | None:
        """Return the .txt file of a path: as it is written, or else as the steps compare paths."""
        there = self.texts.get(_key(path.with_suffix("").as_posix(), Step.STEM), [])
        return path if path in there else there[0] if len(there) == 1 else None

    def folders(self, folder: Path) -> list[Path]:
        """Return the folders in a folder that hold files at any depth."""
        depth = len(folder.parts)
        inside = (path for path in self.files if path.is_relative_to(folder))
        return sorted(
            {Path(*path.parts[: depth + 1]) for path in inside if len(path.parts) > depth + 1}
        )

    def split_of(self, path: Path) -> str | None:
        """Return the split that a folder above a file is named after."""
        if not path.is_relative_to(self.root):
            return None
        return next(filter(None, map(split_called, path.relative_to(self.root).parts[:-1])), None)

    @cached_property
    def image_splits(self) -> tuple[str, ...]:
        """The splits, train among them, whose folders hold all images; else none."""
        splits = {self.split_of(path) for path in self.images}
        if None in splits or "train" not in splits or len(splits) == 1:
            return ()
        return tuple(sorted(filter(None, splits), key=_ORDER.index))

    def inside(self, path: Path) -> str:
        """Return a path relative to the folder."""
        is_inside = path.is_relative_to(self.root)
        return path.relative_to(self.root).as_posix() if is_inside else str(path)

    def once(self, read: Callable[[Path], T], path: Path) -> T:
        """Return `read(path)`, computed on the first call alone; functions differ by name."""
        key = (read.__qualname__, path)
        if key not in self._read:
            self._read[key] = read(path)
        found: T = self._read[key]
        return found


def _walk(root: Path) -> Iterator[Path]:
    """Yield the files below a folder; folders behind links after all the others, each once."""
    seen: set[Path] = set()
    folders, links = [root], deque[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        real = folder.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error
        for entry in entries:
            # macOS writes a ._NAME beside each file on foreign disks and into archives.
            if entry.name in _LITTER or entry.name.startswith("._"):
                continue
            path = folder / entry.name
            if path.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif path.is_file() or (entry.is_symlink() and not path.exists()):
                # Of a link to nothing reading will tell.
                yield path


# --- images by name ------------------------------------------------------------------------------


class Step(IntEnum):
    """How a name in a label file leads to an image, in the order in which they are tried."""

    WRITTEN = 0
    FORM = 1
    CASE = 2
    STEM = 3
    TAIL = 4
    URL = 5
    UPLOAD = 6


_WORDS: Final = {
    Step.FORM: "in another Unicode form",
    Step.CASE: "in other case",
    Step.STEM: "with another suffix",
    Step.TAIL: "by the end of the path",
    Step.URL: "by the path in a URL",
    Step.UPLOAD: "without the prefix of an upload to Label Studio",
}
_UPLOAD: Final = re.compile(r"[0-9a-f]{8}-(?=.)")


def _key(text: str, step: Step) -> str:
    if step is Step.WRITTEN:
        return text
    text = unicodedata.normalize("NFC", text)
    if step is Step.FORM:
        return text
    text = unicodedata.normalize("NFC", text.casefold())
    if step is Step.STEM:
        suffix = PurePosixPath(text).suffix
        return text.removesuffix(suffix) if suffix in IMAGES else text
    return text


def alike(name: str) -> str:
    r"""Return what names have in common that differ by case or Unicode form alone.

    >>> alike("Ku\u0308che") == alike("KÜCHE")
    True
    """
    return _key(name, Step.CASE)


def _by_stem(paths: Iterable[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        found[_key(path.name, Step.STEM)].append(path)
    return dict(found)


class ImageFinder:
    """Finds the images that label files name, and counts how."""

    def __init__(self, folder: LabelledFolder, split: str | None = None) -> None:
        """`split` is the one that is read, if it has a label file or list of its own."""
        self._folder = folder
        self._split = split
        self._found: dict[Step, list[str]] = defaultdict(list)
        self._missing = 0

    def find(self, name: str, bases: Sequence[Path]) -> Path | None:
        """Return the image of a name: a path of this folder, or of another machine.

        `bases` are the folders that the name may be relative to, the likeliest first. In turn: as
        it is written; in another Unicode form; in other case; with another suffix; then the same
        for the end of the path, the longest that is here; then the file name alone, if that is
        unique in the folder; at last the same for the path that a URL holds, and for the name that
        a file had before its upload to Label Studio.

        The end of a path leads neither out of a folder that is here nor into that of another split.
        Where two images fit equally well there is none.
        """
        path, step = self._search_all(name, bases, self._folder.by_stem)
        if path is not None and step is not Step.WRITTEN:
            self._found[step].append(f"{shown(name)} is {shown(self._folder.inside(path))}")
        return path

    def unread(self, name: str, bases: Sequence[Path]) -> Path | None:
        """Return the file of a name, or of its stem, whose format is not read."""
        return self._search_all(name, bases, self._folder.not_read_by_stem)[0]

    def _search_all(
        self, name: str, bases: Sequence[Path], by_stem: Mapping[str, Sequence[Path]]
    ) -> tuple[Path | None, Step]:
        path, step = self._search(name, bases, by_stem)
        for other, meant in () if path is not None else _meant(name):
            path, step = self._search(other, bases, by_stem)[0], meant
            if path is not None:
                break
        return path, step

    def _search(
        self, name: str, bases: Sequence[Path], by_stem: Mapping[str, Sequence[Path]]
    ) -> tuple[Path | None, Step]:
        parts = path_parts(name)
        there = by_stem.get(_key(parts[-1], Step.STEM), []) if parts else []
        ranked: dict[tuple[int, Step, int], list[Path]] = defaultdict(list)
        for path in there:
            for place, base in enumerate(bases):
                rank = _rank(path, base, parts)
                if rank is not None and self._may_be(path, parts[: rank[0]]):
                    ranked[(*rank, place)].append(path)
        if ranked:
            best = min(ranked)
            if len(ranked[best]) == 1:
                return ranked[best][0], Step.TAIL if best[0] else best[1]
            return None, Step.WRITTEN
        for step in (Step.WRITTEN, Step.FORM, Step.CASE):
            same = [path for path in there if _key(path.name, step) == _key(parts[-1], step)]
            if len(same) == 1 and self._may_be(same[0], parts[:-1]):
                return same[0], Step.TAIL
        return None, Step.WRITTEN

    def _may_be(self, path: Path, dropped: Sequence[str]) -> bool:
        """Whether a name without its first folders may still mean an image."""
        split = self._folder.split_of(path)
        if self._split is not None and split not in (None, self._split):
            return False
        return not dropped or (
            dropped[-1] not in self._folder.image_folders or path.parent.name == dropped[-1]
        )

    def missing(self, name: str, *, where: str = "") -> str:
        """Return what is wrong with a name that no image has, and what would be right."""
        parts = path_parts(name)
        what = f"no image {shown(name)}{where}"
        if not parts:
            return what
        same = self._folder.by_stem.get(_key(parts[-1], Step.STEM), [])
        if len(same) > 1:
            fitting = " and ".join(shown(self._folder.inside(path)) for path in same[:3])
            return f"{what}, but {len(same)} images fit it: {fitting}"
        self._missing += 1
        if self._missing > _MOST_MISSING:
            # To compare names takes milliseconds each.
            return what
        names = {path.name: path for path in self._folder.images[:_MOST_COMPARED]}
        near = difflib.get_close_matches(parts[-1], names, n=1, cutoff=0.75)
        if not near:
            return what
        return f"{what}; the most similar here is {shown(self._folder.inside(names[near[0]]))}"

    def notes(self, place: Path) -> list[Problem]:
        """Return a note for each way but the first in which images were found."""
        return [
            Problem(
                place,
                None,
                f"{len(names)} images found {_WORDS[step]}, not as they are named: {names[0]}"
                + (" and others" if len(names) > 1 else ""),
                fatal=False,
                kind=Kind.FOUND,
            )
            for step, names in self._found.items()
        ]


def _meant(name: str) -> Iterator[tuple[str, Step]]:
    """Yield the other names that a name may stand for."""
    path = url_path(name)
    if path != name:
        yield path, Step.URL
    last = PurePosixPath(path).name
    if _UPLOAD.match(last):
        yield _UPLOAD.sub("", last, count=1), Step.UPLOAD


def _rank(path: Path, base: Path, parts: Sequence[str]) -> tuple[int, Step] | None:
    """(how many parts of a name are dropped, how the rest is compared) for it to be a path."""
    if not path.is_relative_to(base):
        return None
    inside = path.relative_to(base).parts
    start = len(parts) - len(inside)
    if start < 0:
        return None
    rest, found = "/".join(parts[start:]), "/".join(inside)
    for step in (Step.WRITTEN, Step.FORM, Step.CASE, Step.STEM):
        if _key(rest, step) == _key(found, step):
            return start, step
    return None


def in_split_folder(
    folder: LabelledFolder, images: Sequence[LabelledImage], split: str
) -> tuple[list[LabelledImage], list[LabelledImage], list[Problem]]:
    """(the images in a split's folder, those in train's, those that are in both).

    Raises DataError if images have no folder for the split.
    """
    wanted = split_called(split) or split
    if wanted not in folder.image_splits:
        raise DataError(
            f"{folder.root}: no split {split!r}; there are folders of images for "
            f"{', '.join(folder.image_splits)}"
        )
    chosen = [each for each in images if folder.split_of(each.image) == wanted]
    train = [each for each in images if folder.split_of(each.image) == "train"]
    if wanted == "train":
        return chosen, train, []
    places = {each.image: (each.image, None) for each in chosen}
    return chosen, train, leaks(places, [each.image for each in train])


def not_read(image: Path) -> str:
    """Return that an image's format is not read, and the remedy."""
    return f"{image.name} is not read; save it as {ACCEPTED}"


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
_CONTROL: Final = re.compile(rb"[\x01-\x08\x0e-\x1f]")


class NotText(ValueError):
    """Content that is no UTF-8; the message shows it in the encodings that it may be in."""


def decoded(content: bytes) -> str:
    """Return text in UTF-8, or in UTF-16 with a byte-order mark. Raises NotText.

    Other encodings are named and not read: a wrong guess would train on wrong names.
    """
    if is_lfs_pointer(content):
        raise NotText("a Git LFS pointer, not the file: run git lfs pull")
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[content.rfind(b"\n", 0, error.start) + 1 :].split(b"\n", 1)[0]
    if _CONTROL.search(content):
        raise NotText("not text")
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


def lines_of(file: Path) -> list[tuple[int, str]]:
    """Return the lines of a list of images that are not blank, with their numbers.

    Raises DataError if it cannot be read.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    try:
        text = decoded(content)
    except NotText:
        # Each line that then names no image is reported.
        text = content.decode(errors="replace")
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    return [(number, line) for number, line in lines if line]

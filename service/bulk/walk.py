"""The files that an INPUT means: an image, a folder with all below it, or a glob.

Always in the same order, with no more in memory than the names of one folder and of those above. A
folder below the named one that cannot be listed stands for its files: reading it fails with the
reason.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from service.bulk.files import Entry, Files, files_of, full_name
from service.errors import DataError

_MAGIC: Final = re.compile(r"[*?\[]")


def walk(given: str, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Yield full names of the files that `given` means; of a folder, those that are `wanted`.

    Raises DataError, also where a folder behind a URL cannot be listed: that may pass.
    """
    name = full_name(given)
    files = files_of(name)
    kind = files.kind(name)
    if kind == "file":
        yield name
    elif kind == "folder":
        yield from walk_folder(name, wanted)
    elif _MAGIC.search(name):
        yield from _matching(files, name)
    else:
        raise DataError(f"{given}: no such file or folder")


def root_of(name: str) -> str:
    """Return the folder of a full name: of a glob, all before its first wildcard."""
    parts = name.split("/")
    first = next((i for i, part in enumerate(parts) if _MAGIC.search(part)), len(parts))
    return "/".join(parts[:first]) or "/"


def walk_folder(folder: str, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Yield the files below a folder that are `wanted`, as paths that begin with `folder`.

    Raises DataError if the folder cannot be listed.
    """
    for found in _below(files_of(folder), folder):
        if found.folder or wanted(found.name):
            yield found.name


def _below(files: Files, folder: str) -> Iterator[Entry]:
    """Yield the files below a folder, and as folders those that cannot be listed."""
    # Not recursive: folders may be nested deeper than Python's stack.
    left = _children(files, folder)
    while left:
        entry = left.pop()
        if entry.folder:
            try:
                left += _children(files, entry.name)
                continue
            except DataError:
                if files.remote:
                    raise
        yield entry


def _children(files: Files, folder: str) -> list[Entry]:
    """Return the entries of a folder with their paths, the last one first. Raises DataError."""
    return [
        Entry(_join(folder, name), is_folder) for name, is_folder in reversed(files.scan(folder))
    ]


def _join(folder: str, name: str) -> str:
    return posixpath.join(folder, name) if "://" in folder else str(Path(folder, name))


def _matching(files: Files, pattern: str) -> Iterator[str]:
    """Yield the files that match a pattern; `**` is any number of folders."""
    root = root_of(pattern)
    if files.kind(root) == "folder":
        yield from _match(files, root, pattern.removeprefix(root).lstrip("/").split("/"))


def _match(files: Files, folder: str, parts: list[str]) -> Iterator[str]:
    here, *rest = parts
    if here != "**":
        fits = _compiled([here])
        for entry in files.scan(folder):
            if fits(entry.name) and entry.folder == bool(rest) and not _hidden(entry.name, here):
                name = _join(folder, entry.name)
                try:
                    yield from _match(files, name, rest) if rest else [name]
                except DataError:
                    if files.remote:
                        raise
                    yield name
        return
    # One expression for all that follows: a file that matches in two ways comes once.
    fits = _compiled(parts)
    prefix = folder.rstrip("/") + "/"
    for name, unlisted in _below(files, folder):
        below = name.removeprefix(prefix)
        hidden = any(_hidden(part, "") for part in below.split("/"))
        if not hidden and (unlisted or fits(below)):
            yield name


def _compiled(parts: list[str]) -> Callable[[str], object]:
    """Return what matches paths below a folder with the segments of a glob."""
    from fsspec.utils import glob_translate

    # fsspec refuses `**` within a segment, where a shell takes it for `*`.
    segments = (part if part == "**" else re.sub(r"\*+", "*", part) for part in parts)
    return re.compile(glob_translate("/".join(segments))).fullmatch


def _hidden(name: str, pattern: str) -> bool:
    """Return whether a name begins with a dot that its pattern, as in a shell, must begin with."""
    return name.startswith(".") and not pattern.startswith(".")

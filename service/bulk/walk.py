"""What a user named, file by file: an image, a folder with all below it, a glob.

Always in the same order, with no more in memory than the names of one folder and of those above.
A folder below the one that is named, which cannot be listed, comes in place of its files: reading
it fails, and says why.
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
    """Full names of the files that `given` means; in a folder, of those that are `wanted`.

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
    """The folder that a full name begins with: of a glob, all before its first wildcard."""
    parts = name.split("/")
    first = next((i for i, part in enumerate(parts) if _MAGIC.search(part)), len(parts))
    # "" and "s3:" are no folders that could be looked into.
    return "/".join(parts[:first]) or "/"


def walk_folder(folder: str, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Names of the files below a folder that are `wanted`, as paths that begin with `folder`.

    Raises DataError if the folder cannot be listed.
    """
    for found in _below(files_of(folder), folder):
        if found.folder or wanted(found.name):
            yield found.name


def _below(files: Files, folder: str) -> Iterator[Entry]:
    """Files below a folder, and as folders those below it that cannot be listed."""
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
    """What lies in a folder, the last first, with paths for names. Raises DataError."""
    return [
        Entry(_join(folder, name), is_folder) for name, is_folder in reversed(files.scan(folder))
    ]


def _join(folder: str, name: str) -> str:
    return posixpath.join(folder, name) if "://" in folder else str(Path(folder, name))


def _matching(files: Files, pattern: str) -> Iterator[str]:
    """Every file that a pattern means; `**` is any number of folders."""
    root = root_of(pattern)
    if files.kind(root) == "folder":
        yield from _match(files, root, pattern.removeprefix(root).lstrip("/").split("/"))


def _match(files: Files, folder: str, parts: list[str]) -> Iterator[str]:
    here, *rest = parts
    if here != "**":
        fits = _compiled(_segment(here), here)
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
    # One expression for all that follows: a file that fits in two ways comes once.
    fits = _compiled(_translate(rest or ["*"]), "/".join(parts))
    prefix = folder.rstrip("/") + "/"
    for name, unlisted in _below(files, folder):
        below = name.removeprefix(prefix)
        hidden = any(_hidden(part, "") for part in below.split("/"))
        if not hidden and (unlisted or fits(below)):
            yield name


def _compiled(expression: str, glob: str) -> Callable[[str], object]:
    try:
        # A name may hold a newline.
        return re.compile(expression, re.DOTALL).fullmatch
    except re.error as error:
        raise DataError(f"{glob}: not a glob: {error}") from error


def _hidden(name: str, pattern: str) -> bool:
    """As in a shell, a name that begins with a dot must be asked for."""
    return name.startswith(".") and not pattern.startswith(".")


def _translate(parts: list[str]) -> str:
    """An expression for paths below the first `**`.

    >>> bool(re.fullmatch(_translate(["a", "**", "*.jpg"]), "x/a/y/z.jpg"))
    True
    >>> bool(re.fullmatch(_translate(["a", "**", "*.jpg"]), "b/z.jpg"))
    False
    """
    written = "(?:[^/]+/)*"
    for i, part in enumerate(parts):
        if part == "**":
            written += "(?:[^/]+/)*" if i < len(parts) - 1 else ".+"
            continue
        written += _segment(part)
        written += "/" if i < len(parts) - 1 else ""
    return written


def _segment(part: str) -> str:
    """As fnmatch has it, but no character may be a folder's border."""
    written = ""
    for token in re.findall(r"\[!?\]?[^\]]*\]|.", part, re.DOTALL):
        if token == "*":
            written += "[^/]*"
        elif token == "?":
            written += "[^/]"
        elif token.startswith("[") and len(token) > 1:
            written += re.sub(r"^\[!", "[^", token).replace("\\", "\\\\")
        else:
            written += re.escape(token)
    return written

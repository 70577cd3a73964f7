"""What a user named, file by file: a picture, a folder with all below it, a glob.

Always in the same order, with no more in memory than one folder's names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

from service.bulk.files import Files, files_of, full_name, join
from service.errors import DataError

_MAGIC: Final = re.compile(r"[*?\[]")


def walk(given: str, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Full names of the files that `given` means; in a folder, of those that are `wanted`.

    Raises DataError.
    """
    name = full_name(given)
    files = files_of(name)
    kind = files.kind(name)
    if kind == "file":
        yield name
    elif kind == "folder":
        for found in _below(files, name):
            if wanted(found):
                yield found
    elif _MAGIC.search(name):
        yield from _matching(files, name)
    else:
        raise DataError(f"{given}: no such file or folder")


def _below(files: Files, folder: str) -> Iterator[str]:
    for entry in files.scan(folder):
        name = join(folder, entry.name)
        if entry.folder:
            yield from _below(files, name)
        else:
            yield name


def _matching(files: Files, pattern: str) -> Iterator[str]:
    """Every file that a pattern means; `**` is any number of folders."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    # "" and "s3:" are no folders that could be looked into.
    root = "/".join(parts[:first]) or "/"
    if files.kind(root) == "folder":
        yield from _match(files, root, parts[first:])


def _match(files: Files, folder: str, parts: list[str]) -> Iterator[str]:
    here, *rest = parts
    if here != "**":
        fits = re.compile(_segment(here)).fullmatch
        for entry in files.scan(folder):
            if fits(entry.name) and entry.folder == bool(rest) and not _hidden(entry.name, here):
                name = join(folder, entry.name)
                yield from _match(files, name, rest) if rest else [name]
        return
    # One expression for all that follows: a file that fits in two ways comes once.
    fits = re.compile(_translate(rest or ["*"])).fullmatch
    prefix = folder.rstrip("/") + "/"
    for name in _below(files, folder):
        below = name.removeprefix(prefix)
        if fits(below) and not any(_hidden(part, "") for part in below.split("/")):
            yield name


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
    for token in re.findall(r"\[!?\]?[^\]]*\]|.", part):
        if token == "*":
            written += "[^/]*"
        elif token == "?":
            written += "[^/]"
        elif token.startswith("[") and len(token) > 1:
            written += re.sub(r"^\[!", "[^", token).replace("\\", "\\\\")
        else:
            written += re.escape(token)
    return written

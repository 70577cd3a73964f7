"""File names at the border: how outputs write them, and which files no output replaces."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

from service.errors import DataError

_FORMULA: tuple[str, ...] = ("=", "+", "-", "@", "\t", "\r", "\n", "'")
"""Begins of a cell that a spreadsheet computes; the quote, so that one in front is always ours."""

Identity = tuple[int, int]
"""Device and inode: equal for all names of a file, whatever links or letter cases they go by."""


def written(name: str | Path) -> str:
    """Return a file name as JSON, CSV, COCO and Parquet have it, which is valid Unicode.

    A name that is not UTF-8 becomes a `file:` URL (RFC 8089) of its absolute path, with its bytes
    percent-encoded: `file:///data/caf%E9.jpg`.

    >>> written("images/café.jpg")
    'images/café.jpg'
    """
    text = str(name)
    try:
        text.encode()
    except UnicodeEncodeError:
        return Path(text).absolute().as_uri()
    return text


def url_path(name: str) -> str:
    """Return a URL without query and encoding; Label Studio's local files have the path there.

    >>> url_path("https://host/a%20b.jpg?width=9"), url_path("/data/local-files/?d=x%2Fa.jpg")
    ('https://host/a b.jpg', 'x/a.jpg')
    """
    _, local, path = name.partition("/local-files/?d=")
    if not local:
        path = re.split("[?#]", name, maxsplit=1)[0] if "://" in name else name
    return unquote(path)


def one_line(text: str) -> str:
    r"""Return text with every character that does not print escaped, for a terminal or a log.

    >>> print(one_line("a\nb\x1b[2J"))
    a\nb\x1b[2J
    """
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def csv_cell(text: str) -> str:
    """Return text for a CSV file: with a quote in front if a spreadsheet would compute it.

    Text that begins with a quote gets one too, so that taking one away gives the text back.

    >>> csv_cell("=1+1.jpg"), csv_cell("a.jpg")
    ("'=1+1.jpg", 'a.jpg')
    """
    return f"'{text}" if text.startswith(_FORMULA) else text


def identity(path: Path) -> Identity | None:
    """Return which file a path leads to; None if it leads to none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def refuse_to_replace(targets: Iterable[Path], sources: Iterable[Path]) -> None:
    """Raise DataError where a target is a source, or a file below a source that is a folder."""
    existing = {found: target for target in targets if (found := identity(target)) is not None}
    if not existing:
        return
    for source in sources:
        for file in _files(source):
            found = identity(file)
            if found is not None and found in existing:
                raise DataError(
                    f"{existing[found]}: writing it would replace {file}, which this command "
                    "reads; name another place"
                )


def _files(source: Path) -> Iterator[Path]:
    yield source
    if source.is_dir():
        for folder, _, names in os.walk(source):
            yield from (Path(folder, name) for name in names)

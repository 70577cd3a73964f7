"""Splits: their names, the split by hash, leaks between splits."""

from __future__ import annotations

import filecmp
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from model_export.data.problems import Kind, Problem
from service.errors import DataError

_HELD_OUT: Final = 5
_ALIASES: Final = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_AROUND: Final = re.compile(r"^instances[_-]|[_-]annotations$|[_-]?\d+$")


def split_called(name: str) -> str | None:
    """Return the split that a file or folder is named after, or None.

    >>> split_called("instances_train2017"), split_called("valid"), split_called("labels")
    ('train', 'val', None)
    """
    return _ALIASES.get(_AROUND.sub("", _AROUND.sub("", name.lower())))


def split_by_hash(root: Path, stems: Iterable[str], split: str, *, unsplit: str) -> frozenset[str]:
    """Return the file stems of a split by hash: a fifth is "val", the rest "train".

    Adding images moves no image from one side to the other, tiny folders aside. `unsplit`
    says what would have chosen the splits. Raises DataError if none is left.
    """
    if split not in ("train", "val"):
        raise DataError(f"{root}: no split {split!r}; without {unsplit} there are train and val")
    digest = {stem: int(hashlib.sha256(os.fsencode(stem)).hexdigest(), 16) for stem in stems}
    held_out = {stem for stem in digest if digest[stem] % _HELD_OUT == 0}
    if len(digest) >= 2 and len(held_out) in (0, len(digest)):
        held_out ^= {min(digest, key=digest.__getitem__)}
    members = frozenset(stem for stem in digest if (stem in held_out) == (split == "val"))
    if not members:
        raise DataError(
            f"{root}: no image falls into the split {split!r}; at least 2 annotated "
            f"images are needed, {len(digest)} found"
        )
    return members


def leaks(
    members: Mapping[Path, tuple[Path, int | None]], training: Sequence[Path]
) -> list[Problem]:
    """Return a problem for each image of a split that train has too.

    `members` maps an image to the file and line that put it into the split. Images are the same
    if their paths are, or their names and their bytes.
    """
    paths = {path.resolve() for path in training}
    named: dict[str, list[Path]] = {}
    for path in training:
        named.setdefault(path.name, []).append(path)
    problems = []
    for image, (file, line) in members.items():
        if image.resolve() in paths:
            what = f"{image.name} is in train too"
        else:
            twin = next((path for path in named.get(image.name, ()) if _same(path, image)), None)
            if twin is None:
                continue
            what = f"{image.name} is the same image as {twin} of train"
        what += "; take it out of one of them"
        problems.append(Problem(file, line, what, fatal=False, kind=Kind.LEAKED))
    return problems


def _same(one: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False

"""Splits: their names, the split by hash, folds of cross-validation, leaks between splits."""

from __future__ import annotations

import filecmp
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model_export.data.problems import Kind, Problem
from service.errors import DataError

FOLDS: Final = 5
"""Folds of cross-validation, where there are as many images."""

_HELD_OUT: Final = 5
_NUMBER: Final = re.compile(r"[\s._-]*\(?\d+\)?$")
_IMAGE_FOLDERS: Final = frozenset(["images", "jpegimages", "default", "data"])
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


def split_by_hash(
    root: Path,
    images: Iterable[Path],
    split: str,
    *,
    problems: Sequence[Problem],
    unsplit: str,
    classes: Iterable[str],
) -> tuple[frozenset[Path], list[Problem]]:
    """(the images of a split by hash: a fifth is "val", the rest "train"; `problems` and a note).

    Images of one folder whose names differ in the number at their end alone, as those of a video's
    frames do, are a sequence and stay together. It is split image by image all the same, with a
    note, if it has more than half of the images, or the name of one of `classes`: whole, it would
    leave too few to train on, or none of its class. Adding images moves none from one side to the
    other unless a sequence gets or loses that share, or val would be empty or more than half.
    `unsplit` says what would have chosen the splits. Raises DataError if no image is left, where
    no problem is fatal already.
    """
    if split not in ("train", "val"):
        raise DataError(f"{root}: no split {split!r}; without {unsplit} there are train and val")
    paths = sorted(frozenset(images))
    names = {path: _sequence(root, path) for path in paths}
    cut = _cut(names.values(), classes)
    units: dict[str, list[Path]] = defaultdict(list)
    for path, name in names.items():
        units[path.stem if name in cut else name].append(path)
    digest = {name: int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16) for name in units}
    held_out = {name for name in digest if digest[name] % _HELD_OUT == 0}
    if len(units) > 1 and not 0 < 2 * sum(len(units[name]) for name in held_out) <= len(paths):
        held_out = {min(digest, key=digest.__getitem__)}
    chosen = [name for name in units if (name in held_out) == (split == "val")]
    if not chosen and not any(problem.fatal for problem in problems):
        raise DataError(
            f"{root}: no image falls into the split {split!r}; at least 2 annotated "
            f"images are needed, {len(units)} found"
        )
    members = frozenset(path for name in chosen for path in units[name])
    parts = [[path for path in paths if names[path] == name] for name in sorted(cut)]
    return members, [*problems, *([_cut_note(root, parts, len(paths), unsplit)] if parts else [])]


def folds_of(images: Sequence[Path], classes: Iterable[str]) -> NDArray[np.int64]:
    """(I,) the fold of each image by a hash of its name, whatever the order and the folder.

    Sequences stay together, but for those that `split_by_hash` splits; where that leaves fewer than
    `FOLDS` to part, each image is on its own. The folds are of equal size as far as sequences
    allow; there are fewer than `FOLDS` for fewer images.
    """
    root = Path(os.path.commonpath([path.parent for path in images])) if images else Path()
    names = [_sequence(root, path) for path in images]
    for cut in (_cut(names, classes), frozenset(names)):
        units: dict[str | int, list[int]] = defaultdict(list)
        for index, name in enumerate(names):
            units[index if name in cut else name].append(index)
        if len(units) >= FOLDS:
            break
    order = []
    for unit, members in units.items():
        first = images[members[0]]
        hashed = first.name if len(members) == 1 else str(unit)
        order.append((hashlib.sha256(os.fsencode(hashed)).digest(), first, members))
    folds, sizes = np.empty(len(images), dtype=np.int64), [0] * FOLDS
    for _, _, members in sorted(order):
        smallest = sizes.index(min(sizes))
        folds[members] = smallest
        sizes[smallest] += len(members)
    return folds


def _cut(names: Collection[str], classes: Iterable[str]) -> frozenset[str]:
    """Return the sequences whose images are parted; `names` has each image's sequence."""
    called = frozenset(name.casefold() for name in classes)
    return frozenset(
        name
        for name, count in Counter(names).items()
        if count > 1
        and (2 * count > len(names) or not called.isdisjoint(name.casefold().split("/")))
    )


def _sequence(root: Path, image: Path) -> str:
    """Return the name of an image, without the number at its end and then with its folders.

    The folders that formats name are left out: the split is the same in every format.
    """
    number = _NUMBER.search(image.stem)
    if number is None:
        return image.stem
    folders = image.relative_to(root).parts[:-1]
    own = [part for part in folders if part.lower() not in _IMAGE_FOLDERS]
    return "/".join([*own, image.stem[: number.start()]])


def _cut_note(root: Path, sequences: Sequence[Sequence[Path]], total: int, unsplit: str) -> Problem:
    largest = max(sequences, key=len)
    reason = (
        "has more than half of all images" if 2 * len(largest) > total else "is named as a class"
    )
    others = f" (and {len(sequences) - 1} more such sequences)" if len(sequences) > 1 else ""
    what = (
        f"{len(largest)} images, {largest[0].name} to {largest[-1].name}{others}, are numbered as "
        f"one sequence, which {reason}: split image by image. If they are frames of one video, "
        "train and val have almost the same images, and AP on val says little; choose the sides "
        f"yourself, with {unsplit} or with folders train/ and val/"
    )
    return Problem(root, None, what, fatal=False, kind=Kind.SEQUENCE)


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

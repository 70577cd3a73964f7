"""The ids of a COCO annotation file, for results that are compared with it."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeGuard

import numpy as np

from service.contents import is_lfs_pointer
from service.errors import DataError, shown, shown_list
from service.filenames import url_path, written
from service.runtime.detector import Detections

_PLACEHOLDER: Final = re.compile(r"__background__|class_\d+")
"""Names of the numbers that torchvision's models count as classes and never output."""
_FORMS: Final[Sequence[Callable[[str], str]]] = (
    str,
    str.casefold,
    lambda name: PurePosixPath(name.casefold()).stem,
)
"""What of file names is compared, the most certain first."""

CocoId = int | float | str
"""An id as the file has it: pycocotools compares them as they are."""


@dataclass(frozen=True, slots=True)
class CocoIds:
    """Ids of images, by path, and of classes, by label."""

    images: Mapping[Path, CocoId]
    categories: Sequence[CocoId | None]
    """None for a placeholder, which no detection has."""
    unlisted: Sequence[Path] = ()
    """Images without an entry in the file."""
    unmatched: Sequence[str] = ()
    """File names of the entries without an image."""
    notes: Sequence[str] = ()
    """What else changes a comparison."""

    def rows(self, image: Path, found: Detections) -> list[dict[str, Any]]:
        """Return an image's COCO results. Raises DataError for a detection without a category.

        The numbers are not rounded: rounded scores would tie, and ties change AP.
        """
        boxes, scores = found.boxes.astype(np.float64), found.scores.astype(np.float64)
        rows = []
        for label, score, (x1, y1, x2, y2) in zip(
            found.labels.tolist(), scores.tolist(), boxes.tolist(), strict=True
        ):
            category = self.categories[label]
            if category is None:
                raise DataError(
                    f"{written(image)}: a detection is of class {label}, which the annotation "
                    "file has no category for; name the model's classes as the file does"
                )
            rows.append(
                {
                    "image_id": self.images[image],
                    "category_id": category,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": score,
                    "file_name": written(image),
                }
            )
        return rows


def read_ids(
    path: Path,
    classes: Sequence[str],
    images: Sequence[Path],
    *,
    rename: Callable[[str], str | None] = lambda name: name,
) -> CocoIds:
    """Return the ids that an annotation file has for `classes`, by name, and for `images`.

    An image is found by its file name, or the one in a URL, if need be in other case or with
    another suffix, and where several entries have that name by its folders, too. `rename` gives the
    class of a category.
    Raises DataError where an id is missing or not certain.
    """
    tables = _read(path)
    named = _named(path, tables, "categories", "name")
    categories = _categories(path, tables, named, classes, rename)
    entries = dict(_named(path, tables, "images", "file_name"))
    stems = {_FORMS[-1](_parts(image.name)[0]) for image in images}
    places = {key: _place(name, stems) for key, name in entries.items()}
    found, unlisted = _match(path, entries, places, images)
    if not found:
        raise DataError(
            f"{path}: lists none of the {len(images)} images ({shown_list(image_names(images))}); "
            f"its own are {shown_list(entries.values())}"
        )
    matched = set(found.values())
    unmatched = [name for key, name in entries.items() if key not in matched]
    notes = list(_notes(tables, entries, dict(named), categories))
    renamed = [key for image, key in found.items() if _parts(image.name) != places[key][-1:]]
    if renamed:
        names = shown_list([entries[key] for key in renamed])
        notes.append(f"{len(renamed)} images are there with other case or suffix: {names}")
    return CocoIds(found, categories, unlisted, unmatched, [f"{path}: {each}" for each in notes])


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = path.read_bytes()
        if is_lfs_pointer(content):
            raise DataError(f"{path}: a Git LFS pointer, not the file: run git lfs pull")
        tables = json.loads(content)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a COCO annotation file: not JSON ({error})") from error
    if not isinstance(tables, dict):
        raise DataError(
            f"{path}: not a COCO annotation file: an object with 'images' and 'categories' is "
            f"expected, found {shown(tables)}"
        )
    return tables


def _named(
    path: Path, tables: Mapping[str, Any], table: str, field: str
) -> list[tuple[CocoId, str]]:
    """Return id and name of each entry of a table."""
    entries = tables.get(table)
    if not isinstance(entries, list):
        raise DataError(
            f"{path}: not a COCO annotation file: it has no list {table!r}, but "
            f"{shown_list(tables)}"
        )
    named = []
    for number, entry in enumerate(entries):
        key, name = (entry.get(each) if isinstance(entry, dict) else None for each in ("id", field))
        if not _is_id(key):
            raise DataError(
                f"{path}: {table}[{number}] has the id {shown(key)}; it must be a whole number or "
                "text"
            )
        if not isinstance(name, str):
            raise DataError(f"{path}: {table}[{number}] has no {field!r}; add it")
        named.append((key, name))
    repeated = [key for key, count in Counter(key for key, _ in named).items() if count > 1]
    if repeated:
        raise DataError(
            f"{path}: several entries of {table!r} have the id {repeated[0]}; number them anew"
        )
    return named


def _is_id(key: object) -> TypeGuard[CocoId]:
    whole = key.is_integer() if isinstance(key, float) else isinstance(key, int | str)
    return whole and not isinstance(key, bool)


def _categories(
    path: Path,
    tables: Mapping[str, Any],
    named: Sequence[tuple[CocoId, str]],
    classes: Sequence[str],
    rename: Callable[[str], str | None],
) -> list[CocoId | None]:
    """Return the category's id of each class."""
    by_class = defaultdict(list)
    for key, name in named:
        by_class[rename(name.strip())].append(key)
    missing = [
        each for each in classes if each not in by_class and not _PLACEHOLDER.fullmatch(each)
    ]
    if missing:
        raise DataError(
            f"{path}: has no category for the model's {shown_list(missing)}; its categories are "
            f"{shown_list([each for each in by_class if each is not None])}"
        )
    used = _used(tables, "category_id")
    ids: list[CocoId | None] = []
    for each in classes:
        # Some tools list the name of the whole data set, of which no object is, as a category too.
        keys = [key for key in by_class[each] if key in used] or by_class[each][:1]
        if len(keys) > 1:
            raise DataError(
                f"{path}: the categories {', '.join(map(str, keys))} are all {each!r}; results "
                "can have one of them: join them"
            )
        ids.append(keys[0] if keys else None)
    return ids


def _annotations(tables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the annotations; files of images to be detected on have none."""
    found = tables.get("annotations")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _used(tables: Mapping[str, Any], field: str) -> set[CocoId]:
    """Return the ids that annotations refer to."""
    return {each[field] for each in _annotations(tables) if _is_id(each.get(field))}


def _notes(
    tables: Mapping[str, Any],
    images: Mapping[CocoId, str],
    categories: Mapping[CocoId, str],
    chosen: Sequence[CocoId | None],
) -> Iterator[str]:
    """Yield what pycocotools counts in another way than `evaluate`."""
    own = [each.get("id") for each in _annotations(tables)]
    if None in own or 0 in own or len(set(map(repr, own))) < len(own):
        yield (
            "its annotations have ids that are 0, missing or repeated, which pycocotools miscounts "
            "or refuses; number them from 1"
        )
    used = _used(tables, "category_id")
    if used - categories.keys() or _used(tables, "image_id") - images.keys():
        yield (
            "its annotations refer to images or categories by ids that those do not have, or have "
            "as text and not as numbers, and pycocotools leaves them out; write both alike"
        )
    others = [name for key, name in categories.items() if key in used and key not in chosen]
    if others:
        yield (
            f"it has objects of {shown_list(others)}, of which there are no detections: leave "
            "those categories out of a comparison (params.catIds of pycocotools)"
        )


def _match(
    path: Path,
    entries: Mapping[CocoId, str],
    places: Mapping[CocoId, tuple[str, ...]],
    images: Sequence[Path],
) -> tuple[dict[Path, CocoId], list[Path]]:
    """Return the entry's id of each image, and the images without one."""
    by_place, by_stem = defaultdict(list), defaultdict(list)
    for key, parts in places.items():
        if parts:
            by_place[parts].append(key)
            by_stem[_FORMS[-1](parts[-1])].append((key, parts))
    claims = defaultdict(list)
    unlisted = []
    for image in images:
        own = _parts(str(image.absolute()))
        whole = next((own[at:] for at in range(len(own)) if own[at:] in by_place), None)
        if whole is not None:
            best, keys = (0, True, len(whole)), by_place[whole]
        else:
            rated = [(_likeness(own, parts), key) for key, parts in by_stem[_FORMS[-1](own[-1])]]
            best = max((each for each, _ in rated), default=(0, False, 0))
            keys = [key for each, key in rated if each == best]
        if len(keys) > 1:
            raise DataError(
                f"{written(image)}: {len(keys)} entries of {path} may be this image: "
                f"{shown_list([entries[key] for key in keys])}; give their folders the same names"
            )
        if keys:
            claims[keys[0]].append((best, image))
        else:
            unlisted.append(image)
    found = {}
    for key, claimed in claims.items():
        # The image that is most like the entry; the others are not in the file.
        most = max(each for each, _ in claimed)
        alike = [image for each, image in claimed if each == most]
        if len(alike) > 1:
            raise DataError(
                f"{path}: the entry {entries[key]!r} may be any of {len(alike)} images: "
                f"{shown_list(image_names(alike))}; give one of them, or write the folders into "
                "the file"
            )
        found[alike[0]] = key
        unlisted += [image for _, image in claimed if image is not alike[0]]
    return found, unlisted


def _likeness(image: tuple[str, ...], entry: tuple[str, ...]) -> tuple[int, bool, int]:
    """Return how sure it is that an image is an entry: larger is surer.

    By the name, then whether all of the entry's folders are the image's, then by how many are.
    """
    step = next(n for n, form in enumerate(_FORMS) if form(image[-1]) == form(entry[-1]))
    folders = zip(reversed(image[:-1]), reversed(entry[:-1]), strict=False)
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], folders))
    return -step, alike == len(entry) - 1, alike + 1


def _place(name: str, stems: Set[str]) -> tuple[str, ...]:
    """Return the parts of an entry's file name, of a URL's path where only that is an image's."""
    parts = _parts(name.replace("\\", "/"))
    if parts and _FORMS[-1](parts[-1]) in stems:
        return parts
    return _parts(url_path(name))


def _parts(path: str) -> tuple[str, ...]:
    # macOS writes accents as characters of their own.
    return PurePosixPath(unicodedata.normalize("NFC", path)).parts


def image_names(images: Sequence[Path]) -> list[str]:
    """Return the file names with the folder that each is in: whole paths would be cut short."""
    return [written("/".join(each.parts[-2:])) for each in images]

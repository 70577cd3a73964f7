"""The ids of a COCO annotation file, for results that are compared with it."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from service.contents import is_lfs_pointer
from service.errors import DataError, shown, shown_list
from service.filenames import written
from service.runtime.detector import Detections

_PLACEHOLDER: Final = re.compile(r"__background__|class_\d+")
"""Names of the numbers that torchvision's models count as classes and never output."""


@dataclass(frozen=True, slots=True)
class CocoIds:
    """Ids of images, by path, and of classes, by label."""

    images: Mapping[Path, int]
    categories: Sequence[int | None]
    """None for a placeholder, which no detection has."""
    unlisted: Sequence[Path] = ()
    """Images without an entry in the file."""
    unmatched: Sequence[str] = ()
    """File names of the entries without an image."""
    note: str | None = None
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

    An image is found by its file name, and where several entries have that name by its folders,
    too. `rename` gives the class of a category. Raises DataError where an id is missing or not
    certain.
    """
    tables = _read(path)
    categories = _categories(path, tables, classes, rename)
    entries = dict(_named(path, tables, "images", "file_name"))
    found, unlisted = _match(path, entries, images)
    if not found:
        raise DataError(
            f"{path}: lists none of the {len(images)} images ({shown_list(_names(images))}); its "
            f"own are {shown_list(entries.values())}"
        )
    matched = set(found.values())
    unmatched = [name for key, name in entries.items() if key not in matched]
    note = None
    if any(each.get("id") == 0 for each in _annotations(tables)):
        note = (
            f"{path}: an annotation has the id 0, which pycocotools takes for none: it counts that "
            "object as missed; number the annotations from 1"
        )
    return CocoIds(found, categories, unlisted, unmatched, note)


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


def _named(path: Path, tables: Mapping[str, Any], table: str, field: str) -> list[tuple[int, str]]:
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
        if not isinstance(key, int) or isinstance(key, bool):
            raise DataError(
                f"{path}: {table}[{number}] has the id {shown(key)}; the ids of COCO results are "
                "whole numbers: number the file's images and categories, and its annotations alike"
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


def _categories(
    path: Path,
    tables: Mapping[str, Any],
    classes: Sequence[str],
    rename: Callable[[str], str | None],
) -> list[int | None]:
    """Return the category's id of each class."""
    by_class = defaultdict(list)
    for key, name in _named(path, tables, "categories", "name"):
        by_class[rename(name.strip())].append(key)
    missing = [
        each for each in classes if each not in by_class and not _PLACEHOLDER.fullmatch(each)
    ]
    if missing:
        raise DataError(
            f"{path}: has no category for the model's {shown_list(missing)}; its categories are "
            f"{shown_list([each for each in by_class if each is not None])}"
        )
    used = [each.get("category_id") for each in _annotations(tables)]
    ids: list[int | None] = []
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


def _match(
    path: Path, entries: Mapping[int, str], images: Sequence[Path]
) -> tuple[dict[Path, int], list[Path]]:
    """Return the entry's id of each image, and the images without one."""
    places = {key: _parts(name.replace("\\", "/")) for key, name in entries.items()}
    by_name = defaultdict(list)
    for key, parts in places.items():
        by_name[parts[-1] if parts else ""].append(key)
    claims = defaultdict(list)
    unlisted = []
    for image in images:
        own = _parts(str(image.absolute()))
        keys = by_name.get(own[-1], [])
        exact = [key for key in keys if own[-len(places[key]) :] == places[key]]
        if exact:
            longest = max(len(places[key]) for key in exact)
            keys = [key for key in exact if len(places[key]) == longest]
        if len(keys) > 1:
            raise DataError(
                f"{written(image)}: {len(keys)} entries of {path} may be this image: "
                f"{shown_list([entries[key] for key in keys])}; give their folders the same names"
            )
        if keys:
            claims[keys[0]].append((not exact, image))
        else:
            unlisted.append(image)
    found = {}
    for key, claimed in claims.items():
        # An image in the entry's own folders comes before one that has only its name.
        best = [image for rank, image in claimed if rank == min(claimed)[0]]
        if len(best) > 1:
            raise DataError(
                f"{path}: the entry {entries[key]!r} may be any of {len(best)} images: "
                f"{shown_list(_names(best))}; give one of them, or write the folders into the file"
            )
        found[best[0]] = key
        unlisted += [image for _, image in claimed if image is not best[0]]
    return found, unlisted


def _parts(path: str) -> tuple[str, ...]:
    # macOS writes accents as characters of their own.
    return PurePosixPath(unicodedata.normalize("NFC", path)).parts


def _names(images: Sequence[Path]) -> list[str]:
    return [written(each) for each in images]

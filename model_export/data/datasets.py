"""Load labelled folders of any format as samples; bad data is found here, before training.

Boxes are x1, y1, x2, y2 in pixels of the upright image, continuous edges from 0 to the
image's side: VOC's xmin..xmax are taken as they are written.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from model_export.data.annotations import SplitAnnotations
from model_export.data.folder import LabelledFolder
from model_export.data.formats import choose_format
from model_export.data.problems import (
    LISTED_PROBLEMS,
    Kind,
    Problem,
    describe_all,
    refuse_fatal,
)
from model_export.data.samples import (
    CLIP_TOLERANCE,
    MIN_SIDE,
    ClassSelection,
    Sample,
    SampleReader,
    nearest,
)
from service.errors import DataError

__all__ = ["CLIP_TOLERANCE", "MIN_SIDE", "Dataset", "Sample", "load", "split_names"]

_THREADS: Final = 4
_NAMED: Final = 12


@dataclass(frozen=True, slots=True)
class Dataset:
    """One split of a labelled folder."""

    root: Path
    split: str
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    """None of them fatal."""
    labels: tuple[Path, ...] = ()
    """The label files of the samples."""


def load(
    root: Path | LabelledFolder,
    split: str,
    *,
    format: str = "auto",  # noqa: A002 - what the option is called
    classes: Sequence[str] | None = None,
    keep: Sequence[str] | None = None,
    remap: Mapping[str, str] | None = None,
) -> Dataset:
    """Read one split of a labelled folder in any of the formats.

    `remap` gives classes new names, `keep` leaves out the objects of all others. Without `classes`
    they are `keep`, or else the names found in the train split (in the whole folder where the
    split is by hash), whichever split is read, by falling count and then by name: the same in
    every format. Images without objects are negatives. A LabelledFolder that several splits are
    read from is listed, and its files parsed, once. Raises DataError with every problem that stops
    training.
    """
    folder = root if isinstance(root, LabelledFolder) else LabelledFolder(root)
    root = folder.root
    choice = ClassSelection(None if keep is None else tuple(keep), dict(remap or {}))
    for name in keep or ():
        if classes is not None and name not in classes:
            raise DataError(f"{root}: {name!r} is not among the classes {', '.join(classes)}")
    reading = choose_format(folder, format).read(folder, split, naming=classes is None)
    problems = list(reading.problems)
    if classes is None:
        classes = _find_classes(root, reading, choice)
    readers = [SampleReader(each, tuple(classes), choice) for each in reading.images]
    with ThreadPoolExecutor(_THREADS) as pool:
        samples = list(pool.map(SampleReader.read, readers))
    for reader in readers:
        problems += reader.problems
    problems += [*_left_out(root, readers), *_counted(root, readers)]
    problems += _similar(root, classes)
    refuse_fatal(problems, what=f"{root}, split {split!r}")
    kept = tuple(sample for sample in samples if sample is not None)
    if not kept:
        raise DataError(
            f"{root}: every image of the split {split!r} is left out\n{describe_all(problems)}"
        )
    if not classes:
        what = f"{root}: no object is labelled in the train split; label some"
        raise DataError("\n".join([what, *map(str, problems[:LISTED_PROBLEMS])]))
    used = {sample.path for sample in kept}
    labels = dict.fromkeys(each.annotation for each in reading.images if each.image in used)
    return Dataset(
        root,
        split,
        tuple(classes),
        kept,
        tuple(problems),
        tuple(path for path in labels if path.exists()),
    )


def split_names(
    root: Path | LabelledFolder,
    *,
    format: str = "auto",  # noqa: A002 - as above
) -> tuple[str, ...]:
    """Return the splits of a labelled folder. Raises DataError."""
    folder = root if isinstance(root, LabelledFolder) else LabelledFolder(root)
    return choose_format(folder, format).split_names(folder)


def _find_classes(root: Path, reading: SplitAnnotations, choice: ClassSelection) -> tuple[str, ...]:
    """Return the classes of the labels. Raises DataError if a selected one is missing."""
    written = reading.names
    # Where annotations could not be read the names are not all there, and that is what to report.
    sound = not any(problem.fatal for problem in reading.problems)
    if sound:
        for name in choice.remap:
            _check_there(root, name, written, what="the class to rename")
    counts = choice.count(written)
    if choice.keep is None:
        return tuple(sorted(counts, key=lambda name: (-counts[name], name)))
    if sound:
        renamed = ClassSelection(None, choice.remap).count(written)
        for name in choice.keep:
            _check_there(root, name, renamed, what="the class to keep")
    return choice.keep


def _check_there(root: Path, name: str, counts: Mapping[str, int], *, what: str) -> None:
    if name in counts:
        return
    hint = nearest(name, counts)
    known = ", ".join(sorted(counts, key=lambda each: -counts[each])[:_NAMED]) or "none"
    meant = f"; did you mean {hint!r}?" if hint else ""
    raise DataError(
        f"{root}: no object of the train split is of {what}, {name!r}; there are {known}{meant}"
    )


def _counted(root: Path, readers: Sequence[SampleReader]) -> Iterator[Problem]:
    """Count the boxes that were changed or dropped, and those that evaluation does not count."""
    rotated = [(each.name, each.rotated) for each in readers if each.rotated]
    doubled = [(each.name, each.duplicates) for each in readers if each.duplicates]
    difficult = [(each.name, each.difficult) for each in readers if each.difficult]
    ignored = "trained on; in evaluation neither they nor their detections count"
    texts = (
        (Kind.ROTATED, rotated, "boxes have a rotation", "the upright box around each is used"),
        (Kind.DUPLICATE, doubled, "duplicates of boxes (same class, same edges)", "dropped"),
        (Kind.DIFFICULT, difficult, "objects are marked difficult", ignored),
    )
    for kind, found, what, becomes in texts:
        if found:
            count = sum(number for _, number in found)
            text = f"{count} {what}, the first in {found[0][0]}: {becomes}"
            yield Problem(root, None, text, fatal=False, kind=kind)


def _similar(root: Path, classes: Sequence[str]) -> Iterator[Problem]:
    """Point out classes that differ by case or white space alone."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault("".join(name.split()).casefold(), []).append(name)
    for first, *others in alike.values():
        if others:
            options = " ".join(f"--remap {shlex.quote(f'{each}={first}')}" for each in others)
            what = (
                f"the classes {', '.join(map(repr, [first, *others]))} differ by case or space "
                f"alone; if they are one, join them: {options}"
            )
            yield Problem(root, None, what, fatal=False, kind=Kind.SIMILAR)


def _left_out(root: Path, readers: Sequence[SampleReader]) -> list[Problem]:
    counts: Counter[str] = Counter()
    for reader in readers:
        counts.update(reader.left_out)
    if not counts:
        return []
    listed = ", ".join(f"{number} {name}" for name, number in counts.most_common(_NAMED))
    if len(counts) > _NAMED:
        listed += f", and of {len(counts) - _NAMED} classes more"
    emptied = sum(reader.emptied for reader in readers)
    what = (
        f"{counts.total()} objects of classes that are not used left out ({listed}); {emptied} "
        "images have no other and count as images without objects"
    )
    return [Problem(root, None, what, fatal=False, kind=Kind.UNUSED_CLASS)]

"""What became of every file below a labelled folder: used, or named with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from model_export.data.datasets import Dataset
from model_export.data.folder import IMAGES, NOT_READ, LabelledFolder
from model_export.data.formats import choose_format
from model_export.data.splits import split_called
from service.errors import DataError

_NAMED: Final = 3
_HIDDEN: Final = "hidden, a name begins with a dot"
_NO_SPLIT: Final = "not labelled, or in no split"
_NO_IMAGE: Final = "of no image in a split"


@dataclass(frozen=True, slots=True)
class FileCount:
    """The images, or the label files, below a folder: `used` + those not used = `found`."""

    what: str
    used: int
    not_used: Mapping[str, tuple[Path, ...]]
    """By reason, each file once."""

    @property
    def found(self) -> int:
        """The number of files."""
        return self.used + sum(map(len, self.not_used.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        listed = {reason: [str(path) for path in paths] for reason, paths in self.not_used.items()}
        return {"found": self.found, "used": self.used, "not_used": listed}

    def __str__(self) -> str:
        parts = [f"{self.what}: {self.found} found, {self.used} used"]
        for reason, paths in self.not_used.items():
            named = ", ".join(path.name for path in paths[:_NAMED])
            more = ", ..." if len(paths) > _NAMED else ""
            parts.append(f"{len(paths)} {reason} ({named}{more})")
        return "; ".join(parts)


def account(
    folder: LabelledFolder,
    datasets: Sequence[Dataset],
    *,
    format: str = "auto",  # noqa: A002 - what the option is called
) -> tuple[FileCount, FileCount]:
    """Return the counts of images and of label files, given all splits that were read."""
    chosen = choose_format(folder, format)
    reasons: dict[Path, str] = {}
    for problem in (each for dataset in datasets for each in dataset.problems):
        for path in (problem.file, *problem.files):
            reasons.setdefault(path, problem.kind.value)
    read = {dataset.split for dataset in datasets}
    other_labels: dict[Path, str] = {}
    for split in chosen.split_names(folder):
        if split in read or split_called(split) is None:
            continue
        try:
            reading = chosen.read(folder, split, naming=False)
        except DataError:
            continue
        for each in reading.images:
            reasons.setdefault(each.image, f"of the split {split!r}")
            other_labels.setdefault(each.annotation, f"of the split {split!r}")
    everything = (*folder.files, *folder.hidden)
    images = {path for path in everything if path.suffix.lower() in IMAGES}
    labels = {*chosen.label_files(folder, everything)}
    used_images = {sample.path for dataset in datasets for sample in dataset.samples}
    used_labels = {path for dataset in datasets for path in dataset.labels}
    return (
        _count("images", images, used_images, reasons, _NO_SPLIT, folder),
        _count("label files", labels, used_labels, other_labels | reasons, _NO_IMAGE, folder),
    )


def _count(
    what: str,
    found: set[Path],
    used: set[Path],
    reasons: Mapping[Path, str],
    otherwise: str,
    folder: LabelledFolder,
) -> FileCount:
    hidden = set(folder.hidden)
    not_used: dict[str, list[Path]] = {}
    for path in sorted(found - used):
        if path in hidden:
            reason = _HIDDEN
        elif path.suffix.lower() in NOT_READ:
            reason = f"not read ({path.suffix.lower()})"
        else:
            reason = reasons.get(path, otherwise)
        not_used.setdefault(reason, []).append(path)
    return FileCount(what, len(used), {reason: tuple(paths) for reason, paths in not_used.items()})

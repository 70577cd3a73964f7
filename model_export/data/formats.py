"""The formats of labelled folders, and their detection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, Protocol

from model_export.data import coco, voc, yolo
from model_export.data.annotations import SplitAnnotations
from model_export.data.folder import LabelledFolder
from service.errors import DataError

FormatName = Literal["auto", "voc", "coco", "yolo"]

_LISTED: Final = 12


class Format(Protocol):
    """Interface of a module that reads a format."""

    LOOKED_FOR: str
    """Description of the files that mark the format."""

    def evidence(self, folder: LabelledFolder) -> str | None:
        """Return the files that indicate the format, or None."""

    def label_files(self, folder: LabelledFolder, paths: Iterable[Path]) -> Sequence[Path]:
        """Return those of a folder's files that hold labels, used or not."""

    def split_names(self, folder: LabelledFolder) -> tuple[str, ...]:
        """Return the names of the splits. Raises DataError."""

    def read(self, folder: LabelledFolder, split: str, *, naming: bool) -> SplitAnnotations:
        """Read one split; `naming`: also count the classes. Raises DataError."""


_FORMATS: Final[dict[str, Format]] = {"voc": voc, "coco": coco, "yolo": yolo}


def choose_format(folder: LabelledFolder, name: str) -> Format:
    """Return the format called `name`, or the one that a folder is in if that is "auto".

    Raises DataError if nothing or more than one format fits it.
    """
    if name != "auto":
        return _FORMATS[name]
    found = {key: each.evidence(folder) for key, each in _FORMATS.items()}
    fitting = [key for key, what in found.items() if what is not None]
    if len(fitting) == 1:
        return _FORMATS[fitting[0]]
    if fitting:
        seen = "; ".join(f"{key}: {found[key]}" for key in fitting)
        raise DataError(
            f"{folder.root}: labelled in more than one format ({seen}); choose one by --format"
        )
    below = [sub for sub in folder.folders(folder.root) if _fits(sub)]
    if below:
        raise DataError(
            f"{folder.root}: no annotations here, but in {', '.join(map(str, below[:3]))}; name one"
        )
    looked_for = "; ".join(each.LOOKED_FOR for each in _FORMATS.values())
    raise DataError(
        f"{folder.root}: no annotations here; looked for {looked_for}; "
        f"found {', '.join(_contents(folder.root))}"
    )


def _fits(root: Path) -> bool:
    folder = LabelledFolder(root)
    return any(each.evidence(folder) for each in _FORMATS.values())


def _contents(root: Path) -> Iterator[str]:
    """Return a short description of a folder: its folders by name, its files counted by suffix."""
    paths = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    folders = [f"{path.name}/" for path in paths if path.is_dir()]
    kinds = Counter(path.suffix.lower() or "without suffix" for path in paths if path.is_file())
    words = folders + [f"{count} files {kind}" for kind, count in kinds.most_common()]
    yield from words[:_LISTED] or ["nothing"]
    if len(words) > _LISTED:
        yield f"{len(words) - _LISTED} more"

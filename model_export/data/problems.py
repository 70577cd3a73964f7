"""Problems of labelled data, each with its place and the remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from service.errors import DataError

LISTED_PROBLEMS: Final = 20
"""Number of problems that an error lists; the rest are counted."""


class Kind(StrEnum):
    """Kind of a problem; the value is its name in counts."""

    UNUSABLE = "unusable"
    UNKNOWN_CLASS = "unknown class"
    NO_AREA = "box without area, dropped"
    OUTSIDE = "box outside the image, dropped"
    CLIPPED = "box clipped to the image"
    WRONG_SIZE = "image left out, its size is not the labelled one"
    UNLABELLED = "image left out, it has no annotation"
    NOT_READ = "file left out, its format is not read"
    FOUND = "note on images found otherwise than they are named"
    ROTATED = "note on boxes with a rotation"
    DUPLICATE = "duplicate box, dropped"
    SIMILAR = "note on classes of similar names"
    TWICE = "listed twice, taken once"
    LEAKED = "image of this split that is in train too"
    UNUSED_CLASS = "note on classes that are not used"
    CROWD = "note on regions that are no single object"
    DIFFICULT = "note on objects marked difficult"
    SEQUENCE = "note on numbered images in both splits"
    NEGATIVE = "note on images that nothing is written about"


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of the data, with the remedy."""

    file: Path
    line: int | None
    what: str
    fatal: bool
    kind: Kind = Kind.UNUSABLE
    files: tuple[Path, ...] = ()
    """Other images and label files that are accounted for by this problem."""

    def __str__(self) -> str:
        place = f"{self.file}" if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.what}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "file": str(self.file),
            "line": self.line,
            "what": self.what,
            "kind": self.kind.value,
        }


class BadData(DataError):
    """Labelled data with problems that stop training; the message lists the first of them."""

    def __init__(self, message: str, problems: Sequence[Problem]) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


def describe_all(problems: Sequence[Problem], *, limit: int = LISTED_PROBLEMS) -> str:
    """Return one line per problem; those beyond `limit` are counted."""
    lines = [str(problem) for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"... and {len(problems) - limit} more")
    return "\n".join(lines)


def refuse_fatal(problems: Iterable[Problem], *, what: str) -> None:
    """Raise BadData if any problem stops training; `what` names the data."""
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        counted = "1 problem stops" if len(fatal) == 1 else f"{len(fatal)} problems stop"
        raise BadData(f"{what}: {counted} training\n{describe_all(fatal)}", fatal)


def problem_listing(problems: Sequence[Problem], *, limit: int = LISTED_PROBLEMS) -> str:
    """Return the count of each kind, then one line per problem up to `limit`."""
    counts = Counter(problem.kind for problem in problems)
    lines = [f"{count} x {kind.value}" for kind, count in counts.most_common()]
    return "\n".join([*lines, describe_all(problems, limit=limit)])

"""Which of a folder's classes are used, and under which name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ClassChoice:
    """New names for classes, then a subset of them."""

    keep: tuple[str, ...] | None = None
    """Classes, by their new names, whose objects are used; None: all of them."""
    remap: Mapping[str, str] = field(default_factory=dict)
    """New name of a class by the one that is written. Several may become one."""

    def name(self, written: str) -> str | None:
        """The class of an object by the one that is written; None if it is left out.

        >>> choice = ClassChoice(keep=("cat",), remap={"kitten": "cat"})
        >>> choice.name("cat"), choice.name("kitten"), choice.name("dog")
        ('cat', 'cat', None)
        """
        name = self.remap.get(written, written)
        return name if self.keep is None or name in self.keep else None

    def count(self, written: Mapping[str, int]) -> Counter[str]:
        """Objects of each class that is used, from those of each that is written."""
        counts: Counter[str] = Counter()
        for each, number in written.items():
            name = self.name(each)
            if name is not None:
                counts[name] += number
        return counts

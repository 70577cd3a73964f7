"""What a model repository holds at one moment: versions, how far each got, which of them serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, NamedTuple

from service.engine.work import Servable
from service.errors import RetinaserveError, Unavailable, UnknownModel, shown
from service.runtime.artifact import Entry, Metadata

State = Literal["waiting", "loading", "ready", "failed", "unloaded"]
_TO_COME: Final = frozenset({"waiting", "loading"})


class Key(NamedTuple):
    """A version of a model."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"model {self.name!r} version {self.version}"


@dataclass(frozen=True, slots=True)
class Slot:
    """One version of one model."""

    name: str
    version: int
    path: Path
    state: State = "unloaded"
    reason: str | None = None
    """Why the last attempt to load it failed; of a ready version: why its file was not loaded
    again."""
    metadata: Metadata | None = None
    sha256: str | None = None
    servable: Servable | None = field(default=None, repr=False)
    """Of a ready version."""
    load_seconds: float | None = None

    @property
    def key(self) -> Key:
        """What tells it from the others."""
        return Key(self.name, self.version)


def empty_slot(entry: Entry) -> Slot:
    """A version of which nothing is known but its file."""
    return Slot(entry.name, entry.version, entry.path)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every version, at one moment. Immutable, so it is read without a lock."""

    slots: Mapping[Key, Slot]
    """By name, then by version."""
    default: str
    """The model for requests that name none."""
    pins: Mapping[str, int]
    """Versions that were chosen, each of them ready; of other models the highest ready one
    serves."""

    def put(self, *changed: Slot) -> Snapshot:
        """The snapshot after some slots changed."""
        return replace(self, slots={**self.slots, **{slot.key: slot for slot in changed}})

    def find(self, name: str, version: int | None = None) -> list[Slot]:
        """One version of a model, or all of them. Never empty: raises UnknownModel."""
        found = [slot for slot in self.slots.values() if slot.name == name]
        if not found:
            there = ", ".join(dict.fromkeys(key.name for key in self.slots))
            raise UnknownModel(f"no model {shown(name)}; there is {there or 'none'}")
        if version is None:
            return found
        slot = self.slots.get(Key(name, version))
        if slot is None:
            there = listed([slot.version for slot in found])
            raise UnknownModel(f"model {name!r} has no version {version}; there is {there}")
        return [slot]

    def ready(self, name: str) -> list[int]:
        """The versions of a model that are loaded, lowest first."""
        return [
            key.version for key, slot in self.slots.items() if key.name == name and slot.servable
        ]

    def serving(self, name: str) -> int | None:
        """The version for requests that name this model and no version; None: none is ready."""
        pinned = self.pins.get(name)
        return max(self.ready(name), default=None) if pinned is None else pinned

    def servable(self, name: str, version: int | None) -> Servable:
        """What serves. Raises UnknownModel, or Unavailable while it loads or failed to."""
        wanted = self.serving(name) if version is None else version
        slots = self.find(name, wanted)
        servable = slots[0].servable
        if wanted is None or servable is None:
            raise self._why_not(name, version, slots)
        return servable

    def not_loaded(self, name: str, version: int | None) -> str:
        """Says that this is not loaded, and what is."""
        ready = self.ready(name)
        rest = f"loaded: version {listed(ready)}" if ready else "no version of it is"
        return f"{called(name, version)} is not loaded; {rest}"

    def _why_not(self, name: str, version: int | None, slots: Sequence[Slot]) -> RetinaserveError:
        failed = [slot for slot in slots if slot.state == "failed"]
        if any(slot.state in _TO_COME for slot in slots):
            reason = f"{called(name, version)} is still loading"
        elif failed:
            reason = f"{called(name, version)} failed to load: {failed[-1].reason}"
        else:
            return UnknownModel(self.not_loaded(name, version))
        return Unavailable(reason, reason="model-not-ready", retry_after=5.0)


def called(name: str, version: int | None) -> str:
    """A model, or one version of it, in a sentence."""
    return f"model {name!r}" if version is None else str(Key(name, version))


def listed(versions: Sequence[int]) -> str:
    """Versions in a sentence."""
    return ", ".join(map(str, sorted(versions)))

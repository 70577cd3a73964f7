"""Which models are loaded, on which devices, and which one serves."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from service.artifact import Entry, Metadata, read_artifact, scan_repository
from service.detector import Detector
from service.devices import Device, open_detector
from service.errors import DataError, RetinaserveError, Unavailable, UnknownModel
from service.pipeline import Servable

_log = logging.getLogger("retinaserve.registry")

State = Literal["waiting", "loading", "ready", "failed"]


@dataclass(slots=True)
class Slot:
    """One version of one model of the repository, and how far it got."""

    name: str
    version: int
    path: Path
    state: State = "waiting"
    reason: str | None = None
    """Why it failed."""
    metadata: Metadata | None = None
    sha256: str | None = None
    servable: Servable | None = field(default=None, repr=False)
    load_seconds: float | None = None


class Registry:
    """The models of one repository. Loads in one thread of its own; read from any thread."""

    def __init__(
        self, entries: Sequence[Entry], *, devices: Sequence[Device], default: str, batch: int
    ) -> None:
        """`batch` is the largest batch, which is warmed along with a single picture."""
        self.default = default
        self._devices = tuple(devices)
        self._batch = batch
        self._slots = [Slot(entry.name, entry.version, entry.path) for entry in entries]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._load_all, name="model-loader", daemon=True)

    def start(self) -> None:
        """Begin to load: the default model first, of each model the newest version first."""
        self._thread.start()

    def close(self, seconds: float = 0.5) -> None:
        """Load nothing more, and wait for the file that is being loaded."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def slots(self) -> list[Slot]:
        """Every version of every model, by name, then by version."""
        return list(self._slots)

    def versions(self, name: str) -> list[Slot]:
        """Every version of one model. Raises UnknownModel."""
        found = [slot for slot in self._slots if slot.name == name]
        if not found:
            known = ", ".join(dict.fromkeys(slot.name for slot in self._slots))
            raise UnknownModel(f"no model {name!r}; there is {known}")
        return found

    def get(self, name: str | None = None, version: int | None = None) -> Servable:
        """The model to serve with: by default the default model's highest ready version.

        Raises UnknownModel, or Unavailable while it loads or when it failed to.
        """
        slots = self.versions(self.default if name is None else name)
        if version is not None:
            slots = [slot for slot in slots if slot.version == version]
            if not slots:
                raise UnknownModel(f"model {name or self.default!r} has no version {version}")
        for slot in reversed(slots):
            if slot.servable is not None:
                return slot.servable
        raise Unavailable(_why_not(slots), reason="model-not-ready", retry_after=5.0)

    def not_ready(self) -> str | None:
        """Why the default model cannot serve; None once it can."""
        try:
            self.get()
        except Unavailable as error:
            return str(error)
        return None

    def _load_all(self) -> None:
        for slot in sorted(self._slots, key=lambda s: (s.name != self.default, s.name, -s.version)):
            if self._closed.is_set():
                return
            self._load(slot)

    def _load(self, slot: Slot) -> None:
        slot.state = "loading"
        started = time.monotonic()
        try:
            artifact = read_artifact(slot.path)
            slot.metadata, slot.sha256 = artifact.metadata, artifact.sha256
            detectors = tuple(open_detector(artifact, device) for device in self._devices)
            for detector, device in zip(detectors, self._devices, strict=True):
                _warm(detector, largest=1 if device.kind == "cpu" else self._batch)
        except Exception as error:
            # A file from outside may fail in any way, and must not take the others with it.
            slot.state, slot.reason = "failed", str(error) or repr(error)
            _log.error(
                "model %s version %d failed: %s",
                slot.name,
                slot.version,
                slot.reason,
                exc_info=None if isinstance(error, RetinaserveError) else error,
            )
            return
        slot.load_seconds = time.monotonic() - started
        slot.servable = Servable(slot.name, slot.version, artifact, detectors)
        slot.state = "ready"
        _log.info(
            "model %s version %d is ready after %.1f s", slot.name, slot.version, slot.load_seconds
        )


def open_registry(
    root: Path, *, devices: Sequence[Device], default: str | None, batch: int
) -> Registry:
    """Look a repository through; nothing is loaded yet.

    Without `default` the only model is the default. Raises ArtifactError for an empty repository
    and DataError when the default is not clear.
    """
    entries = scan_repository(root)
    names = list(dict.fromkeys(entry.name for entry in entries))
    if default is None and len(names) > 1:
        raise DataError(
            f"{root} holds {len(names)} models ({', '.join(names)}); "
            "name the default with RETINASERVE_DEFAULT_MODEL"
        )
    if default is not None and default not in names:
        raise DataError(
            f"the default model {default!r} is not in {root}; there is {', '.join(names)}"
        )
    return Registry(entries, devices=devices, default=default or names[0], batch=batch)


def _warm(detector: Detector, *, largest: int) -> None:
    rule = detector.metadata.canvas
    for canvas in rule.all_canvases() or (rule.largest(),):
        for batch in sorted({1, largest}):
            detector.warm(canvas, batch)


def _why_not(slots: Sequence[Slot]) -> str:
    name = slots[-1].name
    if all(slot.state == "failed" for slot in slots):
        return f"model {name!r} failed to load: {slots[-1].reason}"
    return f"model {name!r} is still loading"

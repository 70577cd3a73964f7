"""The models that are loaded: at the start all there are, then whatever an operator asks for.

Requests read an immutable snapshot of the state and hold on to the Servable that it gave them: a
version that is replaced or unloaded meanwhile lives until the last of them is done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from service.engine.models.loading import Loader, open_servable, return_free_memory
from service.engine.models.versions import Key, Slot, Snapshot, State, called, empty_slot, listed
from service.engine.work import Servable
from service.errors import (
    ArtifactError,
    DataError,
    LoadFailed,
    RetinaserveError,
    StateConflict,
    Unavailable,
    UnknownModel,
    shown,
)
from service.runtime.artifact import (
    Artifact,
    Entry,
    list_skipped,
    read_artifact,
    scan_repository,
    skipped_files,
)
from service.runtime.cpu_concurrency import CpuConcurrency
from service.runtime.devices import Device

_log = logging.getLogger("retinaserve.registry")


class Loaded(NamedTuple):
    """What came of a load."""

    key: Key
    sha256: str
    seconds: float
    changed: bool
    """False: the version was loaded already, from a file of the same content."""


class Registry:
    """The models of one repository. Loads in one thread of its own; any thread may call."""

    def __init__(
        self,
        root: Path,
        entries: Sequence[Entry],
        *,
        devices: Sequence[Device],
        default: str,
        batch: int,
        cpu_concurrency: CpuConcurrency,
    ) -> None:
        """`batch` is the largest batch that a device gets."""
        self._root = root
        self._open = partial(
            open_servable, devices=tuple(devices), batch=batch, cpu_concurrency=cpu_concurrency
        )
        slots = [replace(empty_slot(entry), state="waiting") for entry in sorted(entries)]
        self._snapshot = Snapshot({slot.key: slot for slot in slots}, default, {})
        self._loads: dict[Key, Future[Loaded]] = {}
        """What is being loaded, or waits for that."""
        self._lock = threading.Lock()
        """Held while the snapshot or the loads change, and never for long."""
        self._started = False
        self._closed = False
        self._loader = Loader()
        self._skipped: dict[Path, str] = {}
        """Files that the last scan found where no model is expected."""
        self._report_skipped()

    def start(self) -> None:
        """Begin to load: the default model first, of each model the newest version first.

        Only the first call has an effect.
        """
        with self._lock:
            if self._started:
                return
            self._started = True
            self._loader.start()
            default = self._snapshot.default
            keys = self._snapshot.slots
            for key in sorted(keys, key=lambda k: (k.name != default, k.name, -k.version)):
                self._enqueue(key)

    def stop_loading(self) -> None:
        """Load nothing more; loads that wait fail with Unavailable."""
        with self._lock:
            self._closed = True
            futures = list(self._loads.values())
            self._loads.clear()
        for future in futures:
            future.set_exception(_stopping())

    def close(self, seconds: float = 0.5) -> None:
        """Load nothing more, and wait for the file that is being loaded."""
        self.stop_loading()
        self._loader.close(seconds)

    @property
    def default(self) -> str:
        """The model for requests that name none."""
        return self._snapshot.default

    def snapshot(self) -> Snapshot:
        """Everything, at one moment."""
        return self._snapshot

    def slots(self) -> list[Slot]:
        """Every version of every model, by name, then by version."""
        return list(self._snapshot.slots.values())

    def versions(self, name: str) -> list[Slot]:
        """Every version of one model. Raises UnknownModel."""
        return self._snapshot.find(name)

    def get(self, name: str | None = None, version: int | None = None) -> Servable:
        """The model to serve with: by default the default model, and the version that it serves.

        Raises UnknownModel, or Unavailable while it loads or when it failed to.
        """
        snapshot = self._snapshot
        return snapshot.servable(snapshot.default if name is None else name, version)

    def not_ready(self) -> str | None:
        """Why the default model cannot serve; None once it can."""
        try:
            self.get()
        except (Unavailable, UnknownModel) as error:
            return str(error)
        return None

    def load(self, name: str, version: int | None = None) -> Future[Loaded]:
        """Look at the folder, then load a version, by default the newest that is there.

        A second call while it is being loaded returns the same future, which raises LoadFailed, or
        Unavailable when the service stops first. To look blocks: not for the event loop.

        Raises UnknownModel, or Unavailable once the service stops.
        """
        entries = self._look(name)
        found = [entry.version for entry in entries if entry.name == name]
        if version is not None and version not in found:
            raise UnknownModel(
                f"model {name!r} has no version {version} in {self._root}; there is {listed(found)}"
            )
        with self._lock:
            if self._closed:
                raise _stopping()
            self._adopt(entries)
            return self._enqueue(Key(name, max(found) if version is None else version))

    def unload(self, name: str, version: int | None = None) -> list[int]:
        """Take a version, by default all of them, out of service. Returns which.

        Requests that have begun are finished. Raises UnknownModel, or StateConflict for what is
        not loaded, is just being loaded, or is what the default model serves with.
        """
        with self._lock:
            snapshot = self._snapshot
            slots = snapshot.find(name, version)
            if busy := [slot.version for slot in slots if slot.key in self._loads]:
                raise StateConflict(
                    f"model {name!r} version {listed(busy)} is being loaded; "
                    "unload it once that is done"
                )
            going = [slot for slot in slots if slot.servable is not None]
            if not going:
                raise StateConflict(snapshot.not_loaded(name, version))
            versions = [slot.version for slot in going]
            _check_default_survives(snapshot, name, versions)
            gone = [Slot(slot.name, slot.version, slot.path) for slot in going]
            pins = dict(snapshot.pins)
            if pins.get(name) in versions:
                del pins[name]
            self._snapshot = replace(snapshot.put(*gone), pins=pins)
        _log.info("model %r version %s is unloaded", name, listed(versions))
        return versions

    def make_default(self, name: str, version: int | None = None) -> int:
        """Let a model serve requests that name none. Returns the version that now does.

        With a version, that one serves until another is chosen; without, always the highest ready
        one. Raises UnknownModel, or StateConflict for what is not ready.
        """
        with self._lock:
            snapshot = self._snapshot
            ready = [slot.version for slot in snapshot.find(name, version) if slot.servable]
            if not ready:
                raise StateConflict(
                    f"{snapshot.not_loaded(name, version)}; load it first: "
                    f"POST /v1/models/{name}/load"
                )
            pins = {model: pin for model, pin in snapshot.pins.items() if model != name}
            if version is not None:
                pins[name] = version
            self._snapshot = replace(snapshot, default=name, pins=pins)
        _log.info("model %r version %d is the default", name, ready[-1])
        return ready[-1]

    def _look(self, name: str) -> list[Entry]:
        try:
            entries = scan_repository(self._root)
        except ArtifactError as error:
            raise UnknownModel(f"no model {shown(name)}: {error}") from error
        self._report_skipped()
        names = dict.fromkeys(entry.name for entry in entries)
        if name not in names:
            raise UnknownModel(
                f"no model {shown(name)} in {self._root}; there is {', '.join(names)}"
            )
        return entries

    def _report_skipped(self) -> None:
        skipped = skipped_files(self._root)
        if skipped and skipped != self._skipped:
            _log.warning("%s: skipped: %s", self._root, list_skipped(skipped))
        self._skipped = skipped

    def _adopt(self, entries: Sequence[Entry]) -> None:
        """Bring the snapshot in line with the folder. What is in use stays, even if it is gone."""
        slots = self._snapshot.slots
        kept = {key: slot for key, slot in slots.items() if slot.servable or key in self._loads}
        for entry in entries:
            fresh = empty_slot(entry)
            kept[fresh.key] = slots.get(fresh.key, fresh)
        self._snapshot = replace(self._snapshot, slots={key: kept[key] for key in sorted(kept)})

    def _enqueue(self, key: Key) -> Future[Loaded]:
        future = self._loads.get(key)
        if future is None:
            future = self._loads[key] = Future()
            # From now on none of those who wait for it can cancel it for the others.
            future.set_running_or_notify_cancel()
            slot = self._snapshot.slots[key]
            if slot.servable is None:
                self._snapshot = self._snapshot.put(replace(slot, state="waiting", reason=None))
            self._loader.submit(partial(self._load, key))
        return future

    def _load(self, key: Key) -> None:
        """In the loader's thread."""
        if self._closed:
            return
        try:
            loaded = self._try(key)
        except Exception as error:
            # A file from outside may fail in any way, and must not take the others with it.
            self._failed(key, error)
        else:
            self._done(loaded)
        # What was read and parsed is several times as large as what stays.
        return_free_memory()

    def _try(self, key: Key) -> Loaded:
        started = time.monotonic()
        with self._lock:
            before = self._snapshot.slots[key]
            if before.servable is None:
                self._snapshot = self._snapshot.put(replace(before, state="loading"))
        artifact = read_artifact(before.path)
        changed = before.servable is None or artifact.sha256 != before.sha256
        if changed:
            self._install(key, artifact, started)
        return Loaded(key, artifact.sha256, time.monotonic() - started, changed)

    def _install(self, key: Key, artifact: Artifact, started: float) -> None:
        """Load and warm a file, and let it serve from then on."""
        servable = self._open(Entry(key.name, key.version, artifact.path), artifact)
        self._loader.watch(servable)
        seconds = time.monotonic() - started
        slot = Slot(
            key.name,
            key.version,
            artifact.path,
            state="ready",
            metadata=artifact.metadata,
            sha256=artifact.sha256,
            servable=servable,
            load_seconds=seconds,
        )
        with self._lock:
            if not self._closed:
                self._snapshot = self._snapshot.put(slot)
        _log.info("%s is ready after %.1f s", key, seconds)

    def _done(self, loaded: Loaded) -> None:
        with self._lock:
            future = self._loads.pop(loaded.key, None)
            slot = self._snapshot.slots[loaded.key]
            # The reason why an earlier attempt failed holds no longer.
            self._snapshot = self._snapshot.put(replace(slot, reason=None))
        if future is not None:
            future.set_result(loaded)

    def _failed(self, key: Key, error: Exception) -> None:
        reason = str(error) or repr(error)
        foreseen = isinstance(error, RetinaserveError)
        _log.error("%s failed: %s", key, reason, exc_info=None if foreseen else error)
        with self._lock:
            future = self._loads.pop(key, None)
            slot = self._snapshot.slots[key]
            state: State = "failed" if slot.servable is None else "ready"
            self._snapshot = self._snapshot.put(replace(slot, state=state, reason=reason))
            serving = self._snapshot.serving(key.name)
        if future is not None:
            rest = "" if serving is None else f"; version {serving} serves on as before"
            future.set_exception(LoadFailed(f"{key} was not loaded: {reason}{rest}"))


def open_registry(
    root: Path,
    *,
    devices: Sequence[Device],
    default: str | None,
    batch: int,
    cpu_concurrency: CpuConcurrency = CpuConcurrency(),  # noqa: B008
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
    return Registry(
        root,
        entries,
        devices=devices,
        default=default or names[0],
        batch=batch,
        cpu_concurrency=cpu_concurrency,
    )


def _check_default_survives(snapshot: Snapshot, name: str, going: Sequence[int]) -> None:
    """Raise StateConflict when the default model could not serve without these versions."""
    if name != snapshot.default:
        return
    if snapshot.pins.get(name) in going:
        raise StateConflict(
            f"{called(name, snapshot.pins[name])} was chosen as the default; "
            f"choose another first: POST /v1/models/{name}/default"
        )
    if set(going) >= set(snapshot.ready(name)):
        raise StateConflict(
            f"model {name!r} is the default and would be left without a version; load another "
            "version first, or make another model the default: POST /v1/models/NAME/default"
        )


def _stopping() -> Unavailable:
    return Unavailable("the service stops; nothing is loaded any more", reason="draining")

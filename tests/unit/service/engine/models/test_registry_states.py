"""Any order of loading, unloading and choosing: the registry does what a plain model of it does."""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from service.engine.models.registry import Registry, open_registry
from service.engine.work import Servable
from service.errors import ArtifactError, LoadFailed, StateConflict, UnknownModel
from service.imaging.canvas import Buckets
from service.runtime.artifact import Artifact, Entry, Metadata
from service.runtime.devices import Device
from tests import tiny_model

SECONDS = 60.0
BAD = b"bad"
META = Metadata(name="m", classes=("a",), canvas=Buckets(sizes=tiny_model.SIZES))

names = st.sampled_from(["a", "b"])
versions = st.integers(1, 3)
choices = st.none() | versions


def read(path: Path) -> Artifact:
    content = path.read_bytes()
    if content == BAD:
        raise ArtifactError(f"{path}: bad")
    return Artifact(path, content, META, hashlib.sha256(content).hexdigest())


def open_(entry: Entry, artifact: Artifact, **_: object) -> Servable:
    return Servable(entry.name, entry.version, artifact, ())


@contextlib.contextmanager
def without_sessions() -> Iterator[None]:
    """Model files are a few bytes, and nothing computes with them."""
    with (
        patch("service.engine.models.registry.read_artifact", read),
        patch("service.engine.models.registry.open_servable", open_),
        patch("service.engine.models.registry.return_free_memory"),
    ):
        yield


def write(root: Path, name: str, version: int, content: bytes) -> None:
    path = root / name / str(version) / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


class Machine(RuleBasedStateMachine):
    """The registry beside dictionaries that say what it should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(without_sessions())
        self.root = Path(tempfile.mkdtemp())
        self.disk: dict[tuple[str, int], bytes] = {("a", 1): b"0"}
        self.loaded = dict(self.disk)
        self.pins: dict[str, int] = {}
        self.default = "a"
        write(self.root, "a", 1, b"0")
        devices = (Device("cpu"),)
        self.registry = open_registry(self.root, devices=devices, default=None, batch=1)
        self.registry.start()
        self.registry.load("a", 1).result(SECONDS)

    def teardown(self) -> None:
        self.registry.close(SECONDS)
        self.patches.close()
        shutil.rmtree(self.root)

    def there(self, name: str) -> list[int]:
        return sorted(version for each, version in self.loaded if each == name)

    def serving(self, name: str) -> int | None:
        there = self.there(name)
        return self.pins.get(name, there[-1] if there else None)

    @rule(name=names, version=versions, content=st.sampled_from([b"1", b"2", BAD]))
    def put(self, name: str, version: int, content: bytes) -> None:
        self.disk[name, version] = content
        write(self.root, name, version, content)

    @rule(name=names, version=versions)
    def remove(self, name: str, version: int) -> None:
        if self.disk.pop((name, version), None) is not None:
            shutil.rmtree(self.root / name / str(version))

    @rule(name=names, version=choices)
    def load(self, name: str, version: int | None) -> None:
        there = [v for each, v in self.disk if each == name]
        wanted = max(there, default=None) if version is None else version
        if wanted not in there or wanted is None:
            with pytest.raises(UnknownModel):
                self.registry.load(name, version)
            return
        future = self.registry.load(name, version)
        content = self.disk[name, wanted]
        if content == BAD:
            with pytest.raises(LoadFailed):
                future.result(SECONDS)
            return
        loaded = future.result(SECONDS)
        assert loaded.key == (name, wanted)
        assert loaded.changed == (self.loaded.get((name, wanted)) != content)
        self.loaded[name, wanted] = content

    @rule(name=names, version=choices)
    def unload(self, name: str, version: int | None) -> None:
        going = [v for v in self.there(name) if version in (None, v)]
        left = set(self.there(name)) - set(going)
        pinned = self.pins.get(name) in going
        if not going or (name == self.default and (pinned or not left)):
            with pytest.raises((UnknownModel, StateConflict)):
                self.registry.unload(name, version)
            return
        assert self.registry.unload(name, version) == going
        for each in going:
            del self.loaded[name, each]
        if pinned:
            del self.pins[name]

    @rule(name=names, version=choices)
    def choose(self, name: str, version: int | None) -> None:
        if not [v for v in self.there(name) if version in (None, v)]:
            with pytest.raises((UnknownModel, StateConflict)):
                self.registry.make_default(name, version)
            return
        self.registry.make_default(name, version)
        self.default = name
        self.pins.pop(name, None)
        if version is not None:
            self.pins[name] = version

    @invariant()
    def serves(self) -> None:
        registry = self.registry
        assert registry.default == self.default
        assert registry.get().version == self.serving(self.default)
        ready = {slot.key for slot in registry.slots() if slot.state == "ready"}
        assert ready == set(self.loaded)
        for (name, version), content in self.loaded.items():
            servable = registry.get(name, version)
            assert (servable.name, servable.version) == (name, version)
            assert servable.artifact.content == content
            assert registry.get(name).version == self.serving(name)


Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestRegistry = Machine.TestCase


def test_registry_survives_concurrent_changes(tmp_path: Path) -> None:
    with without_sessions():
        for version in (1, 2, 3):
            write(tmp_path, "a", version, b"1")
            write(tmp_path, "b", version, b"1")
        registry = open_registry(tmp_path, devices=(Device("cpu"),), default="a", batch=1)
        registry.start()
        registry.load("a", 1).result(SECONDS)
        done = threading.Event()
        unforeseen: list[BaseException] = []

        def guarded(work: object, *arguments: object) -> None:
            try:
                work(*arguments)  # type: ignore[operator]
            except BaseException as error:
                unforeseen.append(error)

        def serve() -> None:
            while not done.is_set():
                registry.get()
                assert registry.not_ready() is None

        readers = [threading.Thread(target=guarded, args=(serve,)) for _ in range(2)]
        changers = [
            threading.Thread(target=guarded, args=(_change, registry, seed)) for seed in range(6)
        ]
        for thread in (*readers, *changers):
            thread.start()
        for thread in changers:
            thread.join(SECONDS)
        done.set()
        for thread in readers:
            thread.join(SECONDS)
        registry.close(SECONDS)
    assert unforeseen == []
    assert registry._loads == {}


def _change(registry: Registry, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(60):
        name, version = chance.choice("ab"), chance.choice((None, 1, 2, 3))
        action = chance.choice(("load", "unload", "default"))
        with contextlib.suppress(StateConflict, UnknownModel):
            if action == "load":
                loaded = registry.load(name, version).result(SECONDS)
                assert loaded.key.name == name
            elif action == "unload":
                registry.unload(name, version)
            else:
                registry.make_default(name, version)

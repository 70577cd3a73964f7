"""Models that are loaded, replaced and unloaded while they serve."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from service.engine.models.loading import open_servable
from service.engine.models.registry import Loaded, Registry, open_registry
from service.engine.work import Servable
from service.errors import LoadFailed, StateConflict, Unavailable, UnknownModel
from service.imaging.canvas import Size
from service.runtime.artifact import Artifact, Entry, write_checksum
from service.runtime.devices import Device
from tests import tiny_model

SECONDS = 60.0

Open = Callable[..., Registry]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Open a registry over `tmp_path` and wait until what is there was loaded."""
    registries: list[Registry] = []

    def begin(default: str | None = None, batch: int = 1) -> Registry:
        devices = (Device("cpu"),)
        registry = open_registry(tmp_path, devices=devices, default=default, batch=batch)
        registries.append(registry)
        registry.start()
        settle(registry)
        return registry

    yield begin
    for registry in registries:
        registry.close(SECONDS)


def settle(registry: Registry) -> None:
    """Wait for every load that is under way."""
    with registry._lock:
        futures = list(registry._loads.values())
    for future in futures:
        future.exception(SECONDS)


def load(registry: Registry, name: str = "tiny", version: int | None = None) -> Loaded:
    return registry.load(name, version).result(SECONDS)


def states(registry: Registry, name: str = "tiny") -> dict[int, str]:
    return {slot.version: slot.state for slot in registry.versions(name)}


def best_score(servable: Servable) -> float:
    """Of a red square: 1, but 255/510 by a model with `white=510`."""
    canvas = np.zeros((1, 96, 96, 3), dtype=np.uint8)
    canvas[0, :32, :32, 0] = 255
    sizes = np.array([[96, 96]])
    (found,) = servable.detectors[0](canvas, sizes, score_threshold=0.1, iou_threshold=0.5)
    return float(found.scores[0])


def test_highest_ready_version_serves(opened: Open, tmp_path: Path) -> None:
    tiny_model.save(tmp_path, version=1)
    tiny_model.save(tmp_path, version=10, white=510.0)
    tiny_model.save(tmp_path, version=11).write_bytes(b"no model")
    registry = opened()
    assert states(registry) == {1: "ready", 10: "ready", 11: "failed"}
    assert registry.get().version == 10
    assert best_score(registry.get()) == pytest.approx(0.5)
    assert best_score(registry.get("tiny", 1)) == pytest.approx(1.0)
    with pytest.raises(Unavailable, match=r"version 11 failed to load.*ONNX"):
        registry.get("tiny", 11)
    with pytest.raises(UnknownModel, match="no version 2; there is 1, 10, 11"):
        registry.get("tiny", 2)
    with pytest.raises(UnknownModel, match="no model 'cells'; there is tiny"):
        registry.get("cells")


def test_later_version_is_found_and_serves(opened: Open, tmp_path: Path) -> None:
    tiny_model.save(tmp_path)
    registry = opened()
    path = tiny_model.save(tmp_path, version=2, white=510.0)
    tiny_model.save(tmp_path, version=3)
    assert registry.get().version == 1, "a file that is there is not yet one to serve"
    loaded = load(registry, version=2)
    assert loaded.key == ("tiny", 2)
    assert loaded.changed
    assert loaded.seconds > 0
    assert states(registry) == {1: "ready", 2: "ready", 3: "unloaded"}
    assert registry.get().version == 2
    with pytest.raises(UnknownModel, match="version 3 is not loaded; loaded: version 1, 2"):
        registry.get("tiny", 3)
    assert load(registry).key.version == 3, "by default the newest that is there"
    assert not load(registry, version=2).changed
    assert path.exists()


def test_default_model_can_change(opened: Open, tmp_path: Path) -> None:
    tiny_model.save(tmp_path, name="a")
    registry = opened()
    tiny_model.save(tmp_path, name="b")
    with pytest.raises(UnknownModel, match="no model 'b'"):
        registry.make_default("b")
    load(registry, "b")
    assert registry.get().name == "a"
    assert registry.make_default("b") == 1
    assert registry.get().name == "b"
    assert registry.unload("a") == [1]
    assert states(registry, "a") == {1: "unloaded"}


def test_selected_version_serves_until_changed(opened: Open, tmp_path: Path) -> None:
    for version in (1, 2):
        tiny_model.save(tmp_path, version=version)
    registry = opened()
    assert registry.make_default("tiny", 1) == 1
    tiny_model.save(tmp_path, version=3)
    load(registry)
    assert registry.get().version == 1
    assert registry.get("tiny").version == 1
    assert registry.get("tiny", 3).version == 3
    with pytest.raises(StateConflict, match="version 1 was chosen as the default; choose another"):
        registry.unload("tiny", 1)
    assert registry.make_default("tiny") == 3
    assert registry.get().version == 3
    assert registry.unload("tiny", 1) == [1]


def test_unload_keeps_the_last_version_of_the_default(opened: Open, tmp_path: Path) -> None:
    tiny_model.save(tmp_path, version=1)
    tiny_model.save(tmp_path, version=2)
    registry = opened()
    with pytest.raises(StateConflict, match=r"would be left without.*make another model"):
        registry.unload("tiny")
    assert registry.unload("tiny", 2) == [2]
    assert registry.get().version == 1, "the next one serves"
    with pytest.raises(StateConflict, match="version 2 is not loaded; loaded: version 1"):
        registry.unload("tiny", 2)
    with pytest.raises(StateConflict, match="would be left without"):
        registry.unload("tiny", 1)
    with pytest.raises(StateConflict, match=r"version 2 is not loaded.*load it first"):
        registry.make_default("tiny", 2)
    with pytest.raises(UnknownModel):
        registry.unload("tiny", 3)
    assert registry.get().version == 1


def broken(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def not_what_was_promised(path: Path) -> None:
    write_checksum(path)
    path.write_bytes(path.read_bytes() + b"\0")


def of_unknown_schema(path: Path) -> None:
    model = onnx.load(path)
    for property_ in model.metadata_props:
        property_.value = property_.value.replace('"schema":1', '"schema":2')
    onnx.save(model, path)


def fails_when_it_runs(path: Path) -> None:
    model = onnx.load(path)
    (node,) = [node for node in model.graph.node if node.output[0] == "cell_scores_shape"]
    node.attribute[0].ints[2] = 7
    onnx.save(model, path)


def with_fewer_names_than_classes(path: Path) -> None:
    model = onnx.load(path)
    for property_ in model.metadata_props:
        property_.value = property_.value.replace('"red",', "")
    onnx.save(model, path)


def with_labels_beyond_the_names(path: Path) -> None:
    model = onnx.load(path)
    (node,) = [node for node in model.graph.node if node.output[0] == "labels"]
    node.output[0] = "own_labels"
    nodes = onnx.parser.parse_graph(
        """
        g (int64[n] own_labels) => (int64[n] labels) <int64 seven = {7}>
        { labels = Add (own_labels, seven) }
        """
    )
    model.graph.node.extend(nodes.node)
    model.graph.initializer.extend(nodes.initializer)
    onnx.save(model, path)


FAULTS = [
    (broken, "ONNX"),
    (not_what_was_promised, "sha256 is"),
    (of_unknown_schema, "schema"),
    (fails_when_it_runs, "warm-up failed"),
    (with_fewer_names_than_classes, "3 classes apart, but the metadata names 2"),
    (with_labels_beyond_the_names, "labels are 7 to 9"),
]


@pytest.mark.parametrize(("spoil", "why"), FAULTS)
def test_unusable_file_fails_with_reason(
    opened: Open, tmp_path: Path, spoil: Callable[[Path], None], why: str
) -> None:
    tiny_model.save(tmp_path)
    registry = opened()
    path = tiny_model.save(tmp_path, version=2)
    spoil(path)
    with pytest.raises(LoadFailed, match=f"version 2 was not loaded: .*{why}") as caught:
        load(registry)
    assert "version 1 serves on" in str(caught.value)
    assert registry.get().version == 1
    assert states(registry) == {1: "ready", 2: "failed"}
    assert why in (registry.versions("tiny")[1].reason or "")
    # The same in place of the file of a version that serves.
    before = registry.versions("tiny")[0]
    spoil(tmp_path / "tiny" / "1" / "model.onnx")
    with pytest.raises(LoadFailed, match="serves on as before"):
        load(registry, version=1)
    (after, _) = registry.versions("tiny")
    assert (after.state, after.sha256) == ("ready", before.sha256)
    assert why in (after.reason or "")
    assert best_score(registry.get()) == pytest.approx(1.0)
    # Once the file is good again, all is well.
    (path.parent / "model.sha256").unlink(missing_ok=True)
    tiny_model.save(tmp_path, version=2)
    load(registry)
    assert registry.get().version == 2
    assert registry.versions("tiny")[1].reason is None


@pytest.mark.parametrize("spoil", [with_fewer_names_than_classes, with_labels_beyond_the_names])
def test_unusable_file_fails_at_start(
    opened: Open, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(tiny_model.save(tmp_path))
    registry = opened()
    assert states(registry) == {1: "failed"}
    assert "the metadata names" in (registry.not_ready() or "")
    with pytest.raises(Unavailable, match="the metadata names"):
        registry.get()


def test_skipped_folders_are_logged_once_per_change(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def named() -> list[str]:
        found = [each.getMessage() for each in caplog.records if "skipped" in each.getMessage()]
        caplog.clear()
        return found

    tiny_model.save(tmp_path)
    tiny_model.save(tmp_path, name="my model")
    registry = opened()
    (line,) = named()
    assert str(tmp_path) in line
    assert "'my model/1/model.onnx'" in line
    assert "1 to 128 ASCII letters" in line
    load(registry)
    assert named() == []
    path = tmp_path / "tiny" / "01" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes((tmp_path / "tiny" / "1" / "model.onnx").read_bytes())
    for _ in range(2):
        load(registry)
    (line,) = named()
    assert "'tiny/01/model.onnx'" in line
    assert "'my model/1/model.onnx'" in line
    assert states(registry) == {1: "ready"}


def test_new_content_of_a_loaded_version_is_swapped_in(opened: Open, tmp_path: Path) -> None:
    tiny_model.save(tmp_path)
    registry = opened()
    (before,) = registry.versions("tiny")
    tiny_model.save(tmp_path, white=510.0)
    held = registry.get()
    loaded = load(registry)
    assert loaded.changed
    assert loaded.sha256 != before.sha256
    (after,) = registry.versions("tiny")
    assert after.sha256 == loaded.sha256
    assert best_score(held) == pytest.approx(1.0), "who began with the old one ends with it"
    assert best_score(registry.get()) == pytest.approx(0.5)


def test_version_without_its_file_serves_on(opened: Open, tmp_path: Path) -> None:
    gone = tiny_model.save(tmp_path)
    registry = opened()
    gone.unlink()
    with pytest.raises(UnknownModel, match="no model 'tiny'"):
        load(registry)
    tiny_model.save(tmp_path, version=2)
    load(registry)
    assert states(registry) == {1: "ready", 2: "ready"}
    registry.unload("tiny", 1)
    load(registry)
    assert states(registry) == {2: "ready"}, "forgotten once nothing holds it"


def test_warm_up_covers_batches_and_canvas_costs(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: set[tuple[Size, int]] = set()
    monkeypatch.setattr(
        "service.runtime.detector.Detector.warm",
        lambda self, canvas, batch=1: warmed.add((canvas, batch)),
    )
    tiny_model.save(tmp_path)
    registry = opened(batch=6)
    largest = Size(96, 128)
    assert warmed == {(largest, batch) for batch in (1, 2, 4, 6)}
    costs = registry.get().costs
    for canvas in tiny_model.SIZES:
        share = canvas.area / largest.area
        assert costs.of(canvas).fastest == pytest.approx(share * costs.of(largest).fastest)
        for batch in (1, 2, 4, 6):
            expected = share * costs.of(largest).seconds(batch)
            assert costs.of(canvas).seconds(batch) == pytest.approx(expected)
    assert costs.of(largest).fastest > 0


def test_old_version_is_released_after_its_last_request(opened: Open, tmp_path: Path) -> None:
    tiny_model.save(tmp_path)
    registry = opened()
    held: Servable | None = registry.get()
    assert held is not None
    assert held.artifact.content == b"", "the session has a copy of its own"
    detector = weakref.ref(held.detectors[0])
    session = weakref.ref(held.detectors[0]._session)
    gc.disable()
    try:
        tiny_model.save(tmp_path, version=2)
        load(registry)
        registry.unload("tiny", 1)
        assert session() is not None, "a request holds it"
        del held
        assert detector() is None
        assert session() is None, "without the cycle collector"
        # A replaced file and one that fails leave nothing behind either.
        replaced = weakref.ref(registry.get().detectors[0])
        tiny_model.save(tmp_path, version=2, white=510.0)
        load(registry)
        loader_is_idle(registry)
        assert replaced() is None
    finally:
        gc.enable()


def loader_is_idle(registry: Registry) -> None:
    done = threading.Event()
    registry._loader.submit(done.set)
    assert done.wait(SECONDS)


class Gate:
    """Lets loads through one by one, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.inside = 0
        self.most = 0
        self.opened: list[int] = []
        monkeypatch.setattr("service.engine.models.registry.open_servable", self._open)

    def _open(self, entry: Entry, artifact: Artifact, **given: Any) -> Servable:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.opened.append(entry.version)
        self.entered.release()
        assert self.go.acquire(timeout=SECONDS)
        self.inside -= 1
        return open_servable(entry, artifact, **given)


def test_concurrent_loads_of_a_version_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    tiny_model.save(tmp_path)
    registry = open_registry(tmp_path, devices=(Device("cpu"),), default=None, batch=1)
    gate.go.release()
    registry.start()
    settle(registry)
    for version in (2, 3):
        tiny_model.save(tmp_path, version=version)
    futures: list[Future[Loaded]] = []
    asking = [
        threading.Thread(target=lambda v=v: futures.append(registry.load("tiny", v)))
        for v in (2, 3) * 8
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(SECONDS)
    with pytest.raises(StateConflict, match="being loaded"):
        registry.unload("tiny", 3)
    gate.go.release(2)
    keys = sorted({future.result(SECONDS).key for future in futures})
    assert keys == [("tiny", 2), ("tiny", 3)]
    assert len(futures) == 16
    assert sorted(gate.opened) == [1, 2, 3]
    assert gate.most == 1, "one at a time"
    assert registry.get().version == 3
    registry.close(SECONDS)


def test_pending_load_fails_at_shutdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    tiny_model.save(tmp_path)
    tiny_model.save(tmp_path, version=2)
    registry = open_registry(tmp_path, devices=(Device("cpu"),), default=None, batch=1)
    registry.start()
    first, second = registry.load("tiny", 2), registry.load("tiny", 1)
    assert gate.entered.acquire(timeout=SECONDS)
    registry.stop_loading()
    for future in (first, second):
        with pytest.raises(Unavailable, match="stops"):
            future.result(SECONDS)
    with pytest.raises(Unavailable, match="stops"):
        registry.load("tiny")
    gate.go.release(2)
    registry.close(SECONDS)
    assert gate.opened == [2], "what waited is not begun"
    assert registry.not_ready() is not None

"""A split model answers exactly as the whole file, whatever its buffers held before."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from service.engine.batch_queue import Policy
from service.engine.pipeline import Pipeline
from service.engine.work import Servable, as_it_is
from service.errors import DeviceError
from service.imaging.canvas import Letterbox, ShortSide, Size
from service.imaging.decode import Prepared
from service.runtime import devices
from service.runtime.artifact import Artifact, read_artifact, scan_repository
from service.runtime.detector import SEAM, Detections, Detector, batch_buckets
from service.runtime.devices import Device, open_detector, providers, session_options
from service.runtime.gpu import engine
from service.runtime.gpu.cuda import CaptureGate, Free, HostMemory, OutOfMemory
from service.runtime.gpu.engine import SLOTS
from service.runtime.gpu.graph_split import Parts, split
from service.runtime.gpu.split_detector import SplitDetector, open_split
from service.runtime.gpu.whole_detector import WholeDetector
from service.settings import bundled_models
from tests import seam_model, tiny_model
from tests.canvases import found, noise, same, sizes_of
from tests.required_inputs import without_defaults

SECONDS = 60.0
SMALL = Size(96, 96)
CPU = Device("cpu")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return read_artifact(seam_model.save(tmp_path_factory.mktemp("seam")))


@pytest.fixture(scope="module")
def whole(artifact: Artifact) -> Detector:
    return open_detector(artifact, CPU)


@pytest.fixture
def halves(artifact: Artifact) -> SplitDetector:
    return open_on_host(artifact)


def open_on_host(artifact: Artifact, *, batch: int = 4, **given: Any) -> SplitDetector:
    """The detector of a GPU, on the CPU."""
    chosen: dict[str, Any] = {
        "open_network": open_network,
        "open_graphs": open_network,
        "memory": HostMemory(),
        **given,
    }
    return open_split(
        artifact,
        parts_of(artifact),
        host_options=session_options(CPU),
        gate=CaptureGate(),
        buckets=batch_buckets(batch),
        remedy="lower RETINASERVE_MAX_BATCH_SIZE",
        **chosen,
    )


def open_network(content: bytes) -> ort.InferenceSession:
    return ort.InferenceSession(content, session_options(CPU), providers=providers(CPU))


def parts_of(artifact: Artifact) -> Parts:
    parts = split(artifact.content)
    assert parts is not None
    return parts


@pytest.mark.parametrize("canvas", [*tiny_model.SIZES, Size(64, 160), Size(32, 32)])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 11])
def test_split_detector_agrees_with_the_whole_file(
    whole: Detector, halves: SplitDetector, canvas: Size, count: int
) -> None:
    for seed, less, score, iou, most in (
        (1, 0, 0.45, 0.5, 300),
        (2, 9, 0.0, 0.3, 1000),
        (3, 3, 0.49, 0.9, 2),
        (4, 0, 0.99, 0.5, 300),
    ):
        canvases = noise(seed, count, canvas)
        sizes = sizes_of(count, canvas, less=less)
        limits = {"score": score, "iou": iou, "most": most}
        expected = found(whole, canvases, sizes, **limits)
        assert same(found(halves, canvases, sizes, **limits), expected)
        assert same(found(halves, list(canvases), sizes, **limits), expected)
        assert any(map(len, expected)) == (score < 0.9), "the case says something"


@pytest.mark.parametrize("canvas", [Size(384, 512), Size(96, 64)])
def test_split_detector_agrees_on_the_bundled_model(canvas: Size) -> None:
    bundled = read_artifact(scan_repository(bundled_models())[0].path)
    detector = open_on_host(bundled, batch=2)
    count = 3 if canvas.area < 10_000 else 2
    canvases = noise(5, count, canvas)
    sizes = sizes_of(count, canvas, less=10)
    # With the file's own convolutions, to which the host's parts keep.
    plain = open_detector(bundled, replace(CPU, winograd=False))
    expected = found(plain, canvases, sizes, score=0.01)
    assert same(found(detector, canvases, sizes, score=0.01), expected)
    assert any(map(len, expected))


def test_split_detector_warm_up_changes_no_detection(
    whole: Detector, halves: SplitDetector
) -> None:
    for count in (1, 2, 4):
        halves.warm(SMALL, count)
        halves.warm(SMALL, count)
    for count in (1, 2, 3, 4):
        canvases, sizes = noise(count, count, SMALL), sizes_of(count, SMALL)
        for _ in range(2 * SLOTS):
            assert same(found(halves, canvases, sizes), found(whole, canvases, sizes))


def test_split_detector_ignores_old_buffer_contents(whole: Detector, halves: SplitDetector) -> None:
    white = np.full((4, *SMALL, 3), 255, dtype=np.uint8)
    for _ in range(SLOTS):
        assert all(len(each) for each in found(halves, white, sizes_of(4, SMALL)))
    black = np.zeros((3, *SMALL, 3), dtype=np.uint8)
    for _ in range(SLOTS):
        answers = found(halves, black, sizes_of(3, SMALL))
        assert [len(each) for each in answers] == [0, 0, 0]
    assert same(answers, found(whole, black, sizes_of(3, SMALL)))


def test_split_detector_results_are_not_overwritten(halves: SplitDetector) -> None:
    first = found(halves, noise(1, 2, SMALL), sizes_of(2, SMALL))
    before = [(each.boxes.copy(), each.scores.copy(), each.labels.copy()) for each in first]
    for seed in range(2, 2 + 2 * SLOTS):
        found(halves, noise(seed, 2, SMALL), sizes_of(2, SMALL))
    for each, (boxes, scores, labels) in zip(first, before, strict=True):
        assert np.array_equal(each.boxes, boxes)
        assert np.array_equal(each.scores, scores)
        assert np.array_equal(each.labels, labels)


def test_split_detector_evicts_client_canvases(
    artifact: Artifact, whole: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "RECENT_SHAPES", 2)
    memory = CountingMemory()
    detector = open_on_host(artifact, memory=memory)
    shapes = [Size(32, 32 * columns) for columns in range(1, 9)]
    for canvas in sorted(shapes[:2] * SLOTS):
        found(detector, noise(1, 1, canvas), sizes_of(1, canvas))
    settled = memory.blocks
    most = settled + len(parts_of(artifact).constants) + len(SEAM)
    for canvas in shapes * (2 * SLOTS):
        canvases, sizes = noise(2, 1, canvas), sizes_of(1, canvas)
        assert same(found(detector, canvases, sizes), found(whole, canvases, sizes))
        assert memory.blocks <= most, "at most the newest shape beyond those that stay"


class FullMemory(HostMemory):
    """Memory with room for a number of blocks at a time."""

    most = 1 << 30

    def allocate(self, size: int) -> int:
        if len(self._blocks) >= self.most:
            raise OutOfMemory("CUDA failure 2: out of memory in cudaMalloc on cuda:0")
        return super().allocate(size)


def test_split_detector_evicts_shapes_when_memory_is_short(
    artifact: Artifact, whole: Detector
) -> None:
    memory = FullMemory()
    detector = open_on_host(artifact, memory=memory)
    shapes = [Size(32, 32 * columns) for columns in range(1, 9)]
    for canvas in shapes[:SLOTS]:
        found(detector, noise(1, 1, canvas), sizes_of(1, canvas))
    memory.most = len(memory._blocks)
    for canvas in shapes * 2:
        canvases, sizes = noise(2, 1, canvas), sizes_of(1, canvas)
        assert same(found(detector, canvases, sizes), found(whole, canvases, sizes))


def test_split_detector_allocates_nothing_once_warm(artifact: Artifact) -> None:
    memory = CountingMemory()
    detector = open_on_host(artifact, memory=memory)
    for count in (1, 2, 4):
        detector.warm(SMALL, count)
    before = memory.allocations
    for count in (1, 2, 3, 4, 9):
        found(detector, noise(count, count, SMALL), sizes_of(count, SMALL))
    assert memory.allocations == before


def test_split_detector_serves_every_short_side_canvas(tmp_path: Path) -> None:
    rule = ShortSide(short=64, long=160)
    artifact = read_artifact(seam_model.save(tmp_path, rule))
    detector, whole = open_on_host(artifact), open_detector(artifact, CPU)
    for original in (Size(100, 100), Size(30, 300), Size(300, 30), Size(480, 640)):
        canvas = rule.fit(original).canvas
        canvases, sizes = noise(3, 4, canvas), sizes_of(4, canvas)
        assert same(found(detector, canvases, sizes), found(whole, canvases, sizes))


def test_split_detector_serves_larger_canvases(halves: SplitDetector) -> None:
    canvas = Size(320, 320)
    with pytest.raises(ValueError, match="4 canvases of 320x320 are larger than"):
        found(halves, noise(1, 4, canvas), sizes_of(4, canvas))
    assert found(halves, noise(1, 1, SMALL), sizes_of(1, SMALL)), "and the slot is free again"


@dataclass
class Session:
    """Another session behind a watch."""

    inner: ort.InferenceSession
    threads: set[str] = field(default_factory=set)
    at_once: list[int] = field(default_factory=lambda: [0, 0])
    on_graph: Callable[[ort.IOBinding], bool] = lambda _: True
    """Called in place of a run with a graph; False: nothing is run."""

    def run_with_iobinding(self, binding: ort.IOBinding, options: ort.RunOptions) -> None:
        self.threads.add(threading.current_thread().name)
        self.at_once[0] += 1
        self.at_once[1] = max(self.at_once)
        try:
            if int(options.get_run_config_entry("gpu_graph_id")) < 0 or self.on_graph(binding):
                self.inner.run_with_iobinding(binding, options)
        finally:
            self.at_once[0] -= 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class CountingMemory(HostMemory):
    def __init__(self) -> None:
        super().__init__()
        self.allocations = 0

    def allocate(self, size: int) -> int:
        self.allocations += 1
        return super().allocate(size)

    @property
    def blocks(self) -> int:
        return len(self._blocks)


def test_split_detector_serialises_callers(artifact: Artifact, whole: Detector) -> None:
    sessions: list[Session] = []

    def open_watched(content: bytes) -> Any:
        sessions.append(Session(open_network(content)))
        return sessions[-1]

    detector = open_on_host(artifact, open_graphs=open_watched)
    detector.warm(SMALL, 4)
    cases = [
        (noise(seed, 1 + seed % 6, SMALL), sizes_of(1 + seed % 6, SMALL)) for seed in range(40)
    ]
    with ThreadPoolExecutor(6) as callers:
        answers = list(callers.map(lambda case: found(detector, *case), cases))
    for case, answer in zip(cases, answers, strict=True):
        assert same(answer, found(whole, *case))
    (session,) = sessions
    assert session.threads == {"cpu-0"}
    assert session.at_once[1] == 1


@pytest.mark.parametrize("fault", ["refused", "raises", "stale"])
def test_split_detector_works_without_cuda_graphs(
    artifact: Artifact, whole: Detector, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    def open_graphs(content: bytes) -> Any:
        if fault == "refused":
            raise RuntimeError("This session cannot use the graph capture feature")
        return Session(open_network(content), on_graph=on_graph)

    def on_graph(_: ort.IOBinding) -> bool:
        if fault == "raises":
            raise RuntimeError("CUDA failure 900: operation not permitted")
        return False

    with caplog.at_level(logging.WARNING):
        detector = open_on_host(artifact, open_graphs=open_graphs)
        for canvas in tiny_model.SIZES:
            detector.warm(canvas, 2)
    reason = {"refused": "cannot use", "raises": "900", "stale": "answers other than"}[fault]
    (record,) = caplog.records
    assert re.search(f"no CUDA graphs: .*{reason}", record.getMessage())
    for seed in range(4):
        canvases, sizes = noise(seed, 2, SMALL), sizes_of(2, SMALL)
        assert same(found(detector, canvases, sizes), found(whole, canvases, sizes))


def test_split_detector_captures_once_per_slot_and_shape(artifact: Artifact) -> None:
    captured: list[ort.IOBinding] = []

    def note(binding: ort.IOBinding) -> bool:
        captured.append(binding)
        return True

    detector = open_on_host(
        artifact, open_graphs=lambda content: Session(open_network(content), on_graph=note)
    )
    for _ in range(2):
        for count in (1, 2, 3, 4):
            detector.warm(SMALL, count)
    found(detector, noise(1, 1, Size(32, 32)), sizes_of(1, Size(32, 32)))
    assert len({id(binding) for binding in captured}) == SLOTS * len({1, 2, 4})


class SmallMemory(HostMemory):
    """Limit the memory of a GPU to a number of bytes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._left = size

    def allocate(self, size: int) -> int:
        self._left -= size
        if self._left < 0:
            raise OutOfMemory("CUDA failure 2: out of memory in cudaMalloc on cuda:0")
        return super().allocate(size)

    def left(self) -> Free | None:
        return Free(free=3 << 20, total=16 << 30)


@pytest.mark.parametrize("size", [1000, 2 * 4 * 96 * 128 * 3 + 2000])
def test_split_detector_out_of_memory_names_setting_and_size(artifact: Artifact, size: int) -> None:
    with pytest.raises(DeviceError) as caught:
        open_on_host(artifact, memory=SmallMemory(size)).warm(Size(96, 128), 4)
    for part in (
        "4 canvases of 96x128",
        "3 of its 16384 MiB are free",
        "lower RETINASERVE_MAX_BATCH_SIZE",
        "CUDA failure 2: out of memory",
    ):
        assert part in str(caught.value)


def test_split_detector_releases_its_memory(artifact: Artifact) -> None:
    memory = CountingMemory()
    detector = open_on_host(artifact, memory=memory)
    detector.warm(SMALL, 2)
    session = weakref.ref(detector._engine.network)
    assert memory.blocks
    names = {thread.name for thread in threading.enumerate()}
    assert "cpu-0" in names
    del detector
    gc.collect()
    wait_until(lambda: not memory.blocks and session() is None)


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_split_detector_describes_itself(
    artifact: Artifact, whole: Detector, halves: SplitDetector
) -> None:
    assert halves.metadata == whole.metadata
    assert halves.providers == whole.providers


def test_file_of_required_inputs_is_split_into_the_same_parts(artifact: Artifact) -> None:
    assert split(without_defaults(artifact.content)) == parts_of(artifact)


def test_file_without_candidates_is_not_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = read_artifact(tiny_model.save(tmp_path))
    assert split(artifact.content) is None
    monkeypatch.setattr(devices, "providers", lambda _: providers(CPU))
    monkeypatch.setattr(devices, "CUDA_PROVIDER", devices.CPU_PROVIDER)
    with caplog.at_level(logging.WARNING):
        detector = open_detector(artifact, Device("cuda", 0, graphs=True))
    assert isinstance(detector, WholeDetector)
    assert "no seam" in caplog.text


def broken(name: str) -> bytes:
    """A model whose seam is no cut."""
    model = seam_model.build()
    nodes = {node.output[0]: node for node in model.graph.node}
    if name == "selection reads pixels":
        nodes["select_batch"].input[0] = "pixels"
        nodes["select_batch"].input[0] = "images"
    elif name == "network reads a threshold":
        nodes["bright"].input[1] = "score_threshold"
    else:
        nodes["select_own_class"].input[0] = "candidate_labels_renamed"
        nodes["candidate_scores"].output[0] = "candidate_scores"
        nodes["candidate_labels"].output[0] = "candidate_labels_renamed"
        nodes["labels"].input[0] = "candidate_labels_renamed"
        nodes["select_label_rows"].input[0] = "candidate_labels_renamed"
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "name", ["selection reads pixels", "network reads a threshold", "a name is missing"]
)
def test_file_that_cannot_be_split_stays_whole(name: str) -> None:
    assert split(broken(name)) is None


def test_split_network_excludes_canvas_constants(artifact: Artifact) -> None:
    parts = parts_of(artifact)
    network = onnx.load_model_from_string(parts.network)
    operators = {node.op_type for node in network.graph.node}
    assert not operators & {"Shape", "Range", "GatherND", "NonMaxSuppression"}
    assert {"Gather", "TopK"} <= operators
    hosted = {each.source: each.on_host for each in parts.constants}
    assert hosted == {"kept": True, "table_float": False, "canvas": False}


def test_split_detector_serves_a_pipeline(
    artifact: Artifact, whole: Detector, halves: SplitDetector
) -> None:
    servable = Servable("seam", 1, artifact, (halves,) * SLOTS)
    pipeline = Pipeline(devices=SLOTS, decode_threads=2, policy=Policy(4), on_batch=lambda *_: None)
    images = noise(7, 24, SMALL)
    letterbox = Letterbox(SMALL, SMALL, SMALL)

    async def detect_all() -> Iterator[Detections]:
        outcomes = await asyncio.gather(
            *(
                pipeline.detect_canvas(
                    lambda image=image: Prepared(image, letterbox),
                    servable,
                    score=0.45,
                    iou=0.5,
                    deadline=time.monotonic() + SECONDS,
                    finish=as_it_is,
                )
                for image in images
            )
        )
        return (outcome.detections for outcome in outcomes)

    pipeline.start()
    try:
        answers = list(asyncio.run(detect_all()))
    finally:
        pipeline.close()
    expected = found(whole, images, sizes_of(24, SMALL), most=1000)
    assert same(answers, expected)
    assert math.isfinite(servable.costs.of(SMALL).seconds(4))

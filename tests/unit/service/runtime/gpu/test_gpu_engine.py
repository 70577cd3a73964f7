"""What only a GPU can show of the engine."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import DeviceError
from service.imaging.canvas import Size
from service.imaging.decode import prepare
from service.imaging.samples import draw_smear
from service.runtime.artifact import Artifact, read_artifact, scan_repository
from service.runtime.detector import Detections, Detector
from service.runtime.devices import Device, open_detector, resolve
from service.runtime.gpu.cuda import CudaMemory, runtime_library
from service.runtime.gpu.engine import SLOTS
from service.runtime.gpu.split_detector import SplitDetector
from service.runtime.gpu.whole_detector import WholeDetector
from service.settings import bundled_models
from tests import seam_model
from tests.canvases import found, noise, same, sizes_of
from tests.images import encoded

pytestmark = pytest.mark.gpu

BATCHES = (1, 2, 4)
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def gpu() -> Device:
    return resolve("cuda", graphs=True).devices[0]


@pytest.fixture(scope="module")
def bundled() -> Artifact:
    return read_artifact(scan_repository(bundled_models())[0].path)


@pytest.fixture(scope="module")
def canvas(bundled: Artifact) -> Size:
    return bundled.metadata.canvas.all_canvases()[0]


@pytest.fixture(scope="module")
def warm(bundled: Artifact, gpu: Device, canvas: Size) -> SplitDetector:
    detector = open_detector(bundled, gpu, batch=BATCHES[-1])
    assert isinstance(detector, SplitDetector)
    for batch in BATCHES:
        detector.warm(canvas, batch)
    return detector


def images(artifact: Artifact, count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Drawn blood cells that share a canvas, and the sizes of their images."""
    drawn = [encoded(draw_smear(seed)[0], "PNG") for seed in range(count)]
    prepared = [prepare(each, artifact.metadata.canvas) for each in drawn]
    return (
        np.stack([each.canvas for each in prepared]),
        np.array([each.letterbox.resized for each in prepared]),
    )


def agree(one: list[Detections], other: list[Detections]) -> None:
    """Within what TF32 moves; detections within that of the threshold aside."""
    for a, b in zip(one, other, strict=True):
        sure = min(np.sum(a.scores > 0.32), np.sum(b.scores > 0.32))
        assert sure, "there is something to compare"
        assert np.sum(a.scores > 0.32) == np.sum(b.scores > 0.32)
        assert np.allclose(a.scores[:sure], b.scores[:sure], atol=5e-3)
        # Scores that are nearly equal may have changed places.
        nearest = np.abs(a.boxes[:sure, None] - b.boxes[None]).max(axis=2).min(axis=1)
        assert nearest.max() < 1.0


def test_gpu_runs_cuda_graphs(
    bundled: Artifact, gpu: Device, canvas: Size, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        detector = open_detector(bundled, gpu, batch=2)
        detector.warm(canvas, 2)
    assert caplog.messages == [], "no CUDA graphs"
    assert isinstance(detector, SplitDetector)
    assert detector.providers[0] == "CUDAExecutionProvider"


def test_gpu_replay_equals_first_run(warm: SplitDetector, bundled: Artifact) -> None:
    canvases, sizes = images(bundled, 4)
    first = found(warm, canvases, sizes, score=0.3)
    for _ in range(3 * SLOTS):
        assert same(found(warm, canvases, sizes, score=0.3), first)
    other = noise(1, 4, Size(*canvases.shape[1:3]))
    found(warm, other, sizes)
    assert same(found(warm, canvases, sizes, score=0.3), first)


def test_gpu_split_agrees_with_cpu(warm: SplitDetector, bundled: Artifact) -> None:
    whole = open_detector(bundled, Device("cpu"))
    for count in (1, 3, 4, 6):
        canvases, sizes = images(bundled, count)
        agree(found(warm, canvases, sizes, score=0.3), found(whole, canvases, sizes, score=0.3))


def test_gpu_without_tf32_is_closer_to_cpu(bundled: Artifact, canvas: Size) -> None:
    exact = resolve("cuda", tf32=False, graphs=True).devices[0]
    canvases, sizes = images(bundled, 2)
    expected = found(open_detector(bundled, Device("cpu")), canvases, sizes, score=0.3)
    answers = found(open_detector(bundled, exact, batch=2), canvases, sizes, score=0.3)
    for a, b in zip(answers, expected, strict=True):
        assert len(a) == len(b)
        assert np.allclose(a.scores, b.scores, atol=1e-3)
        assert np.abs(a.boxes - b.boxes).max() < 0.5


def test_gpu_detections_are_batch_invariant(warm: SplitDetector, bundled: Artifact) -> None:
    canvases, sizes = images(bundled, 4)
    together = found(warm, canvases, sizes, score=0.3)
    for index in range(4):
        (alone,) = found(warm, canvases[[index]], sizes[[index]], score=0.3)
        agree([alone], [together[index]])


def test_gpu_memory_is_flat_over_a_thousand_calls(
    warm: SplitDetector, gpu: Device, canvas: Size
) -> None:
    memory = CudaMemory(gpu.index, gpu.gate, runtime_library())
    cases = [(noise(count, count, canvas), sizes_of(count, canvas)) for count in (1, 2, 3, 4)]

    def run(calls: int) -> int:
        for number in range(calls):
            found(warm, *cases[number % len(cases)])
        left = memory.left()
        assert left is not None
        return left.free

    before = run(50)
    assert before - run(1000) < 16 * MEBIBYTE


def test_gpu_threads_never_share_the_session(
    warm: SplitDetector, bundled: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    busy = threading.Lock()
    session = type(warm._engine.network)
    run = session.run_with_iobinding

    def watched(self: Any, *arguments: Any) -> None:
        assert busy.acquire(blocking=False), "another thread is in the session"
        seen.add(threading.current_thread().name)
        try:
            run(self, *arguments)
        finally:
            busy.release()

    canvases, sizes = images(bundled, 4)
    expected = found(warm, canvases, sizes, score=0.3)
    monkeypatch.setattr(session, "run_with_iobinding", watched)
    with ThreadPoolExecutor(4) as callers:
        answers = list(callers.map(lambda _: found(warm, canvases, sizes, score=0.3), range(100)))
    assert all(same(answer, expected) for answer in answers)
    assert len(seen) == 1


def test_gpu_loads_a_model_while_another_serves(
    warm: SplitDetector, bundled: Artifact, gpu: Device, canvas: Size
) -> None:
    """Captures are CUDA's own business with every thread of the process: see CaptureGate."""
    canvases, sizes = images(bundled, 4)
    expected = found(warm, canvases, sizes, score=0.3)
    done = threading.Event()

    def serve() -> int:
        count = 0
        while not done.is_set():
            assert same(found(warm, canvases, sizes, score=0.3), expected)
            count += 1
        return count

    with ThreadPoolExecutor(SLOTS) as callers:
        serving = [callers.submit(serve) for _ in range(SLOTS)]
        try:
            other = open_detector(bundled, gpu, batch=4)
            for batch in BATCHES:
                other.warm(canvas, batch)
        finally:
            done.set()
        assert all(each.result() for each in serving)
    assert same(found(other, canvases, sizes, score=0.3), expected)


@pytest.mark.parametrize("graphs", [False, True])
def test_gpu_out_of_memory_names_the_remedy(bundled: Artifact, graphs: bool) -> None:
    small = resolve("cuda", memory_limit=24 * MEBIBYTE, graphs=graphs).devices[0]
    with pytest.raises(DeviceError, match="RETINASERVE_GPU_MEMORY_BYTES") as caught:
        open_detector(bundled, small, batch=16).warm(Size(448, 448), 16)
    assert "RETINASERVE_MAX_BATCH_SIZE (now 16)" in str(caught.value)


def test_gpu_whole_file_agrees_with_cpu(bundled: Artifact, canvas: Size) -> None:
    on_gpu = open_detector(bundled, resolve("cuda").devices[0], batch=4)
    assert isinstance(on_gpu, WholeDetector)
    on_gpu.warm(canvas, 4)
    on_cpu = open_detector(bundled, Device("cpu"))
    for count in (1, 3, 4):
        canvases, sizes = images(bundled, count)
        expected = found(on_cpu, canvases, sizes, score=0.3)
        with ThreadPoolExecutor(SLOTS) as callers:
            answers = callers.map(
                lambda _: found(on_gpu, canvases, sizes, score=0.3),  # noqa: B023
                range(4 * SLOTS),
            )
            for answer in answers:
                agree(answer, expected)


def test_gpu_small_model_is_exact(tmp_path: Path, gpu: Device) -> None:
    """Squares have no products to round, so the GPU's answer is the CPU's to the last digits."""
    artifact = read_artifact(seam_model.save(tmp_path))
    on_gpu: Detector = open_detector(artifact, gpu, batch=4)
    on_cpu = open_detector(artifact, Device("cpu"))
    for canvas in (Size(96, 128), Size(64, 160), Size(32, 32)):
        for count in (1, 3, 4, 9):
            canvases, sizes = noise(count, count, canvas), sizes_of(count, canvas, less=3)
            for a, b in zip(
                found(on_gpu, canvases, sizes), found(on_cpu, canvases, sizes), strict=True
            ):
                assert len(a) == len(b)
                assert np.allclose(a.scores, b.scores, atol=1e-5)

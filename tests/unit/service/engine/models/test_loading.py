"""The loader's thread, and what a load leaves behind."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from service.engine.models import loading as module
from service.engine.models.loading import Loader, open_servable
from service.engine.work import Servable
from service.errors import ArtifactError
from service.imaging.canvas import Size
from service.runtime.artifact import Entry, read_artifact
from service.runtime.cpu_concurrency import CpuConcurrency, cpu_concurrency
from service.runtime.detector import Detector, batch_buckets
from service.runtime.devices import Device, open_detector
from tests import tiny_model

SECONDS = 60.0
CPU = Device("cpu")


def test_failed_load_does_not_block_the_next(caplog: pytest.LogCaptureFixture) -> None:
    order: list[int] = []
    done = threading.Event()
    loader = Loader()
    loader.submit(lambda: order.append(1))
    loader.submit(lambda: order.append(2 // 0))
    loader.submit(lambda: order.append(3))
    loader.submit(done.set)
    with caplog.at_level(logging.ERROR):
        loader.start()
        assert done.wait(SECONDS)
    loader.close(SECONDS)
    assert order == [1, 3]
    assert "ZeroDivisionError" in caplog.text


def test_close_has_a_timeout() -> None:
    go = threading.Event()
    loader = Loader()
    loader.start()
    loader.submit(lambda: assert_waited(go))
    loader.close(0.01)
    go.set()
    loader.close(SECONDS)


def assert_waited(go: threading.Event) -> None:
    assert go.wait(SECONDS)


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])]
)
def test_warm_up_batch_sizes(largest: int, sizes: list[int]) -> None:
    assert batch_buckets(largest) == sizes


def test_warm_up_runs_every_canvas_on_every_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = read_artifact(tiny_model.save(tmp_path))
    detectors = tuple(open_detector(artifact, CPU) for _ in range(2))
    warmed: set[tuple[Detector, Size, int]] = set()
    monkeypatch.setattr(Detector, "warm", lambda self, *given: warmed.add((self, *given)))
    servable = Servable("tiny", 1, artifact, detectors)
    module._warm(servable, (1, 2), on_cpu=False)
    assert warmed == {
        (detector, canvas, batch)
        for detector in detectors
        for canvas in tiny_model.SIZES
        for batch in (1, 2)
    }
    assert all(servable.costs.of(canvas).fastest > 0 for canvas in tiny_model.SIZES)


@pytest.mark.parametrize("device", [CPU, Device("cuda")])
@pytest.mark.parametrize(
    ("output", "why"),
    [("labels", "labels are 2 to 4"), ("image_index", "image_index is 2 to 3 in a batch of 2")],
)
def test_load_checks_outputs_before_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Device, output: str, why: str
) -> None:
    path = tiny_model.save(tmp_path)
    model = onnx.load(path)
    (node,) = [node for node in model.graph.node if node.output[0] == output]
    node.output[0] = "before"
    beyond = onnx.helper.make_tensor("beyond", onnx.TensorProto.INT64, [], [2])
    model.graph.initializer.append(beyond)
    model.graph.node.append(onnx.helper.make_node("Add", ["before", "beyond"], [output]))
    onnx.save(model, path)
    # What is looked at does not depend on where it was computed.
    monkeypatch.setattr(
        module, "open_detector", lambda artifact, _, **given: open_detector(artifact, CPU, **given)
    )
    entry = Entry("tiny", 1, path)
    with pytest.raises(ArtifactError, match=why):
        open_servable(
            entry, read_artifact(path), devices=(device,), batch=2, cpu_concurrency=CpuConcurrency()
        )


def opened(path: Path, concurrency: CpuConcurrency) -> Servable:
    artifact, entry = read_artifact(path), Entry("tiny", 1, path)
    return open_servable(entry, artifact, devices=(CPU,), batch=1, cpu_concurrency=concurrency)


def test_load_opens_both_sessions_concurrently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model.save(tmp_path)
    both = threading.Barrier(2)
    threads: list[int | None] = []

    def together(artifact: Any, device: Device, **given: Any) -> Detector:
        both.wait(SECONDS)
        threads.append(device.threads)
        return open_detector(artifact, device, **given)

    monkeypatch.setattr(module, "open_detector", together)
    servable = opened(path, cpu_concurrency(2, 4))
    assert sorted(threads, key=str) == [2, None]
    assert len(servable.detectors) == 2


def test_load_opens_large_files_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model.save(tmp_path)
    opening: list[threading.Thread] = []

    def noted(artifact: Any, device: Device, **given: Any) -> Detector:
        opening.append(threading.current_thread())
        return open_detector(artifact, device, **given)

    monkeypatch.setattr(module, "open_detector", noted)
    monkeypatch.setattr(module, "_OPENED_TOGETHER", path.stat().st_size - 1)
    assert len(opened(path, cpu_concurrency(2, 4)).detectors) == 2
    assert opening == [threading.current_thread()] * 2


def test_load_warms_both_sessions_concurrently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model.save(tmp_path)
    first = threading.Barrier(4)
    runs: list[Detector] = []
    counting = threading.Lock()

    def together(run: Callable[[Detector, Size, int], None]) -> Callable[..., None]:
        def counted(self: Detector, canvas: Size, batch: int = 1) -> None:
            with counting:
                runs.append(self)
                number = len(runs)
            if number <= 4:
                first.wait(SECONDS)
            run(self, canvas, batch)

        return counted

    monkeypatch.setattr(Detector, "warm", together(Detector.warm))
    monkeypatch.setattr(Detector, "prove", together(Detector.prove))
    opened(path, cpu_concurrency(3, 4))
    assert len(set(runs[:4])) == 2, "one run of the lone session, one for each caller beside it"
    assert len(runs) == 5
    assert runs.count(runs[4]) == 2, "then the lone one runs by itself, and is timed"


def test_load_failure_ends_both_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model.save(tmp_path)
    begun = threading.Event()
    ended = threading.Event()

    def fail(artifact: Any, device: Device, **given: Any) -> Detector:
        if device.threads is None:
            assert begun.wait(SECONDS)
            raise ArtifactError("bad file")
        begun.set()
        detector = open_detector(artifact, device, **given)
        ended.set()
        return detector

    monkeypatch.setattr(module, "open_detector", fail)
    with pytest.raises(ArtifactError, match="bad file"):
        opened(path, cpu_concurrency(2, 2))
    assert ended.is_set(), "nothing is left in native code"

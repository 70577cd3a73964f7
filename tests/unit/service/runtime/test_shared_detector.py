"""Which of two sessions a call takes, and that both give the same answers."""

from __future__ import annotations

import io
import threading
from typing import Any

import numpy as np
import pytest

from service.imaging.decode import prepare
from service.imaging.samples import draw_smear
from service.runtime.artifact import MODEL_FILE, read_artifact
from service.runtime.detector import Detections, Detector
from service.runtime.devices import Device, open_detector
from service.runtime.shared_detector import SharedDetector
from service.settings import bundled_models

BUNDLED = next(bundled_models().glob(f"*/*/{MODEL_FILE}"))
SECONDS = 60.0
BLANK = np.zeros((1, 32, 32, 3), np.uint8), np.array([[32, 32]])


class Fake(Detector):
    """Tells the call its name, and lasts as long as the call is told to."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> list[Detections]:
        call = threading.current_thread()
        assert isinstance(call, Call)
        call.took = self._name
        call.begun.set()
        assert call.go.wait(SECONDS)
        if call.fails:
            raise RuntimeError("bad image")
        return []


class Call(threading.Thread):
    """A call from a thread of its own."""

    def __init__(self, detector: Detector, *, fails: bool = False) -> None:
        super().__init__(daemon=True)
        self.took = ""
        self.begun, self.go = threading.Event(), threading.Event()
        self.fails = fails
        self._detector = detector
        self.start()
        assert self.begun.wait(SECONDS)

    def run(self) -> None:
        try:
            self._detector(*BLANK, score_threshold=0.5, iou_threshold=0.5)
        except RuntimeError:
            assert self.fails

    def end(self) -> None:
        self.go.set()
        self.join(SECONDS)
        assert not self.is_alive()


@pytest.fixture
def shared() -> SharedDetector:
    alone, beside = Fake("alone"), Fake("beside")
    alone.metadata = beside.metadata = read_artifact(BUNDLED).metadata
    return SharedDetector(alone, beside)


def test_sequential_calls_use_all_threads(shared: SharedDetector) -> None:
    for _ in range(3):
        call = Call(shared)
        call.end()
        assert call.took == "alone"


def test_concurrent_calls_use_few_threads(shared: SharedDetector) -> None:
    calls = [Call(shared) for _ in range(3)]
    assert [call.took for call in calls] == ["alone", "beside", "beside"]
    # While other calls run, none has all threads.
    calls[0].end()
    calls += [Call(shared), Call(shared)]
    assert [call.took for call in calls[3:]] == ["beside", "beside"]
    for call in calls[1:]:
        call.end()
    last = Call(shared)
    last.end()
    assert last.took == "alone"


def test_caller_may_choose_the_session(shared: SharedDetector) -> None:
    for lone, name in ((True, "alone"), (False, "beside")):
        call = Call(shared.suited(lone=lone))
        call.end()
        assert call.took == name
    plain = Fake("plain")
    assert plain.suited(lone=True) is plain.suited(lone=False) is plain


def test_failed_call_is_not_counted_as_running(shared: SharedDetector) -> None:
    calls = [Call(shared, fails=True) for _ in range(2)]
    for call in calls:
        call.end()
    last = Call(shared)
    last.end()
    assert last.took == "alone"


def test_both_sessions_give_the_same_detections() -> None:
    artifact = read_artifact(BUNDLED)
    alone, beside = (open_detector(artifact, Device("cpu", threads=count)) for count in (4, 1))
    file = io.BytesIO()
    draw_smear(1)[0].save(file, "JPEG")
    image = prepare(file.getvalue(), artifact.metadata.canvas, max_pixels=10**7)
    sizes = np.array([image.letterbox.resized], dtype=np.int64)
    (expected,), (found,) = (
        each([image.canvas], sizes, score_threshold=0.05, iou_threshold=0.5)
        for each in (alone, beside)
    )
    assert len(expected) > 10
    assert found.labels.tolist() == expected.labels.tolist()
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)

"""The choice of a device, and sessions that are what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from service.errors import ArtifactError, DeviceError
from service.runtime import devices
from service.runtime.artifact import read_artifact
from service.runtime.devices import Device, Hardware, open_detector, resolve
from tests import tiny_model


def test_nvidia_driver_is_read_from_proc(tmp_path: Path) -> None:
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text("NVRM version: ...\n")
    assert "NVIDIA driver" in (devices.nvidia_driver(tmp_path) or "")


def test_auto_without_driver_falls_back_to_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "nvidia_driver", lambda: None)
    assert resolve("auto") == Hardware((Device("cpu"),), fallback="no NVIDIA driver was found")
    assert resolve("cpu") == Hardware((Device("cpu"),))
    with pytest.raises(DeviceError, match="cuda:1 cannot be used: no NVIDIA driver"):
        resolve("cuda:1")


@pytest.mark.skipif(devices.nvidia_driver() is not None, reason="CUDA may work on this machine")
@pytest.mark.parametrize("asked", ["auto", "cuda", "cuda:0,cuda:1"])
def test_driver_without_cuda_names_the_missing_library(
    monkeypatch: pytest.MonkeyPatch, asked: str, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "nvidia_driver", lambda: "an NVIDIA driver (libcuda.so.1)")
    missing = r"lib\w+\.so" if devices.CUDA_PROVIDER in ort.get_available_providers() else "CUDA"
    with pytest.raises(DeviceError, match=rf"cuda:0 cannot be used: .*{missing}"):
        resolve(asked)
    assert capfd.readouterr().out == "", "stdout belongs to the command"


@pytest.mark.parametrize("asked", ["tpu", "cuda:x", "cuda:0,cpu", ""])
def test_unknown_device_is_refused(asked: str) -> None:
    with pytest.raises(DeviceError, match="cuda:0,cuda:1"):
        resolve(asked)


def test_device_names_are_parsed() -> None:
    assert Hardware((Device("cuda", 0), Device("cuda", 1))).name == "cuda:0,cuda:1"
    assert Device("cpu").name == "cpu"


_SHRINK = """
import sys
from pathlib import Path

import psutil

from service.imaging.canvas import Size
from service.runtime import devices
from service.runtime.artifact import read_artifact

artifact = read_artifact(Path(sys.argv[1]))
detectors = [devices.open_detector(artifact, devices.Device("cpu", threads=1)) for _ in range(2)]
for detector in detectors:
    detector.warm(Size(96, 128), batch=512)
with_arena = psutil.Process().memory_info().rss
del detector, detectors
devices.shrink_arena()
print(with_arena - psutil.Process().memory_info().rss)
"""


def test_shrink_arena_gives_memory_back(tmp_path: Path) -> None:
    """In a process of its own: one that has trained keeps what it freed."""
    command = [sys.executable, "-c", _SHRINK, tiny_model.save(tmp_path)]
    given_back = int(subprocess.check_output(command, text=True))
    # Two sessions use the same blocks, one after the other; in the end none does.
    assert given_back > 512 * 96 * 128 * 3 * 4


def test_cpu_detector_opens(tmp_path: Path) -> None:
    detector = open_detector(read_artifact(tiny_model.save(tmp_path)), Device("cpu"))
    assert detector.providers == ["CPUExecutionProvider"]
    canvas = np.zeros((1, 96, 128, 3), dtype=np.uint8)
    canvas[0, :32, :32] = (255, 0, 0)
    (found,) = detector(canvas, np.array([[96, 128]]), score_threshold=0.9, iou_threshold=0.5)
    assert found.boxes.tolist() == [[0.0, 0.0, 32.0, 32.0]]


@pytest.mark.skipif(devices.nvidia_driver() is not None, reason="CUDA may work on this machine")
def test_silent_cpu_fallback_is_refused(tmp_path: Path) -> None:
    artifact = read_artifact(tiny_model.save(tmp_path))
    with pytest.raises((DeviceError, ArtifactError), match=r"cuda:0|CUDA"):
        open_detector(artifact, Device("cuda", 0))


def test_device_probe_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    session = ort.InferenceSession(devices._probe_model(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {})
    assert result.shape == (1, 4, 6, 6)
    assert devices.prove(Device("cpu")) is None
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "without CUDA" in (devices.prove(Device("cuda")) or "")


@pytest.mark.gpu
def test_cuda_agrees_with_cpu(tmp_path: Path) -> None:
    hardware = resolve("auto")
    assert hardware == Hardware((Device("cuda", 0),))
    artifact = read_artifact(tiny_model.save(tmp_path))
    on_gpu, on_cpu = (
        open_detector(artifact, device) for device in (hardware.devices[0], Device("cpu"))
    )
    assert on_gpu.providers[0] == devices.CUDA_PROVIDER
    canvases = np.random.default_rng(0).integers(0, 256, (4, 96, 128, 3), dtype=np.uint8)
    sizes = np.tile(np.array([[96, 128]]), (4, 1))
    for one, other in zip(
        on_gpu(canvases, sizes, score_threshold=0.3, iou_threshold=0.5),
        on_cpu(canvases, sizes, score_threshold=0.3, iou_threshold=0.5),
        strict=True,
    ):
        assert np.allclose(one.scores, other.scores, atol=1e-3)
        assert len(one) == len(other)


@pytest.mark.gpu
def test_missing_gpu_is_refused() -> None:
    with pytest.raises(DeviceError, match="cuda:63 cannot be used"):
        resolve("cuda:63")

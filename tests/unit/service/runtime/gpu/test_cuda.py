"""What can be shown of the CUDA part without a GPU: its bookkeeping, its options, its gate."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from service.errors import DeviceError
from service.imaging.canvas import Size
from service.runtime import devices
from service.runtime.artifact import Artifact, read_artifact
from service.runtime.devices import (
    Device,
    open_detector,
    providers,
    session_options,
    with_cuda_graphs,
)
from service.runtime.gpu import cuda
from service.runtime.gpu.buffers import run_options
from service.runtime.gpu.cuda import CaptureGate, CudaMemory, Free, OutOfMemory
from service.runtime.gpu.split_detector import SplitDetector
from service.runtime.gpu.whole_detector import WholeDetector
from tests import seam_model
from tests.canvases import found, noise, same, sizes_of
from tests.required_inputs import without_defaults

SECONDS = 60.0


class Runtime:
    """NVIDIA's runtime library, with the host for a device."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.blocks: dict[int, Any] = {}
        self.room = room
        self.device: dict[int, int] = {}
        """By thread, as in CUDA."""
        self.calls: list[tuple[str, int | None]] = []
        self.cudaGetErrorString = self._describe
        self.errors_taken = 0

    def _describe(self, status: Any) -> bytes:
        return {2: b"out of memory", 1: b"invalid argument"}[status.value]

    def _note(self, name: str) -> None:
        self.calls.append((name, self.device.get(threading.get_ident())))

    def cudaSetDevice(self, index: Any) -> int:
        self.device[threading.get_ident()] = index.value
        return 0

    def cudaGetLastError(self) -> int:
        self.errors_taken += 1
        return 0

    def cudaMemGetInfo(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = self.room, 1 << 30
        return 0

    def cudaMalloc(self, address: Any, size: Any) -> int:
        self._note("cudaMalloc")
        if size.value > self.room:
            return 2
        self.room -= size.value
        block = (ctypes.c_uint8 * size.value)()
        address._obj.value = ctypes.addressof(block)
        self.blocks[ctypes.addressof(block)] = block
        return 0

    def cudaHostAlloc(self, address: Any, size: Any, flags: Any) -> int:
        assert flags.value == 0
        return self.cudaMalloc(address, size)

    def cudaFree(self, address: Any) -> int:
        self.room += len(self.blocks.pop(address.value))
        return 0

    cudaFreeHost = cudaFree

    def cudaMemcpy(self, target: Any, source: Any, size: Any, kind: Any) -> int:
        self._note("cudaMemcpy")
        if kind.value not in (1, 2):
            return 1
        device = target.value if kind.value == 1 else source.value
        assert any(start <= device < start + len(self.blocks[start]) for start in self.blocks)
        ctypes.memmove(target.value, source.value, size.value)
        return 0


def memory_of(runtime: Runtime, index: int = 0) -> CudaMemory:
    return CudaMemory(index, CaptureGate(), runtime)


def test_cuda_copies_to_the_device_and_back() -> None:
    runtime = Runtime()
    memory = memory_of(runtime, 3)
    sent = memory.staging(48).view(np.float32).reshape(3, 4)
    assert not sent.any()
    sent[:] = np.arange(12).reshape(3, 4)
    address = memory.allocate(sent.nbytes)
    memory.upload(sent, address)
    sent[:] = 0
    back = np.empty_like(sent)
    memory.download(address, back)
    assert back.tolist() == np.arange(12).reshape(3, 4).tolist()
    assert {device for _, device in runtime.calls} == {3}


def test_cuda_frees_everything_once() -> None:
    runtime = Runtime()
    memory = memory_of(runtime)
    before = runtime.room
    addresses = [memory.allocate(size) for size in (0, 7, 4096)]
    staging = memory.staging(100)
    memory.free(addresses[0])
    memory.free(addresses[0])
    memory.free(int(staging.ctypes.data))
    assert len(runtime.blocks) == 2
    memory.close()
    memory.close()
    assert runtime.blocks == {}
    assert runtime.room == before


def test_cuda_out_of_memory_differs_from_other_errors() -> None:
    runtime = Runtime(room=1000)
    memory = memory_of(runtime, 1)
    with pytest.raises(OutOfMemory, match=r"CUDA failure 2: out of memory in cudaMalloc on cuda:1"):
        memory.allocate(1001)
    assert memory.left() == Free(1000, 1 << 30)
    with pytest.raises(DeviceError, match="CUDA failure 1") as caught:
        memory._copy(0, 0, 0, 7)
    assert not isinstance(caught.value, OutOfMemory)
    assert runtime.errors_taken == 2


def test_cuda_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_LIBRARIES", ("libcudart.so.0",))
    with pytest.raises(DeviceError, match=r"none of libcudart\.so\.0 can be loaded"):
        cuda.runtime_library()


def test_cuda_capture_excludes_other_calls() -> None:
    gate = CaptureGate()
    order: list[str] = []
    captured = threading.Event()

    def capture() -> None:
        with gate.capture():
            order.append("capture")
        captured.set()

    def use() -> None:
        with gate.use():
            order.append("late use")

    with gate.use(), gate.use():
        capturing = threading.Thread(target=capture)
        capturing.start()
        while not gate._captures:
            time.sleep(0.001)
        using = threading.Thread(target=use)
        using.start()
        assert not captured.wait(0.05)
        order.append("early use")
    for thread in (capturing, using):
        thread.join(SECONDS)
    assert order == ["early use", "capture", "late use"]


def test_cuda_captures_take_turns() -> None:
    gate = CaptureGate()
    inside: list[int] = []
    most: list[int] = []

    def capture() -> None:
        for _ in range(20):
            with gate.capture():
                inside.append(1)
                most.append(len(inside))
                inside.pop()
            with gate.use():
                assert not inside

    threads = [threading.Thread(target=capture) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(most) == 80
    assert max(most) == 1


def options_of(device: Device) -> dict[str, str]:
    (name, options), last = with_cuda_graphs(providers(device))
    assert (name, last) == (devices.CUDA_PROVIDER, devices.CPU_PROVIDER)
    assert isinstance(options, dict)
    return options


def test_cuda_provider_options_follow_settings() -> None:
    options = options_of(Device("cuda", 2, memory_limit=1 << 30, tf32=False))
    assert options["device_id"] == "2"
    assert options["gpu_mem_limit"] == str(1 << 30)
    assert options["use_tf32"] == "0"
    assert options["enable_cuda_graph"] == "1"
    default = options_of(Device("cuda"))
    assert default["use_tf32"] == "1"
    assert "gpu_mem_limit" not in default
    assert "enable_cuda_graph" not in dict(providers(Device("cuda"))[:1])[devices.CUDA_PROVIDER]
    assert with_cuda_graphs(providers(Device("cpu"))) == [devices.CPU_PROVIDER]


def test_cuda_provider_options_are_known_to_onnxruntime() -> None:
    """An unknown one fails only where there is a GPU, so the names are looked up in its code."""
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not library.exists():
        pytest.skip("this onnxruntime is a build without CUDA")
    options = options_of(Device("cuda", memory_limit=1))
    words = [*options, *(value for value in options.values() if value.isalpha())]
    assert {"HEURISTIC", "kSameAsRequested", "prefer_nhwc", "gpu_mem_limit"} <= set(words)
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        for word in words:
            assert code.find(b"\0" + word.encode() + b"\0") > 0, word


def test_cuda_run_options_hold_the_graph_id() -> None:
    assert run_options(7).get_run_config_entry("gpu_graph_id") == "7"


def test_gpu_opens_the_named_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the GPU itself: the runtime library and the provider stand in for it."""
    artifact = read_artifact(seam_model.save(tmp_path))
    runtime = Runtime()
    monkeypatch.setattr(devices, "runtime_library", lambda: runtime)
    monkeypatch.setattr(devices, "providers", lambda _: [devices.CPU_PROVIDER])
    monkeypatch.setattr(devices, "session_options", lambda _: session_options(Device("cpu")))
    monkeypatch.setattr(devices, "CUDA_PROVIDER", devices.CPU_PROVIDER)
    # What lies on the "device" is on the host, and onnxruntime has to be told so.
    monkeypatch.setattr(CudaMemory, "device", ("cpu", 0), raising=False)
    monkeypatch.setattr(CudaMemory, "__setattr__", _keep_device)
    detector = open_detector(artifact, Device("cuda", 0, graphs=True), batch=4)
    assert isinstance(detector, SplitDetector)
    canvas = Size(96, 128)
    for count in (1, 4):
        detector.warm(canvas, count)
    blocks = len(runtime.blocks)
    whole = open_detector(artifact, Device("cpu"))
    for count in (1, 2, 3, 4, 6):
        canvases, sizes = noise(count, count, canvas), sizes_of(count, canvas, less=5)
        assert same(found(detector, canvases, sizes), found(whole, canvases, sizes))
    # The buckets of 1 and 4 were warm; that of 2 is made when it is needed.
    assert len(runtime.blocks) > blocks


def _keep_device(memory: CudaMemory, name: str, value: Any) -> None:
    if name != "device":
        object.__setattr__(memory, name, value)


def test_gpu_out_of_memory_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = read_artifact(seam_model.save(tmp_path))
    monkeypatch.setattr(devices, "runtime_library", lambda: Runtime(room=10_000))
    monkeypatch.setattr(devices, "providers", lambda _: [devices.CPU_PROVIDER])
    monkeypatch.setattr(devices, "session_options", lambda _: session_options(Device("cpu")))
    with pytest.raises(DeviceError) as caught:
        open_detector(artifact, Device("cuda", 0, memory_limit=1 << 30, graphs=True), batch=16)
    for part in (
        "cuda:0 has too little memory for 16 canvases of 96x128",
        "lower RETINASERVE_MAX_BATCH_SIZE (now 16)",
        "raise RETINASERVE_GPU_MEMORY_BYTES (now 1073741824)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("broken", ["library", "network"])
def test_gpu_falls_back_to_the_whole_file(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = read_artifact(seam_model.save(tmp_path))

    def no_library() -> Runtime:
        raise DeviceError("no such library")

    def no_run(*_: object) -> None:
        raise RuntimeError("no such kernel\nStacktrace: ...")

    if broken == "library":
        monkeypatch.setattr(devices, "runtime_library", no_library)
    else:
        monkeypatch.setattr(devices, "runtime_library", Runtime)
        monkeypatch.setattr(SplitDetector, "warm", no_run)
    monkeypatch.setattr(devices, "providers", lambda _: [devices.CPU_PROVIDER])
    monkeypatch.setattr(devices, "session_options", lambda _: session_options(Device("cpu")))
    monkeypatch.setattr(devices, "CUDA_PROVIDER", devices.CPU_PROVIDER)
    detector = open_detector(artifact, Device("cuda", 0, graphs=True))
    assert not isinstance(detector, SplitDetector)
    reason = "no such library" if broken == "library" else "no such kernel"
    (line,) = [record.getMessage() for record in caplog.records if "runs whole" in record.message]
    assert line.endswith(f"on cuda:0, without CUDA graphs: {reason}")


def open_whole(artifact: Artifact, gate: CaptureGate) -> WholeDetector:
    """A whole file on a "device" that is the host."""
    return WholeDetector(
        artifact,
        providers=providers(Device("cpu")),
        options=session_options(Device("cpu")),
        device=("cpu", 0),
        gate=gate,
        remedy="lower RETINASERVE_MAX_BATCH_SIZE (now 16)",
    )


def test_gpu_runs_the_whole_file_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "providers", lambda _: [devices.CPU_PROVIDER])
    monkeypatch.setattr(devices, "CUDA_PROVIDER", devices.CPU_PROVIDER)
    detector = open_detector(read_artifact(seam_model.save(tmp_path)), Device("cuda", 0))
    assert isinstance(detector, WholeDetector)


@pytest.mark.parametrize("inputs", ["optional", "required"])
def test_gpu_io_binding_gives_the_same_detections(tmp_path: Path, inputs: str) -> None:
    artifact = read_artifact(seam_model.save(tmp_path))
    plain = open_detector(artifact, Device("cpu"))
    if inputs == "required":
        artifact = replace(artifact, content=without_defaults(artifact.content))
    bound = open_whole(artifact, CaptureGate())
    canvas = Size(96, 128)
    for count in (1, 3, 2):
        canvases, sizes = noise(count, count, canvas), sizes_of(count, canvas, less=5)
        assert same(found(bound, canvases, sizes), found(plain, canvases, sizes))
        assert same(found(bound, list(canvases), sizes), found(plain, canvases, sizes))


def test_gpu_whole_file_out_of_memory_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = open_whole(read_artifact(seam_model.save(tmp_path)), CaptureGate())
    monkeypatch.setattr(detector, "_session", Full())
    with pytest.raises(DeviceError) as caught:
        detector.warm(Size(96, 128), 16)
    assert "too little memory for 16 canvases of 96x128: lower RETINASERVE_MAX_BATCH_SIZE" in str(
        caught.value
    )


class Full:
    def io_binding(self) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 1\nStack: ...")


def test_gpu_whole_file_waits_for_captures(tmp_path: Path) -> None:
    """Whatever else the process does with CUDA would break them, and be broken by them."""
    gate = CaptureGate()
    artifact = read_artifact(seam_model.save(tmp_path))
    done: list[str] = []

    def work() -> None:
        detector = open_whole(artifact, gate)
        done.append("opened")
        found(detector, noise(1, 1, Size(96, 128)), sizes_of(1, Size(96, 128), less=5))
        done.append("ran")

    thread = threading.Thread(target=work)
    with gate.capture():
        thread.start()
        thread.join(0.2)
        assert done == []
    thread.join(30)
    assert done == ["opened", "ran"]

"""Devices: choose them, check that they work, and open detectors on them.

`onnxruntime` quietly hands back a CPU session when CUDA's libraries are missing, so a device
counts as usable only after a small network has run on it and the session names its provider.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, Literal

import onnx.parser
import onnxruntime as ort

from service.errors import DeviceError
from service.runtime.artifact import Artifact
from service.runtime.detector import Detector, batch_buckets
from service.runtime.gpu.cuda import (
    CaptureGate,
    CudaMemory,
    OutOfMemory,
    first_line,
    runtime_library,
)
from service.runtime.gpu.engine import SLOTS
from service.runtime.gpu.graph_split import Parts, split
from service.runtime.gpu.split_detector import open_split
from service.runtime.gpu.whole_detector import WholeDetector
from service.runtime.rewriting import rewrite
from service.settings import Settings
from service.system.cpus import cpu_count, has_wide_vectors

_log = logging.getLogger("retinaserve.devices")

CUDA_PROVIDER: Final = "CUDAExecutionProvider"
CPU_PROVIDER: Final = "CPUExecutionProvider"

_NO_DRIVER: Final = "no NVIDIA driver was found"

Providers = list[str | tuple[str, dict[str, str]]]


@dataclass(frozen=True, slots=True)
class Device:
    """One device and the options of its sessions."""

    kind: Literal["cpu", "cuda"]
    index: int = 0
    memory_limit: int | None = None
    """Most bytes for weights and intermediate values, of each model."""
    tf32: bool = True
    """Whether float32 products may be computed in TF32."""
    graphs: bool = False
    """Whether a GPU runs the network as CUDA graphs, split from the selection; else whole."""
    winograd: bool = True
    """Whether a CPU may compute convolutions with fewer multiplications, and in strips."""
    threads: int | None = None
    """Threads of a CPU's session that share an inference; None: one for each core."""
    gate: CaptureGate = field(default_factory=CaptureGate, compare=False, repr=False)
    """Shared by all GPUs of a process."""

    @property
    def name(self) -> str:
        """The device as settings and responses write it: "cpu", "cuda:0"."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @property
    def default_batch_size(self) -> int:
        """Most images in a batch by default; on a CPU more than one gain nothing."""
        return 1 if self.kind == "cpu" else 16

    @property
    def callers(self) -> int:
        """Concurrent callers: a GPU computes for one while another copies and selects."""
        return 1 if self.kind == "cpu" else SLOTS


@dataclass(frozen=True, slots=True)
class Hardware:
    """The devices in use, each of them checked."""

    devices: tuple[Device, ...]
    fallback: str | None = None
    """Why `auto` fell back to the CPU; None when it did not."""

    @property
    def name(self) -> str:
        """The devices as responses write them: "cpu", "cuda:0,cuda:1"."""
        return ",".join(device.name for device in self.devices)


def resolve(
    asked: str,
    *,
    memory_limit: int | None = None,
    tf32: bool = True,
    graphs: bool = False,
    winograd: bool = True,
    threads: int | None = None,
) -> Hardware:
    """Return the devices for `asked` (auto, cpu, cuda, or cuda:0,cuda:1), each of them checked.

    `memory_limit`, `tf32` and `graphs` are for GPUs, `winograd` and `threads` for a CPU. Raises
    DeviceError that names what is missing.
    """
    cpu = Device("cpu", winograd=winograd, threads=threads)
    if asked == "cpu":
        return Hardware((cpu,))
    gate = CaptureGate()
    devices = tuple(
        replace(device, memory_limit=memory_limit, tf32=tf32, graphs=graphs, gate=gate)
        for device in _parse("cuda" if asked == "auto" else asked)
    )
    driver = nvidia_driver()
    if driver is None:
        if asked == "auto":
            return Hardware((cpu,), fallback=_NO_DRIVER)
        raise DeviceError(
            f"{devices[0].name} cannot be used: {_NO_DRIVER}; use --device cpu or auto"
        )
    preload_libraries()
    for device in devices:
        problem = prove(device)
        if problem is not None:
            raise DeviceError(
                f"{device.name} cannot be used: {problem} (there is {driver}: install what is "
                "missing, or use --device cpu)"
            )
    return Hardware(devices)


def resolve_for(settings: Settings, *, threads: int | None = None) -> Hardware:
    """Return the devices that the settings ask for. Raises DeviceError as `resolve` does."""
    return resolve(
        settings.device,
        memory_limit=settings.gpu_memory_bytes,
        tf32=settings.gpu_tf32,
        graphs=settings.gpu_engine == "graphs",
        winograd=settings.cpu_winograd,
        threads=threads,
    )


def fitted(artifact: Artifact, device: Device) -> Artifact:
    """Return what sessions on a device are opened from: on a CPU, a file that is computed faster.

    `open_detector` does this itself; to open several sessions, do it once before. A session of one
    thread gains where one of several, which wait for each other after each step, does not.
    """
    if device.kind != "cpu" or not device.winograd or artifact.weights is not None:
        return artifact
    dear = has_wide_vectors() and device.threads != 1
    rewritten = rewrite(artifact.content, artifact.metadata.canvas.largest(), dear=dear)
    if rewritten is None:
        return replace(artifact, weights={})
    if rewritten.count:
        _log.info(
            "%s: %d convolutions multiply less than in the file; their filters take %.1f MB",
            artifact.path,
            rewritten.count,
            sum(weight.nbytes for weight in rewritten.weights.values()) / 1e6,
        )
    if rewritten.strips:
        _log.info("%s: the first maps are computed in %d strips", artifact.path, rewritten.strips)
    return replace(artifact, content=rewritten.content, weights=rewritten.weights)


def open_detector(artifact: Artifact, device: Device, *, batch: int | None = None) -> Detector:
    """Load a model file on a device, in serving and in evaluation alike.

    `batch` is how many canvases a GPU gets at a time at most. Raises ArtifactError when the file
    does not load, DeviceError when the session landed on another device than the one asked for or
    a GPU has too little memory.
    """
    if device.kind == "cuda":
        batch = batch or device.default_batch_size
        open_on_gpu = _open_graphs if device.graphs else _open_whole
        detector, wanted = open_on_gpu(artifact, device, batch), CUDA_PROVIDER
    else:
        detector, wanted = _open_on_cpu(artifact, device), CPU_PROVIDER
    if detector.providers[0] != wanted:
        raise DeviceError(
            f"{artifact.path}: asked for {device.name}, but the session uses "
            f"{detector.providers[0]}: {missing_library() or 'no library is missing'}"
        )
    return detector


def providers(device: Device) -> Providers:
    """Return execution providers for onnxruntime, first choice first."""
    if device.kind == "cpu":
        return [CPU_PROVIDER]
    cuda = {
        "device_id": str(device.index),
        # Picks convolution algorithms without trying each: a new canvas or batch size then costs
        # milliseconds, not seconds.
        "cudnn_conv_algo_search": "HEURISTIC",
        # What tensor cores multiply; otherwise cuDNN transposes before and after.
        "prefer_nhwc": "1",
        "use_tf32": "1" if device.tf32 else "0",
        # Powers of two would take up to twice the memory.
        "arena_extend_strategy": "kSameAsRequested",
    }
    if device.memory_limit is not None:
        cuda["gpu_mem_limit"] = str(device.memory_limit)
    return [(CUDA_PROVIDER, cuda), CPU_PROVIDER]


def with_cuda_graphs(given: Providers) -> Providers:
    """Return the same providers with CUDA graphs enabled."""
    return [
        each if isinstance(each, str) else (each[0], {**each[1], "enable_cuda_graph": "1"})
        for each in given
    ]


def session_options(device: Device) -> ort.SessionOptions:
    """Return options for a session on `device`."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if device.kind == "cpu":
        options.intra_op_num_threads = device.threads or cpu_count()
        options.inter_op_num_threads = 1
        # Between two inferences the threads would spin for the next one, on cores that decoding
        # and the event loop need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Weights stay outside of the arena: among its blocks they would keep it from shrinking.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    return options


@functools.cache
def _share_arena() -> None:
    """Give all sessions on the CPU one arena: what one of them frees, another takes."""
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    # No limit, and for the rest onnxruntime's defaults.
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, -1, -1, -1))


def shrink_arena() -> None:
    """Give back what the sessions' arena has free."""
    session = ort.InferenceSession(_probe_model(), session_options(Device("cpu", threads=1)))
    run = ort.RunOptions()
    run.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    session.run(None, {}, run)


def prove(device: Device) -> str | None:
    """Run a small network on `device`. Return what is wrong; None if it worked."""
    if device.kind == "cpu":
        return None
    if CUDA_PROVIDER not in ort.get_available_providers():
        return "this onnxruntime is a build without CUDA; pip install 'retinaserve[gpu]'"
    options = session_options(device)
    # Otherwise the constants are folded, and nothing runs on the device.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        with _quiet():
            session = ort.InferenceSession(
                _probe_model(), sess_options=options, providers=providers(device)
            )
        if session.get_providers()[0] != CUDA_PROVIDER:
            return missing_library() or "onnxruntime fell back to the CPU without a reason"
        session.run(None, {})
    except Exception as error:
        # onnxruntime's errors share no base class that it documents.
        return missing_library() or str(error).strip().splitlines()[0]
    return None


def missing_library() -> str | None:
    """Return the linker's message about the library that keeps CUDA from loading; None if none.

    Call this only after onnxruntime tried: its CUDA part must not be loaded before it.
    """
    folder = Path(ort.__file__).parent / "capi"
    for library in ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"):
        try:
            ctypes.CDLL(str(folder / library), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            return str(error)
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return str(error)
    return None


def preload_libraries() -> None:
    """Load CUDA and cuDNN from the installed Python packages, where they are."""
    if not hasattr(ort, "preload_dlls"):
        return
    # It reports on stdout, which belongs to the command's own output; `missing_library` says
    # later, and better, what could not be loaded.
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()


def _open_on_cpu(artifact: Artifact, device: Device) -> Detector:
    return Detector(
        fitted(artifact, device), providers=providers(device), options=session_options(device)
    )


def _open_whole(artifact: Artifact, device: Device, batch: int) -> Detector:
    return WholeDetector(
        artifact,
        providers=providers(device),
        options=session_options(device),
        device=(device.kind, device.index),
        gate=device.gate,
        remedy=_memory_remedy(device, batch),
    )


def _open_graphs(artifact: Artifact, device: Device, batch: int) -> Detector:
    """Open the engine of CUDA graphs; the whole file where it cannot be split or does not run."""
    parts = split(artifact.content)
    if parts is None:
        _log.warning(
            "%s has no seam (candidate_*) to split it at: it runs whole, without CUDA graphs",
            artifact.path,
        )
        return _open_whole(artifact, device, batch)
    try:
        return _proved(_open_split(artifact, parts, device, batch))
    except OutOfMemory:
        raise
    except Exception as error:
        # onnxruntime's errors share no base class that it documents.
        reason = first_line(error)
    # Only here nothing holds the failed one any more, nor its memory.
    _log.warning("%s runs whole on %s, without CUDA graphs: %s", artifact.path, device.name, reason)
    return _open_whole(artifact, device, batch)


def _proved(detector: Detector) -> Detector:
    """Run a detector once and return it."""
    rule = detector.metadata.canvas
    detector.warm((tuple(rule.all_canvases()) or (rule.largest(),))[0])
    return detector


def _open_split(artifact: Artifact, parts: Parts, device: Device, batch: int) -> Detector:
    def opened(content: bytes, given: Providers) -> ort.InferenceSession:
        return ort.InferenceSession(
            content, session_options(device), providers=given, enable_fallback=0
        )

    plain = providers(device)
    return open_split(
        artifact,
        parts,
        open_network=partial(opened, given=plain),
        open_graphs=partial(opened, given=with_cuda_graphs(plain)),
        host_options=_selection_options(),
        memory=CudaMemory(device.index, device.gate, runtime_library()),
        gate=device.gate,
        buckets=batch_buckets(batch),
        remedy=_memory_remedy(device, batch),
    )


def _memory_remedy(device: Device, batch: int) -> str:
    """Return what an operator can do about too little memory."""
    limit = device.memory_limit
    return f"lower RETINASERVE_MAX_BATCH_SIZE (now {batch})" + (
        "" if limit is None else f" or raise RETINASERVE_GPU_MEMORY_BYTES (now {limit})"
    )


def _selection_options() -> ort.SessionOptions:
    """Return options for selection on the CPU beside a GPU: one thread, the caller's."""
    return session_options(Device("cpu", threads=1))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence onnxruntime's log; the exception that follows says the same in one line."""
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)


def nvidia_driver(root: Path = Path("/")) -> str | None:
    """Return what shows that an NVIDIA driver is installed; None if nothing does."""
    version = root / "proc/driver/nvidia/version"
    if version.exists():
        return f"an NVIDIA driver ({version})"
    if shutil.which("nvidia-smi"):
        return "an NVIDIA driver (nvidia-smi)"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return "an NVIDIA driver (libcuda.so.1)"


def _parse(asked: str) -> Iterator[Device]:
    names = ["cuda:0"] if asked == "cuda" else asked.split(",")
    for name in dict.fromkeys(names):
        kind, _, index = name.partition(":")
        if kind != "cuda" or not index.isdecimal():
            raise DeviceError(f"device {asked!r} is unknown; use auto, cpu, cuda or cuda:0,cuda:1")
        yield Device("cuda", int(index))


def _probe_model() -> bytes:
    """Return a model with a convolution and a matrix product, which need cuDNN and cuBLAS."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        probe () => (float[1, 4, 6, 6] z)
        {
          shape = Constant <value_ints = [1, 4, 8, 8]> ()
          x = ConstantOfShape (shape)
          kernel_shape = Constant <value_ints = [4, 4, 3, 3]> ()
          w = ConstantOfShape (kernel_shape)
          square = Constant <value_ints = [6, 6]> ()
          m = ConstantOfShape (square)
          y = Conv (x, w)
          z = MatMul (y, m)
        }
        """
    )
    return bytes(model.SerializeToString())

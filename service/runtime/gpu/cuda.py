"""Memory on a GPU and page-locked memory on its host, by NVIDIA's runtime library.

onnxruntime's Python offers neither page-locked memory nor copies that let other threads run. The
library is the one that onnxruntime itself has loaded; eight of its functions are enough. Their
declarations and numbers are those of the CUDA Runtime API's memory and device management.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from service.errors import DeviceError
from service.imaging.canvas import Size

_LIBRARIES: Final = (
    ("cudart64_13.dll", "cudart64_12.dll")
    if sys.platform == "win32"
    else ("libcudart.so.13", "libcudart.so.12")
)
_TO_DEVICE: Final = 1
_TO_HOST: Final = 2
_OUT_OF_MEMORY: Final = 2
_NO_MEMORY: Final = re.compile(
    r"failed to allocate memory|out of memory|smaller than requested bytes", re.IGNORECASE
)


class CaptureGate:
    """Excludes all other use of CUDA by the process while a CUDA graph is captured.

    onnxruntime captures in CUDA's global mode: an allocation or a copy by any other thread, for
    another model or even another GPU, would fail then, and take the capture with it.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._users = 0
        self._captures = 0
        """Under way or waiting."""

    @contextmanager
    def use(self) -> Iterator[None]:
        """Hold around any use of CUDA, by any number of threads. Not reentrant."""
        with self._condition:
            self._condition.wait_for(lambda: not self._captures)
            self._users += 1
        try:
            yield
        finally:
            with self._condition:
                self._users -= 1
                self._condition.notify_all()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Hold around a capture; excludes everything else."""
        with self._condition:
            # First those who want to capture, or steady use would keep them waiting for ever.
            self._condition.wait_for(lambda: not self._captures)
            self._captures += 1
            self._condition.wait_for(lambda: not self._users)
        try:
            yield
        finally:
            with self._condition:
                self._captures -= 1
                self._condition.notify_all()


class OutOfMemory(DeviceError):
    """A device has too little memory."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error, of ours, onnxruntime's or CUDA's, means too little memory."""
    return _NO_MEMORY.search(str(error)) is not None


def first_line(error: Exception) -> str:
    """Return an error's message without the native stack trace that onnxruntime appends."""
    return (str(error).strip() or repr(error)).splitlines()[0]


class Free(NamedTuple):
    """Bytes of a device's memory."""

    free: int
    total: int


def too_little_memory(
    error: Exception,
    device: tuple[str, int],
    canvas: Size,
    batch: int,
    *,
    free: Free | None,
    remedy: str,
) -> OutOfMemory:
    """Return the error that tells an operator which setting to change."""
    kind, index = device
    rest = "" if free is None else f", {free.free >> 20} of its {free.total >> 20} MiB are free"
    return OutOfMemory(
        f"{kind}:{index} has too little memory for {batch} canvases of "
        f"{canvas.height}x{canvas.width}{rest}: {remedy} ({first_line(error)})"
    )


class Memory(Protocol):
    """Allocates and copies a detector's buffers. Thread-safe."""

    device: tuple[str, int]
    """As onnxruntime's IOBinding names it: ("cuda", 0)."""

    def staging(self, size: int) -> NDArray[np.uint8]:
        """Allocate zeroed page-locked bytes on the host. Raises OutOfMemory."""

    def allocate(self, size: int) -> int:
        """Allocate bytes on the device and return their address. Raises OutOfMemory."""

    def upload(self, source: NDArray[Any], address: int) -> None:
        """Copy a contiguous array to the device; it is there when this returns."""

    def download(self, address: int, target: NDArray[Any]) -> None:
        """Copy from the device into a contiguous array."""

    def free(self, address: int) -> None:
        """Free an address of `allocate` or `staging`."""

    def close(self) -> None:
        """Free everything."""

    def left(self) -> Free | None:
        """Return the device's free memory; None if it is unknown."""


class HostMemory:
    """Host memory in place of a device's, to run the same steps without a GPU."""

    device: tuple[str, int] = ("cpu", 0)

    def __init__(self) -> None:
        self._blocks: dict[int, NDArray[np.uint8]] = {}

    def staging(self, size: int) -> NDArray[np.uint8]:
        """See `Memory`."""
        return np.zeros(size, dtype=np.uint8)

    def allocate(self, size: int) -> int:
        """See `Memory`."""
        block = np.zeros(max(1, size), dtype=np.uint8)
        address = int(block.ctypes.data)
        self._blocks[address] = block
        return address

    def upload(self, source: NDArray[Any], address: int) -> None:
        """See `Memory`."""
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def download(self, address: int, target: NDArray[Any]) -> None:
        """See `Memory`."""
        ctypes.memmove(target.ctypes.data, address, target.nbytes)

    def free(self, address: int) -> None:
        """See `Memory`."""
        self._blocks.pop(address, None)

    def close(self) -> None:
        """See `Memory`."""
        self._blocks.clear()

    def left(self) -> Free | None:
        """See `Memory`."""
        return None


class CudaMemory:
    """One GPU's memory."""

    def __init__(self, index: int, gate: CaptureGate, library: Any) -> None:
        """`library` is NVIDIA's runtime library, see `runtime_library`."""
        self.device = ("cuda", index)
        self._gate = gate
        self._library = library
        self._lock = threading.Lock()
        self._owned: dict[int, Callable[[], None]] = {}
        """What gives back what is at an address."""

    def staging(self, size: int) -> NDArray[np.uint8]:
        """See `Memory`."""
        address = self._take("cudaHostAlloc", "cudaFreeHost", size, ctypes.c_uint(0))
        block = (ctypes.c_uint8 * size).from_address(address)
        ctypes.memset(address, 0, size)
        return np.ctypeslib.as_array(block)

    def allocate(self, size: int) -> int:
        """See `Memory`."""
        return self._take("cudaMalloc", "cudaFree", size)

    def upload(self, source: NDArray[Any], address: int) -> None:
        """See `Memory`."""
        self._copy(address, source.ctypes.data, source.nbytes, _TO_DEVICE)

    def download(self, address: int, target: NDArray[Any]) -> None:
        """See `Memory`."""
        self._copy(target.ctypes.data, address, target.nbytes, _TO_HOST)

    def free(self, address: int) -> None:
        """See `Memory`."""
        with self._lock:
            give_back = self._owned.pop(address, None)
        if give_back is not None:
            with self._gate.use():
                give_back()

    def close(self) -> None:
        """See `Memory`."""
        with self._lock:
            addresses = list(self._owned)
        for address in addresses:
            self.free(address)

    def left(self) -> Free | None:
        """See `Memory`."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        with self._gate.use():
            self._call("cudaSetDevice", ctypes.c_int(self.device[1]))
            self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return Free(free.value, total.value)

    def _take(self, function: str, opposite: str, size: int, *flags: ctypes.c_uint) -> int:
        address = ctypes.c_void_p()
        with self._gate.use():
            self._call("cudaSetDevice", ctypes.c_int(self.device[1]))
            self._call(function, ctypes.byref(address), ctypes.c_size_t(max(1, size)), *flags)
        assert address.value is not None, "CUDA reports success only with an address"
        library = self._library

        def give_back() -> None:
            # Nothing can be done about a failure; after one of the device, all of these fail.
            getattr(library, opposite)(address)

        with self._lock:
            self._owned[address.value] = give_back
        return address.value

    def _copy(self, target: int, source: int, size: int, kind: int) -> None:
        with self._gate.use():
            # The device belongs to the thread, and this may be any.
            self._call("cudaSetDevice", ctypes.c_int(self.device[1]))
            self._call(
                "cudaMemcpy",
                ctypes.c_void_p(target),
                ctypes.c_void_p(source),
                ctypes.c_size_t(size),
                ctypes.c_int(kind),
            )

    def _call(self, function: str, *arguments: Any) -> None:
        status = int(getattr(self._library, function)(*arguments))
        if status == 0:
            return
        # The error would otherwise be reported by the next launch as well.
        self._library.cudaGetLastError()
        words = self._library.cudaGetErrorString(ctypes.c_int(status)).decode(errors="replace")
        kind = OutOfMemory if status == _OUT_OF_MEMORY else DeviceError
        raise kind(f"CUDA failure {status}: {words} in {function} on cuda:{self.device[1]}")


def runtime_library() -> Any:
    """Return NVIDIA's runtime library, which onnxruntime has loaded. Raises DeviceError."""
    reason = ""
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            reason = str(error)
        else:
            library.cudaGetErrorString.restype = ctypes.c_char_p
            return library
    raise DeviceError(f"none of {', '.join(_LIBRARIES)} can be loaded: {reason}")

"""Preallocated input and output buffers of a split detector's network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.imaging.canvas import Size
from service.runtime.detector import SEAM, Canvases
from service.runtime.gpu.cuda import Memory
from service.runtime.gpu.graph_split import Constant

_TYPES: Final[Mapping[str, type[np.generic]]] = {
    "candidate_boxes": np.float32,
    "candidate_scores": np.float32,
    "candidate_labels": np.int64,
}
_PLAIN: Final = -1
"""The graph id with which onnxruntime neither captures nor replays."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of one run: canvas size and batch size."""

    canvas: Size
    batch: int

    @property
    def images(self) -> tuple[int, int, int, int]:
        """The shape of the input `images`."""
        return (self.batch, *self.canvas, 3)


@dataclass(slots=True)
class Bound:
    """A session's inputs and outputs for one shape, at fixed addresses."""

    session: ort.InferenceSession
    binding: ort.IOBinding
    options: ort.RunOptions
    candidates: list[tuple[int, NDArray[Any]]] = field(default_factory=list)
    """Address on the device and copy on the host of each value at the seam."""
    addresses: list[int] = field(default_factory=list)
    """Everything that was allocated for it."""
    settled: bool = False
    """Whether capturing it as a CUDA graph was tried."""

    def run(self) -> None:
        """Run the network, in the thread of the session, and wait for it."""
        self.session.run_with_iobinding(self.binding, self.options)


class Slot:
    """One set of buffers. Not thread-safe.

    With two of them one caller fills and reads buffers while the other's are computed.
    """

    def __init__(self, memory: Memory, *, area: int, batch: int) -> None:
        """Allocate for canvases of up to `area` pixels. Raises OutOfMemory."""
        self._memory = memory
        self._room = area * batch * 3
        self._pixels = memory.staging(self._room)
        self._sizes = memory.staging(batch * 16).view(np.int64).reshape(batch, 2)
        self.pixels_at = memory.allocate(self._room)
        self.sizes_at = memory.allocate(self._sizes.nbytes)
        self.known: dict[Shape, Bound] = {}
        """Shapes that stay."""
        self.recent: OrderedDict[Shape, Bound] = OrderedDict()
        """Others, the most recent one last."""

    def fill(
        self, canvases: Canvases, sizes: NDArray[np.int64] | Sequence[Size], shape: Shape
    ) -> None:
        """Copy canvases and the sizes of their images to the device.

        What lies behind them, up to the batch, stays as it was: it costs time to clear, and none of
        it gets into an answer.
        """
        count = len(canvases)
        pixels = self.canvases(shape)
        for place, canvas in zip(pixels, canvases, strict=False):
            np.copyto(place, canvas)
        self._sizes[:count] = sizes
        self._sizes[count : shape.batch] = shape.canvas
        self._memory.upload(pixels[:count], self.pixels_at)
        self._memory.upload(self._sizes[: shape.batch], self.sizes_at)

    def canvases(self, shape: Shape) -> NDArray[np.uint8]:
        """Return the host buffer of canvases as (B, H, W, 3)."""
        size = int(np.prod(shape.images))
        if size > self._room:
            raise ValueError(
                f"{shape.batch} canvases of {shape.canvas.height}x{shape.canvas.width} are larger "
                f"than the {self._room} bytes that the model's largest canvas needs"
            )
        return self._pixels[:size].reshape(shape.images)

    def read(self, bound: Bound, count: int) -> dict[str, NDArray[Any]]:
        """Return the candidates of the first `count` canvases, valid until the next use."""
        found = {}
        for name, (address, copy) in zip(SEAM, bound.candidates, strict=True):
            found[name] = copy[:count]
            self._memory.download(address, found[name])
        return found

    def release(self, bound: Bound) -> None:
        """Free the buffers of a shape."""
        for address in bound.addresses:
            self._memory.free(address)

    def bind_inputs(
        self,
        session: ort.InferenceSession,
        shape: Shape,
        constants: Sequence[tuple[Constant, NDArray[Any]]],
        *,
        sizes_name: str | None,
    ) -> Bound:
        """Bind this slot's buffers, and new ones for the constants of the shape."""
        bound = Bound(session, session.io_binding(), run_options(_PLAIN))
        try:
            self._bind(bound, "images", np.uint8, shape.images, self.pixels_at)
            if sizes_name is not None:
                self._bind(bound, sizes_name, np.int64, (shape.batch, 2), self.sizes_at)
            for constant, value in constants:
                if constant.on_host:
                    bound.binding.bind_cpu_input(constant.name, value)
                    continue
                address = self._allocate(bound, value.nbytes)
                self._memory.upload(value, address)
                self._bind(bound, constant.name, value.dtype.type, value.shape, address)
            for name in SEAM:
                # Only a run tells how many candidates there are.
                bound.binding.bind_output(name, *self._memory.device)
        except BaseException:
            self.release(bound)
            raise
        return bound

    def bind_outputs(self, bound: Bound) -> None:
        """Bind outputs of the shapes that a first run had."""
        shapes = [tuple(value.shape()) for value in bound.binding.get_outputs()]
        bound.binding.clear_binding_outputs()
        try:
            for name, shape in zip(SEAM, shapes, strict=True):
                kind = np.dtype(_TYPES[name])
                size = int(np.prod(shape)) * kind.itemsize
                staging = self._memory.staging(size)
                bound.addresses.append(int(staging.ctypes.data))
                address = self._allocate(bound, size)
                bound.candidates.append((address, staging.view(kind).reshape(shape)))
                bound.binding.bind_output(
                    name, *self._memory.device, kind.type, list(shape), address
                )
        except BaseException:
            self.release(bound)
            raise

    def _bind(
        self, bound: Bound, name: str, kind: type[Any], shape: Sequence[int], address: int
    ) -> None:
        bound.binding.bind_input(name, *self._memory.device, kind, list(shape), address)

    def _allocate(self, bound: Bound, size: int) -> int:
        address = self._memory.allocate(size)
        bound.addresses.append(address)
        return address


def run_options(graph: int) -> ort.RunOptions:
    """Return options of a run that captures or replays the CUDA graph of this number."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options

"""Runs a split model: the network in preallocated buffers, selection on the CPU.

The network runs in a thread of its own, as a CUDA graph where the canvas is known in advance. Two
callers at a time keep it busy: while it computes the images of one, the other copies its own and
selects its detections.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.imaging.canvas import Size
from service.runtime.detector import (
    INPUTS,
    OUTPUTS,
    SEAM,
    Canvases,
    Detections,
    by_image,
)
from service.runtime.gpu.buffers import Bound, Shape, Slot, run_options
from service.runtime.gpu.cuda import CaptureGate, Memory, first_line, is_out_of_memory
from service.runtime.gpu.graph_split import Constant, Parts
from service.runtime.gpu.submitter import Submitter

_log = logging.getLogger("retinaserve.engine")

SLOTS: Final = 2
"""Callers that a detector serves at a time; more of them wait."""
RECENT_SHAPES: Final = 32
"""Shapes of canvases not known in advance that a slot stays ready for."""
_SAME_SCORE: Final = 1e-3
_SAME_PIXEL: Final = 0.5
_SAME_SHARE: Final = 0.99
"""Candidates that a replayed graph must give as a plain run does: ties may change places."""

OpenSession = Callable[[bytes], ort.InferenceSession]


class Engine:
    """Sessions and buffers of a split model on one device."""

    def __init__(
        self,
        parts: Parts,
        *,
        open_network: OpenSession,
        open_graphs: OpenSession,
        host_options: ort.SessionOptions,
        memory: Memory,
        gate: CaptureGate,
        canvases: Sequence[Size],
        area: int,
        buckets: Sequence[int],
    ) -> None:
        """`open_network` and `open_graphs` make the session, plainly and with CUDA graphs.

        `canvases` are those known in advance, `area` the pixels of the largest that may come, and
        `buckets` the batch sizes that the network sees. Raises what onnxruntime raises, and
        OutOfMemory.
        """
        self.buckets = tuple(buckets)
        self.memory = memory
        self._parts = parts
        self._gate = gate
        self._canvases = frozenset(canvases)
        self._open_network = open_network
        self._submitter = Submitter(f"{memory.device[0]}-{memory.device[1]}")
        self._graphs = itertools.count(1)
        self._captures = True
        self._sessions: list[ort.InferenceSession] = []
        """The network's; a list, so that it can go before this object does."""
        self.selection = _on_host(parts.selection, host_options)
        self._canvas = None if parts.canvas is None else _on_host(parts.canvas, host_options)
        try:
            self._sessions.append(self._open_first(open_graphs))
            largest = self.buckets[-1]
            self._all = [Slot(memory, area=area, batch=largest) for _ in range(SLOTS)]
        except BaseException:
            self.end()
            raise
        self._free: SimpleQueue[Slot] = SimpleQueue()
        for slot in self._all:
            self._free.put(slot)

    @property
    def network(self) -> ort.InferenceSession:
        """The session on the device."""
        return self._sessions[0]

    def detect(
        self, canvases: Canvases, sizes: NDArray[np.int64], limits: dict[str, NDArray[Any]]
    ) -> list[Detections]:
        """Detect on at most as many canvases as the largest bucket."""
        count = len(canvases)
        shape = self._shape(canvases)
        with self._slot() as slot:
            bound = self._bound(slot, shape)
            slot.fill(canvases, sizes, shape)
            self._run(bound)
            # While the slot is held: the candidates lie in its buffers. What selection makes of
            # them are arrays of its own.
            found = self.selection.run(OUTPUTS, {**slot.read(bound, count), **limits})
        return by_image(found, count)

    def prepare(self, canvas: Size, batch: int) -> None:
        """Make every slot ready for a shape, with a CUDA graph where the canvas is known."""
        shape = Shape(canvas, self._bucket(batch))
        # Slots take turns, so this is each of them while there are no other callers.
        for _ in range(SLOTS):
            with self._slot() as slot:
                bound = self._bound(slot, shape)
                if canvas in self._canvases and not bound.settled:
                    self._capture(slot, bound, shape)

    def end(self) -> None:
        """Free everything, in the session's own thread. Finalizers may call this."""
        self._submitter.end(self._close)

    def _close(self) -> None:
        with self._gate.use():
            # Bindings and sessions free memory of the device when they go.
            self._all = []
            self._free = SimpleQueue()
            self._sessions.clear()
        self.memory.close()

    def _open_first(self, open_graphs: OpenSession) -> ort.InferenceSession:
        try:
            with self._gate.use():
                return open_graphs(self._parts.network)
        except Exception as error:
            # onnxruntime's errors share no base class that it documents.
            _log.warning("no CUDA graphs: %s", first_line(error))
            self._captures = False
        with self._gate.use():
            return self._open_network(self._parts.network)

    @contextmanager
    def _slot(self) -> Iterator[Slot]:
        slot = self._free.get()
        try:
            yield slot
        finally:
            self._free.put(slot)

    def _shape(self, canvases: Canvases) -> Shape:
        height, width = canvases[0].shape[:2]
        return Shape(Size(height, width), self._bucket(len(canvases)))

    def _bucket(self, count: int) -> int:
        return next(bucket for bucket in self.buckets if bucket >= count)

    def _run(self, bound: Bound) -> None:
        self._submitter.run(partial(_run_beside_others, self._gate, bound))

    def _bound(self, slot: Slot, shape: Shape) -> Bound:
        """Return the buffers of a shape, allocated on first use."""
        known = shape.canvas in self._canvases
        place = slot.known if known else slot.recent
        bound = place.get(shape)
        if bound is not None and bound.session is not self.network:
            slot.release(place.pop(shape))
            bound = None
        if bound is None:
            bound = place[shape] = self._bind_where_there_is_room(slot, shape)
        if not known:
            slot.recent.move_to_end(shape)
            if len(slot.recent) > RECENT_SHAPES:
                slot.release(slot.recent.popitem(last=False)[1])
        return bound

    def _bind_where_there_is_room(self, slot: Slot, shape: Shape) -> Bound:
        try:
            return self._bind(slot, shape)
        except Exception as error:
            # onnxruntime's errors share no base class that it documents.
            if not (slot.recent and is_out_of_memory(error)):
                raise
        # What is remembered for shapes that may never come again has what this one needs.
        while slot.recent:
            slot.release(slot.recent.popitem()[1])
        return self._bind(slot, shape)

    def _bind(self, slot: Slot, shape: Shape) -> Bound:
        slot.canvases(shape)
        bound = slot.bind_inputs(
            self.network,
            shape,
            self._constants(shape),
            sizes_name=INPUTS[1] if self._parts.takes_sizes else None,
        )
        try:
            self._run(bound)
        except BaseException:
            slot.release(bound)
            raise
        slot.bind_outputs(bound)
        return bound

    def _constants(self, shape: Shape) -> list[tuple[Constant, NDArray[Any]]]:
        if self._canvas is None:
            return []
        names = list(dict.fromkeys(each.source for each in self._parts.constants))
        # Never touched, so it takes no memory.
        blank = np.zeros(shape.images, dtype=np.uint8)
        values = dict(zip(names, self._canvas.run(names, {INPUTS[0]: blank}), strict=True))
        return [(each, values[each.source]) for each in self._parts.constants]

    def _capture(self, slot: Slot, bound: Bound, shape: Shape) -> None:
        """Capture a shape as a CUDA graph, if its replay gives the candidates of a plain run."""
        bound.settled = True
        if not self._captures:
            return
        generator = np.random.default_rng(0)
        sizes = [shape.canvas] * shape.batch
        noise = [generator.integers(0, 256, shape.images, dtype=np.uint8) for _ in range(2)]
        plain = [self._candidates(slot, bound, sizes, each, shape) for each in noise]
        bound.options = run_options(next(self._graphs))
        try:
            slot.fill(noise[1], sizes, shape)
            self._submitter.run(partial(_run_alone, self._gate, bound))
            replayed = [self._candidates(slot, bound, sizes, each, shape) for each in noise]
        except Exception as error:
            # onnxruntime's errors share no base class that it documents.
            self._give_up_graphs(first_line(error))
            return
        if not all(itertools.starmap(_agree, zip(plain, replayed, strict=True))):
            self._give_up_graphs("a replayed one answers other than a plain run")

    def _candidates(
        self,
        slot: Slot,
        bound: Bound,
        sizes: Sequence[Size],
        canvases: NDArray[np.uint8],
        shape: Shape,
    ) -> dict[str, NDArray[Any]]:
        slot.fill(canvases, sizes, shape)
        self._run(bound)
        return {name: value.copy() for name, value in slot.read(bound, shape.batch).items()}

    def _give_up_graphs(self, reason: str) -> None:
        """Open a session without CUDA graphs: the old one may be in the middle of a capture."""
        _log.warning("no CUDA graphs: %s", reason)
        self._captures = False
        with self._gate.use():
            self._sessions[:] = [self._open_network(self._parts.network)]


def _on_host(content: bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _run_beside_others(gate: CaptureGate, bound: Bound) -> None:
    with gate.use():
        bound.run()


def _run_alone(gate: CaptureGate, bound: Bound) -> None:
    with gate.capture():
        bound.run()


def _agree(first: dict[str, NDArray[Any]], second: dict[str, NDArray[Any]]) -> bool:
    limits = dict(zip(SEAM, (_SAME_PIXEL, _SAME_SCORE, 0), strict=True))
    return all(
        float(np.mean(np.abs(first[name] - second[name]) <= limit)) >= _SAME_SHARE
        for name, limit in limits.items()
    )

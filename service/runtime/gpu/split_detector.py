"""A model file on a GPU, split into network and selection."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.errors import ArtifactError, DeviceError
from service.imaging.canvas import Size
from service.runtime.artifact import MAX_DETECTIONS_CAP, Artifact
from service.runtime.detector import Canvases, Detections, Detector, thresholds
from service.runtime.gpu.cuda import CaptureGate, Memory, is_out_of_memory, too_little_memory
from service.runtime.gpu.engine import Engine, OpenSession
from service.runtime.gpu.graph_split import Parts


class SplitDetector(Detector):
    """A model file on one device, split at its seam. Two threads at a time may call."""

    def __init__(self, artifact: Artifact, engine: Engine, *, remedy: str) -> None:
        """`remedy` is what an operator can do about too little memory."""
        self.metadata = artifact.metadata
        self._engine = engine
        self._remedy = remedy
        # The thread lives as long as the engine is used, and must not keep the detector alive.
        end = weakref.finalize(self, engine.end)
        end.atexit = False

    @property
    def providers(self) -> list[str]:
        """The execution providers of the network's session, first choice first."""
        return list(self._engine.network.get_providers())

    def __call__(
        self,
        canvases: Canvases,
        image_sizes: NDArray[np.int64],
        *,
        score_threshold: float,
        iou_threshold: float,
        max_detections: int = MAX_DETECTIONS_CAP,
    ) -> list[Detections]:
        """Detect on canvases of images of size (B, 2); boxes in canvas pixels."""
        limits = thresholds(score_threshold, iou_threshold, max_detections)
        most = self._engine.buckets[-1]
        found: list[Detections] = []
        for start in range(0, len(canvases), most):
            some = slice(start, start + most)
            found += self._engine.detect(canvases[some], image_sizes[some], limits)
        return found

    def warm(self, canvas: Size, batch: int = 1) -> None:
        """Allocate the buffers of a shape, then run once on empty canvases.

        Raises DeviceError that names the setting when the device has too little memory.
        """
        try:
            self._engine.prepare(canvas, batch)
            super().warm(canvas, batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            memory = self._engine.memory
            raise too_little_memory(
                error, memory.device, canvas, batch, free=memory.left(), remedy=self._remedy
            ) from error


def open_split(
    artifact: Artifact,
    parts: Parts,
    *,
    open_network: OpenSession,
    open_graphs: OpenSession,
    host_options: ort.SessionOptions,
    memory: Memory,
    gate: CaptureGate,
    buckets: Sequence[int],
    remedy: str,
) -> SplitDetector:
    """Return a detector of a split model. Raises ArtifactError, OutOfMemory or DeviceError."""
    rule = artifact.metadata.canvas
    largest = rule.largest()
    try:
        engine = Engine(
            parts,
            open_network=open_network,
            open_graphs=open_graphs,
            host_options=host_options,
            memory=memory,
            gate=gate,
            canvases=rule.all_canvases(),
            area=largest.area,
            buckets=buckets,
        )
    except Exception as error:
        # onnxruntime's errors share no base class that it documents.
        if is_out_of_memory(error):
            raise too_little_memory(
                error, memory.device, largest, buckets[-1], free=memory.left(), remedy=remedy
            ) from error
        if isinstance(error, DeviceError):
            raise
        raise ArtifactError(f"{artifact.path}: onnxruntime cannot load it: {error}") from error
    return SplitDetector(artifact, engine, remedy=remedy)

"""A detector for GPUs where the model file cannot be split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.runtime.artifact import MAX_DETECTIONS_CAP, Artifact
from service.runtime.detector import Canvases, Detections, Detector
from service.runtime.gpu.cuda import CaptureGate


class WholeDetector(Detector):
    """A model file on one GPU, out of the way of other models' captures of CUDA graphs."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        providers: Sequence[str | tuple[str, dict[str, str]]],
        options: ort.SessionOptions,
        gate: CaptureGate,
    ) -> None:
        """Create the session. Raises ArtifactError when the file is not a detector."""
        self._gate = gate
        with gate.use():
            super().__init__(artifact, providers=providers, options=options)

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
        with self._gate.use():
            return super().__call__(
                canvases,
                image_sizes,
                score_threshold=score_threshold,
                iou_threshold=iou_threshold,
                max_detections=max_detections,
            )

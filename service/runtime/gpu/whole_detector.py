"""A model file on a GPU as one session, with bound inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.imaging.canvas import Size
from service.runtime.artifact import MAX_DETECTIONS_CAP, Artifact
from service.runtime.detector import (
    OUTPUTS,
    Canvases,
    Detections,
    Detector,
    as_batch,
    by_image,
    thresholds,
)
from service.runtime.gpu.cuda import CaptureGate, is_out_of_memory, too_little_memory


class WholeDetector(Detector):
    """A whole model file on one GPU. Several threads may call it at a time.

    The canvases are copied to the device before the run, so that one caller copies while another's
    run computes; thresholds and detections, which are small, stay on the host.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        providers: Sequence[str | tuple[str, dict[str, str]]],
        options: ort.SessionOptions,
        device: tuple[str, int],
        gate: CaptureGate,
        remedy: str,
    ) -> None:
        """Create the session. Raises ArtifactError when the file is not a detector.

        `device` is as onnxruntime's IOBinding names it: ("cuda", 0). `gate` keeps this model's use
        of CUDA away from other models' captures of CUDA graphs. `remedy` is what an operator can do
        about too little memory.
        """
        self._device = device
        self._gate = gate
        self._remedy = remedy
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
        on_host = {
            "image_sizes": image_sizes,
            **thresholds(score_threshold, iou_threshold, max_detections),
        }
        with self._gate.use():
            binding = self._session.io_binding()
            images = ort.OrtValue.ortvalue_from_numpy(as_batch(canvases), *self._device)
            binding.bind_ortvalue_input("images", images)
            for name, value in on_host.items():
                # `bind_cpu_input` knows no inputs with defaults.
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
            for name in OUTPUTS:
                # The number of detections follows from the run, so onnxruntime allocates these.
                binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            found = [value.numpy() for value in binding.get_outputs()]
        return by_image(found, len(canvases))

    def warm(self, canvas: Size, batch: int = 1) -> None:
        """Run once on empty canvases, so that the first request does not pay for set-up.

        Raises DeviceError that names the setting when the device has too little memory.
        """
        try:
            super().warm(canvas, batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise too_little_memory(
                error, self._device, canvas, batch, free=None, remedy=self._remedy
            ) from error

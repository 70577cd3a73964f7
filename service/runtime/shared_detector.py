"""A detector on a CPU for several concurrent callers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from service.runtime.artifact import MAX_DETECTIONS_CAP
from service.runtime.detector import Canvases, Detections, Detector


class SharedDetector(Detector):
    """Two sessions of one model file: one with all threads for a call that is alone, one with few.

    Threads that share a call wait for each other, which costs time that other calls could use, so
    concurrent calls have few threads each. Both sessions give the same detections, to about six
    digits where only one of them has fewer multiplications.
    """

    def __init__(self, alone: Detector, beside: Detector) -> None:
        """`alone` takes a call while no other runs; `beside` takes the others."""
        self.metadata = alone.metadata
        self._alone = alone
        self._beside = beside
        self._running = 0
        self._lock = threading.Lock()
        """Held while `_running` changes."""

    @property
    def providers(self) -> list[str]:
        """The execution providers in use, first choice first."""
        return self._alone.providers

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
        with self._choose() as detector:
            return detector(
                canvases,
                image_sizes,
                score_threshold=score_threshold,
                iou_threshold=iou_threshold,
                max_detections=max_detections,
            )

    def suited(self, *, lone: bool) -> Detector:
        """Return the session for a caller that knows whether other work is waiting.

        Better than to look for other calls: between two of them, under load, there may be none.
        """
        return self._alone if lone else self._beside

    @contextlib.contextmanager
    def _choose(self) -> Iterator[Detector]:
        with self._lock:
            detector = self._beside if self._running else self._alone
            self._running += 1
        try:
            yield detector
        finally:
            with self._lock:
                self._running -= 1

"""`retinaserve`, on a device that fails when it is told to by the colour of an image.

What cannot be had without broken hardware happens here at the one call that leaves Python: a batch
that never ends, a device that is lost, a thread that dies.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from service.cli import main
from service.runtime.detector import Detections, Detector

WEDGE: Final = (255, 0, 255)
LOSE: Final = (0, 255, 255)
DIE: Final = (255, 255, 0)

_detect = Detector.__call__


def detect_on(state: dict[str, bool]) -> Callable[..., list[Detections]]:
    """A detector's call, on a device that is in this state."""

    def detect(detector: Detector, canvases: Any, *args: Any, **options: Any) -> list[Detections]:
        corners = {tuple(canvas[0, 0].tolist()) for canvas in np.asarray(canvases)}
        state["lost"] = state["lost"] or LOSE in corners
        if state["lost"]:
            raise RuntimeError("CUDA error 700: an illegal memory access was encountered")
        if WEDGE in corners:
            time.sleep(3600)
        if DIE in corners:
            raise SystemExit("the thread ends here")
        return _detect(detector, canvases, *args, **options)

    return detect


if __name__ == "__main__":
    Detector.__call__ = detect_on({"lost": False})  # type: ignore[method-assign]
    main()

"""A request for detections, as every protocol hands it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from service.engine.batch_queue import Urgency
from service.engine.postprocessing import Selection
from service.engine.tiling import Tile
from service.engine.work import Estimate, Servable

ImageType = Literal["image/jpeg", "image/png"]


@dataclass(frozen=True, slots=True)
class DetectRequest:
    """One image, and what is to be done with it. Made once, where its protocol ends."""

    image: bytes | memoryview
    """Compressed."""
    model: Servable
    selection: Selection
    deadline: float
    """When a response is too late, on the clock of `time.monotonic`."""
    tile: Tile = "off"
    urgency: Urgency = Urgency.INTERACTIVE
    draw_as: ImageType | None = None
    """The type of the file that the image becomes with its boxes drawn; None: nothing is drawn."""
    estimate: Estimate | None = None
    """What decoding will take, of an image that was let in together with others."""

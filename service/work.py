"""What the threads of the pipeline hand on: a model that serves, a picture's work, its outcome."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from service.artifact import Artifact, Metadata
from service.batching import Urgency
from service.canvas import Letterbox, Size
from service.cost import Costs
from service.detector import Detections, Detector
from service.errors import DeadlineExceeded, RetinaserveError
from service.imaging import Prepared
from service.record import Passage
from service.request_id import request_id


@dataclass(frozen=True, slots=True, eq=False)
class Servable:
    """A model that is loaded and warm.

    Its detectors are in the devices' order; one that takes several callers at a time is there as
    often.
    """

    name: str
    version: int
    artifact: Artifact
    detectors: tuple[Detector, ...]
    costs: Costs = field(default_factory=Costs, repr=False)

    @property
    def metadata(self) -> Metadata:
        """What the file says of itself."""
        return self.artifact.metadata


class BatchKey(NamedTuple):
    """What pictures must have in common to share an inference."""

    model: Servable
    canvas: Size
    iou: float


class Timing(NamedTuple):
    """Seconds that a picture spent in each stage."""

    decode: float
    queue: float
    """Waiting, for a decode thread and for a device."""
    inference: float


class Outcome(NamedTuple):
    """What the pipeline makes of a picture."""

    detections: Detections
    """In canvas pixels."""
    letterbox: Letterbox
    timing: Timing
    passage: Passage


def as_it_is(outcome: Outcome) -> Outcome:
    """For those who want nothing else of it."""
    return outcome


@dataclass(slots=True, eq=False)
class Work:
    """One picture on its way through the pipeline."""

    make: Callable[[], Prepared]
    """Puts it on its canvas. Raises what `imaging.prepare` raises."""
    model: Servable
    score: float
    """Detections that score lower need not be found."""
    iou: float
    deadline: float
    """On the clock of `time.monotonic`."""
    urgency: Urgency
    future: asyncio.Future[Any]
    finish: Callable[[Outcome], Any]
    """What whoever waits wants of its outcome."""
    arrived: float = field(default_factory=time.monotonic)
    request_id: str = field(default_factory=request_id.get)
    abandoned: bool = False
    prepared: Prepared | None = None
    decoding: float = 0.0
    """Since when a thread decodes it."""
    decode_seconds: float = 0.0

    @property
    def key(self) -> BatchKey | Servable:
        """Before decoding only the model is known."""
        if self.prepared is None:
            return self.model
        return BatchKey(self.model, self.prepared.letterbox.canvas, self.iou)

    def fail(self, error: RetinaserveError) -> None:
        """Answer the one who waits, if he still does, with an error. On the event loop."""
        if not self.future.done():
            self.future.set_exception(error)

    def expire(self) -> None:
        """The deadline has passed. On the event loop."""
        self.fail(DeadlineExceeded("the deadline passed before the answer"))

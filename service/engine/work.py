"""What pipeline threads pass on: a served model, the work on one image, its outcome."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from service.engine.batch_queue import Urgency
from service.engine.cost import Costs
from service.errors import DeadlineExceeded, RetinaserveError
from service.imaging.canvas import Letterbox, Size
from service.imaging.decode import Prepared
from service.observability.record import Passage, Timing
from service.observability.request_id import request_id
from service.runtime.artifact import Artifact, Metadata
from service.runtime.detector import Detections, Detector


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
    """What images must have in common to share an inference."""

    model: Servable
    canvas: Size
    iou: float


class DecodeKey(NamedTuple):
    """What tells work that waits for a decode thread apart."""

    model: Servable
    canvas: Size | None
    """None: not known before decoding, or nothing is to be inferred."""
    infers: bool
    long: bool


LONG_SECONDS: Final = 0.25
"""Work that takes longer in a decode thread never holds all of them."""


class Estimate(NamedTuple):
    """What work in a decode thread is expected to take. The default: nothing is known."""

    canvas: Size | None = None
    """What comes of it, if that is a canvas."""
    kind: str = ""
    """As `ThreadCosts` has it; "": there is nothing to learn."""
    pixels: float = 0.0
    seconds: float = 0.0

    @property
    def long(self) -> bool:
        """Whether it takes a thread for longer than short work can wait."""
        return self.seconds > LONG_SECONDS


NOTHING_KNOWN: Final = Estimate()


class Outcome(NamedTuple):
    """What the pipeline makes of an image."""

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
    """One image on its way through the pipeline."""

    make: Callable[[], Any]
    """Puts it on its canvas: a Prepared. Where nothing is to be inferred, makes the answer.
    Raises what `imaging.prepare` raises."""
    model: Servable
    score: float
    """Detections that score lower need not be found."""
    iou: float
    deadline: float
    """On the clock of `time.monotonic`."""
    urgency: Urgency
    future: asyncio.Future[Any]
    finish: Callable[[Outcome], Any]
    """Makes the result of the outcome."""
    estimate: Estimate = NOTHING_KNOWN
    infers: bool = True
    arrived: float = field(default_factory=time.monotonic)
    request_id: str = field(default_factory=request_id.get)
    abandoned: bool = False
    prepared: Prepared | None = None
    decoding: float = 0.0
    """Since when a thread decodes it."""
    decode_seconds: float = 0.0

    @property
    def key(self) -> BatchKey | DecodeKey:
        """Before decoding, the canvas is the one that the header tells."""
        if self.prepared is None:
            return DecodeKey(self.model, self.estimate.canvas, self.infers, self.estimate.long)
        return BatchKey(self.model, self.prepared.letterbox.canvas, self.iou)

    @property
    def seconds(self) -> float:
        """What it is expected to take of a decode thread; nothing more once it is decoded."""
        return self.estimate.seconds if self.prepared is None else 0.0

    def fail(self, error: RetinaserveError) -> None:
        """Answer the one who waits, if he still does, with an error. On the event loop."""
        if not self.future.done():
            self.future.set_exception(error)

    def expire(self) -> None:
        """The deadline has passed. On the event loop."""
        self.fail(DeadlineExceeded("the deadline passed before the answer"))

"""The record of a request, for its log line, its span and its Server-Timing header."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Any, Final, NamedTuple


class Timing(NamedTuple):
    """Seconds that an image spent in each stage."""

    decode: float
    queue: float
    """Waiting, for a decode thread and for a device."""
    inference: float


class Stages(NamedTuple):
    """Seconds that an image, or several together, spent in each stage."""

    decode: float
    queue: float
    """Waiting, for a decode thread and for a device."""
    inference: float
    postprocess: float
    """From the device's result to the response, which is written by then for one canvas."""

    @property
    def total(self) -> float:
        """The sum of the stages."""
        return sum(self)


class Passage(NamedTuple):
    """When an image reached each stage, on the clock of `time.monotonic`, and its batch size."""

    arrived: float
    decoding: float
    inferring: float
    batch_size: int


class ImageRecord(NamedTuple):
    """One image with detections."""

    model: str
    version: int
    width: int
    height: int
    detections: int
    stages: Stages
    finished: float
    """On the clock of `time.monotonic`."""
    passage: Passage | None
    """None for an image of several canvases, whose stages overlap."""


class Record:
    """One request, of any protocol."""

    __slots__ = (
        "body_bytes",
        "body_finished",
        "images",
        "key",
        "reasons",
        "request_id",
        "span_id",
        "started",
        "trace_id",
    )

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.started = time.monotonic()
        self.key: str | None = None
        """Name of its API key."""
        self.body_bytes = 0
        self.body_finished: float | None = None
        self.images: list[ImageRecord] = []
        self.reasons: dict[str, None] = {}
        """Reasons of the errors of the request and its images, in order."""
        self.trace_id: str | None = None
        self.span_id: str | None = None

    def stages(self) -> Stages:
        """Return the sums over the request's images."""
        return Stages(*map(sum, zip(*(image.stages for image in self.images), strict=True)))

    def fields(self) -> dict[str, Any]:
        """Return the fields of the log line."""
        fields: dict[str, Any] = {} if self.key is None else {"key": self.key}
        if self.body_bytes:
            fields["body_bytes"] = self.body_bytes
            if self.body_finished is not None:
                fields["body_ms"] = _ms(self.body_finished - self.started)
        if self.images:
            last = self.images[-1]
            fields |= {
                "model": last.model,
                "version": last.version,
                "pictures": len(self.images),
                "width": last.width,
                "height": last.height,
                "detections": sum(image.detections for image in self.images),
            }
            fields |= {
                f"{name}_ms": _ms(seconds) for name, seconds in self.stages()._asdict().items()
            }
        if self.reasons:
            fields["reason"] = ",".join(self.reasons)
        return fields

    def server_timing(self) -> str | None:
        """Return the value of the Server-Timing header; None for a response without images."""
        if not self.images:
            return None
        total = time.monotonic() - self.started
        body = (self.body_finished or self.started) - self.started
        count = len(self.images)
        if count == 1:
            stages, shape = self.images[0].stages, _TIMING_OF_ONE
        else:
            stages, shape = self.stages(), _timing(f';desc="sum of {count} images"')
        return shape % tuple(1e3 * seconds for seconds in (body, *stages, total))


current: Final[ContextVar[Record | None]] = ContextVar("record", default=None)
"""The request that the current task works for."""


def _timing(note: str) -> str:
    """Return a format of the header; `note` describes each stage."""
    stages = [f"{name};dur=%.2f{note}" for name in Stages._fields]
    return ", ".join(["body;dur=%.2f", *stages, "total;dur=%.2f"])


_TIMING_OF_ONE: Final = _timing("")


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)

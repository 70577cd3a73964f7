"""Canvas geometry: which canvas an image goes onto, where on it, and how boxes map back.

A canvas is the fixed-size uint8 image that the network sees. The rule that chooses it is part
of the model file, and depends on the image's own size alone, so that an image gets the same
canvas in training, in evaluation and in any batch.

Coordinates are pixels with the origin at the top-left corner of the top-left pixel. Images are
placed at the canvas's top-left corner; padding is at the right and at the bottom.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MULTIPLE = 32
"""Canvas sides are multiples of this: the stride of the backbone's last stage."""
MAX_CANVAS_AREA = 4096 * 4096
"""Pixels of the largest canvas: a warm-up runs it, and takes memory in proportion."""
MAX_CANVASES = 64
"""Canvases of one rule: on a GPU each of them is warmed, and keeps buffers."""
_MAX_SIDE = MAX_CANVAS_AREA // MULTIPLE
"""Pixels of the longest side that a canvas within the area can have."""

_Side = Annotated[int, Field(ge=1, le=_MAX_SIDE)]


class Size(NamedTuple):
    """A size in pixels, height first, as arrays have it."""

    height: int
    width: int

    @property
    def area(self) -> int:
        """Pixels of the canvas."""
        return self.height * self.width


@dataclass(frozen=True, slots=True)
class Letterbox:
    """Where an image lies on its canvas."""

    original: Size
    """Size of the image after EXIF orientation."""
    resized: Size
    """Size of the image's part of the canvas."""
    canvas: Size

    @property
    def ratios(self) -> tuple[float, float]:
        """(x, y): canvas pixels per original pixel."""
        return (
            self.resized.width / self.original.width,
            self.resized.height / self.original.height,
        )

    def to_original(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map (D, 4) x1, y1, x2, y2 from canvas to original pixels, clipped to the image."""
        x, y = self.ratios
        mapped = boxes / np.array([x, y, x, y], dtype=np.float32)
        height, width = self.original
        limit = np.array([width, height, width, height], dtype=np.float32)
        # Several times as fast as `clip` on the few boxes that an image has.
        np.maximum(mapped, np.float32(0), out=mapped)
        return np.minimum(mapped, limit, out=mapped)

    def to_canvas(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map (D, 4) x1, y1, x2, y2 from original pixels to canvas pixels."""
        x, y = self.ratios
        return boxes * np.array([x, y, x, y], dtype=np.float32)


class _Rule(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    interpolation: Literal["bilinear"] = "bilinear"
    """Pillow's BILINEAR, as `service.imaging.resize` computes it."""
    place: Literal["top-left"] = "top-left"


class Buckets(_Rule):
    """The image is scaled to fit, aspect ratio kept, the canvas of `sizes` with least padding."""

    rule: Literal["buckets"] = "buckets"
    sizes: tuple[Size, ...] = Field(min_length=1, max_length=MAX_CANVASES)
    """[height, width] of each canvas; the earlier wins a tie."""

    @field_validator("sizes")
    @classmethod
    def _check_sizes(cls, sizes: tuple[Size, ...]) -> tuple[Size, ...]:
        for size in sizes:
            if min(size) < MULTIPLE or any(side % MULTIPLE for side in size):
                raise ValueError(
                    f"canvas {_shown(size)} is not a positive multiple of {MULTIPLE} in both sides"
                )
            _check_area(size)
        return sizes

    def fit(self, original: Size) -> Letterbox:
        """Place an image of size `original`."""
        return _least_padded(self.sizes, original)

    def all_canvases(self) -> tuple[Size, ...]:
        """Return every canvas of this rule, for the warm-up."""
        return self.sizes

    def tiles(self) -> tuple[Letterbox, ...]:
        """Images that fill a canvas at their own resolution, one for each canvas."""
        return tuple(Letterbox(size, size, size) for size in self.sizes)

    def largest(self) -> Size:
        """The canvas of greatest area."""
        return max(self.sizes, key=lambda size: size.area)


class ShortSide(_Rule):
    """The shorter side becomes `short` unless the longer would pass `long`; torchvision's rule."""

    rule: Literal["short-side"] = "short-side"
    short: _Side
    long: _Side
    multiple: int = Field(default=MULTIPLE, ge=MULTIPLE, le=_MAX_SIDE, multiple_of=MULTIPLE)
    round: Literal["floor"] = "floor"

    @model_validator(mode="after")
    def _check_largest(self) -> ShortSide:
        _check_area(self.largest())
        return self

    def fit(self, original: Size) -> Letterbox:
        """Place an image of size `original`."""
        scale = min(self.short / min(original), self.long / max(original))
        resized = Size(
            height=max(1, math.floor(original.height * scale)),
            width=max(1, math.floor(original.width * scale)),
        )
        canvas = Size(self._pad(resized.height), self._pad(resized.width))
        return Letterbox(original=original, resized=resized, canvas=canvas)

    def all_canvases(self) -> tuple[Size, ...]:
        """Return none: the canvas follows each image's aspect ratio."""
        return ()

    def tiles(self) -> tuple[Letterbox, ...]:
        """Images that this rule neither scales nor could take larger: wide, tall and square."""
        short = min(self.short, self.long)
        shapes = (Size(short, self.long), Size(self.long, short), Size(short, short))
        return tuple(self.fit(shape) for shape in shapes)

    def largest(self) -> Size:
        """Return an upper bound of the canvases."""
        return Size(self._pad(min(self.short, self.long)), self._pad(self.long))

    def _pad(self, side: int) -> int:
        return math.ceil(side / self.multiple) * self.multiple


def _check_area(canvas: Size) -> None:
    """Raise ValueError for a canvas of more than MAX_CANVAS_AREA pixels."""
    if canvas.area > MAX_CANVAS_AREA:
        raise ValueError(
            f"canvas {_shown(canvas)} has more than {MAX_CANVAS_AREA} pixels, the limit (4096x4096)"
        )


def _shown(size: Size) -> str:
    # JSON has numbers of thousands of digits.
    return "x".join(map(reprlib.repr, size))


@lru_cache(maxsize=1024)
def _least_padded(canvases: tuple[Size, ...], original: Size) -> Letterbox:
    """Return the letterbox of `original` with the least padding.

    Remembered: it is asked three times for each image, and most are as large as others.
    """
    best, least = Letterbox(original, canvases[0], canvases[0]), math.inf
    for canvas in canvases:
        scale = min(canvas.width / original.width, canvas.height / original.height)
        height = min(canvas.height, max(1, round(original.height * scale)))
        width = min(canvas.width, max(1, round(original.width * scale)))
        padding = canvas.height * canvas.width - height * width
        if padding < least:
            best, least = Letterbox(original, Size(height, width), canvas), padding
    return best


CanvasRule = Annotated[Buckets | ShortSide, Field(discriminator="rule")]

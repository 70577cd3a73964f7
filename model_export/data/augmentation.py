"""Augmentation of an image on its canvas: crops, zooms, flips, colour, mosaics.

Boxes are x1, y1, x2, y2 in canvas pixels, continuous edges, and follow the pixels exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from model_export.data.samples import CROWD
from service.imaging.canvas import Size

MIN_SIDE: Final = 1.0
"""Canvas pixels. A box that augmentation leaves with a shorter side is dropped."""

_LUMA: Final = (0.299, 0.587, 0.114)
"""ITU-R BT.601, as Pillow's conversion to grey."""

_Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(slots=True)
class Example:
    """One image on its canvas, with its labels."""

    canvas: NDArray[np.uint8]
    """(H, W, 3) RGB, zero outside the image."""
    size: Size
    """The image's part of the canvas, at the top-left."""
    boxes: NDArray[np.float32]
    """(N, 4) x1, y1, x2, y2 in canvas pixels; N may be 0."""
    labels: NDArray[np.int64]
    """(N,) index into the classes, or CROWD."""


class Augmentation(BaseModel):
    """Augmentation settings; the defaults suit a few hundred images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    horizontal_flip: _Probability = 0.5
    """Probability of mirroring left and right."""
    vertical_flip: _Probability = 0.0
    """Probability of mirroring top and bottom; for images without an upright, as microscopes'."""
    transpose: _Probability = 0.0
    """Probability of swapping the axes of a whole batch, which also swaps its canvas's sides."""
    scale: tuple[float, float] = (0.8, 1.25)
    """Least and greatest zoom, drawn log-uniformly: above 1 crops, below 1 shrinks."""
    aspect: float = Field(default=0.1, ge=0, le=1)
    """Greatest change of log(width / height)."""
    translate: float = Field(default=0.1, ge=0, le=0.5)
    """Greatest share of the image cut away at one side, for each axis."""
    brightness: float = Field(default=0.2, ge=0, lt=1)
    """Greatest relative change."""
    contrast: float = Field(default=0.2, ge=0, lt=1)
    """Greatest relative change of the distance to the image's mean grey."""
    saturation: float = Field(default=0.2, ge=0, le=1)
    """Greatest relative change of the distance to grey."""
    hue: float = Field(default=0.02, ge=0, le=0.5)
    """Greatest rotation of the colours, in turns."""
    mosaic: _Probability = 0.0
    """Probability of a 2 x 2 mosaic of four images at half their scale."""
    min_visible: float = Field(default=0.3, gt=0, le=1)
    """A box of whose area a smaller share stays in the image is dropped."""

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0.1 <= scale[0] <= scale[1] <= 10:
            raise ValueError(f"scale {list(scale)} must rise and lie within 0.1 and 10")
        return scale

    @classmethod
    def none(cls) -> Self:
        """Return settings without augmentation."""
        return cls(
            horizontal_flip=0,
            scale=(1, 1),
            aspect=0,
            translate=0,
            brightness=0,
            contrast=0,
            saturation=0,
            hue=0,
        )


def augment(
    example: Example,
    augmentation: Augmentation,
    rng: np.random.Generator,
    *,
    others: Callable[[], Example],
) -> Example:
    """Return an augmented copy of `example` on a canvas of equal size; `others` gives mosaic tiles.

    The whole-batch transpose is not done here.
    """
    if rng.random() < augmentation.mosaic:
        example = _mosaic([example, others(), others(), others()], augmentation, rng)
    height, width = example.size
    zoom = math.exp(rng.uniform(math.log(augmentation.scale[0]), math.log(augmentation.scale[1])))
    stretch = math.exp(rng.uniform(-augmentation.aspect, augmentation.aspect) / 2)
    cuts = rng.uniform(-augmentation.translate, augmentation.translate, size=2)
    places = rng.random(size=2)
    x = _span(width, zoom * stretch, cut=cuts[0], place=places[0])
    y = _span(height, zoom / stretch, cut=cuts[1], place=places[1])
    image = _resize(example.canvas[:height, :width], x, y)
    image = _jitter_colour(image, augmentation, rng)
    boxes, labels = _map_boxes(example, x, y, min_visible=augmentation.min_visible)
    if rng.random() < augmentation.horizontal_flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = _mirrored(boxes, axis=0, length=x.out)
    if rng.random() < augmentation.vertical_flip:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        boxes = _mirrored(boxes, axis=1, length=y.out)
    canvas = np.zeros_like(example.canvas)
    canvas[: y.out, : x.out] = np.asarray(image)
    return Example(canvas, Size(y.out, x.out), boxes, labels)


def _mirrored(boxes: NDArray[np.float32], *, axis: int, length: int) -> NDArray[np.float32]:
    mirrored = boxes.copy()
    mirrored[:, [axis, axis + 2]] = length - boxes[:, [axis + 2, axis]]
    return mirrored


class _Span(NamedTuple):
    """Along one axis, [start, stop) of the image becomes [0, out) of the new one."""

    start: float
    stop: float
    out: int

    @property
    def ratio(self) -> float:
        return self.out / (self.stop - self.start)


def _span(length: int, zoom: float, *, cut: float, place: float) -> _Span:
    """Cut |cut| of the length away (before if positive, else behind), then zoom.

    What then exceeds `length` is cut as well; `place` in [0, 1] says how much of that before.
    """
    start, stop = max(cut, 0.0) * length, (1 + min(cut, 0.0)) * length
    span = min(stop - start, length / zoom)
    start = min(max(start + place * (stop - start - span), 0.0), length - span)
    # The minimum is for rounding: Pillow refuses a window that ends an ulp outside the image.
    return _Span(start, min(start + span, length), max(1, min(length, round(span * zoom))))


def _resize(image: NDArray[np.uint8], x: _Span, y: _Span) -> Image.Image:
    """Return the window (x, y) of the image, resized to (y.out, x.out)."""
    window = (x.start, y.start, x.stop, y.stop)
    whole = Image.fromarray(np.ascontiguousarray(image))
    return whole.resize((x.out, y.out), Image.Resampling.BILINEAR, box=window)


def _map_boxes(
    example: Example, x: _Span, y: _Span, *, min_visible: float
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    origin = np.array([x.start, y.start] * 2)
    ratio = np.array([x.ratio, y.ratio] * 2)
    moved = (example.boxes.astype(np.float64) - origin) * ratio
    clipped = np.clip(moved, 0, np.array([x.out, y.out] * 2))
    sides = clipped[:, 2:] - clipped[:, :2]
    visible = sides.prod(axis=1) >= min_visible * (moved[:, 2:] - moved[:, :2]).prod(axis=1)
    # A crowd stays a crowd, however little of it is visible.
    keep = (visible | (example.labels == CROWD)) & (sides >= MIN_SIDE).all(axis=1)
    return clipped[keep].astype(np.float32), example.labels[keep]


def _mosaic(
    tiles: Sequence[Example], augmentation: Augmentation, rng: np.random.Generator
) -> Example:
    """Four images, each cropped to fill a quarter of the first one's part of its canvas."""
    first = tiles[0]
    canvas = np.zeros_like(first.canvas)
    xs = (0, first.size.width // 2, first.size.width)
    ys = (0, first.size.height // 2, first.size.height)
    if 0 in (xs[1], ys[1]):
        return first
    boxes: list[NDArray[np.float32]] = []
    labels: list[NDArray[np.int64]] = []
    for index, tile in enumerate(tiles):
        row, column = divmod(index, 2)
        width, height = xs[column + 1] - xs[column], ys[row + 1] - ys[row]
        ratio = max(width / tile.size.width, height / tile.size.height)
        place = rng.random(size=2)
        x = _crop(tile.size.width, min(width / ratio, tile.size.width), place[0], width)
        y = _crop(tile.size.height, min(height / ratio, tile.size.height), place[1], height)
        image = tile.canvas[: tile.size.height, : tile.size.width]
        rows, columns = slice(ys[row], ys[row + 1]), slice(xs[column], xs[column + 1])
        canvas[rows, columns] = np.asarray(_resize(image, x, y))
        kept, kept_labels = _map_boxes(tile, x, y, min_visible=augmentation.min_visible)
        boxes.append(kept + np.array([xs[column], ys[row]] * 2, dtype=np.float32))
        labels.append(kept_labels)
    return Example(canvas, first.size, np.concatenate(boxes), np.concatenate(labels))


def _crop(length: int, span: float, place: float, out: int) -> _Span:
    start = place * (length - span)
    return _Span(start, min(start + span, length), out)


def _jitter_colour(
    image: Image.Image, augmentation: Augmentation, rng: np.random.Generator
) -> Image.Image:
    """Jitter the colours by one 3 x 4 matrix in RGB, in one pass over the pixels."""
    drawn = rng.uniform(-1, 1, size=4)
    brightness = 1 + drawn[0] * augmentation.brightness
    contrast = 1 + drawn[1] * augmentation.contrast
    saturation = 1 + drawn[2] * augmentation.saturation
    turns = drawn[3] * augmentation.hue
    if (brightness, contrast, saturation, turns) == (1, 1, 1, 0):
        return image
    grey = np.tile(np.array(_LUMA), (3, 1))
    colour = saturation * np.eye(3) + (1 - saturation) * grey
    linear = brightness * contrast * colour @ _rotation_about_grey(turns)
    # Every 8th pixel of every 8th row is plenty for a mean.
    sparse = np.asarray(image)[::8, ::8]
    mean = float(sparse.reshape(-1, 3).mean(axis=0) @ np.array(_LUMA))
    offset = np.full((3, 1), (1 - contrast) * brightness * mean)
    matrix = tuple(np.hstack([linear, offset]).ravel().tolist())
    return image.convert("RGB", matrix=matrix)


def _rotation_about_grey(turns: float) -> NDArray[np.float64]:
    """(3, 3) rotation of RGB about the axis of greys (Rodrigues' formula)."""
    angle = 2 * math.pi * turns
    axis = 1 / math.sqrt(3)
    cross = axis * np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return (
        math.cos(angle) * np.eye(3)
        + math.sin(angle) * cross
        + (1 - math.cos(angle)) * np.full((3, 3), 1 / 3)
    )

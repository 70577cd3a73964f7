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
from service.imaging.canvas import MULTIPLE, Size

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
    """Probability of a mosaic: four images around a random centre (YOLOv4, arXiv 2004.10934)."""
    mosaic_until: float = Field(default=0.8, ge=0, le=1)
    """Share of the schedule after which no mosaics are made (as in YOLOX, arXiv 2107.08430)."""
    canvas_scales: tuple[float, ...] = (1.0,)
    """Factors of which each batch draws one for its canvas; sides stay multiples of 32."""
    min_visible: float = Field(default=0.3, gt=0, le=1)
    """A box of whose area a smaller share stays in the image is dropped."""

    @field_validator("canvas_scales")
    @classmethod
    def _check_canvas_scales(cls, factors: tuple[float, ...]) -> tuple[float, ...]:
        if not factors or not all(0.25 <= factor <= 4 for factor in factors):
            raise ValueError(
                f"{list(factors)} must be one or more factors within 0.25 and 4, such as "
                "[0.75, 1, 1.25]; [1] leaves every canvas as it is"
            )
        return factors

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
    progress: float = 0.0,
    canvas_scale: float = 1.0,
) -> Example:
    """Return an augmented copy of `example`, on its canvas times `canvas_scale`.

    `others` gives mosaic tiles; `progress` is the share of the schedule that is done. The
    whole-batch transpose is not done here.
    """
    visible = np.ones(len(example.boxes))
    if rng.random() < augmentation.mosaic and progress < augmentation.mosaic_until:
        example, visible = _mosaic([example, others(), others(), others()], rng)
    before = Size(*example.canvas.shape[:2])
    after = scaled_canvas(before, canvas_scale)
    height, width = example.size
    zoom = math.exp(rng.uniform(math.log(augmentation.scale[0]), math.log(augmentation.scale[1])))
    stretch = math.exp(rng.uniform(-augmentation.aspect, augmentation.aspect) / 2)
    cuts = rng.uniform(-augmentation.translate, augmentation.translate, size=2)
    places = rng.random(size=2)
    wider, higher = after.width / before.width, after.height / before.height
    x = _span(width, zoom * stretch, cut=cuts[0], place=places[0], canvas_ratio=wider)
    y = _span(height, zoom / stretch, cut=cuts[1], place=places[1], canvas_ratio=higher)
    image = _resize(example.canvas[:height, :width], x, y)
    image = _jitter_colour(image, augmentation, rng)
    mapped, shares = _map_boxes(example.boxes, x, y)
    sides = mapped[:, 2:] - mapped[:, :2]
    # A crowd stays a crowd, however little of it is visible.
    seen = (visible * shares >= augmentation.min_visible) | (example.labels == CROWD)
    keep = seen & (sides >= MIN_SIDE).all(axis=1)
    boxes, labels = mapped[keep].astype(np.float32), example.labels[keep]
    if rng.random() < augmentation.horizontal_flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = _mirrored(boxes, axis=0, length=x.out)
    if rng.random() < augmentation.vertical_flip:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        boxes = _mirrored(boxes, axis=1, length=y.out)
    canvas = np.zeros((*after, 3), dtype=np.uint8)
    canvas[: y.out, : x.out] = np.asarray(image)
    return Example(canvas, Size(y.out, x.out), boxes, labels)


def scaled_canvas(canvas: Size, factor: float) -> Size:
    """Return a canvas times a factor of `canvas_scales`, each side as the nearest multiple of 32.

    >>> scaled_canvas(Size(384, 512), 0.75)
    Size(height=288, width=384)
    """
    height, width = (MULTIPLE * max(1, round(side * factor / MULTIPLE)) for side in canvas)
    return Size(height, width)


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


def _span(length: int, zoom: float, *, cut: float, place: float, canvas_ratio: float) -> _Span:
    """Cut |cut| of the length away (before if positive, else behind), then zoom.

    What then exceeds `length` is cut as well; `place` in [0, 1] says how much of that before.
    `canvas_ratio` is the new canvas's side over the old one's.
    """
    start, stop = max(cut, 0.0) * length, (1 + min(cut, 0.0)) * length
    span = min(stop - start, length / zoom)
    start = min(max(start + place * (stop - start - span), 0.0), length - span)
    # The minimum is for rounding: Pillow refuses a window that ends an ulp outside the image.
    out = min(round(length * canvas_ratio), round(span * zoom * canvas_ratio))
    return _Span(start, min(start + span, length), max(1, out))


def _resize(image: NDArray[np.uint8], x: _Span, y: _Span) -> Image.Image:
    """Return the window (x, y) of the image, resized to (y.out, x.out)."""
    window = (x.start, y.start, x.stop, y.stop)
    whole = Image.fromarray(np.ascontiguousarray(image))
    return whole.resize((x.out, y.out), Image.Resampling.BILINEAR, box=window)


def _map_boxes(
    boxes: NDArray[np.float32], x: _Span, y: _Span
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what the window (x, y) shows of each box, and the share of its area that this is."""
    origin = np.array([x.start, y.start] * 2)
    ratio = np.array([x.ratio, y.ratio] * 2)
    moved = (boxes.astype(np.float64) - origin) * ratio
    clipped = np.clip(moved, 0, np.array([x.out, y.out] * 2))
    whole, left = ((each[:, 2:] - each[:, :2]).prod(axis=1) for each in (moved, clipped))
    return clipped, np.divide(left, whole, out=np.zeros_like(whole), where=whole > 0)


def _mosaic(
    tiles: Sequence[Example], rng: np.random.Generator
) -> tuple[Example, NDArray[np.float64]]:
    """Four images around a random centre of the first one's part of its canvas.

    Each is cropped to its quarter, at a scale between the least that fills it and its own. Boxes
    are cut with them, and the share of each that is left is returned: the caller drops boxes.
    """
    first = tiles[0]
    height, width = first.size
    if min(height, width) < 4:
        return first, np.ones(len(first.boxes))
    centre = rng.uniform(0.25, 0.75, size=2)
    xs = (0, round(width * centre[0]), width)
    ys = (0, round(height * centre[1]), height)
    canvas = np.zeros_like(first.canvas)
    boxes: list[NDArray[np.float64]] = []
    shares: list[NDArray[np.float64]] = []
    for index, tile in enumerate(tiles):
        row, column = divmod(index, 2)
        out = Size(ys[row + 1] - ys[row], xs[column + 1] - xs[column])
        least = max(out.height / tile.size.height, out.width / tile.size.width)
        zoom = max(least, least ** rng.random())
        places = rng.random(size=2)
        x = _crop(tile.size.width, out.width / zoom, places[0], out.width)
        y = _crop(tile.size.height, out.height / zoom, places[1], out.height)
        image = tile.canvas[: tile.size.height, : tile.size.width]
        rows, columns = slice(ys[row], ys[row + 1]), slice(xs[column], xs[column + 1])
        canvas[rows, columns] = np.asarray(_resize(image, x, y))
        mapped, left = _map_boxes(tile.boxes, x, y)
        boxes.append(mapped + np.array([xs[column], ys[row]] * 2))
        shares.append(left)
    labels = np.concatenate([tile.labels for tile in tiles])
    mosaic = Example(canvas, first.size, np.concatenate(boxes).astype(np.float32), labels)
    return mosaic, np.concatenate(shares)


def _crop(length: int, span: float, place: float, out: int) -> _Span:
    """Return a window of `span` at `place` in [0, 1] of the room that is left beside it."""
    start = place * max(length - span, 0.0)
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

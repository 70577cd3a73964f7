"""Crops around mistakes, with the labelled and the detected boxes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from model_export.data.samples import Sample
from model_export.evaluation.error_analysis import ImageAnalysis, Mistake
from service.errors import DataError, RetinaserveError
from service.imaging import decode as imaging

LABELLED: Final = "#1d9bf0"
DETECTED: Final = "#ff7a1a"
"""Blue and orange: distinct to colour-blind readers, and rare in images of cells or runways."""

_SIZE: Final = (400, 300)
_CONTEXT: Final = 2.6
"""Ratio of the crop's sides to those of its box."""
_SMALLEST: Final = 48.0
"""Pixels of the original. Less would show nothing but interpolation."""
_QUALITY: Final = 78

Box = tuple[float, float, float, float]


def draw_all(
    mistakes: Sequence[Mistake], samples: Sequence[Sample], analyses: Sequence[ImageAnalysis]
) -> dict[Mistake, str]:
    """Return a JPEG of each mistake as a data URI. One image is in memory at a time.

    Raises DataError if an image can no longer be read.
    """
    wanted: dict[int, list[Mistake]] = {}
    for mistake in mistakes:
        wanted.setdefault(mistake.image, []).append(mistake)
    return {
        mistake: data_uri(drawn)
        for image, group in sorted(wanted.items())
        for mistake, drawn in _draw_image(samples[image], analyses[image], group)
    }


def crop_box(about: Box, width: int, height: int) -> Box:
    """Return the part of an image of `width` x `height` to show around a box, in its pixels.

    It has the aspect of the crops where the image is large enough.
    """
    x1, y1, x2, y2 = about
    aspect = _SIZE[0] / _SIZE[1]
    across = max((x2 - x1) * _CONTEXT, (y2 - y1) * _CONTEXT * aspect, _SMALLEST)
    wide, high = min(across, width), min(across / aspect, height)
    left = min(max((x1 + x2 - wide) / 2, 0.0), width - wide)
    top = min(max((y1 + y2 - high) / 2, 0.0), height - high)
    # Rounding must not reach out of the image.
    return left, top, min(left + wide, float(width)), min(top + high, float(height))


def data_uri(image: Image.Image) -> str:
    """Return an image as a JPEG inside of a URI."""
    target = io.BytesIO()
    image.save(target, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(target.getvalue()).decode("ascii")


def _draw_image(
    sample: Sample, analysis: ImageAnalysis, mistakes: Sequence[Mistake]
) -> Iterator[tuple[Mistake, Image.Image]]:
    try:
        image = imaging.decode(sample.path.read_bytes())
    except (OSError, RetinaserveError) as error:
        raise DataError(f"{sample.path}: {error}; replace the image") from error
    for mistake in mistakes:
        yield mistake, _crop(image, sample, analysis, mistake)


def _crop(
    image: Image.Image, sample: Sample, analysis: ImageAnalysis, mistake: Mistake
) -> Image.Image:
    main: Mapping[str, Box | None] = {
        LABELLED: _box(sample.boxes, mistake.thing),
        DETECTED: _box(analysis.shown.boxes, mistake.detection),
    }
    region = crop_box(_around([each for each in main.values() if each]), *image.size)
    width, height = region[2] - region[0], region[3] - region[1]
    scale = min(_SIZE[0] / width, _SIZE[1] / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    cut = image.resize(size, Image.Resampling.BICUBIC, box=region)
    pen = ImageDraw.Draw(cut)
    for colour, boxes in ((LABELLED, sample.boxes), (DETECTED, analysis.shown.boxes)):
        for other in boxes.tolist():
            _outline(pen, _scaled(other, region, scale), colour, width=1)
    for colour, box in main.items():
        if box is not None:
            _outline(pen, _scaled(box, region, scale), "#ffffff", width=5)
            _outline(pen, _scaled(box, region, scale), colour, width=3)
    return cut


def _outline(pen: ImageDraw.ImageDraw, box: Box, colour: str, *, width: int) -> None:
    # Lines grow inwards: moved out by half their width they lie on the box's edge.
    out = width / 2
    pen.rectangle((box[0] - out, box[1] - out, box[2] + out, box[3] + out), None, colour, width)


def _scaled(box: Sequence[float], region: Box, scale: float) -> Box:
    left, top = region[:2]
    x1, y1, x2, y2 = box
    return (x1 - left) * scale, (y1 - top) * scale, (x2 - left) * scale, (y2 - top) * scale


def _box(boxes: NDArray[np.float32], index: int | None) -> Box | None:
    if index is None:
        return None
    x1, y1, x2, y2 = boxes[index].tolist()
    return x1, y1, x2, y2


def _around(boxes: Sequence[Box]) -> Box:
    corners = np.array(boxes)
    x1, y1 = corners[:, :2].min(axis=0).tolist()
    x2, y2 = corners[:, 2:].max(axis=0).tolist()
    return x1, y1, x2, y2

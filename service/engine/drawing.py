"""Detections drawn onto the image they were found in."""

from __future__ import annotations

import colorsys
import io
import zlib
from collections.abc import Sequence
from typing import Final, Literal

from PIL import Image, ImageDraw, ImageFont

from service.runtime.detector import Detections

Encoding = Literal["JPEG", "PNG", "WEBP"]

_PALETTE: Final = ("#00796f", "#c65500", "#b0175e", "#1565c0", "#4d7c0f", "#7b3fb5", "#8d5a3b")
"""Far apart in hue, dark enough for white text; the page draws in the same colours."""
_GOLDEN_ANGLE: Final = 137.508
"""Degrees of the colour circle between one further class and the next."""


def draw(image: Image.Image, detections: Detections, classes: Sequence[str]) -> Image.Image:
    """Draw boxes, labels and scores onto `image` (RGB, upright, original size), in place."""
    pen = ImageDraw.Draw(image)
    short = min(image.size)
    line = max(1, round(short / 240))
    font = ImageFont.load_default(size=max(10, round(short / 36)))
    rows = zip(
        detections.boxes.tolist(),
        detections.scores.tolist(),
        detections.labels.tolist(),
        strict=True,
    )
    # The best last, so that it lies on top.
    for (x1, y1, x2, y2), score, label in reversed(list(rows)):
        colour = class_colour(label)
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=line)
        text = f"{classes[label]} {score:.2f}"
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        height, width = bottom - top + 4, right - left + 6
        above = y1 - height if y1 >= height else y1
        pen.rectangle((x1, above, x1 + width, above + height), fill=colour)
        pen.text((x1 + 3 - left, above + 2 - top), text, fill="white", font=font)
    return image


def class_colour(label: int) -> tuple[int, int, int]:
    """The colour of class `label`, dark enough for white text."""
    if label < len(_PALETTE):
        red, green, blue = bytes.fromhex(_PALETTE[label][1:])
        return red, green, blue
    share_r, share_g, share_b = colorsys.hls_to_rgb(label * _GOLDEN_ANGLE % 360 / 360, 0.30, 0.65)
    return round(share_r * 255), round(share_g * 255), round(share_b * 255)


def encode(image: Image.Image, encoding: Encoding) -> bytes:
    """Compress an image."""
    target = io.BytesIO()
    if encoding == "PNG":
        # A fifth of the default's time for a few per cent more bytes: level 1, and of what zlib
        # looks for only runs, which are what PNG's filters leave.
        image.save(target, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    else:
        image.save(target, encoding, quality=90)
    return target.getvalue()

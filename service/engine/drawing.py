"""Detections drawn onto the image they were found in."""

from __future__ import annotations

import colorsys
import io
import unicodedata
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final, Literal

from PIL import Image, ImageDraw, ImageFont

from service.errors import DataError
from service.runtime.detector import Detections
from service.settings import ENV_PREFIX

Encoding = Literal["JPEG", "PNG", "WEBP"]

_PALETTE: Final = ("#00796f", "#c65500", "#b0175e", "#1565c0", "#4d7c0f", "#7b3fb5", "#8d5a3b")
"""Far apart in hue, dark enough for white text; the page draws in the same colours."""
_GOLDEN_ANGLE: Final = 137.508
"""Degrees of the colour circle between one further class and the next."""
_SMALLEST: Final = 10
"""Pixels: the size of text on small images."""
_COMPARED: Final = 64
"""Pixels: the size in which one character is told from another."""
_ABSENT: Final = "\uffff"
"""Not a character, so every font draws it as it draws characters that it lacks."""
_NEEDED: Final = "class 0123456789."

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class LabelFont:
    """The font of drawn names: that of a file, or Pillow's own. Thread-safe."""

    def __init__(self, file: Path | None = None) -> None:
        """Raises DataError for a file that is no font, or lacks Latin letters and digits."""
        try:
            # Held, so that the file may change or go.
            self._content = None if file is None else file.read_bytes()
            self._sample = self.at(_COMPARED)
            self._absent = self._image_of(_ABSENT)
            self._has = cache(self._look_up)
            if not self._has_all(_NEEDED):
                raise OSError("it lacks the digits or Latin letters that scores and numbers need")
        except OSError as error:
            raise DataError(
                f"{ENV_PREFIX}FONT_FILE={file}: {error.strerror or error}; "
                "name a scalable TrueType or OpenType font"
            ) from error

    def at(self, size: int) -> Font:
        """Return the font in a size."""
        if self._content is None:
            return ImageFont.load_default(size=size)
        return ImageFont.truetype(io.BytesIO(self._content), size)

    def name(self, classes: Sequence[str], label: int) -> str:
        """Return the name of class `label`; its number if the font lacks a character of it.

        >>> LabelFont().name(["car", "叉车"], 0), LabelFont().name(["car", "叉车"], 1)
        ('car', 'class 1')
        """
        # Composed: a font has é, and hardly ever the accent alone.
        name = unicodedata.normalize("NFC", classes[label])
        return name if self._has_all(name) else f"class {label}"

    def _has_all(self, text: str) -> bool:
        return all(map(self._has, text))

    def _look_up(self, character: str) -> bool:
        kind = unicodedata.category(character)
        if kind in ("Cc", "Zl", "Zp"):
            # Raqm fails with what ends a line.
            return False
        if self._is_basic and (
            kind.startswith("M") or unicodedata.bidirectional(character) in ("R", "AL")
        ):
            return False
        try:
            return character == " " or self._image_of(character) != self._absent
        except OSError:
            # Damaged, in a font that is otherwise whole.
            return False

    @property
    def _is_basic(self) -> bool:
        """Without Raqm, or FriBiDi, which it loads: letters are neither joined nor reordered."""
        return getattr(self._sample, "layout_engine", None) != ImageFont.Layout.RAQM

    def _image_of(self, character: str) -> tuple[float, tuple[int, int], bytes]:
        mask = self._sample.getmask(character, mode="1")
        return self._sample.getlength(character), mask.size, bytes(mask)


def draw(
    image: Image.Image, detections: Detections, classes: Sequence[str], font: LabelFont
) -> Image.Image:
    """Draw boxes, labels and scores onto `image` (RGB, upright, original size), in place."""
    pen = ImageDraw.Draw(image)
    short = min(image.size)
    line = max(1, round(short / 240))
    sized = font.at(max(_SMALLEST, round(short / 36)))
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
        text = f"{font.name(classes, label)} {score:.2f}"
        left, top, right, bottom = pen.textbbox((0, 0), text, font=sized)
        height, width = bottom - top + 4, right - left + 6
        above = y1 - height if y1 >= height else y1
        pen.rectangle((x1, above, x1 + width, above + height), fill=colour)
        pen.text((x1 + 3 - left, above + 2 - top), text, fill="white", font=sized)
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

"""Which way up a picture is meant to be seen, by its EXIF, and turning it so."""

from __future__ import annotations

import io
import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngImageFile

from service.parts import PNG_HEAD

_EXIF_ORIENTATION: Final = 0x0112
_TRANSPOSE: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES: Final = frozenset({5, 6, 7, 8})
_AGAINST: Final = {
    1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1),
    5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1),
}  # fmt: skip
"""Which way rows and columns are read, once the sides are swapped where they are."""
_PNG_TEXT: Final = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})
"""Chunks in which EXIF or XMP may stand."""
_EXIF_ERRORS: Final = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)
"""What Pillow raises on EXIF blocks that are rubbish."""


def orientation_of(image: ImageFile.ImageFile) -> int:
    """The EXIF orientation of a picture whose header was read; 1, upright, where there is none.

    Raises what decoders raise, where a picture has to be decoded to find out.
    """
    if isinstance(image, PngImageFile) and "exif" not in image.info and not _ends_plainly(image):
        # A PNG's EXIF may come after its pixels; a PNG that breaks off there must be refused.
        image.load()
    try:
        # Not the PNG class's own: it would decode the picture, and swallow that it is broken.
        value = Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)
    except _EXIF_ERRORS:
        # Viewers show such pictures, as they are: broken EXIF says nothing of the pixels.
        return 1
    return value if value in _TRANSPOSE else 1


def _ends_plainly(image: PngImageFile) -> bool:
    """Whether a PNG is complete and has nothing after its pixels that could be EXIF or XMP.

    From the headers of its chunks: `load` would decode every pixel to find out.
    """
    if not isinstance(image.fp, io.BytesIO):
        return False
    data, position, pixels = image.fp.getvalue(), PNG_HEAD, False
    while position + 12 <= len(data):
        kind = bytes(data[position + 4 : position + 8])
        if kind == b"IEND":
            return True
        if pixels and kind in _PNG_TEXT:
            return False
        pixels = pixels or kind == b"IDAT"
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return False


def made_upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """(height, width, 3) as it is meant to be seen."""
    if orientation in SWAPS_SIDES:
        pixels = pixels.transpose(1, 0, 2)
    down, right = _AGAINST[orientation]
    return pixels[::down, ::right]


def transposed(image: Image.Image, orientation: int) -> Image.Image:
    """A decoded picture as it is meant to be seen; the same one where it stands upright."""
    if orientation == 1:
        return image
    return image.transpose(_TRANSPOSE[orientation])

"""The orientation in an image's EXIF, and turning the image upright."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngImageFile

from service.imaging.limits import PNG_HEAD

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
_EXIF_PREFIX: Final = b"Exif\x00\x00"
_ORDERS: Final[Mapping[bytes, Literal["little", "big"]]] = {b"II": "little", b"MM": "big"}
_SIZES: Final = {3: 2, 4: 4}
"""Bytes of a whole number, by the number that TIFF gives its type: SHORT and LONG."""
_ENTRY_BYTES: Final = 12
_MOST_ENTRIES: Final = 1024
"""Fields of EXIF that are looked at; cameras write some dozens."""
_XMP: Final = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def orientation_of(image: ImageFile.ImageFile) -> int:
    """Return the orientation of an opened image, by its EXIF or else its XMP.

    1, upright, where neither tells one: viewers show such images as they are. Raises what
    decoders raise, where an image has to be decoded to find out.
    """
    if isinstance(image, PngImageFile) and "exif" not in image.info and not _ends_plainly(image):
        # A PNG's EXIF may come after its pixels; a PNG that breaks off there must be refused.
        image.load()
    value = _in_exif(_exif(image.info))
    if value is None:
        xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
        found = _XMP.search(xmp.encode() if isinstance(xmp, str) else xmp)
        value = 1 if found is None else int(found[1])
    return value if value in _TRANSPOSE else 1


def _exif(info: Mapping[str | tuple[int, int], Any]) -> bytes:
    """Return an image's EXIF block; empty if it has none."""
    block = info.get("exif")
    if isinstance(block, bytes):
        return block
    # As some programs write it into a PNG: a name, a length and a line before it, then digits.
    text = info.get("Raw profile type exif")
    if not isinstance(text, str):
        return b""
    try:
        return bytes.fromhex(text.split("\n", 3)[3])
    except (IndexError, ValueError):
        return b""


def _in_exif(block: bytes) -> int | None:
    """Return the orientation in EXIF.

    Pillow would read every field, and make an object of every value that one says it has: a file of
    some megabytes keeps it busy for seconds.
    """
    tiff = block.removeprefix(_EXIF_PREFIX).removeprefix(_EXIF_PREFIX)
    order = _ORDERS.get(tiff[:2])
    if order is None:
        return None

    def number(position: int, size: int) -> int:
        return int.from_bytes(tiff[position : position + size], order)

    first = number(4, 4)
    begin, count = first + 2, min(number(first, 2), _MOST_ENTRIES)
    for entry in range(begin, begin + count * _ENTRY_BYTES, _ENTRY_BYTES):
        if number(entry, 2) == _EXIF_ORIENTATION:
            size, values = _SIZES.get(number(entry + 2, 2)), number(entry + 4, 4)
            return None if size is None or values != 1 else number(entry + 8, size)
    return None


def _ends_plainly(image: PngImageFile) -> bool:
    """Return whether a PNG is complete, with nothing after its pixels that could be EXIF or XMP.

    From the headers of its chunks: `load` would decode every pixel to find out.
    """
    if not isinstance(image.fp, io.BytesIO):
        return False
    data, position, pixels = image.fp.getvalue(), PNG_HEAD, False
    while position + 12 <= len(data):
        kind = data[position + 4 : position + 8]
        if kind == b"IEND":
            return True
        if pixels and kind in _PNG_TEXT:
            return False
        pixels = pixels or kind == b"IDAT"
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return False


def made_upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Return pixels (height, width, 3) turned upright."""
    if orientation in SWAPS_SIDES:
        pixels = pixels.transpose(1, 0, 2)
    down, right = _AGAINST[orientation]
    return pixels[::down, ::right]


def transposed(image: Image.Image, orientation: int) -> Image.Image:
    """Return a decoded image turned upright; the same one if it is."""
    if orientation == 1:
        return image
    return image.transpose(_TRANSPOSE[orientation])

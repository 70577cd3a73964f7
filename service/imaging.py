"""Bytes to canvas: the one way a picture becomes the network's input, in training and in serving.

Type by content, size limits from the header, decoding (JPEGs are scaled in the DCT domain to just
above what the canvas needs), EXIF orientation, RGB, and the letterbox resize. How a picture is
decoded and resized moves the detector's accuracy, so nothing else in this project does it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service.canvas import Buckets, Letterbox, ShortSide, Size
from service.errors import MalformedImage, TooLarge, UnsupportedMedia

ACCEPTED: Final = "JPEG, PNG or WebP"
DEFAULT_MAX_PIXELS: Final = 50_000_000

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
_SWAPS_SIDES: Final = frozenset({5, 6, 7, 8})


@dataclass(frozen=True, slots=True)
class Prepared:
    """A picture on its canvas."""

    canvas: NDArray[np.uint8]
    """(height, width, 3) RGB, zero where the picture is not."""
    letterbox: Letterbox


def prepare(
    data: bytes | memoryview,
    rule: Buckets | ShortSide,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Prepared:
    """Decode a compressed picture and place it on the canvas that `rule` chooses for it.

    Raises MalformedImage, UnsupportedMedia or TooLarge.
    """
    header = _open(data, max_pixels=max_pixels)
    try:
        placed = rule.fit(_upright_size(header))
        if isinstance(header, JpegImageFile):
            # The decoder scales by 1/2, 1/4 or 1/8 at a fraction of the cost of decoding in
            # full; `draft` picks the smallest that is still at least the size asked for.
            header.draft(None, _turned(header, placed.resized))
        resized = _to_rgb(header).resize(
            _turned(header, placed.resized), Image.Resampling.BILINEAR
        )
        upright = _transposed(resized, _orientation(header))
    except Exception as error:
        # Whatever a decoder throws on bytes from outside means that the bytes are bad: Pillow
        # raises OSError, SyntaxError, ValueError, struct.error, zlib.error and more.
        raise _malformed(error) from error
    canvas = np.zeros((placed.canvas.height, placed.canvas.width, 3), dtype=np.uint8)
    canvas[: placed.resized.height, : placed.resized.width] = np.asarray(upright)
    return Prepared(canvas=canvas, letterbox=placed)


def decode(
    data: bytes | memoryview, *, max_pixels: int = DEFAULT_MAX_PIXELS
) -> Image.Image:
    """Decode a compressed picture in full: upright, RGB. For drawing; detection uses `prepare`.

    Raises MalformedImage, UnsupportedMedia or TooLarge.
    """
    image = _open(data, max_pixels=max_pixels)
    try:
        return _transposed(_to_rgb(image), _orientation(image))
    except Exception as error:
        raise _malformed(error) from error


def probe(data: bytes | memoryview, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Size:
    """Upright size of a compressed picture, from its header alone.

    Raises MalformedImage, UnsupportedMedia or TooLarge.
    """
    image = _open(data, max_pixels=max_pixels)
    try:
        return _upright_size(image)
    except Exception as error:
        raise _malformed(error) from error


def media_type(data: bytes | memoryview) -> str:
    """The picture's media type by its first bytes. Raises MalformedImage or UnsupportedMedia."""
    return _sniff(data)[0]


def _sniff(
    data: bytes | memoryview,
) -> tuple[str, Callable[[io.BytesIO], ImageFile.ImageFile]]:
    head = bytes(data[:16])
    if not head:
        raise MalformedImage(f"the image is empty (0 bytes); send a {ACCEPTED} file")
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg", JpegImageFile
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png", PngImageFile
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp", WebPImageFile
    raise UnsupportedMedia(f"not an accepted image type; send {ACCEPTED} (judged by content)")


def _open(data: bytes | memoryview, *, max_pixels: int) -> ImageFile.ImageFile:
    """Read the header. Nothing is decoded, so a picture that is too large costs nothing."""
    _, factory = _sniff(data)
    try:
        # The plugin's class, not Image.open: only these three decoders can ever run, and the
        # limit is ours rather than Pillow's process-wide Image.MAX_IMAGE_PIXELS.
        image = factory(io.BytesIO(data))
    except Exception as error:
        raise _malformed(error) from error
    width, height = image.size
    if width * height > max_pixels:
        raise TooLarge(
            f"the image has {width} x {height} = {width * height} pixels; "
            f"at most {max_pixels} are accepted"
        )
    if width < 1 or height < 1:
        raise MalformedImage(f"the image is {width} x {height} pixels; both must be at least 1")
    return image


def _malformed(error: Exception) -> MalformedImage:
    return MalformedImage(f"the image does not decode, is it truncated? ({error})")


def _orientation(image: ImageFile.ImageFile) -> int:
    value = image.getexif().get(_EXIF_ORIENTATION, 1)
    return value if value in _TRANSPOSE else 1


def _upright_size(image: ImageFile.ImageFile) -> Size:
    width, height = image.size
    if _orientation(image) in _SWAPS_SIDES:
        width, height = height, width
    return Size(height=height, width=width)


def _turned(image: ImageFile.ImageFile, upright: Size) -> tuple[int, int]:
    """(width, height) before orientation of what has size `upright` after it."""
    if _orientation(image) in _SWAPS_SIDES:
        return upright.height, upright.width
    return upright.width, upright.height


def _transposed(image: Image.Image, orientation: int) -> Image.Image:
    if orientation == 1:
        return image
    return image.transpose(_TRANSPOSE[orientation])


def _to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    image.load()
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling.
        grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        # A viewer shows transparent pixels on its page; dropping alpha would uncover colours
        # that nobody ever saw.
        rgba = image.convert("RGBA")
        page = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(page, rgba).convert("RGB")
    return image.convert("RGB")

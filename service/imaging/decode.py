"""Bytes to canvas: the one way an image becomes the network's input, in training and in serving.

Type by content, size limits from the header, decoding (JPEGs are scaled in the DCT domain to just
above what the canvas needs), EXIF orientation, RGB, and the letterbox resize. How an image is
decoded and resized moves the detector's accuracy, so nothing else in this project does it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service.contents import kind_of
from service.errors import MalformedImage, TooLarge, UnsupportedMedia
from service.imaging.canvas import Buckets, Letterbox, ShortSide, Size
from service.imaging.exif import SWAPS_SIDES, made_upright, orientation_of, transposed
from service.imaging.header import WEBP_BYTES, Header, webp_size
from service.imaging.limits import START_OF_SCAN, check_png, jpeg_file, walk_scans
from service.imaging.memory_budget import DecodeMemory
from service.imaging.resize import COPY_BYTES, LARGEST_COPIED, resize

ACCEPTED: Final = "JPEG, PNG or WebP"
SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"})
"""Of files that are taken for images in a folder, in small letters."""
DEFAULT_MAX_PIXELS: Final = 50_000_000

_STORED_BYTES: Final = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}
"""Of a pixel in Pillow's memory; 4 in every other mode, RGB too."""
_STRIP_PIXELS: Final = 1 << 20
"""Pixels that are converted to RGB at a time: Pillow's conversions hold the interpreter's lock, and
take the memory of several images of what they convert."""
_STRIP_BYTES: Final = 20
"""Of a pixel, while its strip is converted."""
_SIDE_BYTES: Final = 40
"""Of each row and each column: little, unless a side has millions of pixels."""
_WEBP_BYTES: Final = 12
"""Of a WebP's pixel in its decoder: two canvases, and the frame that is being decoded."""
_COEFFICIENT_BYTES: Final = 2
"""Of a JPEG's pixel and colour, where the decoder collects several scans."""
_DRAFT_SCALES: Final = (8, 4, 2, 1)
_MOST_PIECES: Final = 16
"""Most pieces of a JPEG: what the decoder leaves of a piece, it goes through again
together with the next."""
_FILLING: Final = b"\xff" * 4096
"""A JPEG may have any number of such bytes before a marker, and the decoder leaves them until they
end."""
_LITTLE: Final = 1 << 20
"""Bytes of a JPEG that are not worth looking through for filling."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image on its canvas."""

    canvas: NDArray[np.uint8]
    """(height, width, 3) RGB, zero where the image is not."""
    letterbox: Letterbox


class Jpeg(JpegImageFile):
    """A JPEG whose EXIF only `orientation_of` reads."""

    def _read_dpi_from_exif(self) -> None:
        """Do nothing, where Pillow would parse all of EXIF for dots per inch."""


class Opened:
    """A compressed image whose header was read. Not thread-safe."""

    def __init__(self, header: ImageFile.ImageFile) -> None:
        self._header = header
        try:
            self._orientation = orientation_of(header)
        except Exception as error:
            raise _malformed(error) from error
        self.size = self._turned(Size(height=header.height, width=header.width))
        """Upright."""

    @property
    def is_turned(self) -> bool:
        """Whether the stored image lies on its side, as EXIF says."""
        return self._orientation in SWAPS_SIDES

    def prepare(self, rule: Buckets | ShortSide) -> Prepared:
        """Decode the image and place it on its canvas, scaled in one go. Raises MalformedImage.

        Afterwards this object is used up: its pixels may have been scaled while decoding.
        """
        placed = rule.fit(self.size)
        resized = self._turned(placed.resized)
        wanted = (resized.width, resized.height)
        try:
            if isinstance(self._header, JpegImageFile):
                # The decoder scales by 1/2, 1/4 or 1/8 at a fraction of the cost of decoding in
                # full; `draft` picks the smallest that is still at least the size asked for.
                self._header.draft(None, wanted)
            upright = made_upright(resize(_to_rgb(self._header), resized), self._orientation)
        except Exception as error:
            # Whatever a decoder throws on bytes from outside means that the bytes are bad: Pillow
            # raises OSError, SyntaxError, ValueError, struct.error, zlib.error and more.
            raise _malformed(error) from error
        return _place(upright, placed)

    def decode(self) -> Image.Image:
        """Return the whole image, upright, RGB, and use this object up. Raises MalformedImage."""
        header = self._header
        # An image that has to be turned would otherwise stay in memory twice.
        del self._header
        try:
            return transposed(_to_rgb(header), self._orientation)
        except Exception as error:
            raise _malformed(error) from error

    def _turned(self, size: Size) -> Size:
        """Swap the sides between upright and stored."""
        if self.is_turned:
            return Size(height=size.width, width=size.height)
        return size


def open_image(data: bytes | memoryview, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Opened:
    """Read a compressed image's header. Raises MalformedImage, UnsupportedMedia or TooLarge."""
    return Opened(_open(data, max_pixels=max_pixels))


@contextmanager
def held_image(
    data: bytes | memoryview,
    *,
    memory: DecodeMemory,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    rule: Buckets | ShortSide | None = None,
    kept: int = 0,
) -> Iterator[Opened]:
    """Open an image as `open_image` does, holding room in `memory` for decoding; waits for room.

    `rule` is the one that the image will be prepared by; None: it will be decoded in full. `kept`
    is how many further bytes of a pixel will be needed. Raises MalformedImage, UnsupportedMedia or
    TooLarge.
    """
    kind, _ = _sniff(data)
    if kind == "image/webp":
        # Held before it is opened: opening makes the decoder.
        head = bytes(data[:WEBP_BYTES])
        size = webp_size(head)
        _check_pixels(size, max_pixels)
        with memory.hold(size[0] * size[1] * (_WEBP_BYTES + 8 + kept) + _strip_bytes(*size)):
            yield open_image(data, max_pixels=max_pixels)
        return
    header = _open(data, max_pixels=max_pixels)
    try:
        needed = _decode_bytes(header, rule)
    except Exception as error:
        # Pillow asserts that a palette is there, for example.
        raise _malformed(error) from error
    with memory.hold(needed + header.width * header.height * kept):
        yield Opened(header)


def prepare(
    data: bytes | memoryview,
    rule: Buckets | ShortSide,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    memory: DecodeMemory | None = None,
) -> Prepared:
    """Decode a compressed image and place it on the canvas that `rule` chooses for it.

    Raises MalformedImage, UnsupportedMedia or TooLarge.
    """
    if memory is None:
        return open_image(data, max_pixels=max_pixels).prepare(rule)
    with held_image(data, memory=memory, max_pixels=max_pixels, rule=rule) as image:
        return image.prepare(rule)


def cut(image: Image.Image, corner: tuple[int, int], placed: Letterbox) -> Prepared:
    """Place the part of a decoded image (RGB) that begins at `corner` (x, y) on a canvas.

    The part's size is `placed.original`; where that is `placed.resized`, pixels stay as they are.
    May run in several threads at once on the same image.
    """
    (x, y), (height, width) = corner, placed.original
    part = (x, y, x + width, y + height)
    if placed.resized == placed.original:
        return _place(np.asarray(image.crop(part)), placed)
    # Pillow's own: it looks beyond the part's borders.
    wanted = (placed.resized.width, placed.resized.height)
    return _place(np.asarray(image.resize(wanted, Image.Resampling.BILINEAR, box=part)), placed)


def decode(
    data: bytes | memoryview,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    memory: DecodeMemory | None = None,
) -> Image.Image:
    """Decode a compressed image in full: upright, RGB.

    Raises MalformedImage, UnsupportedMedia or TooLarge.
    """
    if memory is None:
        return open_image(data, max_pixels=max_pixels).decode()
    with held_image(data, memory=memory, max_pixels=max_pixels) as image:
        return image.decode()


def probe(data: bytes | memoryview, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Size:
    """Return the upright size of a compressed image, from its header alone.

    Raises MalformedImage, UnsupportedMedia or TooLarge.
    """
    return open_image(data, max_pixels=max_pixels).size


def examine(data: bytes | memoryview, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Header:
    """Return the header of any JPEG, PNG or WebP that `read_header` does not know.

    Raises MalformedImage, UnsupportedMedia or TooLarge.
    """
    image = _open(data, max_pixels=max_pixels)
    size = Size(image.height, image.width)
    if not isinstance(image, JpegImageFile):
        return Header.of(f"other {image.format}", size, data)
    if not _has_several_scans(image):
        return Header.of(f"jpeg {image.layers}", size, data)
    return Header.of(f"progressive {image.layers}", size, data, walk_scans(_content(image)))


def draft_scale(size: Size, rule: Buckets | ShortSide) -> int:
    """Return by how much a JPEG's decoder scales down at least, in any orientation."""
    sides = []
    for turned in (size, Size(size.width, size.height)):
        resized = rule.fit(turned).resized
        sides += [turned.height // resized.height, turned.width // resized.width]
    return next((scale for scale in _DRAFT_SCALES if scale <= min(sides)), 1)


def media_type(data: bytes | memoryview) -> str:
    """Return the media type by the first bytes. Raises MalformedImage or UnsupportedMedia."""
    return _sniff(data)[0]


def _sniff(
    data: bytes | memoryview,
) -> tuple[str, Callable[[io.BytesIO], ImageFile.ImageFile]]:
    head = bytes(data[:16])
    if not head:
        raise MalformedImage(f"the image is empty (0 bytes); send a {ACCEPTED} file")
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg", Jpeg
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png", PngImageFile
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp", WebPImageFile
    raise UnsupportedMedia(
        f"not an accepted image type but {kind_of(data)}; send {ACCEPTED} (judged by content)"
    )


def _open(data: bytes | memoryview, *, max_pixels: int) -> ImageFile.ImageFile:
    """Read the header. Nothing is decoded, so an image that is too large costs nothing."""
    kind, factory = _sniff(data)
    if kind == "image/webp":
        # The decoder takes the memory of two whole canvases as soon as it is made.
        _check_pixels(webp_size(bytes(data[:WEBP_BYTES])), max_pixels)
    if kind == "image/png":
        check_png(data)
    try:
        file = jpeg_file(data) if kind == "image/jpeg" else io.BytesIO(data)
        # The plugin's class, not Image.open: only these three decoders can ever run, and the
        # limit is ours rather than Pillow's process-wide Image.MAX_IMAGE_PIXELS.
        image = factory(file)
    except Image.DecompressionBombError as error:
        raise TooLarge(f"the image is too large to decode: {error}") from error
    except Exception as error:
        raise _malformed(error) from error
    if kind == "image/jpeg":
        image.decodermaxblock = max(image.decodermaxblock, len(data) // _MOST_PIECES)
    _check_pixels(image.size, max_pixels)
    if min(image.size) < 1:
        width, height = image.size
        raise MalformedImage(f"the image is {width} x {height} pixels; both must be at least 1")
    return image


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise TooLarge(
            f"the image has {width} x {height} = {width * height} pixels; "
            f"at most {max_pixels} are accepted"
        )


def _decode_bytes(header: ImageFile.ImageFile, rule: Buckets | ShortSide | None) -> int:
    """Return the most memory that a JPEG or PNG takes from header to canvas, by its header."""
    pixels = decoded = header.width * header.height
    # Texts and colour profiles, which were inflated.
    total = sum(len(each) for each in header.info.values() if isinstance(each, bytes | str))
    total += _side_bytes(header.width, header.height)
    if isinstance(header, JpegImageFile):
        content = _content(header)
        if len(content) > _LITTLE and _FILLING in content:
            # What the decoder left, alone and with the next piece.
            total += 2 * len(content)
        if _has_several_scans(header):
            total += pixels * _COEFFICIENT_BYTES * header.layers
        if rule is not None:
            decoded = pixels // draft_scale(Size(header.height, header.width), rule) ** 2
    # Decoded in full, an image may have to be turned.
    per_pixel = _STORED_BYTES.get(header.mode, 4) + (4 if rule is None else 0)
    if header.mode != "RGB" or header.has_transparency_data:
        per_pixel += 4
        total += _strip_bytes(header.width, header.height)
    if rule is not None:
        total += COPY_BYTES * min(decoded, LARGEST_COPIED)
    return total + decoded * per_pixel


def _strip_bytes(width: int, height: int) -> int:
    """Return the most memory that the conversion of a strip takes."""
    return _STRIP_BYTES * max(width, min(_STRIP_PIXELS, width * height))


def _side_bytes(width: int, height: int) -> int:
    """Return the most memory that grows with the sides: row pointers, resize coefficients."""
    return _SIDE_BYTES * (width + height)


def _content(header: ImageFile.ImageFile) -> bytes:
    """Return the file's bytes without a copy, which `getbuffer` makes of shared memory."""
    assert isinstance(header.fp, io.BytesIO), "images are opened from memory"
    return header.fp.getvalue()


def _has_several_scans(header: JpegImageFile) -> bool:
    """Return whether the decoder must collect the whole image's coefficients first."""
    if "progressive" in header.info:
        return True
    assert header.fp is not None, "nothing has been decoded"
    # Pillow stops behind the first scan's header: marker, length (2), number of colours (1), two
    # bytes for each, 3 more. One that holds all the colours is the only one.
    begin = header.fp.tell() - 2 * header.layers - 8
    scan = _content(header)[max(0, begin) : max(0, begin + 5)]
    return scan[:2] != START_OF_SCAN or scan[-1] != header.layers


def _malformed(error: Exception) -> MalformedImage:
    if isinstance(error, MalformedImage):
        return error
    return MalformedImage(f"the image does not decode, is it truncated? ({error})")


def _place(resized: NDArray[np.uint8], placed: Letterbox) -> Prepared:
    height, width = placed.resized
    # Only what the image leaves is made zero: memory is what several threads wait for.
    canvas = np.empty((*placed.canvas, 3), dtype=np.uint8)
    canvas[:height, :width] = resized
    canvas[height:] = 0
    canvas[:height, width:] = 0
    return Prepared(canvas=canvas, letterbox=placed)


def _to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    image.load()
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    rows = max(1, _STRIP_PIXELS // image.width)
    if rows >= image.height:
        return _strip_to_rgb(image)
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(_strip_to_rgb(strip), (0, top))
    return rgb


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling.
        values = np.asarray(image)
        grey = (values >> 8).clip(0, 255).astype(np.uint8)
        key = image.info.get("transparency")
        if key is not None:
            grey[values == key] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        # A viewer shows transparent pixels on its page; dropping alpha would uncover colours
        # that were never to be seen.
        rgba = image.convert("RGBA")
        page = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(page, rgba).convert("RGB")
    return image.convert("RGB")

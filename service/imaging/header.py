"""The cost of decoding by an image's header: kind, size and number of passes."""

from __future__ import annotations

from typing import Final, NamedTuple

from service.imaging.canvas import Size
from service.imaging.limits import ordinary_frame

WEBP_BYTES: Final = 30
"""Bytes that hold a WebP's size, whatever its kind."""
_PNG_BYTES: Final = 29
_PNG_COLOURS: Final = {0: "grey", 2: "rgb", 3: "palette", 4: "grey-alpha", 6: "rgba"}
_DENSITIES: Final = ("sparse", "middling", "dense")
"""Below 2 bits a pixel, below 8, and from there on."""
_WEBP_KINDS: Final = {b"VP8 ": "webp lossy", b"VP8L": "webp lossless", b"VP8X": "webp extended"}


class Header(NamedTuple):
    """The fields of a header that decide the time of decoding."""

    kind: str
    """Format and mode: images of one kind take about the same time for a pixel."""
    size: Size
    """As stored, before EXIF orientation."""
    passes: int = 1
    """How often the decoder goes through all pixels: the number of a JPEG's scans."""

    @classmethod
    def of(cls, kind: str, size: Size, data: bytes | memoryview, passes: int = 1) -> Header:
        """A header whose kind tells apart files that are dense, which take longer for a pixel."""
        bits = 8 * len(data) // max(1, size.area)
        return cls(f"{kind} {_DENSITIES[min(bits.bit_length() // 2, 2)]}", size, passes)

    @property
    def work(self) -> int:
        """Pixels that the decoder goes through."""
        return self.size.area * self.passes


def read_header(data: bytes | memoryview) -> Header | None:
    """Return the header of a PNG, a WebP or an ordinary JPEG, within microseconds.

    None for what must be looked at more closely (`imaging.examine`), for what is no image, and for
    an image without pixels: decoding will say what is wrong with it.
    """
    header = _read_header(data)
    return header if header is not None and header.size.area > 0 else None


def _read_header(data: bytes | memoryview) -> Header | None:
    head = bytes(data[:WEBP_BYTES])
    if head.startswith(b"\xff\xd8\xff"):
        frame = ordinary_frame(data)
        if frame is None:
            return None
        return Header.of(f"jpeg {frame.colours}", Size(frame.height, frame.width), data)
    if head[12:16] == b"IHDR" and len(head) >= _PNG_BYTES:
        return _png_header(head, data)
    kind = _WEBP_KINDS.get(head[12:16])
    if kind is None or head[:4] != b"RIFF":
        return None
    width, height = webp_size(head)
    return Header.of(kind, Size(height, width), data)


def _png_header(head: bytes, data: bytes | memoryview) -> Header | None:
    """Return the header of a PNG (RFC 2083, 4.1.1)."""
    depth, colour, interlaced = head[24], _PNG_COLOURS.get(head[25]), head[28]
    if colour is None or depth not in (1, 2, 4, 8, 16):
        return None
    size = Size(int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big"))
    return Header.of(f"png {colour} {depth}{' interlaced' if interlaced else ''}", size, data)


def webp_size(head: bytes) -> tuple[int, int]:
    """(width, height) by a WebP's header (RFC 9649); (0, 0) if the header is of no known kind."""
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        # The upper two bits are a hint for scaling.
        return (
            int.from_bytes(head[26:28], "little") & 0x3FFF,
            int.from_bytes(head[28:30], "little") & 0x3FFF,
        )
    return 0, 0

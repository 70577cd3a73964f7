"""Bounds on the number of parts of an image's file, each of which costs time.

Thirty megabytes of empty chunks keep Pillow busy for ten seconds, of colour profiles that inflate
for more than a minute, and of a JPEG's scans for hours. Cameras and editors write some dozens.
"""

from __future__ import annotations

import io
import re
from typing import Final, NamedTuple

import numpy as np

from service.errors import MalformedImage

PNG_HEAD: Final = 8
"""Bytes before a PNG's first chunk: length (4), kind (4), content, checksum (4)."""
_MOST_PARTS: Final = 1024
_PART_BYTES: Final = 512
"""Bytes of a PNG per allowed chunk: its pixels may be in any number of chunks."""
_INFLATED: Final = frozenset({b"iCCP", b"iTXt", b"zTXt"})
_TEXT: Final = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_MOST_TEXT: Final = 4 << 20
"""Bytes. As strings they may take four times as many, and are searched for the orientation."""
_MOST_INFLATED: Final = 32
"""Each becomes up to 1 MiB of memory, and milliseconds of time."""

_READS: Final = 4 * _MOST_PARTS
"""Pillow reads a segment of a JPEG in four steps."""
_BLOCK_BYTES: Final = 16_384
"""Less than it reads of the pixels at a time."""
_EXIF: Final = b"Exif\x00\x00"
_MOST_EXIF: Final = 16
"""Segments of EXIF, which Pillow puts together one by one: the time grows with their square."""

_MOST_ORDINARY: Final = 64
"""Segments of a JPEG with nothing out of the ordinary."""
_MARKER: Final = 0xFF
_FRAMES: Final = frozenset({0xC0, 0xC1})
"""The kinds of image whose colours may all be in one scan: baseline and extended."""
_APP1: Final = 0xE1
"""EXIF, or XMP."""
_PLAIN_SEGMENTS: Final = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
"""Tables of codes and factors, the interval of restarts, comments, and what applications add."""

_NEXT_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
"""What is no restart and no stuffed byte of the pixels."""
_BARE_MARKERS: Final = frozenset({0x01, 0xD8, 0xD9})
START_OF_SCAN: Final = b"\xff\xda"
_SCAN_WORD: Final = int.from_bytes(START_OF_SCAN, "little")
_WORDS: Final = 65_536
"""Pairs of bytes that are compared at a time."""
MOST_SCANS: Final = 64
"""The decoder goes through the whole image for each: a hundred bytes that cost 30 ms with 50
million pixels."""


def check_png(data: bytes | memoryview) -> None:
    """Raise MalformedImage for a PNG of too many chunks, too much text, or two headers."""
    position, parts, inflated, text = PNG_HEAD, 0, 0, 0
    most = _MOST_PARTS + len(data) // _PART_BYTES
    while position + 12 <= len(data):
        kind = bytes(data[position + 4 : position + 8])
        if kind == b"IEND":
            return
        length = int.from_bytes(data[position : position + 4], "big")
        if kind == b"IHDR" and parts:
            # Decoders take the last one; the price of decoding is that of the first.
            raise MalformedImage("the PNG has more than one IHDR chunk; save it again")
        parts += 1
        inflated += kind in _INFLATED
        text += length if kind in _TEXT else 0
        if text > _MOST_TEXT:
            raise MalformedImage(
                f"the PNG has more than {_MOST_TEXT} bytes of text; save it again without it"
            )
        if parts > most or inflated > _MOST_INFLATED:
            raise MalformedImage(
                f"the PNG has more than {most} chunks, or more than {_MOST_INFLATED} that hold "
                "text or a colour profile; save it again without them"
            )
        position += 12 + length


def jpeg_file(data: bytes | memoryview) -> io.BytesIO:
    """Return a JPEG's bytes as a file for Pillow.

    Raises MalformedImage for too many scans; reading raises it where they fall into too many parts.
    """
    return JpegReader(data) if ordinary_frame(data) is None else io.BytesIO(data)


class Frame(NamedTuple):
    """The frame header of a JPEG."""

    height: int
    width: int
    colours: int


def ordinary_frame(data: bytes | memoryview) -> Frame | None:
    """Return the frame of a JPEG of a few well-formed segments and one scan; None for others.

    The decoder expects no other scan then. Most JPEGs are such, and nothing need be counted while
    they are read.
    """
    frame, exif, position = None, 0, 2
    for _ in range(_MOST_ORDINARY):
        head = bytes(data[position : position + 10])
        if len(head) < 10 or head[0] != _MARKER:
            return None
        kind, length = head[1], int.from_bytes(head[2:4], "big")
        if kind == START_OF_SCAN[1]:
            return frame if frame is not None and head[4] == frame.colours else None
        if kind in _FRAMES and frame is None:
            frame = Frame(
                int.from_bytes(head[5:7], "big"), int.from_bytes(head[7:9], "big"), head[9]
            )
        elif kind not in _PLAIN_SEGMENTS:
            return None
        exif += kind == _APP1
        if length < 2 or exif > _MOST_EXIF:
            return None
        position += 2 + length
    return None


class JpegReader(io.BytesIO):
    """A JPEG's bytes. Raises MalformedImage when they are read in too many pieces."""

    def __init__(self, data: bytes | memoryview) -> None:
        """Raises MalformedImage for too many scans."""
        super().__init__(data)
        scans = count_scans(self.getvalue())
        if scans > MOST_SCANS:
            raise MalformedImage(
                f"the JPEG has {scans} scans; at most {MOST_SCANS} are accepted, and some ten are "
                "usual"
            )
        self._reads = _READS + len(data) // _BLOCK_BYTES
        self._exif = _MOST_EXIF

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as from any file."""
        piece = super().read(size)
        self._reads -= 1
        self._exif -= piece[: len(_EXIF)] == _EXIF
        if self._reads < 0 or self._exif < 0:
            raise MalformedImage(
                f"the JPEG has more than {_MOST_PARTS} segments, or more than {_MOST_EXIF} of "
                "EXIF; save it again without them"
            )
        return piece


def walk_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG as a decoder meets them, segment by segment."""
    scans, position = 0, 2
    while found := _NEXT_MARKER.search(data, position):
        position, kind = found.end(), data[found.end() - 1]
        scans += kind == START_OF_SCAN[1]
        # Markers without content are passed over by the next search.
        if kind not in _BARE_MARKERS:
            position += int.from_bytes(data[position : position + 2], "big")
    return max(1, scans)


def count_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG: exact if there are too many, else an upper bound.

    `bytes.count` would be a noticeable part of decoding; pairs of bytes are compared by vector
    instructions.
    """
    pairs = 0
    for offset in (0, 1):
        words = np.frombuffer(data, "<u2", count=(len(data) - offset) // 2, offset=offset)
        for begin in range(0, len(words), _WORDS):
            block = words[begin : begin + _WORDS]
            pairs += int(np.count_nonzero(block == _SCAN_WORD))
    if pairs <= MOST_SCANS:
        return pairs
    # With the first byte of its length: whatever else the file holds, such as the film that
    # phones append, has the marker's two bytes once in 64 KiB.
    return data.count(START_OF_SCAN + b"\x00")

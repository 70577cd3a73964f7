"""Images for tests, drawn when needed: squares that the tiny model finds, and rubbish."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

RED = (255, 0, 0)
GREEN = (0, 255, 0)
BLUE = (0, 0, 255)


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def squares(
    *placed: tuple[int, int, tuple[int, int, int]], size: tuple[int, int] = (128, 96)
) -> Image.Image:
    """A black image of `size` (width, height) with 32 px squares at (x, y)."""
    image = Image.new("RGB", size)
    for x, y, colour in placed:
        image.paste(colour, (x, y, x + 32, y + 32))
    return image


def one_red() -> Image.Image:
    """A red square at x 32..64, y 16..48: one detection at the tiny model's own threshold."""
    return squares((32, 16, RED))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The image as a file."""
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def huge_png(side: int = 30_000) -> bytes:
    """A PNG of side x side grey pixels in about 100 kB: a decompression bomb, valid in full."""
    line = zlib.compressobj(9)
    row = b"\x00" + bytes(side // 8)
    packed = b"".join(line.compress(row * 100) for _ in range(side // 100)) + line.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", packed)
        + _chunk(b"IEND", b"")
    )


def png_header(width: int, height: int) -> bytes:
    """The header of a PNG of that size, and nothing of its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"x" * 64)


def rotated(image: Image.Image, orientation: int) -> bytes:
    """A lossless file that looks like `image` in a viewer, stored turned, with an EXIF tag."""
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = image if undo is None else image.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, "PNG", exif=exif)


def sixteen_bit(image: Image.Image) -> bytes:
    """Grey, 16 bits a pixel."""
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(grey))


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """An image that compresses badly."""
    width, height = size
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def _chunk(kind: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc

"""Small files that want to become large: whatever they hold, it is refused or it stays small."""

from __future__ import annotations

import contextlib
import functools
import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from service.errors import MalformedImage, TooLarge, UnsupportedMedia
from service.imaging.canvas import Buckets, Size
from service.imaging.decode import decode, prepare
from service.imaging.limits import MOST_SCANS, START_OF_SCAN, JpegReader, jpeg_file, walk_scans
from service.imaging.memory_budget import DecodeMemory
from tests.images import encoded, one_red

RULE = Buckets(sizes=(Size(96, 128),))
PEAK = 72 << 20
"""Pillow inflates texts to at most 1 MiB each and 64 MiB in all."""
BOMB = 80 << 20


def chunk(kind: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def png(*extra: bytes, side: int = 64, pixels: bytes | None = None) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = (b"\x00" + bytes(3 * side)) * side if pixels is None else pixels
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            *extra,
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        )
    )


@functools.cache
def zeros(count: int) -> bytes:
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(count >> 20)) + packer.flush()


def exif(entries: int, size: int) -> bytes:
    """Every field says that its value is the same `size` bytes."""
    fields = b"".join(struct.pack("<HHII", 1000 + i, 1, size, 8) for i in range(entries))
    return b"II*\x00" + struct.pack("<IH", 8, entries) + fields + bytes(size)


def segments(count: int) -> bytes:
    """Return a JPEG with `count` full application segments before its image."""
    good = encoded(one_red(), "JPEG")
    return (
        good[:2]
        + (b"\xff\xe2\xff\xff" + b"ICC_PROFILE\x00\x01\xff" + bytes(65519)) * count
        + good[2:]
    )


HOSTILE: dict[str, Callable[[], bytes]] = {
    "a text of 100 MB": lambda: png(chunk(b"zTXt", b"a\x00\x00" + zeros(BOMB))),
    "an international text": lambda: png(chunk(b"iTXt", b"a\x00\x01\x00\x00\x00" + zeros(BOMB))),
    "a colour profile of 100 MB": lambda: png(chunk(b"iCCP", b"a\x00\x00" + zeros(BOMB))),
    "texts of 1 MB by the hundred": lambda: png(
        *(chunk(b"zTXt", b"a%d\x00\x00" % i + zeros(1 << 20)) for i in range(100))
    ),
    "texts behind the pixels": lambda: png()[:-12] + chunk(b"zTXt", b"a\x00\x00" + zeros(BOMB)),
    "more pixels than it says": lambda: png(pixels=bytes(BOMB)),
    "EXIF that repeats itself": lambda: png(chunk(b"eXIf", exif(1000, 200_000))),
    "EXIF that points to itself": lambda: png(chunk(b"eXIf", b"II*\x00\x08\x00\x00\x00" * 1000)),
    "a chunk longer than the file": lambda: png(struct.pack(">I", 0x7FFFFFFF) + b"tEXt"),
    "profiles by the megabyte": lambda: segments(100),
    "a side of two thousand million": lambda: (
        png(side=1)[:16] + struct.pack(">II", 0x7FFFFFFF, 0x7FFFFFFF) + png(side=1)[24:]
    ),
    "a WebP larger than it says": lambda: (
        b"RIFF\x00\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00" + bytes(4) + b"\xff\xff\xff\xff\xff\xff"
    ),
    "a JPEG of 65,500 x 65,500": lambda: encoded(one_red(), "JPEG").replace(
        b"\x00\x11\x08\x00\x60\x00\x80", b"\x00\x11\x08\xff\xdc\xff\xdc"
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_decompression_bombs_stay_small(name: str) -> None:
    data = HOSTILE[name]()
    tracemalloc.start()
    with contextlib.suppress(MalformedImage, TooLarge):
        prepare(data, RULE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # What it holds itself may be held twice.
    assert peak < PEAK + 2 * len(data), f"{peak} bytes of {len(data)}"


def in_front(piece: bytes, count: int) -> bytes:
    """Return a JPEG with `count` segments before its image."""
    good = encoded(one_red(), "JPEG")
    return good[:2] + piece * count + good[2:]


def scans(count: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    good = encoded(Image.new("L", (64, 64)), "JPEG", progressive=True)
    begin = good.rindex(b"\xff\xc4")
    return good[:-2] + good[begin:-2] * count + good[-2:]


PROFILE = chunk(b"iCCP", b"a\x00\x00" + zlib.compress(bytes(1000)))
COUNTLESS: dict[str, Callable[[int], bytes]] = {
    "PNG: chunks": lambda count: png(*[chunk(b"abCd", b"")] * 40 * count),
    "PNG: chunks behind the pixels": lambda count: (
        png()[:-12] + chunk(b"tEXt", b"a\x00b") * 40 * count + png()[-12:]
    ),
    "PNG: pixels in no bytes": lambda count: (
        png()[:-12] + chunk(b"IDAT", b"") * 40 * count + png()[-12:]
    ),
    "PNG: colour profiles": lambda count: png(*[PROFILE] * count),
    "JPEG: scans": scans,
    "JPEG: comments": lambda count: in_front(b"\xff\xfe\x00\x02", 30 * count),
    "JPEG: filling": lambda count: in_front(b"\xff", 100 * count),
    "JPEG: rubbish": lambda count: in_front(b"\xff\x00", 60 * count),
    "JPEG: EXIF": lambda count: in_front(b"\xff\xe1\x00\x0aExif\x00\x00II", count // 2),
}


@pytest.mark.parametrize("name", COUNTLESS)
def test_images_of_too_many_parts_are_refused(name: str) -> None:
    prepare(COUNTLESS[name](20), RULE)
    with pytest.raises(MalformedImage, match=r"more than|at most"):
        prepare(COUNTLESS[name](64), RULE)


@pytest.mark.parametrize("between", [b"", b"\x00", b"\xff" * 131_068, b"\xda" * 131_069])
@pytest.mark.parametrize("before", [b"", b"\xff"])
def test_jpeg_scans_are_counted_everywhere(before: bytes, between: bytes) -> None:
    scan = START_OF_SCAN + b"\x00" + between
    JpegReader(before + scan * MOST_SCANS)
    with pytest.raises(MalformedImage, match=f"{MOST_SCANS + 1} scans"):
        JpegReader(before + scan * (MOST_SCANS + 1))


GREY = encoded(Image.new("L", (64, 64)), "JPEG")
COLOURED = encoded(one_red(), "JPEG")


@pytest.mark.parametrize(
    "data",
    [
        GREY,
        COLOURED,
        encoded(one_red(), "JPEG", subsampling=0, restart_marker_rows=1, comment=b"by hand"),
        encoded(one_red(), "JPEG", exif=b"Exif\x00\x00II", icc_profile=bytes(100_000)),
        encoded(one_red().convert("CMYK"), "JPEG"),
    ],
)
def test_baseline_jpeg_is_decoded_without_scan_limit(data: bytes) -> None:
    assert type(jpeg_file(data)) is io.BytesIO


@pytest.mark.parametrize(
    "data",
    [
        encoded(one_red(), "JPEG", progressive=True),
        in_front(b"\xff", 1),
        in_front(b"\xff\x00", 1),
        in_front(b"\xff\xd0", 1),
        # Lengths that lead back into the segment itself.
        in_front(b"\xff\xe0\x00\x00", 1),
        in_front(b"\xff\xe0\x00\x01", 1),
        in_front(b"\xff\xfe\x00\x02", 64),
        # A second header, for an image whose colours come one by one.
        in_front(GREY[(begin := GREY.index(b"\xff\xc0")) : begin + 13], 1),
        COLOURED.replace(b"\xff\xda\x00\x0c\x03", b"\xff\xda\x00\x0c\x01"),
        COLOURED[: COLOURED.index(START_OF_SCAN)],
        COLOURED[:2],
    ],
)
def test_progressive_jpeg_is_decoded_with_scan_limit(data: bytes) -> None:
    assert isinstance(jpeg_file(data), JpegReader)


def test_scans_after_the_complete_one_are_not_decoded() -> None:
    """The decoder says that it expected the end, however many there are."""
    scan = GREY[GREY.index(START_OF_SCAN) : -2]
    with pytest.raises(MalformedImage, match="does not decode"):
        prepare(GREY[:-2] + scan * 1000 + GREY[-2:], RULE)


class CountedDecoder:
    """A decoder of Pillow's that counts the bytes it is given."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.given = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def decode(self, data: bytes) -> Any:
        self.given += len(data)
        return self._decoder.decode(data)


def test_jpeg_fill_bytes_are_scanned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder leaves filling until it ends, and so gets it again with whatever comes next."""
    decoders: list[CountedDecoder] = []
    make = Image._getdecoder

    def counted(*arguments: Any) -> CountedDecoder:
        decoders.append(CountedDecoder(make(*arguments)))
        return decoders[-1]

    monkeypatch.setattr(Image, "_getdecoder", counted)
    begin = GREY.index(START_OF_SCAN)
    pixels = begin + 2 + int.from_bytes(GREY[begin + 2 : begin + 4], "big")
    data = GREY[:pixels] + b"\xff" * (8 << 20) + b"\x00" + GREY[pixels:]
    memory = DecodeMemory(64 << 20)
    prepare(data, RULE, memory=memory)
    assert len(data) <= decoders[0].given < 20 * len(data)
    with pytest.raises(TooLarge, match=r"takes .* bytes of memory"):
        prepare(data, RULE, memory=DecodeMemory(2 * len(data)))


POLYGLOTS: dict[str, bytes] = {
    "a page in front": b"<html><script>alert(1)</script></html>" + encoded(one_red()),
    "a GIF in front": b"GIF89a" + encoded(one_red(), "JPEG"),
    "a PDF": b"%PDF-1.7\n" + encoded(one_red()),
    "a TIFF": encoded(one_red(), "TIFF"),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "an icon": encoded(one_red(), "ICO"),
    "JPEG 2000": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(64),
    "AVIF": b"\x00\x00\x00\x20ftypavif" + bytes(64),
}


@pytest.mark.parametrize("name", POLYGLOTS)
def test_only_three_decoders_are_ever_tried(name: str) -> None:
    with pytest.raises(UnsupportedMedia):
        prepare(POLYGLOTS[name], RULE)


def test_trailing_data_is_ignored() -> None:
    plain = prepare(encoded(one_red()), RULE).canvas
    assert (prepare(encoded(one_red()) + b"PK\x03\x04 a zip file", RULE).canvas == plain).all()
    # What a camera's film holds is as good as random: the two bytes of a marker, hundreds of times.
    film = encoded(one_red(), "JPEG") + b"ftyp\xff\xda\xab" * 1000
    assert prepare(film, RULE).letterbox.original == Size(96, 128)
    several = encoded(one_red(), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert prepare(several, RULE).letterbox.original == Size(96, 128)


@pytest.mark.parametrize("data", [png()[:-40], png()[:60], encoded(one_red(), "WEBP")[:90]])
def test_image_errors_reveal_no_paths(data: bytes) -> None:
    with pytest.raises(MalformedImage) as raised:
        prepare(data, RULE)
    assert "/" not in str(raised.value)
    assert "0x" not in str(raised.value)


def palette(*extra: bytes, depth: int = 8) -> bytes:
    """A PNG whose pixels are places in a palette."""
    header = struct.pack(">IIBBBBB", 64, 64, depth, 3, 0, 0, 0)
    pixels = zlib.compress((b"\x00" + bytes(64 * depth // 8)) * 64)
    parts = chunk(b"IHDR", header), *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    "data",
    [
        palette(),
        palette(chunk(b"tRNS", b"\x00" * 16)),
        palette(chunk(b"PLTE", b"")),
        palette(chunk(b"PLTE", b"\x01\x02"), depth=1),
        palette(chunk(b"PLTE", bytes(6)), chunk(b"tRNS", bytes(300))),
    ],
    ids=["no palette", "only transparency", "empty", "cut", "more transparency than colours"],
)
@pytest.mark.parametrize("whole", [False, True])
def test_decoder_assertions_are_image_errors(data: bytes, whole: bool) -> None:
    memory = DecodeMemory(1 << 30)
    # Such a file is refused, or its colours are black: never an error of another kind.
    with contextlib.suppress(MalformedImage):
        if whole:
            decode(data, memory=memory)
        else:
            prepare(data, RULE, memory=memory)
    assert memory.held == 0


def test_png_with_two_headers_is_refused() -> None:
    second = chunk(b"IHDR", struct.pack(">IIBBBBB", 7000, 7000, 8, 2, 0, 0, 0))
    with pytest.raises(MalformedImage, match="more than one IHDR"):
        prepare(png(second), RULE)


@pytest.mark.parametrize("kind", [b"tEXt", b"iTXt"])
def test_png_with_megabytes_of_text_is_refused(kind: bytes) -> None:
    text = chunk(kind, b"Raw profile type exif\0" + b"\n" * (5 << 20))
    with pytest.raises(MalformedImage, match="bytes of text"):
        prepare(png(text), RULE)


def test_jpeg_scans_are_those_that_a_decoder_meets() -> None:
    data = encoded(one_red(), "JPEG", progressive=True)
    scans = walk_scans(data)
    assert scans == data.count(START_OF_SCAN) > 1
    comment = b"\xff\xfe" + (182).to_bytes(2, "big") + START_OF_SCAN + b"\x00" * 178
    assert walk_scans(data[:2] + comment + data[2:]) == scans

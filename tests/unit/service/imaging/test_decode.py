"""The imaging path: every kind of image, every orientation, and every kind of rubbish."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from service.errors import MalformedImage, TooLarge, UnsupportedMedia
from service.imaging.canvas import Buckets, ShortSide, Size
from service.imaging.decode import decode, media_type, prepare, probe
from service.imaging.samples import draw_smear

RULE = Buckets(sizes=(Size(96, 128), Size(128, 96), Size(96, 96)))

# The four quarters of the test image, clockwise from the top-left.
RED, GREEN, BLUE, GREY = (200, 40, 40), (40, 200, 40), (40, 40, 200), (120, 120, 120)
QUARTERS = (RED, GREEN, BLUE, GREY)

EXIF_ORIENTATION = 0x0112
# What turns an upright image into the stored one that has this orientation.
STORED: dict[int, Callable[[Image.Image], Image.Image]] = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}


def quarters(width: int = 256, height: int = 192) -> Image.Image:
    image = Image.new("RGB", (width, height))
    half_x, half_y = width // 2, height // 2
    for colour, corner in zip(
        QUARTERS, ((0, 0), (half_x, 0), (half_x, half_y), (0, half_y)), strict=True
    ):
        image.paste(colour, (*corner, corner[0] + half_x, corner[1] + half_y))
    return image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oriented(value: Any) -> Image.Exif:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = value
    return exif


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def webp_canvas(width: int, height: int) -> bytes:
    """An animated WebP with one frame of 2 x 2 on a canvas of any size."""

    def riff(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)

    def three(number: int) -> bytes:
        return number.to_bytes(3, "little")

    frame = encoded(Image.new("RGB", (2, 2)), "WEBP")[12:]
    body = (
        riff(b"VP8X", bytes([2, 0, 0, 0]) + three(width - 1) + three(height - 1))
        + riff(b"ANIM", bytes(6))
        + riff(b"ANMF", three(0) * 2 + three(1) * 2 + three(100) + b"\0" + frame)
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def assert_quarters(canvas: NDArray[np.uint8], size: Size, *, tolerance: int) -> None:
    """Each quarter's middle has its colour."""
    height, width = size
    middles = ((1, 1), (3, 1), (3, 3), (1, 3))
    for colour, (x, y) in zip(QUARTERS, middles, strict=True):
        pixel = canvas[y * height // 4, x * width // 4].astype(int)
        assert np.abs(pixel - colour).max() <= tolerance, (colour, pixel)


# --- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "tolerance", "media"),
    [
        ("JPEG", {"quality": 95}, 3, "image/jpeg"),
        ("JPEG", {"quality": 95, "progressive": True}, 3, "image/jpeg"),
        ("PNG", {}, 0, "image/png"),
        ("WEBP", {"lossless": True}, 0, "image/webp"),
        ("WEBP", {"quality": 95}, 6, "image/webp"),
    ],
)
def test_decode_accepts_jpeg_png_webp(
    kind: str, options: dict[str, Any], tolerance: int, media: str
) -> None:
    data = encoded(quarters(), kind, **options)
    prepared = prepare(data, RULE)
    assert media_type(data) == media
    assert prepared.canvas.shape == (96, 128, 3)
    assert prepared.canvas.dtype == np.uint8
    assert prepared.letterbox.original == Size(192, 256) == probe(data)
    assert_quarters(prepared.canvas, Size(96, 128), tolerance=tolerance)
    assert_quarters(np.asarray(decode(data)), Size(192, 256), tolerance=tolerance)


def grey_of(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    grey: int = Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0))  # type: ignore[assignment]
    return grey, grey, grey


def test_decode_converts_cmyk_jpeg() -> None:
    data = encoded(quarters().convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert_quarters(prepare(data, RULE).canvas, Size(96, 128), tolerance=4)


def test_decode_converts_grey_jpeg() -> None:
    data = encoded(quarters().convert("L"), "JPEG", quality=95)
    canvas = prepare(data, RULE).canvas
    assert np.abs(canvas[24, 32].astype(int) - grey_of(RED)).max() <= 2


@pytest.mark.parametrize(("stored", "shown"), [(0, 0), (0x8000, 128), (0xFFFF, 255), (0x12FF, 18)])
def test_16_bit_grey_keeps_its_high_byte(stored: int, shown: int) -> None:
    image = Image.fromarray(np.full((96, 128), stored, dtype=np.uint16))
    data = encoded(image, "PNG")
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    assert np.unique(prepare(data, RULE).canvas).tolist() == [shown]


def test_16_bit_grey_with_a_transparent_grey_shows_the_page_there() -> None:
    rows = b"".join(b"\0" + struct.pack(">HH", 0x4000, 0x1234) for _ in range(2))
    data = png(2, 2, 16, 0, (b"tRNS", struct.pack(">H", 0x1234)), (b"IDAT", zlib.compress(rows)))
    assert np.asarray(decode(data))[0, :, 0].tolist() == [0x40, 255]


def test_16_bit_rgb_keeps_its_high_bytes() -> None:
    pixel = struct.pack(">HHH", 0xC8FF, 0x2800, 0x28AB)
    data = png(8, 6, 16, 2, (b"IDAT", zlib.compress((b"\0" + pixel * 8) * 6)))
    canvas = prepare(data, RULE).canvas
    assert canvas.reshape(-1, 3).tolist() == [[0xC8, 0x28, 0x28]] * (96 * 128)


def test_16_bit_rgba_is_laid_on_white() -> None:
    pixels = struct.pack(">HHHH", 0xC8FF, 0x2800, 0x28AB, 0) + struct.pack(
        ">HHHH", 0xC8FF, 0x2800, 0x28AB, 0xFFFF
    )
    data = png(2, 1, 16, 6, (b"IDAT", zlib.compress(b"\0" + pixels)))
    assert np.asarray(decode(data)).tolist() == [[[255, 255, 255], [200, 40, 40]]]


def test_decode_converts_palette() -> None:
    data = encoded(quarters().quantize(8), "PNG")
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert_quarters(prepare(data, RULE).canvas, Size(96, 128), tolerance=1)


def test_palette_with_transparency_is_laid_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 40, 40])
    image.putpixel((1, 0), 1)
    assert np.asarray(decode(encoded(image, "PNG", transparency=0))).tolist() == [
        [[255, 255, 255], [200, 40, 40]]
    ]
    # One alpha per palette entry: half of 10, 20, 30 over white.
    half = np.asarray(decode(encoded(image, "PNG", transparency=bytes([128, 255]))))
    assert np.abs(half[0, 0].astype(int) - [132, 137, 142]).max() <= 1


def test_rgb_with_a_transparent_colour_is_laid_on_white() -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    data = encoded(image, "PNG", transparency=RED)
    assert np.asarray(decode(data)).tolist() == [[[255, 255, 255], list(BLUE)]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_laid_on_white(kind: str) -> None:
    image = quarters().convert("RGBA")
    image.paste((0, 0, 0, 0), (128, 0, 256, 96))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    canvas = prepare(encoded(image, kind, **options), RULE).canvas
    assert canvas[24, 32].tolist() == list(RED)
    assert canvas[24, 96].tolist() == [255, 255, 255]


def test_grey_with_alpha_is_laid_on_white() -> None:
    image = Image.new("LA", (2, 1), (50, 255))
    image.putpixel((1, 0), (50, 0))
    data = encoded(image, "PNG")
    assert np.asarray(decode(data)).tolist() == [[[50] * 3, [255] * 3]]


def test_decode_converts_one_bit() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    data = encoded(image, "PNG")
    assert np.asarray(decode(data)).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_decode_takes_the_first_frame(kind: str) -> None:
    frames = [quarters(), Image.new("RGB", (256, 192), BLUE), Image.new("RGB", (256, 192), RED)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert_quarters(prepare(data, RULE).canvas, Size(96, 128), tolerance=0)


# --- orientation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "size"),
    # 256 x 192 is decoded in full or at half, 1100 x 820 at an eighth.
    [
        ("JPEG", (256, 192)),
        ("JPEG", (200, 150)),
        ("JPEG", (1100, 820)),
        ("PNG", (256, 192)),
        ("WEBP", (256, 192)),
    ],
)
def test_decode_follows_exif_orientation(
    kind: str, size: tuple[int, int], orientation: int
) -> None:
    stored = STORED[orientation](quarters(*size))
    data = encoded(stored, kind, exif=oriented(orientation), quality=95)
    prepared = prepare(data, RULE)
    upright = Size(size[1], size[0])
    assert prepared.letterbox.original == upright == probe(data)
    assert prepared.letterbox.canvas == Size(96, 128)
    assert_quarters(prepared.canvas, prepared.letterbox.resized, tolerance=6)
    whole = decode(data)
    assert whole.size == size
    assert_quarters(np.asarray(whole), upright, tolerance=6)


def test_decode_reads_png_exif_after_the_pixels() -> None:
    stored = STORED[6](quarters())
    exif = oriented(6).tobytes()[6:]
    data = encoded(stored, "PNG")
    end = data.index(b"IEND") - 4
    data = data[:end] + chunk(b"eXIf", exif) + data[end:]
    assert probe(data) == Size(192, 256)
    assert_quarters(prepare(data, RULE).canvas, Size(96, 128), tolerance=0)


def test_decode_reads_png_xmp_after_the_pixels() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(STORED[6](quarters()), "PNG")
    end = data.index(b"IEND") - 4
    late = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    assert probe(data[:end] + late + data[end:]) == Size(192, 256)


def test_open_png_reads_no_pixels() -> None:
    data = png(2000, 1000, 8, 2, (b"tEXt", b"k\0v"), (b"IDAT", b"no pixels"), (b"tIME", bytes(7)))
    assert probe(data) == Size(1000, 2000)
    with pytest.raises(MalformedImage):
        prepare(data, RULE)
    with pytest.raises(MalformedImage):
        decode(data)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_decode_ignores_invalid_orientation(value: int) -> None:
    data = encoded(quarters(), "JPEG", exif=oriented(value), quality=95)
    assert_quarters(prepare(data, RULE).canvas, Size(96, 128), tolerance=4)


def exif(*fields: tuple[int, int, int, int], order: str = "<") -> bytes:
    """EXIF with fields of (tag, type, number of values, value)."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    listed = b"".join(
        struct.pack(f"{order}HHI", *field[:3])
        + struct.pack(f"{order}{ {3: 'H', 4: 'I'}[field[1]] }", field[3]).ljust(4, b"\0")
        for field in fields
    )
    return b"Exif\0\0" + mark + struct.pack(f"{order}IH", 8, len(fields)) + listed + bytes(4)


FIELD = (0x010F, 3, 1, 5)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("image", ["JPEG", "PNG", "WEBP"])
def test_decode_reads_every_encoding_of_orientation(image: str, kind: int, order: str) -> None:
    block = exif(FIELD, FIELD, (EXIF_ORIENTATION, kind, 1, 6), FIELD, order=order)
    assert probe(encoded(quarters(), image, exif=block)) == Size(256, 192)
    read = Image.Exif()
    read.load(block)
    assert read[EXIF_ORIENTATION] == 6


def test_decode_reads_orientation_in_png_text() -> None:
    block = exif((EXIF_ORIENTATION, 3, 1, 6))
    digits = block.hex()
    text = f"\nexif\n{len(block):8}\n{digits[:72]}\n{digits[72:]}\n"
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", text, zip=True)
    assert probe(encoded(quarters(), "PNG", pnginfo=info)) == Size(256, 192)
    for broken in ("\nexif\n", text + "no digits", ""):
        info = PngImagePlugin.PngInfo()
        info.add_text("Raw profile type exif", broken)
        assert probe(encoded(quarters(), "PNG", pnginfo=info)) == Size(192, 256)


@pytest.mark.parametrize("image", ["JPEG", "PNG", "WEBP"])
def test_decode_never_uses_pillow_exif(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes an object of each of as many values as a field says it has."""
    data = encoded(quarters(), image, exif=exif((EXIF_ORIENTATION, 3, 1, 6)))

    def load(self: Image.Exif, data: bytes) -> None:
        pytest.fail("EXIF is parsed as a whole")

    monkeypatch.setattr(Image.Exif, "load", load)
    assert prepare(data, RULE).letterbox.original == Size(256, 192)
    assert decode(data).size == (192, 256)


def test_decode_bounds_exif_fields() -> None:
    last = (EXIF_ORIENTATION, 3, 1, 6)
    assert probe(encoded(quarters(), "JPEG", exif=exif(*[FIELD] * 1023, last))) == Size(256, 192)
    assert probe(encoded(quarters(), "JPEG", exif=exif(*[FIELD] * 1024, last))) == Size(192, 256)
    # Nor are several values one orientation.
    several = exif((EXIF_ORIENTATION, 3, 1_000_000, 6))
    assert probe(encoded(quarters(), "JPEG", exif=several)) == Size(192, 256)


RUBBISH_EXIF = (
    b"Exif\0\0rubbish",
    b"Exif\0\0",
    b"Exif\0\0II*\0\xff\xff\xff\x7f",
    b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\xff\xff\xff\xff\0\x06\0\0",
    bytes(30),
)


# Pillow warns of broken EXIF on its own account.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", RUBBISH_EXIF)
def test_decode_ignores_broken_exif(kind: str, exif: bytes) -> None:
    data = encoded(quarters(), kind, exif=exif, quality=95)
    assert_quarters(prepare(data, RULE).canvas, Size(96, 128), tolerance=6)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_decode_ignores_any_exif(body: bytes) -> None:
    for head in (b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01", b"Exif\0\0MM\0*"):
        data = encoded(quarters(16, 12), "JPEG", exif=head + body)
        assert sorted(probe(data)) == [12, 16]


# --- geometry ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(1, 1), (4000, 1), (1, 4000), (3, 2000), (17, 5), (129, 97)])
def test_decode_handles_extreme_sizes(kind: str, size: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", size, (90, 90, 90)), kind)
    prepared = prepare(data, RULE)
    height, width = prepared.letterbox.resized
    assert prepared.letterbox.original == Size(size[1], size[0])
    assert prepared.canvas.shape == (*prepared.letterbox.canvas, 3)
    inside = prepared.canvas[:height, :width].astype(int)
    assert np.abs(inside - 90).max() <= 2
    assert prepared.canvas[height:].max(initial=0) == 0
    assert prepared.canvas[:, width:].max(initial=0) == 0


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_box_on_the_canvas_maps_back_to_the_object(orientation: int) -> None:
    upright = Image.new("RGB", (640, 400))
    upright.paste((255, 255, 255), (200, 100, 360, 220))
    data = encoded(STORED[orientation](upright), "PNG", exif=oriented(orientation))
    prepared = prepare(data, RULE)
    rows, columns = np.nonzero(prepared.canvas[..., 0] > 127)
    found = np.array(
        [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], dtype=np.float32
    )
    # One canvas pixel is five of the image.
    assert np.abs(prepared.letterbox.to_original(found) - [[200, 100, 360, 220]]).max() <= 5
    assert (
        np.abs(
            prepared.letterbox.to_canvas(np.array([[200, 100, 360, 220]], dtype=np.float32)) - found
        ).max()
        <= 1
    )


def test_jpeg_draft_agrees_with_full_decode() -> None:
    """DCT scaling is another filter than resizing alone: a few grey levels at edges, not more."""
    image, _ = draw_smear(1, width=1600, height=1200)
    data = encoded(image, "JPEG", quality=92)
    rule = Buckets(sizes=(Size(288, 384),))
    canvas = prepare(data, rule).canvas.astype(int)
    full = decode(data).resize((384, 288), Image.Resampling.BILINEAR)
    difference = np.abs(canvas - np.asarray(full).astype(int))
    assert difference.mean() < 1.0
    assert np.percentile(difference, 99) <= 4
    # It would be 0 if nothing had been scaled while decoding.
    assert difference.max() > 0


def test_prepare_resizes_as_pillow_does() -> None:
    image, _ = draw_smear(2, width=300, height=200)
    prepared = prepare(encoded(image, "PNG"), ShortSide(short=100, long=140))
    assert prepared.letterbox.resized == Size(93, 140)
    expected = np.asarray(image.resize((140, 93), Image.Resampling.BILINEAR)).astype(int)
    assert prepared.canvas.shape == (96, 160, 3)
    # The last bit, in how sums are rounded: tests/unit/service/imaging/test_resize.py.
    assert np.abs(prepared.canvas[:93, :140] - expected).max() <= 2


@pytest.mark.parametrize("size", [(128, 96), (256, 192), (100, 96)])
def test_prepared_canvas_is_writable(size: tuple[int, int]) -> None:
    """torch takes no other; also where the image fills it, scaled or not."""
    rule = Buckets(sizes=(Size(96, 128),))
    assert prepare(encoded(quarters(*size), "JPEG"), rule).canvas.flags.writeable


@pytest.mark.parametrize("wrap", [bytes, memoryview, lambda data: memoryview(bytearray(data))])
def test_decode_accepts_bytes_and_memoryviews(wrap: Callable[[bytes], bytes | memoryview]) -> None:
    data = encoded(quarters(), "JPEG", quality=95)
    assert np.array_equal(prepare(wrap(data), RULE).canvas, prepare(data, RULE).canvas)
    assert media_type(wrap(data)) == "image/jpeg"
    assert probe(wrap(data)) == Size(192, 256)


# --- refusals ------------------------------------------------------------------------------------


def svg() -> bytes:
    return b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


@pytest.mark.parametrize(
    "data",
    [
        b"not an image at all",
        b"x",
        svg(),
        encoded(quarters(), "GIF"),
        encoded(quarters(), "BMP"),
        encoded(quarters(), "TIFF"),
        b"RIFF\x10\0\0\0WAVEfmt ",
        b"\xff\xd8",
        b"\x89PNG",
        b"%PDF-1.7",
    ],
)
def test_decode_rejects_other_types(data: bytes) -> None:
    for function in (lambda: prepare(data, RULE), lambda: decode(data), lambda: probe(data)):
        with pytest.raises(UnsupportedMedia, match="JPEG, PNG or WebP"):
            function()


def test_decode_rejects_empty_input() -> None:
    with pytest.raises(MalformedImage, match="empty"):
        prepare(b"", RULE)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})],
)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_decode_rejects_truncated_images(kind: str, options: dict[str, Any], share: float) -> None:
    image, _ = draw_smear(3, width=320, height=240)
    data = encoded(image, kind, **options)
    part = data[: max(20, int(len(data) * share))]
    for function in (lambda: prepare(part, RULE), lambda: decode(part)):
        with pytest.raises(MalformedImage, match="truncated"):
            function()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.data())
def test_decode_survives_flipped_bytes(kind: str, data: st.DataObject) -> None:
    body = bytearray(encoded(quarters(32, 24), kind))
    places = data.draw(st.lists(st.integers(0, len(body) - 1), min_size=1, max_size=8))
    for place in places:
        body[place] = data.draw(st.integers(0, 255))
    try:
        prepared = prepare(bytes(body), RULE, max_pixels=100_000)
    except (MalformedImage, TooLarge, UnsupportedMedia):
        return
    assert prepared.canvas.shape == (*prepared.letterbox.canvas, 3)


def lossless_webp(width: int, height: int) -> bytes:
    bits = (width - 1) | (height - 1) << 14
    body = b"VP8L" + struct.pack("<I", 8) + b"\x2f" + struct.pack("<I", bits) + bytes(3)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def lossy_webp(width: int, height: int) -> bytes:
    frame = b"\x10\x02\x00\x9d\x01\x2a" + struct.pack("<HH", width, height)
    body = b"VP8 " + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


@pytest.mark.parametrize(
    "data",
    [
        png(30_000, 30_000, 8, 2, (b"IDAT", zlib.compress(bytes(1000)))),
        webp_canvas(30_000, 30_000),
        webp_canvas(8_000, 8_000),
        lossless_webp(16_384, 16_384),
        lossy_webp(16_383, 16_383),
    ],
    ids=["png", "animated webp", "animated webp of 64 Mpx", "lossless webp", "lossy webp"],
)
def test_decode_rejects_huge_image_by_header(data: bytes) -> None:
    for function in (lambda: prepare(data, RULE), lambda: decode(data), lambda: probe(data)):
        with pytest.raises(TooLarge, match="at most 50000000 are accepted"):
            function()


def test_pixel_limit_is_inclusive() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(quarters(40, 20), kind)
        assert prepare(data, RULE, max_pixels=800).letterbox.original == Size(20, 40)
        with pytest.raises(TooLarge, match="40 x 20 = 800 pixels; at most 799 are accepted"):
            prepare(data, RULE, max_pixels=799)


def test_decode_rejects_text_bomb() -> None:
    bomb = zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK * 4))
    data = png(1, 1, 8, 0, (b"zTXt", b"key\0\0" + bomb), (b"IDAT", zlib.compress(bytes(2))))
    with pytest.raises(MalformedImage):
        prepare(data, RULE)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_decode_rejects_image_without_pixels(size: tuple[int, int]) -> None:
    with pytest.raises(MalformedImage):
        prepare(png(*size, 8, 2, (b"IDAT", zlib.compress(b""))), RULE)


def test_decode_rejects_webp_beyond_the_decoder_limit() -> None:
    with pytest.raises(TooLarge, match="too large to decode"):
        probe(webp_canvas(16_000, 16_000), max_pixels=10**9)


def test_open_rejects_png_truncated_before_exif() -> None:
    data = encoded(quarters(), "PNG")
    with pytest.raises(MalformedImage, match="truncated"):
        probe(data[: len(data) // 2])


def test_decode_rejects_unknown_webp_chunk() -> None:
    with pytest.raises(MalformedImage):
        probe(b"RIFF\x10\0\0\0WEBPVP9 " + bytes(20))

"""Bodies that `fuzz.py` sends: images, forms and JSON, valid or with a few things wrong."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image

MOST_BYTES = 1 << 20
"""Of a body."""
MOST_PIXELS = 50_000_000
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
BOUNDARY = b"----fuzz"
CLOSED = "closed"
"""Instead of a status: the server ended the connection without a response."""

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Case:
    """One request."""

    path: str
    """With the query; over gRPC the method; over a bare socket a word for the log."""
    body: bytes = b""
    """Over gRPC the message; over a bare socket all bytes."""
    headers: Headers = ()
    """Over gRPC the metadata."""
    also: frozenset[str] = frozenset()
    """Statuses that are no findings here."""
    way: Literal["http", "socket", "grpc"] = "http"
    method: str = "POST"


class Source:
    """Of what requests are made. `model` is the name of the server's model."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._files = seeds()

    def image(self, rng: random.Random) -> bytes:
        """A small file, which may be broken."""
        return mutate(rng, rng.choice(self._files), self._files)


def seeds() -> list[bytes]:
    """Small valid files of each kind, with every sort of extra that a file may carry."""
    image = Image.frombytes("RGB", (48, 40), random.Random(0).randbytes(48 * 40 * 3))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a cell " * 20
    frames = [image.rotate(90 * turn) for turn in range(1, 3)]
    profile = bytes(range(256)) * 8
    return [
        save(image, "JPEG"),
        save(image, "JPEG", progressive=True, exif=exif, icc_profile=profile),
        save(image.convert("L"), "JPEG", quality=30),
        save(image.convert("CMYK"), "JPEG"),
        save(image, "JPEG", restart_marker_blocks=2, comment=b"x" * 300),
        save(image, "PNG", exif=exif, icc_profile=profile),
        save(image.convert("RGBA"), "PNG"),
        save(image.quantize(16), "PNG", transparency=3),
        save(image.convert("1"), "PNG"),
        save(image.convert("I;16"), "PNG"),
        save(image, "PNG", save_all=True, append_images=frames),
        save(image, "WEBP", exif=exif.tobytes(), icc_profile=profile),
        save(image.convert("RGBA"), "WEBP", lossless=True),
        save(image, "WEBP", save_all=True, append_images=frames),
    ]


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def mutate(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """The file with a few things wrong."""
    result = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 4, 8, 32))):
        if not result:
            break
        rng.choice(_MUTATIONS)(rng, result)
    if rng.random() < 0.05:
        other = rng.choice(others)
        result += other[rng.randrange(len(other) or 1) :]
    return bytes(result)


def _flip(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _flip_in_header(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(min(len(data), 80))] = rng.randrange(256)


def _number(rng: random.Random, data: bytearray) -> None:
    width = rng.choice((1, 2, 4))
    value = rng.choice(INTERESTING) & ((1 << 8 * width) - 1)
    start = rng.randrange(min(len(data), rng.choice((40, len(data)))))
    data[start : start + width] = value.to_bytes(width, rng.choice(("big", "little")))


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _remove(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 64)]


def _repeat(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    piece = data[start : start + rng.randrange(1, 256)]
    data[start:start] = piece * rng.choice((1, 2, 50))


def _insert(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    data[start:start] = rng.randbytes(rng.randrange(1, 64))


_MUTATIONS: tuple[Callable[[random.Random, bytearray], None], ...] = (
    *(_flip, _flip, _flip_in_header, _number, _number),
    *(_cut, _remove, _repeat, _insert),
)


def image(source: Source, rng: random.Random) -> Case:
    path = rng.choice(("/v1/detect",) * 9 + ("/v1/detect?tile=auto",))
    content = rng.choice(("application/octet-stream", "image/png"))
    headers: Headers = (("Content-Type", content),)
    if rng.random() < 0.1:
        headers += (("Accept", rng.choice(("image/png", "image/jpeg"))),)
    return Case(path, source.image(rng), headers)


def large_image(source: Source, rng: random.Random) -> Case:
    """A small file of up to `MOST_PIXELS` pixels, and of more at times."""
    area = 1.02 * MOST_PIXELS * 10 ** rng.uniform(-2, 0)
    width = int(area ** rng.choice((0.45, 0.5, 0.55, rng.random())))
    make = rng.choice((_large_png, _large_png, _large_jpeg, _large_webp))
    data = make(rng, width, int(area / width))
    query = rng.choice(("", "?tile=auto", "?tile=auto", "?tile=1000", "?max_detections=1"))
    headers: Headers = (("Content-Type", "image/any"),)
    if rng.random() < 0.2:
        headers += (("Accept", "image/png"),)
    return Case(f"/v1/detect{query}", data, headers, frozenset({"504"}))


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


_PNG_MODES = (
    *((1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)),
    *((1, 3), (4, 3), (8, 3), (8, 4), (16, 4), (8, 6), (16, 6)),
)
"""Depth and colour type."""
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def _large_png(rng: random.Random, width: int, height: int) -> bytes:
    """A black image, of which all may be there, or the head alone."""
    depth, colour = rng.choice(_PNG_MODES)
    interlaced = rng.random() < 0.25
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    content = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head)
    if rng.random() < (0.8 if colour == 3 else 0.1):
        content += _chunk(b"PLTE", rng.randbytes(3 * rng.choice((1, 2, 16, 256))))
    if rng.random() < 0.2:
        content += _chunk(b"tRNS", rng.randbytes(rng.choice((1, 2, 6, 256))))
    line = (width * depth * _CHANNELS[colour] + 7) // 8 + 1
    # Interlaced, an image has up to seven beginnings of lines for each of its own.
    size = line * height + 8 * height * interlaced
    if rng.random() < 0.3:
        size = rng.randrange(size)
    return content + _chunk(b"IDAT", _zeros(size)) + _chunk(b"IEND", b"")


def _zeros(size: int) -> bytes:
    """So many zeros as zlib writes them, without going through all of them."""
    raw = zlib.compressobj(9, wbits=-15)
    steps, rest = divmod(size, 1 << 20)
    block = raw.compress(bytes(1 << 20)) + raw.flush(zlib.Z_FULL_FLUSH)
    end = raw.compress(bytes(rest)) + raw.flush()
    # Their checksum is made of their number alone.
    return b"\x78\xda" + block * steps + end + struct.pack(">HH", size % 65_521, 1)


def _large_jpeg(rng: random.Random, width: int, height: int) -> bytes:
    """A small image that says that it is large; its decoder fills in what is not there."""
    mode = rng.choice(("RGB", "RGB", "L", "CMYK"))
    progressive = rng.random() < 0.5
    data = save(Image.new(mode, (48, 40)), "JPEG", progressive=progressive)
    height, width = min(height, 65_500), min(width, 65_500)
    frame = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    data = data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]
    if not progressive:
        return data
    first = data.index(b"\xff\xda")
    last = data.rindex(b"\xff\xda")
    scan = rng.choice((data[last:-2], data[first:-2]))
    again = scan * rng.choice((0, 1, 5, 20, 60, 2000))
    return data[:-2] + again[:MOST_BYTES] + rng.choice((b"\xff\xd9", b"\xff\xd9", b""))


def _large_webp(rng: random.Random, width: int, height: int) -> bytes:
    """An image of one colour, lossless: no bit for a pixel."""
    data = save(Image.new("RGB", (48, 40), (9, 9, 9)), "WEBP", lossless=True)
    bits = min(width, 16_384) - 1 | (min(height, 16_384) - 1) << 14
    return data[:21] + struct.pack("<I", bits) + data[25:]


def form(source: Source, rng: random.Random) -> Case:
    """A multipart body that is good, or bad in some way."""
    path, name = rng.choice((("/v1/detect", b"file"), ("/v1/detect/batch", b"files")))
    boundary = rng.choice(
        (BOUNDARY, BOUNDARY, BOUNDARY, BOUNDARY, b"-", b"a", b"x" * 80, b"y" * 300)
    )
    head = (
        b'Content-Disposition: form-data; name="%s"; filename="a.jpg"\r\n'
        b"Content-Type: image/jpeg\r\n\r\n" % name
    )
    line = b"--" + boundary + b"\r\n"
    part = line + head + source.image(rng) + b"\r\n"
    end = b"--" + boundary + b"--\r\n"
    body = part * rng.choice((1, 1, 2, 5, 100)) + end
    wrong = rng.randrange(16)
    if wrong == 0:
        body = mutate(rng, body, [body])
    elif wrong == 1:
        body = body.replace(b"\r\n", b"\n")
    elif wrong == 2:
        body = body.replace(b"form-data", rng.randbytes(6))
    elif wrong == 3:
        body = line + b"X: y\r\n" * rng.choice((10, 2000, 50_000)) + body
    elif wrong == 4:
        body = (b"\r\n--" + boundary[:-1]) * rng.choice((500, 50_000)) + body
    elif wrong == 5:
        body = body[: rng.randrange(len(body))]
    elif wrong == 6:
        body = body.replace(b'filename="a.jpg"', b"filename*=" + rng.randbytes(20).hex().encode())
    elif wrong == 7:
        body = (line + head + b"\r\n") * rng.choice((1000, 8000)) + end
    elif wrong == 8:
        body = (line + b"\r\n\r\n") * rng.choice((5, 60, 20_000)) + end
    elif wrong == 9:
        body = line + b"Content-Disposition: form-data; " + b"a" * 500_000
    elif wrong == 10:
        body = body.replace(b"; filename", rng.choice((b";", b'; a="b"', b" ")) * 20_000, 1)
    elif wrong == 11:
        body = line + rng.choice((b"\r\n", b"\n", b"\r", b"-", boundary)) * 100_000 + end
    boundary = rng.choice((boundary,) * 12 + (b'"', b"", b'"' + boundary + b'"', b"other"))
    content = f"multipart/form-data; boundary={boundary.decode()}"
    return Case(path, body[:MOST_BYTES], (("Content-Type", content),))


def document(source: Source, rng: random.Random) -> Case:
    """A JSON body that is good, or bad in some way."""
    path = rng.choice(("/v1/detect", "/v1/detect/batch"))
    text = base64.b64encode(source.image(rng))
    body = rng.choice(
        (
            b'{"image": "%s"}' % text,
            b'{"images": [{"id": "a", "image": "%s"}, {"image": "%s"}]}' % (text, text[:-3]),
            b'{"images": [%s]}' % b",".join([b'{"image": 1}'] * 70),
            b'{"image": %s"%s"%s}' % (b"[" * 2000, text, b"]" * 2000),
            b'{"images": {"image": "%s"}}' % text,
            b'{"images": [%s]}' % (b"[]," * 300_000),
            b'{"image": "%s"}' % (b"A \t" * 300_000),
        )
    )
    if rng.random() < 0.4:
        body = mutate(rng, body, [body])
    headers: Headers = (("Content-Type", "application/json"),)
    if path.endswith("batch") and rng.random() < 0.3:
        headers += (("Accept", "application/x-ndjson"),)
    return Case(path, body, headers)

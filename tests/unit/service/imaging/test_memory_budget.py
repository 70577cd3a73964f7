"""The bound on memory while decoding: who waits, who is refused, what is held for whom."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from service.errors import MalformedImage, TooLarge
from service.imaging.canvas import Buckets, Size
from service.imaging.decode import decode, held_image, prepare
from service.imaging.memory_budget import DecodeMemory
from service.imaging.resize import COPY_BYTES, LARGEST_COPIED
from tests.images import encoded, huge_png, noise, one_red, png_header, sixteen_bit

RULE = Buckets(sizes=(Size(96, 128),))
STRIP = 20 << 20
"""While pixels become RGB, a million at a time."""
ROOT = Path(__file__).resolve().parents[4]


def needed(data: bytes, rule: Buckets | None) -> int:
    memory = DecodeMemory(1 << 40)
    with held_image(data, memory=memory, max_pixels=1 << 40, rule=rule):
        return memory.held


def test_decode_memory_is_held_and_freed() -> None:
    memory = DecodeMemory(1 << 30)
    assert prepare(encoded(one_red()), RULE, memory=memory).canvas.shape == (96, 128, 3)
    assert decode(encoded(one_red()), memory=memory).size == (128, 96)
    for broken in (encoded(noise((64, 64)))[:500], encoded(noise((64, 64)), "WEBP")[:200]):
        with pytest.raises(MalformedImage):
            prepare(broken, RULE, memory=memory)
    assert memory.held == 0


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_decode_memory_refuses_what_never_fits(kind: str) -> None:
    data = encoded(noise((1000, 800)), kind)
    memory = DecodeMemory(1_000_000)
    with pytest.raises(TooLarge, match="875000"):
        decode(data, memory=memory)
    assert memory.held == 0
    assert prepare(encoded(one_red(), kind), RULE, memory=memory).canvas.any()


def test_decode_memory_of_a_jpeg_is_its_scaled_size() -> None:
    data = encoded(noise((1600, 1200)), "JPEG")
    sides = 40 * (1600 + 1200)
    assert needed(data, RULE) == 200 * 150 * (4 + COPY_BYTES) + sides
    assert needed(data, None) == 1600 * 1200 * 8 + sides
    progressive = encoded(noise((1600, 1200)), "JPEG", progressive=True)
    assert needed(progressive, RULE) == 200 * 150 * (4 + COPY_BYTES) + 1600 * 1200 * 6 + sides


def test_decode_memory_refuses_bombs_by_header() -> None:
    scaled = LARGEST_COPIED * COPY_BYTES + STRIP + 40 * 16_000
    assert needed(huge_png(8000), RULE) == 8000 * 8000 * 5 + scaled


@pytest.mark.parametrize("size", [(50_000_000, 1), (1, 50_000_000)])
def test_decode_memory_refuses_sides_of_millions_of_pixels(size: tuple[int, int]) -> None:
    memory = DecodeMemory(1 << 30)
    with pytest.raises(TooLarge, match="decoding the image takes"):
        prepare(png_header(*size), RULE, memory=memory, max_pixels=50_000_000)


def test_decode_memory_queues_large_images_in_order() -> None:
    memory = DecodeMemory(160)
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with memory.hold(140):
            inside.set()
            assert leave.wait(30)
            order.append("first")

    def then(name: str, size: int) -> None:
        with memory.hold(size):
            order.append(name)

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert inside.wait(30)
    for name, size in (("largest", 135), ("large", 21)):
        thread = threading.Thread(target=then, args=(name, size))
        thread.start()
        threads.append(thread)
        while len(memory._waiting) < len(threads) - 1:
            time.sleep(0.001)
    assert order == []
    with memory.hold(20):
        assert memory.held == 160, "an eighth is for small ones alone"
    leave.set()
    for thread in threads:
        thread.join(30)
    assert order == ["first", "largest", "large"]
    assert memory.held == 0
    with pytest.raises(TooLarge, match="at most 140 are"), memory.hold(141):
        pass


MEASURE = """
import json, os, resource, sys
from pathlib import Path
from service.imaging.canvas import Buckets, Size
from service.imaging.decode import decode, prepare

rule = Buckets(sizes=(Size(96, 128),))
result = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    for name, work in (("prepare", lambda d: prepare(d, rule)), ("decode", decode)):
        reader, writer = os.pipe()
        if os.fork() == 0:
            data = path.read_bytes()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            work(data)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(writer, str((after - before) * 1024).encode())
            os._exit(0)
        os.close(writer)
        result[f"{path.name} {name}"] = int(os.read(reader, 100))
        os.wait()
print(json.dumps(result))
"""


def test_decode_memory_is_never_underestimated(tmp_path: Path) -> None:
    """Measured: a process of its own for each, and the most memory that it ever had."""
    plain = noise((100, 75)).resize((1600, 1200), Image.Resampling.NEAREST)
    turned = Image.Exif()
    turned[0x0112] = 6
    images = {
        "jpeg": encoded(plain, "JPEG"),
        "jpeg cmyk": encoded(plain.convert("CMYK"), "JPEG"),
        "jpeg progressive": encoded(plain, "JPEG", progressive=True, subsampling=0),
        "jpeg turned": encoded(plain, "JPEG", exif=turned),
        "png": encoded(plain, compress_level=1),
        "png alpha": encoded(plain.convert("RGBA"), compress_level=1),
        "png grey": encoded(plain.convert("L"), compress_level=1),
        "png palette": encoded(plain.quantize(16), compress_level=1),
        "png 16 bits": sixteen_bit(plain),
        "webp": encoded(plain, "WEBP", method=0),
        "webp lossless alpha": encoded(plain.convert("RGBA"), "WEBP", lossless=True, method=0),
    }
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path], cwd=ROOT, capture_output=True, check=True
    )
    # Code that is loaded when it is first used, and what an allocator keeps.
    slack = 6 << 20
    for name, taken in json.loads(run.stdout).items():
        image, _, how = name.rpartition(" ")
        held = needed(images[image], RULE if how == "prepare" else None)
        assert taken <= held + slack, (name, taken, held)

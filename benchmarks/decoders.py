"""JPEG to canvas with three decoders: their cost, and how far they are from a full decode.

    pip install simplejpeg opencv-python-headless
    python benchmarks/decoders.py

All end in Pillow's bilinear resize to 384 x 512, so only the decoder differs. Core-milliseconds are
the median of CPU time; the difference is the mean absolute one in grey levels, against decoding in
full with the same decoder.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from service.canvas import Buckets, Size
from service.imaging import prepare
from service.samples import draw_smear

CANVAS = (512, 384)
RULE = Buckets(sizes=(Size(384, 512),))
SIZES = ((640, 480), (1280, 960), (1920, 1440), (4032, 3024))

Pixels = NDArray[np.uint8]


def resize(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB").resize(CANVAS, Image.Resampling.BILINEAR))


def pillow_full(data: bytes) -> Pixels:
    return resize(Image.open(io.BytesIO(data)))


def service_imaging(data: bytes) -> Pixels:
    return prepare(data, RULE).canvas


def simplejpeg_full(data: bytes) -> Pixels:
    return resize(Image.fromarray(simplejpeg.decode_jpeg(data)))


def simplejpeg_scaled(data: bytes) -> Pixels:
    decoded = simplejpeg.decode_jpeg(data, min_height=CANVAS[1], min_width=CANVAS[0])
    return resize(Image.fromarray(decoded))


def opencv_full(data: bytes) -> Pixels:
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return resize(Image.fromarray(decoded))


def opencv_scaled(data: bytes) -> Pixels:
    # OpenCV scales only when told by how much, so the size has to be known from elsewhere.
    width = Image.open(io.BytesIO(data)).size[0]
    flags = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4}
    flags |= {2: cv2.IMREAD_REDUCED_COLOR_2, 1: cv2.IMREAD_COLOR}
    flag = next(value for factor, value in flags.items() if width // factor >= CANVAS[0])
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    return resize(Image.fromarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)))


PAIRS: tuple[tuple[Callable[[bytes], Pixels], Callable[[bytes], Pixels]], ...] = (
    (pillow_full, pillow_full),
    (service_imaging, pillow_full),
    (simplejpeg_full, simplejpeg_full),
    (simplejpeg_scaled, simplejpeg_full),
    (opencv_full, opencv_full),
    (opencv_scaled, opencv_full),
)


def main() -> None:
    cv2.setNumThreads(1)
    drawn, _ = draw_smear(1)
    print("| picture | " + " | ".join(f.__name__.replace("_", " ") for f, _ in PAIRS) + " |")
    print("|---" * (len(PAIRS) + 1) + "|")
    for size in SIZES:
        file = io.BytesIO()
        drawn.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        data = file.getvalue()
        times: dict[str, list[float]] = {function.__name__: [] for function, _ in PAIRS}
        for _ in range(15):
            for function, _ in PAIRS:
                started = time.process_time()
                function(data)
                times[function.__name__].append(time.process_time() - started)
        cells = []
        for function, full in PAIRS:
            milliseconds = 1e3 * statistics.median(times[function.__name__])
            difference = np.abs(function(data).astype(int) - full(data).astype(int)).mean()
            cells.append(f"{milliseconds:.1f} ms, {difference:.2f}")
        print(f"| {size[0]} x {size[1]}, {len(data) / 1e6:.2f} MB | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

"""JPEG to canvas with three decoders, and with two ways to scale: cost, and how far they differ.

    pip install simplejpeg opencv-python-headless
    python benchmarks/decoders.py

All end in the service's own bilinear resize to 384 x 512, so only the decoder differs; but for
`pillow resizes`, which is the service's way with Pillow's resize in its place. Core-milliseconds
are the median of CPU time; the difference is the mean absolute one in grey levels, against decoding
in full with the same decoder. The JPEGs are those of `decode.py`.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from decode import made
from numpy.typing import NDArray
from PIL import Image
from report import Report, add_options

from service.imaging import resize as resizing
from service.imaging.canvas import Buckets, Size
from service.imaging.decode import prepare

CANVAS = (512, 384)
RULE = Buckets(sizes=(Size(384, 512),))
SIZES = ((640, 480), (1280, 960), (1920, 1440), (4000, 3000))
ROUNDS, QUICK_ROUNDS = 15, 3

Pixels = NDArray[np.uint8]


def resize(image: Image.Image) -> Pixels:
    return resizing.resize(image.convert("RGB"), Size(CANVAS[1], CANVAS[0]))


def pillow_full(data: bytes) -> Pixels:
    return resize(Image.open(io.BytesIO(data)))


def service_imaging(data: bytes) -> Pixels:
    return prepare(data, RULE).canvas


def pillow_resizes(data: bytes) -> Pixels:
    vectorised, resizing.vectorised = resizing.vectorised, None
    try:
        return prepare(data, RULE).canvas
    finally:
        resizing.vectorised = vectorised


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
    (pillow_resizes, pillow_full),
    (simplejpeg_full, simplejpeg_full),
    (simplejpeg_scaled, simplejpeg_full),
    (opencv_full, opencv_full),
    (opencv_scaled, opencv_full),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    report = Report("decoders", "JPEG decoders, core-ms and grey levels", arguments)
    names = [function.__name__.replace("_", " ") for function, _ in PAIRS]
    table = report.table({"picture": "", "file": "", "MB": ".2f"} | dict.fromkeys(names, ""))
    for case in made(SIZES, ("JPEG", "JPEG, progressive")):
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(QUICK_ROUNDS if arguments.quick else ROUNDS):
            for name, (function, _) in zip(names, PAIRS, strict=True):
                started = time.thread_time()
                function(case.data)
                times[name].append(1e3 * (time.thread_time() - started))
        cells = []
        for name, (function, full) in zip(names, PAIRS, strict=True):
            pixels, whole = function(case.data).astype(int), full(case.data).astype(int)
            difference = np.abs(pixels - whole).mean()
            cells.append(f"{statistics.median(times[name]):.1f}, {difference:.2f}")
        table.row(case.name, case.kind, case.megabytes, *cells)
    report.close()


if __name__ == "__main__":
    main()

"""What it costs to get from bytes to canvas (`service.imaging.decode`): core-milliseconds, memory.

    python benchmarks/decode.py
    python benchmarks/decode.py --images FOLDER     # your own files beside the made ones

From 300 pixels to 24 megapixels, in each accepted format. A drawn image is made in two kinds:
`smooth`, which compresses to next to nothing, and `camera`, the same with a sensor's noise, which
gives a JPEG the bytes that a camera's has. Sizes, formats and kinds take turns; core-milliseconds
are the median over the rounds. Memory is what one image adds at its peak to a process that holds
nothing yet.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from report import Report, add_options

from service.engine.models.loading import return_free_memory
from service.imaging.canvas import Buckets, ShortSide
from service.imaging.decode import prepare
from service.imaging.samples import draw_smear
from service.runtime.artifact import read_artifact, scan_repository
from service.settings import bundled_models
from service.system.memory import keep_freed_memory

SIZES = ((300, 225), (640, 480), (1280, 960), (1920, 1080), (4000, 3000), (6000, 4000))
FULL_HD = 1920 * 1080
NOISE = 6.0
"""Grey levels; what a small sensor has in daylight."""
FORMATS = {
    "JPEG": ("JPEG", {"quality": 90}),
    "JPEG, progressive": ("JPEG", {"quality": 90, "progressive": True}),
    "PNG": ("PNG", {"compress_level": 3}),
    "WebP": ("WEBP", {"quality": 85, "method": 1}),
}
FULL_HD_MS = 12.0
"""Most core-milliseconds for a JPEG of up to 1920 x 1080."""
MEGABYTE_MS = 25.0
"""Most core-milliseconds for each megabyte of a larger one."""


class Case(NamedTuple):
    """One file."""

    name: str
    kind: str
    data: bytes
    pixels: int

    @property
    def megabytes(self) -> float:
        return len(self.data) / 1e6


def made(sizes: Sequence[tuple[int, int]], formats: Sequence[str] = (*FORMATS,)) -> Iterator[Case]:
    """Every size, kind and format."""
    drawn, _ = draw_smear(1, width=1600, height=1200)
    dice = np.random.default_rng(0)
    for width, height in sizes:
        smooth = drawn.resize((width, height), Image.Resampling.BICUBIC)
        noise = dice.standard_normal((height, width), dtype=np.float32)[..., np.newaxis] * NOISE
        noisy = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
        for image, kind in ((smooth, "smooth"), (Image.fromarray(noisy), "camera")):
            for name in formats:
                written, options = FORMATS[name]
                file = io.BytesIO()
                image.save(file, written, **options)
                yield Case(
                    f"{width} x {height}", f"{name}, {kind}", file.getvalue(), width * height
                )


def given(folder: Path) -> Iterator[Case]:
    """The files of a folder."""
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            width, height = image.size
            kind = f"{image.format}, {path.name}"
        yield Case(f"{width} x {height}", kind, path.read_bytes(), width * height)


def peak_mb(data: bytes, rule: Buckets | ShortSide) -> float | None:
    """What decoding adds to resident memory at its peak; None where the kernel does not say."""
    return_free_memory()
    try:
        # Forgets the highest level so far.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        prepare(data, rule)
        return (_status("VmHWM") - before) / 1e3
    except OSError:
        return None


def _status(name: str) -> float:
    """A figure of this process in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def core_ms(cases: list[Case], rule: Buckets | ShortSide, rounds: int) -> list[float]:
    """Median core-milliseconds of each case; the cases take turns."""
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for case, taken in zip(cases, times, strict=True):
            started = time.thread_time()
            prepare(case.data, rule)
            taken.append(1e3 * (time.thread_time() - started))
    return [statistics.median(each) for each in times]


def criteria(report: Report, measured: list[tuple[Case, float]]) -> None:
    """The figures. Bounds are for what cameras write: baseline, and with their noise.

    A progressive file is decoded scan by scan whatever size is asked for, and the file of a smooth
    image has hardly any bytes to be measured by.
    """
    for kind in ("JPEG, camera", "JPEG, smooth", "JPEG, progressive, camera"):
        chosen = [(case, took) for case, took in measured if case.kind == kind]
        small = [took for case, took in chosen if case.pixels == FULL_HD]
        large = [took / case.megabytes for case, took in chosen if case.pixels > FULL_HD]
        bounded = kind == "JPEG, camera"
        for name, values, bound in (
            ("1920 x 1080 to canvas", small, FULL_HD_MS),
            ("larger to canvas, for each MB, worst size", [max(large)], MEGABYTE_MS),
        ):
            report.figure(
                f"{kind}, {name}",
                values,
                better="lower",
                bound=bound if bounded else None,
                unit="core-ms",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=bundled_models(), help="whose canvases")
    parser.add_argument("--images", type=Path, help="folder of files to measure too")
    add_options(parser)
    arguments = parser.parse_args()
    rule = read_artifact(scan_repository(arguments.models)[-1].path).metadata.canvas
    cases = list(made(SIZES))
    cases += given(arguments.images) if arguments.images else []
    report = Report("decode", "Bytes to canvas", arguments)
    memory = [peak_mb(case.data, rule) for case in cases]
    keep_freed_memory()
    times = core_ms(cases, rule, 3 if arguments.quick else 11)
    table = report.table(
        {"image": "", "file": "", "MB": ".2f", "core-ms": ".2f", "core-ms per MB": ".1f"}
        | {"core-ms per megapixel": ".2f", "peak MB": ".1f"}
    )
    for case, took, held in zip(cases, times, memory, strict=True):
        table.row(
            *(case.name, case.kind, case.megabytes, took, took / case.megabytes),
            *(1e6 * took / case.pixels, held),
        )
    criteria(report, list(zip(cases, times, strict=True)))
    report.close()


if __name__ == "__main__":
    main()

"""`retinaserve bulk` over many images: killed half-way, resumed, its memory and its rate.

    python benchmarks/bulk.py --images ../shared/data/bccd/JPEGImages
    python benchmarks/bulk.py --only near-free   # or --only bundled, --count N

The JPEGs of a folder (without one, 20 drawn ones of 640 x 480) get as many names as there are to be
images: 20,000, or N. The command runs in a process of its own, is killed by SIGKILL once half of
the parts are there, and started again. Its rate is that of the second half, beside two bare loops
of decoding, letterbox and session that share one session (`bare_loop.py --loops 2`): every few
seconds the command is frozen (SIGSTOP) while they run, so that what else the machine does counts
for both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow.parquet as pq
from near_free_model import write_near_free_model
from report import Report, Table, add_options
from serving import draw_images, run_script

from service.runtime.artifact import scan_repository
from service.settings import bundled_models

RATIO = 0.9
GROWTH = 1.1
COUNT = 20_000
QUICK_COUNTS = {"near-free": 2_000, "bundled": 60}
PARTS = 40
LOOK_SECONDS = 0.05
SLICE_SECONDS = 4.0
"""Of the command, and of the bare loops while it is frozen."""
ROWS = 6
"""Of memory in the table, for each half."""


def name_images(sources: Path, folder: Path, count: int) -> Path:
    """`count` names for the images of a folder, in folders of a thousand; the folder."""
    found = sorted(sources.glob("*.jpg"))
    for number in range(count):
        target = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(found[number % len(found)], target)
    return folder


class Look(NamedTuple):
    seconds: float
    parts: int
    """That are there."""
    resident: float
    """MB."""
    cpu: float
    """Core-seconds so far."""


class Watched:
    """The command in a process, and what it takes of memory over time."""

    def __init__(self, arguments: list[str], output: Path) -> None:
        command = [sys.executable, "-m", "service.cli", "bulk", *arguments]
        self._output = output
        self._started = time.monotonic()
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.process = psutil.Process(self.popen.pid)
        self.looks: list[Look] = []

    def watch(self, until: Callable[[int], bool]) -> None:
        """Look at it until `until` says so of the number of parts, or it ends."""
        while self.popen.poll() is None:
            parts = len(list(self._output.glob("part-*")))
            resident, times = self.process.memory_info().rss / 1e6, self.process.cpu_times()
            if not resident:
                # It has ended, but was not waited for.
                continue
            seconds = time.monotonic() - self._started
            self.looks.append(Look(seconds, parts, resident, times.user + times.system))
            if until(parts):
                return
            time.sleep(LOOK_SECONDS)

    def interrupted(self, doing: Callable[[], None]) -> None:
        """Do something while the command is frozen; its clock stands still meanwhile."""
        frozen = time.monotonic()
        self.process.suspend()
        try:
            doing()
        finally:
            self.process.resume()
        self._started += time.monotonic() - frozen

    def each(self, size: int) -> tuple[float, float]:
        """Images a second, and core-milliseconds for each, from the first new part to the last.

        `size` is how many images a part has.
        """
        begun = next(look for look in self.looks if look.parts > self.looks[0].parts)
        done = next(look for look in self.looks if look.parts == self.looks[-1].parts)
        count = size * (done.parts - begun.parts)
        return count / (done.seconds - begun.seconds), 1e3 * (done.cpu - begun.cpu) / count


def measure(
    report: Report,
    memory: Table,
    name: str,
    models: Path,
    images: Path,
    sources: Path,
    output: Path,
) -> None:
    """One model."""
    count = len(list(images.rglob("*.jpg")))
    size = max(1, count // PARTS)
    arguments = [str(images), "--output", str(output), "--part-size", str(size)]
    arguments += ["--models", str(models), "--device", "cpu"]
    model = scan_repository(models)[-1].path

    loops: list[dict[str, float]] = []

    def bare() -> None:
        options = ("--seconds", SLICE_SECONDS, "--loops", 2)
        loops.append(run_script("bare_loop.py", model, sources, *options))

    first = Watched(arguments, output)
    first.watch(lambda parts: parts >= PARTS // 2)
    first.popen.kill()
    first.popen.communicate()
    second = Watched(arguments, output)
    while second.popen.poll() is None:
        limit = time.monotonic() + SLICE_SECONDS
        second.watch(lambda _, limit=limit: time.monotonic() >= limit)  # type: ignore[misc]
        if second.popen.poll() is None:
            second.interrupted(bare)
    second.popen.communicate()
    if not loops:
        # Few images are done before its first slice is over.
        bare()
    if second.popen.returncode:
        raise SystemExit(f"{name}: the second half ended with status {second.popen.returncode}")
    for half, watched in (("before the kill", first), ("resumed", second)):
        step = max(1, len(watched.looks) // ROWS)
        for look in watched.looks[step::step]:
            memory.row(name, half, look.seconds, look.parts * size, look.resident)
    # Whatever starts up takes its memory in the first fifth.
    fifth = len(second.looks) // 5
    steady = [look.resident for look in second.looks]
    rows = Counter(pq.read_table(output, columns=["path"])["path"].to_pylist())
    wanted = {str(path) for path in images.rglob("*.jpg")}
    for title, figure in (
        ("lost", len(wanted - rows.keys())),
        ("doubled", rows.total() - len(rows)),
    ):
        report.figure(f"{name}: images {title}", [figure], better="lower", bound=0)
    report.figure(
        f"{name}: resident memory, the most in the last fifth over the most in the second",
        [max(steady[-fifth:]) / max(steady[fifth : 2 * fifth])],
        better="lower",
        bound=GROWTH,
    )
    rate, cpu_ms = second.each(size)
    rates = [each["per_second"] for each in loops]
    report.figure(f"{name}: images/s", [rate], better="higher")
    report.figure(f"{name}: two bare loops, /s", rates, better="higher")
    report.figure(
        f"{name}: rate over two bare loops side by side",
        [rate / statistics.fmean(rates)],
        better="higher",
        bound=RATIO,
    )
    # Says more than the rate where the machine has other work.
    bare_ms = statistics.fmean(each["cpu_ms"] for each in loops)
    report.figure(
        f"{name}: CPU time of the bare loops over the command's, each image",
        [bare_ms / cpu_ms],
        better="higher",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(QUICK_COUNTS))
    parser.add_argument("--count", type=int, help="names of images; default: 20,000")
    parser.add_argument("--images", type=Path, help="folder of .jpg files; default: drawn ones")
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.images and not any(arguments.images.glob("*.jpg")):
        parser.error(f"--images {arguments.images}: no .jpg file lies in it")
    report = Report("bulk", "Bulk detection, killed half-way and resumed", arguments)
    memory = report.table(
        {"model": "", "half": "", "s": ".1f", "images done": "d", "resident MB": ".0f"}
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        sources = folder / "sources"
        if arguments.images:
            # Names are hard links, which stay within a file system.
            sources.mkdir()
            for path in arguments.images.glob("*.jpg"):
                shutil.copy(path, sources)
        else:
            draw_images(sources)
        write_near_free_model(folder / "models")
        for name in [arguments.only] if arguments.only else QUICK_COUNTS:
            count = arguments.count or (QUICK_COUNTS[name] if report.quick else COUNT)
            images = name_images(sources, folder / name / "in", count)
            models = folder / "models" if name == "near-free" else bundled_models()
            measure(report, memory, name, models, images, sources, folder / name / "out")
    report.close()


if __name__ == "__main__":
    main()

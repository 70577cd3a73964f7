"""What serving an image takes in instructions, step by step and thread by thread.

    apt-get install linux-perf
    python benchmarks/steps.py

Where a machine shares its cores, times of one and the same work differ by a factor of two; counted
instructions do not. Each step runs so many times and then twice as many, in a process of its own;
what the second run took beyond the first is for that many images. The threads' are those of a
service with a near-free network under closed-loop clients.
"""

from __future__ import annotations

import argparse
import collections
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from near_free_model import CANVASES, write_near_free_model
from PIL import Image
from report import Report, Table, add_options
from serving import THREADS, Running, draw_images, run_script, served

from service.imaging import resize as resizing
from service.imaging.canvas import Buckets, Size
from service.imaging.decode import open_image, prepare
from service.runtime.artifact import read_artifact
from service.runtime.devices import Device, open_detector

CLIENTS = 16
DELAY = 2
"""Seconds after perf has begun, in which nothing is counted: the clients start."""
EVENTS = ("instructions:u", "cycles:u", "context-switches")
CANVAS = Size(384, 512)
RULE = Buckets(sizes=CANVASES)
SCALE = 1e-6

Step = Callable[[], object]


def steps(data: bytes, model: Path) -> dict[str, Step]:
    """What can be counted, by name: the parts of `prepare`, all of it, and the session."""
    detector = open_detector(read_artifact(model), Device("cpu"))
    decoded = Image.open(io.BytesIO(data))
    decoded.load()
    canvas = np.zeros((1, *CANVAS, 3), np.uint8)

    def decode() -> None:
        image = Image.open(io.BytesIO(data))
        image.draft(None, (CANVAS.width, CANVAS.height))
        image.load()

    def session() -> None:
        sizes = np.array([CANVAS], dtype=np.int64)
        detector(canvas, sizes, score_threshold=0.5, iou_threshold=0.5)

    return {
        "the header": lambda: open_image(data),
        "the header, and the JPEG": decode,
        "the resize": lambda: resizing.resize(decoded, CANVAS),
        "Pillow's resize": lambda: np.asarray(
            decoded.resize((CANVAS.width, CANVAS.height), Image.Resampling.BILINEAR)
        ),
        "a canvas from a file, all of it": lambda: prepare(data, RULE),
        "the near-free session": session,
    }


def counted(command: list[str]) -> dict[str, float]:
    """Run a command under perf; how often each event was."""
    told = perf(["--", *command])
    return {event: sum(counts.values()) for event, counts in told.items()}


def perf(arguments: list[str]) -> dict[str, dict[str, float]]:
    """`perf stat`: how often each event was, by thread where that is asked for."""
    command = ["perf", "stat", "-x,", "-e", ",".join(EVENTS), *arguments]
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise SystemExit("perf is not installed: apt-get install linux-perf") from None
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr}")
    found: dict[str, dict[str, float]] = {event: {} for event in EVENTS}
    for line in done.stderr.splitlines():
        fields = line.split(",")
        event = next((each for each in EVENTS if each in fields), None)
        if event is None:
            continue
        thread, value = fields[:2] if "--per-thread" in arguments else ("", fields[0])
        if value == "<not supported>":
            raise SystemExit(f"this machine does not count {event}")
        # What a thread that slept did was not counted.
        found[event][thread] = float(value) if value[0].isdigit() else 0.0
    return found


def by_step(table: Table, times: int, image: Path, model: Path) -> dict[str, float]:
    """A row for each step; millions of instructions."""
    found = {}
    for name in steps(image.read_bytes(), model):
        command = [sys.executable, __file__, "--image", str(image), "--file", str(model)]
        once, twice = (
            counted([*command, "--step", name, "--times", str(count)])
            for count in (times, 2 * times)
        )
        each = {event: (twice[event] - once[event]) / times for event in EVENTS}
        found[name] = SCALE * each["instructions:u"]
        table.row(name, found[name], SCALE * each["cycles:u"])
    return found


def by_thread(table: Table, server: Running, images: Path, seconds: float) -> dict[str, float]:
    """A row for each kind of thread; millions of instructions for an image."""
    told: dict[str, Any] = {}

    def load() -> None:
        arguments = ("--clients", CLIENTS, "--seconds", seconds + 2 * DELAY)
        told.update(run_script("load.py", server.url, images, *arguments))

    run_script("load.py", server.url, images, "--clients", CLIENTS, "--seconds", 3)
    loading = Thread(target=load)
    loading.start()
    process = str(server.process.pid)
    wait = ["--", "sleep", str(DELAY + seconds)]
    counts = perf(["--delay", str(1000 * DELAY), "--per-thread", "-p", process, *wait])
    loading.join()
    if set(told["statuses"]) != {"200"}:
        raise SystemExit(f"not every answer was 200: {told['statuses']}")
    answers = told["per_second"] * seconds
    sums: dict[str, dict[str, float]] = {}
    for event, threads in counts.items():
        for thread, count in threads.items():
            cells = sums.setdefault(_purpose(thread, process), collections.defaultdict(float))
            cells[event] += count / answers
    for purpose, cells in sorted(sums.items()):
        table.row(
            purpose,
            SCALE * cells["instructions:u"],
            SCALE * cells["cycles:u"],
            cells["context-switches"],
        )
    return {purpose: SCALE * cells["instructions:u"] for purpose, cells in sums.items()}


def _purpose(thread: str, process: str) -> str:
    """Of a thread as perf calls it, such as `decode-0-1234`."""
    name, _, number = thread.rpartition("-")
    if number == process:
        return "event loop"
    purpose = next((each for each in THREADS if name.startswith(each)), "other")
    return "session" if purpose == "model-loader" else purpose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="folder of JPEGs; default: drawn 640x480")
    parser.add_argument("--times", type=int, help="how often each step runs, and twice of it")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--image", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    add_options(parser)
    arguments = parser.parse_args()
    times = arguments.times or (100 if arguments.quick else 1000)
    if arguments.step:
        step = steps(arguments.image.read_bytes(), arguments.file)[arguments.step]
        for _ in range(times):
            step()
        return
    report = Report("steps", "An image in instructions", arguments)
    columns = {"step": "", "million instructions": ".2f", "million cycles": ".2f"}
    with tempfile.TemporaryDirectory() as scratch:
        images = arguments.images or draw_images(Path(scratch) / "images")
        models = Path(scratch) / "models"
        model = write_near_free_model(models)
        table = report.table(columns)
        found = by_step(table, times, min(images.glob("*.jpg")), model)
        title = f"near-free network, {CLIENTS} connections, for each image"
        table = report.table(
            {"thread": ""} | dict(list(columns.items())[1:]) | {"context switches": ".1f"}, title
        )
        seconds = 4.0 if arguments.quick else 10.0
        with served(models) as server:
            threads = by_thread(table, server, images, seconds)
    bare = found["a canvas from a file, all of it"] + found["the near-free session"]
    for name, value in (
        ("the resize over Pillow's", found["the resize"] / found["Pillow's resize"]),
        ("the service over its canvas and session", sum(threads.values()) / bare),
    ):
        report.figure(name, [value], better="lower")
    report.close()


if __name__ == "__main__":
    main()

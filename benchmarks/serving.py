"""A real service in a process of its own, and the scripts that put load on it."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from service.imaging.samples import draw_smear

HERE = Path(__file__).resolve().parent
READY_SECONDS = 180
LOOK_SECONDS = 0.02
THREADS = ("decode", "device", "model-loader")
"""How names of the service's threads begin; onnxruntime's are called as the loader, who makes the
session."""


class Running(NamedTuple):
    process: psutil.Process
    url: str
    ready_seconds: float
    """From the start of the process until it said that it is ready."""

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def loop_seconds(self) -> float:
        """CPU seconds of the main thread, which runs the event loop."""
        main = next(each for each in self.process.threads() if each.id == self.process.pid)
        return float(main.user_time + main.system_time)

    def thread_seconds(self) -> dict[str, float]:
        """CPU seconds of the threads that are there, summed by what they are for."""
        seconds: dict[str, float] = collections.defaultdict(float)
        for each in self.process.threads():
            main = each.id == self.process.pid
            seconds["event loop" if main else self._purpose(each.id)] += (
                each.user_time + each.system_time
            )
        return dict(seconds)

    def _purpose(self, thread: int) -> str:
        try:
            name = Path(f"/proc/{self.process.pid}/task/{thread}/comm").read_text().strip()
        except OSError:
            return "other"
        return next((each for each in THREADS if name.startswith(each)), "other")

    def peak(self) -> float:
        """The most memory that was ever resident, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6

    def resident(self) -> float:
        return float(self.process.memory_info().rss) / 1e6


@contextlib.contextmanager
def served(models: Path, **settings: object) -> Iterator[Running]:
    """A service on a free port, ready; on the CPU unless the settings say otherwise."""
    environment = os.environ | {"RETINASERVE_LOG_LEVEL": "warning", "RETINASERVE_DEVICE": "cpu"}
    # An installed package has its bytecode: a checkout gets it with the first start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment |= {f"RETINASERVE_{name.upper()}": str(each) for name, each in settings.items()}
    command = [sys.executable, str(HERE / "server.py"), "serve"]
    command += ["--models", str(models), "--port", str(free_port())]
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    try:
        while True:
            # A busy machine may be too slow even for an answer within the second.
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/readyz", timeout=1).read()
                break
            if time.monotonic() > started + READY_SECONDS:
                raise SystemExit(f"{url} did not become ready within {READY_SECONDS} s")
            if process.poll() is not None:
                raise SystemExit(f"the service ended with status {process.returncode}")
            time.sleep(LOOK_SECONDS)
        ready = time.monotonic() - started
        yield Running(psutil.Process(process.pid), f"{url}/v1/detect", ready)
    finally:
        process.terminate()
        process.wait(timeout=20)


def draw_images(folder: Path, count: int = 20) -> Path:
    """Write drawn JPEGs of 640 x 480 into a new folder; the folder."""
    folder.mkdir(parents=True)
    for seed in range(count):
        draw_smear(seed)[0].save(folder / f"{seed:02d}.jpg", quality=90)
    return folder


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_script(name: str, *arguments: object) -> dict[str, Any]:
    """Run a script of this folder in a process of its own; what it prints is one JSON object."""
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer

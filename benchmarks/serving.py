"""A real service in a process of its own, and the scripts that put load on it."""

from __future__ import annotations

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

HERE = Path(__file__).resolve().parent
READY_SECONDS = 180


class Running(NamedTuple):
    process: psutil.Process
    url: str

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def loop_seconds(self) -> float:
        """CPU seconds of the main thread, which runs the event loop."""
        main = next(each for each in self.process.threads() if each.id == self.process.pid)
        return float(main.user_time + main.system_time)

    def resident(self) -> float:
        return float(self.process.memory_info().rss) / 1e6


@contextlib.contextmanager
def served(models: Path, **settings: object) -> Iterator[Running]:
    """A service on a free port, ready."""
    environment = os.environ | {"RETINASERVE_LOG_LEVEL": "warning"}
    environment |= {f"RETINASERVE_{name.upper()}": str(each) for name, each in settings.items()}
    command = [sys.executable, "-c", "from service.cli import main; main()", "serve"]
    command += ["--models", str(models), "--port", str(free_port()), "--device", "cpu"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    try:
        limit = time.monotonic() + READY_SECONDS
        while True:
            # A busy machine may be too slow even for an answer within the second.
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/readyz", timeout=1).read()
                break
            if time.monotonic() > limit:
                raise SystemExit(f"{url} did not become ready within {READY_SECONDS} s")
            time.sleep(0.1)
        yield Running(psutil.Process(process.pid), f"{url}/v1/detect")
    finally:
        process.terminate()
        process.wait(timeout=20)


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
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

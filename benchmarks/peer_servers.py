"""The service and its peers, each in a process tree of its own, and what such a tree costs."""

from __future__ import annotations

import contextlib
import json
import os
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from serving import READY_SECONDS, free_port

HERE = Path(__file__).resolve().parent
ROUTE = "/v1/detect"
OURS = "retinaserve"
MARK = "PEER_MARK"
STOP_SECONDS = 20
LOOK_SECONDS = 0.2


class NotStarted(Exception):
    """A server does not become ready."""


@dataclass(frozen=True)
class Setup:
    """One way to run one peer. What the numbers mean says `peers/recipe.py`."""

    app: str
    """File in `benchmarks/peers`; none: the service itself."""
    workers: int = 1
    threads: int = 1
    session_threads: int = 1
    batch: int = 1
    style: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.app:
            return "defaults"
        parts = [
            f"{self.workers} processes x {self.threads} threads",
            f"sessions of {self.session_threads}",
        ]
        parts += [f"batches up to {self.batch}"] if self.batch > 1 else []
        parts += [self.style] if self.style else []
        switches = {"THROUGHPUT_OPTIMIZED": "optimized", "ENABLE_HA_PROXY": "HAProxy"}
        parts += [
            word for name, word in switches.items() if f"RAY_SERVE_{name}" in self.environment
        ]
        return ", ".join(parts)

    def variables(self) -> dict[str, str]:
        """As `peers/recipe.py` reads them."""
        return {
            "PEER_WORKERS": str(self.workers),
            "PEER_THREADS": str(self.threads),
            "PEER_SESSION_THREADS": str(self.session_threads),
            "PEER_BATCH": str(self.batch),
            "PEER_STYLE": self.style,
        }


DEFAULTS = Setup("")
_RAY_BASE = {"RAY_worker_niceness": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
"""Its workers would run at niceness 15, behind everybody else, the load's generator too."""
_RAY_OPTIMIZED = _RAY_BASE | {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
_RAY_HAPROXY = _RAY_OPTIMIZED | {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
_FASTAPI, _LITSERVE = "plain_fastapi.py", "litserve_app.py"
_BENTOML, _RAY = "bentoml_app.py", "ray_app.py"

PEERS: dict[str, tuple[Setup, ...]] = {
    "fastapi": (
        Setup(_FASTAPI, workers=1, threads=16, session_threads=1),
        Setup(_FASTAPI, workers=1, threads=2, session_threads=1),
        Setup(_FASTAPI, workers=1, threads=2, session_threads=2),
        Setup(_FASTAPI, workers=2, threads=1, session_threads=1),
        Setup(_FASTAPI, workers=2, threads=2, session_threads=1),
    ),
    "litserve": (
        Setup(_LITSERVE, workers=2, session_threads=1),
        Setup(_LITSERVE, workers=2, session_threads=1, style="one front"),
        Setup(_LITSERVE, workers=2, session_threads=1, style="zmq"),
        Setup(_LITSERVE, workers=2, session_threads=1, style="zmq, one front"),
        Setup(_LITSERVE, workers=2, session_threads=1, batch=8, style="zmq, one front"),
    ),
    "bentoml": (
        Setup(_BENTOML, workers=2, threads=40, session_threads=1, style="mounted"),
        Setup(_BENTOML, workers=2, threads=2, session_threads=1),
        Setup(_BENTOML, workers=2, threads=1, session_threads=1),
        Setup(_BENTOML, workers=1, threads=2, session_threads=1),
    ),
    "ray": (
        Setup(_RAY, workers=2, threads=2, session_threads=1, environment=_RAY_HAPROXY),
        Setup(_RAY, workers=1, threads=2, session_threads=1, environment=_RAY_HAPROXY),
        Setup(_RAY, workers=2, threads=1, session_threads=1, environment=_RAY_HAPROXY),
        Setup(_RAY, workers=2, threads=1, session_threads=1, environment=_RAY_BASE),
        Setup(_RAY, workers=1, threads=2, session_threads=1, environment=_RAY_BASE),
    ),
}
"""Made for two cores; first what was best when it was last tried. A session of more threads than
one gains nothing where several run side by side, so it is tried where one alone might do."""


class Tree(NamedTuple):
    """A running server."""

    process: psutil.Process
    url: str

    def processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def cpu_seconds(self) -> float:
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def resident(self) -> float:
        """MB, shared pages counted once for each process that shares them."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss / 1e6
        return total

    def freeze(self) -> None:
        """Stop it where it is: until `thaw` it costs nothing."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def thaw(self) -> None:
        """Let it go on."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def answer(self, image: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "image/jpeg"}
        request = urllib.request.Request(self.url, data=image, headers=headers)
        with urllib.request.urlopen(request, timeout=READY_SECONDS) as response:
            found: dict[str, Any] = json.loads(response.read())
        return found


@contextlib.contextmanager
def running(
    setup: Setup, *, python: Path, repository: Path, model: Path, image: bytes, scratch: Path
) -> Iterator[Tree]:
    """Start a server with the interpreter `python`; ready once it has answered `image`."""
    port = free_port()
    # By the mark, which children inherit, all of them are found in the end, orphans too.
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), MARK: str(port)}
    environment |= setup.environment
    if setup.app:
        command = [str(python), setup.app]
        environment |= setup.variables() | {
            "PEER_MODEL": str(model.resolve()),
            "PEER_PORT": str(port),
            "RAY_TMPDIR": str(scratch),
        }
    else:
        command = [str(python), "-c", "from service.cli import main; main()", "serve"]
        command += ["--models", str(repository), "--port", str(port), "--device", "cpu"]
        environment |= {"RETINASERVE_LOG_LEVEL": "warning"}
    log = scratch / "log"
    with log.open("wb") as output:
        process = psutil.Popen(
            command, cwd=HERE / "peers", env=environment, stdout=output, stderr=output
        )
    tree = Tree(psutil.Process(process.pid), f"http://127.0.0.1:{port}{ROUTE}")
    try:
        _wait_for(tree, process, image, log)
        yield tree
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            tree.thaw()
        _stop(process, str(port))


def _wait_for(tree: Tree, process: psutil.Popen, image: bytes, log: Path) -> None:
    limit = time.monotonic() + READY_SECONDS
    while True:
        # Answers that are not JSON are refusals on the way up.
        with contextlib.suppress(OSError, json.JSONDecodeError):
            tree.answer(image)
            return
        if time.monotonic() > limit or process.poll() is not None:
            told = log.read_text(errors="replace")[-2000:]
            raise NotStarted(f"{tree.url} did not become ready:\n{told}")
        time.sleep(LOOK_SECONDS)


def _stop(process: psutil.Popen, mark: str) -> None:
    process.terminate()
    with contextlib.suppress(psutil.TimeoutExpired):
        process.wait(timeout=STOP_SECONDS)
    left = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if each.environ().get(MARK) == mark:
                left.append(each)
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(left, timeout=STOP_SECONDS)

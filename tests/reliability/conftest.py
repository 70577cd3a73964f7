"""Real servers: `retinaserve serve` in a process of its own, on a port of the system's choice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from service.imaging.canvas import Size
from tests import tiny_model

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
PROGRAM = (sys.executable, "-m", "service.cli")


@dataclass
class Process:
    """A server that runs."""

    popen: subprocess.Popen[str]
    log: Path
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, **options: object) -> httpx.Client:
        # Without `verify` each client reads every certificate authority, 40 ms of CPU: forty
        # clients would come one after the other instead of at once.
        options = {"timeout": 60.0, "verify": False, **options}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", **options)  # type: ignore[arg-type]

    def resident(self) -> int:
        return int(psutil.Process(self.popen.pid).memory_info().rss)

    def terminate(self) -> None:
        self.popen.send_signal(signal.SIGTERM)

    def exit_code(self, seconds: float = 30.0) -> int:
        return self.popen.wait(seconds)


# Servers inherit what is ignored, and a shell ignores both in what it starts in the background.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

Serve = Callable[..., Process]


def command(*arguments: object) -> list[str]:
    return [*PROGRAM, *map(str, arguments)]


def environment(**settings: object) -> dict[str, str]:
    # One inference at a time, so that queues fill alike on every machine. None takes the default.
    chosen = {"cpu_inferences": 1, **settings}
    mine = {
        f"RETINASERVE_{name.upper()}": str(value)
        for name, value in chosen.items()
        if value is not None
    }
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RETINASERVE_")}
    path = os.pathsep.join(filter(None, (str(ROOT), inherited.get("PYTHONPATH"))))
    return {**inherited, "PYTHONPATH": path, **mine}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers; all of them are gone when the test ends."""
    running: list[Process] = []

    def start(
        models: Path,
        *,
        arguments: tuple[object, ...] = (),
        program: tuple[str, ...] = PROGRAM,
        **settings: object,
    ) -> Process:
        log = tmp_path / f"server-{len(running)}.log"
        with log.open("w") as stderr:
            popen = subprocess.Popen(
                [
                    *program,
                    *("serve", "--models", str(models), "--port", "0", "--device", "cpu"),
                    *map(str, arguments),
                ],
                env=environment(**settings),
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert popen.stdout is not None
        line = popen.stdout.readline()
        assert "http" in line, log.read_text()
        process = Process(popen, log, line.split()[-1])
        running.append(process)
        until(lambda: ready(process))
        return process

    yield start
    for process in running:
        process.popen.kill()
        process.popen.wait()
        assert process.popen.stdout is not None
        process.popen.stdout.close()


@pytest.fixture(scope="session")
def quick_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers at once."""
    root = tmp_path_factory.mktemp("quick")
    tiny_model.save(root)
    return root


@pytest.fixture(scope="session")
def slow_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes some tenths of a second on two idle cores, and longer on busy ones.

    With one canvas, so that a start warms no more than what is asked for.
    """
    root = tmp_path_factory.mktemp("slow")
    tiny_model.save(root, work=150, sizes=(Size(96, 128),))
    return root


def ready(process: Process) -> bool:
    try:
        with process.client() as client:
            return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def until(condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            pytest.fail("it never happened")
        time.sleep(0.02)

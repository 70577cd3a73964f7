"""Standard output and error that are closed, broken, full or not read do not stop serving."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.images import encoded, one_red
from tests.reliability.conftest import command, environment, until

GOOD = encoded(one_red())
SMALL_PIPE = 4096

Begin = Callable[..., "Server"]


class Server:
    """A server whose output is set up by hand, so that its port is asked of the system."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.popen = popen
        self._client = httpx.Client(timeout=30.0)
        until(self._ready)

    def _ready(self) -> bool:
        assert self.popen.poll() is None, "it has ended"
        try:
            return self.get("/readyz") == 200
        except (httpx.TransportError, StopIteration):
            return False

    def get(self, path: str) -> int:
        """Return the status of an answer."""
        sockets = psutil.Process(self.popen.pid).net_connections()
        port = next(each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN)
        return self._client.get(f"http://127.0.0.1:{port}{path}").status_code

    def assert_serves(self, requests: int = 3) -> None:
        """Each request writes a line of the log."""
        for _ in range(requests):
            assert self.get("/nothing") == 404

    def assert_stops(self) -> None:
        """The server drains, and ends with 0, though its output is what it is."""
        self._client.close()
        self.popen.send_signal(signal.SIGTERM)
        assert self.popen.wait(30) == 0


@pytest.fixture
def begin(quick_models: Path) -> Iterator[Begin]:
    """Start servers; all of them are gone when the test ends."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*, stdout: int, stderr: int, shell: str = "", **settings: object) -> Server:
        arguments = command("serve", "--models", quick_models, "--port", 0, "--device", "cpu")
        if shell:
            arguments = ["sh", "-c", f'exec "$@" {shell}', "sh", *arguments]
        popen = subprocess.Popen(
            arguments, env=environment(**settings), stdout=stdout, stderr=stderr
        )
        running.append(popen)
        return Server(popen)

    yield start
    for popen in running:
        popen.kill()
        popen.wait()
        for stream in (popen.stdout, popen.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe that is full after some lines: what to read, and what to write."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, SMALL_PIPE)
    yield reading, writing
    for each in (reading, writing):
        try:
            os.close(each)
        except OSError:
            continue


def test_unread_stderr_does_not_block_serving(begin: Begin, pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    server = begin(stdout=subprocess.DEVNULL, stderr=writing, log_format="json")
    os.close(writing)
    server.assert_serves(requests=200)
    # Read again: all that waited is there.
    with os.fdopen(reading, "rb", closefd=False) as stream:
        lines = [json.loads(stream.readline()) for _ in range(200)]
        assert {each["path"] for each in lines if "path" in each} == {"/nothing"}
        server.assert_serves()
        server.assert_stops()
        rest = [json.loads(each) for each in stream]
    assert len([each for each in lines + rest if each.get("path") == "/nothing"]) == 203
    assert "draining" in rest[-1]["message"]


def test_full_output_pipe_blocks_neither_start_nor_stop(
    begin: Begin, pipe: tuple[int, int]
) -> None:
    _, writing = pipe
    os.write(writing, bytes(SMALL_PIPE))
    server = begin(stdout=writing, stderr=writing)
    server.assert_serves()
    server.assert_stops()


def test_closed_output_does_not_stop_serving(begin: Begin) -> None:
    closed = ">&- 2>&- <&-"
    server = begin(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, shell=closed)
    server.assert_serves()
    # No connection has the number that libraries write to.
    for descriptor in range(3):
        link = Path(f"/proc/{server.popen.pid}/fd/{descriptor}")
        assert str(link.readlink()) == os.devnull
    server.assert_stops()


def test_broken_output_pipe_does_not_stop_serving(begin: Begin, pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.close(reading)
    server = begin(stdout=writing, stderr=writing)
    server.assert_serves()
    server.assert_stops()


def test_start_error_is_printed_in_full(tmp_path: Path) -> None:
    done = subprocess.run(
        command("serve", "--models", tmp_path / "none", "--port", 0, "--device", "cpu"),
        env=environment(no_such_setting=1),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert any("RETINASERVE_NO_SUCH_SETTING" in each for each in lines)
    assert any(each.startswith("retinaserve: error: ") for each in lines)


def test_detect_works_with_closed_and_open_stderr(quick_models: Path, tmp_path: Path) -> None:
    image = tmp_path / "red.png"
    image.write_bytes(GOOD)
    arguments = command("detect", image, tmp_path, "--device", "cpu", "--model", "tiny")
    for redirection in ("", "2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {redirection}', "sh", *arguments],
            env=environment(models_dir=quick_models),
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)

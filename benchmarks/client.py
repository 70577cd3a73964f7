"""What generators of load share: images as requests, connections that are kept, what it cost."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import uvloop

Result = TypeVar("Result")


class Pool:
    """Connections that are kept alive: as many as requests are under way."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def exchange(self, request: bytes) -> tuple[int, bytes]:
        """Send a request and read its answer: status, and head in small letters."""
        reader, writer = (
            self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
        )
        try:
            writer.write(request)
            # A refusal may come while the body is still being sent.
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
        except BaseException:
            writer.close()
            raise
        if b"connection: close" in head:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(head[9:12]), head

    def close(self) -> None:
        """Close what is idle."""
        for _, writer in self._idle:
            writer.close()


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """The options of every generator."""
    options = argparse.ArgumentParser(description=documentation)
    options.add_argument("url")
    options.add_argument("images", type=Path, help="folder of JPEG images")
    options.add_argument("--seconds", type=float, default=20.0)
    return options


def requests(url: str, folder: Path, *headers: str) -> list[bytes]:
    """One HTTP request for each image of a folder."""
    parts = urlsplit(url)
    lines = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.hostname}", "Content-Type: image/jpeg"]
    head = "\r\n".join([*lines, *headers])
    images = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    return [f"{head}\r\nContent-Length: {len(each)}\r\n\r\n".encode() + each for each in images]


def retry_after(head: bytes) -> float:
    """Seconds that an answer tells its client to wait."""
    return float(head.partition(b"\r\nretry-after:")[2].partition(b"\r\n")[0] or 0)


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run in the lightest event loop there is: the generator shares the cores with the service."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def milliseconds(seconds: list[float], percentile: float) -> float | None:
    """A percentile. None: no values, or one of them for which there was no good answer."""
    if not seconds:
        return None
    found = float(np.percentile(seconds, percentile, method="higher"))
    return 1e3 * found if np.isfinite(found) else None


def cpu_ms(requests_sent: int) -> float:
    """Core-milliseconds that each request cost this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return 1e3 * (usage.ru_utime + usage.ru_stime) / max(1, requests_sent)

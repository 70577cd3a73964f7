"""Open-loop load: requests come at random, at a rate that does not care how the service is doing.

    python benchmarks/poisson.py http://127.0.0.1:8000/v1/detect PICTURES --rate 50 --seconds 20

Latency counts from the moment at which a request was due, so that a generator that falls behind
does not flatter the service; how far it fell behind is in the answer. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment]


@dataclass
class Seen:
    """What came back."""

    accepted: list[float] = field(default_factory=list)
    """Seconds from due to answered, of answers with status 200."""
    refused: list[float] = field(default_factory=list)
    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    without_retry_after: int = 0
    lag: list[float] = field(default_factory=list)
    """Seconds from due to sent."""


class Pool:
    """Connections that are kept alive: as many as requests are under way."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def exchange(self, request: bytes) -> tuple[int, bytes]:
        """Send a request and read its answer: status and head."""
        reader, writer = (
            self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
        )
        try:
            writer.write(request)
            # A refusal may come while the body is still being sent.
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            low = head.lower()
            length = int(low.partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
        except BaseException:
            writer.close()
            raise
        if b"connection: close" in low:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(head[9:12]), low


async def run(
    url: str, pictures: list[bytes], *, rate: float, seconds: float, deadline: int
) -> Seen:
    """Send `rate` requests a second on average for `seconds`, and wait for every answer."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/jpeg\r\n"
        f"X-Deadline-Ms: {deadline}\r\nContent-Length: {{length}}\r\n\r\n"
    )
    requests = [head.format(length=len(data)).encode() + data for data in pictures]
    pool, seen, dice = Pool(host, port), Seen(), random.Random(0)

    async def one(due: float, request: bytes) -> None:
        seen.lag.append(time.perf_counter() - due)
        try:
            status, answer = await asyncio.wait_for(pool.exchange(request), 60)
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError) as error:
            seen.statuses[type(error).__name__] += 1
            return
        took = time.perf_counter() - due
        seen.statuses[str(status)] += 1
        if status == 200:
            seen.accepted.append(took)
        elif status == 503:
            seen.refused.append(took)
            seen.without_retry_after += b"\r\nretry-after: " not in answer

    due = time.perf_counter()
    end = due + seconds
    tasks = []
    while (due := due + dice.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(due, requests[len(tasks) % len(requests)])))
    await asyncio.gather(*tasks)
    return seen


def _milliseconds(values: list[float], percentile: float) -> float | None:
    return 1e3 * float(np.percentile(values, percentile)) if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("pictures", type=Path, help="folder of JPEG pictures")
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--deadline", type=int, default=1000, help="milliseconds")
    arguments = parser.parse_args()
    pictures = [path.read_bytes() for path in sorted(arguments.pictures.glob("*.jpg"))]
    with asyncio.Runner(loop_factory=uvloop and uvloop.new_event_loop) as runner:
        seen = runner.run(
            run(
                arguments.url,
                pictures,
                rate=arguments.rate,
                seconds=arguments.seconds,
                deadline=arguments.deadline,
            )
        )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    sent = len(seen.lag)
    print(
        json.dumps(
            {
                "sent": sent,
                "good_per_second": len(seen.accepted) / arguments.seconds,
                "in_time": sum(1e3 * each <= arguments.deadline for each in seen.accepted),
                "p50_ms": _milliseconds(seen.accepted, 50),
                "p99_ms": _milliseconds(seen.accepted, 99),
                "refused_p99_ms": _milliseconds(seen.refused, 99),
                "statuses": dict(sorted(seen.statuses.items())),
                "without_retry_after": seen.without_retry_after,
                "lag_p99_ms": _milliseconds(seen.lag, 99),
                "client_cpu_ms": 1e3 * (usage.ru_utime + usage.ru_stime) / sent,
            }
        )
    )


if __name__ == "__main__":
    main()

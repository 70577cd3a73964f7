"""Closed-loop load on one URL over keep-alive connections, light enough to share the machine.

    python benchmarks/load.py http://127.0.0.1:8000/v1/detect PICTURES --clients 16 --seconds 20

Each client sends its next picture when the answer to the last is there. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import resource
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np


async def _client(
    host: str,
    port: int,
    requests: list[bytes],
    start: int,
    *,
    until: float,
    limit: int | None,
    latencies: list[float],
    statuses: collections.Counter[int],
) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    position = start
    try:
        while time.perf_counter() < until and (limit is None or len(latencies) < limit):
            sent = time.perf_counter()
            writer.write(requests[position % len(requests)])
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.partition(b":")[2])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length:")
            )
            await reader.readexactly(length)
            latencies.append(time.perf_counter() - sent)
            statuses[int(head[9:12])] += 1
            position += 1
    finally:
        writer.close()


async def run(
    url: str, pictures: list[bytes], *, clients: int, seconds: float, limit: int | None = None
) -> dict[str, object]:
    """Load `url` for `seconds`, or until `limit` answers have come."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/jpeg\r\n"
        "Content-Length: {length}\r\n\r\n"
    )
    requests = [head.format(length=len(data)).encode() + data for data in pictures]
    latencies: list[float] = []
    statuses: collections.Counter[int] = collections.Counter()
    started = time.perf_counter()
    await asyncio.gather(
        *(
            _client(
                host,
                port,
                requests,
                index * len(requests) // clients,
                until=started + seconds,
                limit=limit,
                latencies=latencies,
                statuses=statuses,
            )
            for index in range(clients)
        )
    )
    elapsed = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "requests": len(latencies),
        "per_second": len(latencies) / elapsed,
        "p50_ms": 1e3 * float(np.percentile(latencies, 50)),
        "p99_ms": 1e3 * float(np.percentile(latencies, 99)),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "client_cpu_ms": 1e3 * (usage.ru_utime + usage.ru_stime) / len(latencies),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("pictures", type=Path, help="folder of JPEG pictures")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--limit", type=int, help="stop after this many answers")
    arguments = parser.parse_args()
    pictures = [path.read_bytes() for path in sorted(arguments.pictures.glob("*.jpg"))]
    result = asyncio.run(
        run(
            arguments.url,
            pictures,
            clients=arguments.clients,
            seconds=arguments.seconds,
            limit=arguments.limit,
        )
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()

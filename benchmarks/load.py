"""Closed-loop load on one URL over keep-alive connections, light enough to share the machine.

    python benchmarks/load.py http://127.0.0.1:8000/v1/detect IMAGES --clients 16 --seconds 20

Each client sends its next image when the answer to the last is there; one that is refused waits
as long as it is told to. Latencies are those of good answers. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import collections
import json
import time
from dataclasses import dataclass, field

import client

GOOD = 200


@dataclass
class Seen:
    """What came back."""

    latencies: list[float] = field(default_factory=list)
    """Seconds from sent to answered, of answers with status 200."""
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    seconds: float = 0.0


async def load(
    url: str, requests: list[bytes], *, clients: int, seconds: float, limit: int | None
) -> Seen:
    """Load `url` for `seconds`, or until `limit` answers have come."""
    pool, seen = client.Pool(url), Seen()
    started = time.perf_counter()

    async def one(position: int) -> None:
        while time.perf_counter() < started + seconds:
            if limit is not None and seen.statuses.total() >= limit:
                return
            sent = time.perf_counter()
            status, head = await pool.exchange(requests[position % len(requests)])
            seen.statuses[status] += 1
            position += 1
            if status == GOOD:
                seen.latencies.append(time.perf_counter() - sent)
            elif wait := client.retry_after(head):
                await asyncio.sleep(min(wait, max(0.0, started + seconds - time.perf_counter())))

    await asyncio.gather(*(one(index * len(requests) // clients) for index in range(clients)))
    seen.seconds = time.perf_counter() - started
    pool.close()
    return seen


def main() -> None:
    parser = client.parser(__doc__)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--limit", type=int, help="stop after this many answers")
    parser.add_argument("--latencies", action="store_true", help="print each, not percentiles only")
    arguments = parser.parse_args()
    seen = client.run(
        load(
            arguments.url,
            client.requests(arguments.url, arguments.images),
            clients=arguments.clients,
            seconds=arguments.seconds,
            limit=arguments.limit,
        )
    )
    count = seen.statuses.total()
    result = {
        "requests": count,
        "per_second": count / seen.seconds,
        "good_per_second": seen.statuses[GOOD] / seen.seconds,
        "p50_ms": client.milliseconds(seen.latencies, 50),
        "p99_ms": client.milliseconds(seen.latencies, 99),
        "statuses": {str(status): number for status, number in sorted(seen.statuses.items())},
        "client_cpu_ms": client.cpu_ms(count),
    }
    if arguments.latencies:
        result["latencies_ms"] = [1e3 * seconds for seconds in seen.latencies]
    print(json.dumps(result))


if __name__ == "__main__":
    main()

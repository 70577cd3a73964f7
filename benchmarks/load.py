"""Closed- or open-loop load on one URL over keep-alive connections.

    python benchmarks/load.py http://127.0.0.1:8000/v1/detect IMAGES --clients 16 --seconds 20
    python benchmarks/load.py http://127.0.0.1:8000/v1/detect IMAGES --rate 50 --deadline 1000

Closed loop: each client sends its next image when the response to the last has arrived; a refused
one waits as long as Retry-After says. Open loop: Poisson arrivals at `--rate`; latency counts from
the moment a request was due, so a generator that falls behind does not flatter the service.
Latencies are those of responses with status 200. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import collections
import json
import math
import random
import time
from dataclasses import dataclass, field
from typing import Any

import client

GOOD = 200
TIMEOUT_SECONDS = 60


@dataclass
class Seen:
    """The responses."""

    latencies: list[float] = field(default_factory=list)
    """Seconds to responses with status 200: from sent, in an open loop from due."""
    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    refused: list[float] = field(default_factory=list)
    """Seconds to responses with status 503."""
    without_retry_after: int = 0
    lag: list[float] = field(default_factory=list)
    """Seconds from due to sent, in an open loop."""
    seconds: float = 0.0

    def count(self, status: int, head: bytes, took: float) -> None:
        self.statuses[str(status)] += 1
        if status == GOOD:
            self.latencies.append(took)
        elif status == 503:
            self.refused.append(took)
            self.without_retry_after += b"\r\nretry-after: " not in head


async def closed_loop(
    url: str, requests: list[bytes], *, clients: int, seconds: float, limit: int | None = None
) -> Seen:
    """Load `url` for `seconds`, or until `limit` responses have come."""
    pool, seen = client.Pool(url), Seen()
    started = time.perf_counter()

    async def one(position: int) -> None:
        while time.perf_counter() < started + seconds:
            if limit is not None and seen.statuses.total() >= limit:
                return
            sent = time.perf_counter()
            status, head = await pool.exchange(requests[position % len(requests)])
            seen.count(status, head, time.perf_counter() - sent)
            position += 1
            if status != GOOD and (wait := client.retry_after(head)):
                await asyncio.sleep(min(wait, max(0.0, started + seconds - time.perf_counter())))

    await asyncio.gather(*(one(index * len(requests) // clients) for index in range(clients)))
    seen.seconds = time.perf_counter() - started
    pool.close()
    return seen


async def open_loop(
    url: str, requests: list[bytes], *, rate: float, seconds: float, seed: int
) -> Seen:
    """Send `rate` requests a second on average for `seconds`, and wait for every response."""
    pool, seen, dice = client.Pool(url), Seen(seconds=seconds), random.Random(seed)

    async def one(due: float, request: bytes) -> None:
        seen.lag.append(time.perf_counter() - due)
        try:
            status, head = await asyncio.wait_for(pool.exchange(request), TIMEOUT_SECONDS)
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError) as error:
            seen.statuses[type(error).__name__] += 1
        else:
            seen.count(status, head, time.perf_counter() - due)

    due = time.perf_counter()
    end = due + seconds
    tasks: list[asyncio.Task[None]] = []
    while (due := due + dice.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(due, requests[len(tasks) % len(requests)])))
    await asyncio.gather(*tasks)
    pool.close()
    return seen


def result(seen: Seen) -> dict[str, Any]:
    """The figures of a load."""
    count = seen.statuses.total()
    # A request that got no detections waits for ever.
    missing = [math.inf] * (count - len(seen.latencies))
    return {
        "requests": count,
        "per_second": count / seen.seconds,
        "good_per_second": len(seen.latencies) / seen.seconds,
        "p50_ms": client.milliseconds(seen.latencies, 50),
        "p99_ms": client.milliseconds(seen.latencies, 99),
        "p99_of_all_ms": client.milliseconds(seen.latencies + missing, 99),
        "refused_p99_ms": client.milliseconds(seen.refused, 99),
        "statuses": dict(sorted(seen.statuses.items())),
        "not_200": len(missing),
        "without_retry_after": seen.without_retry_after,
        "lag_p99_ms": client.milliseconds(seen.lag, 99),
        "client_cpu_ms": client.cpu_ms(count),
    }


def main() -> None:
    parser = client.parser(__doc__)
    parser.add_argument("--clients", type=int, default=16, help="of a closed loop")
    parser.add_argument("--limit", type=int, help="stop a closed loop after this many responses")
    parser.add_argument("--rate", type=float, help="requests a second of an open loop")
    parser.add_argument("--deadline", type=int, help="X-Deadline-Ms; default: the service's own")
    parser.add_argument("--seed", type=int, default=0, help="of an open loop's arrivals")
    parser.add_argument("--latencies", action="store_true", help="print each, not percentiles only")
    given = parser.parse_args()
    headers = () if given.deadline is None else (f"X-Deadline-Ms: {given.deadline}",)
    requests = client.requests(given.url, given.images, *headers)
    if given.rate is None:
        work = closed_loop(
            given.url, requests, clients=given.clients, seconds=given.seconds, limit=given.limit
        )
    else:
        work = open_loop(
            given.url, requests, rate=given.rate, seconds=given.seconds, seed=given.seed
        )
    seen = client.run(work)
    found = result(seen)
    if given.latencies:
        found["latencies_ms"] = [1e3 * seconds for seconds in seen.latencies]
    print(json.dumps(found))


if __name__ == "__main__":
    main()

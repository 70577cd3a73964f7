"""Open-loop load: requests come at random, at a rate that does not care how the service is doing.

    python benchmarks/poisson.py http://127.0.0.1:8000/v1/detect IMAGES --rate 50 --seconds 20

Latency counts from the moment at which a request was due, so that a generator that falls behind
does not flatter the service; how far it fell behind is in the answer. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import collections
import json
import math
import random
import time
from dataclasses import dataclass, field

import client


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


async def poisson(
    url: str, requests: list[bytes], *, rate: float, seconds: float, seed: int
) -> Seen:
    """Send `rate` requests a second on average for `seconds`, and wait for every answer."""
    pool, seen, dice = client.Pool(url), Seen(), random.Random(seed)

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
    pool.close()
    return seen


def main() -> None:
    parser = client.parser(__doc__)
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--deadline", type=int, help="milliseconds; default: the service's own")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    headers = () if arguments.deadline is None else (f"X-Deadline-Ms: {arguments.deadline}",)
    seen = client.run(
        poisson(
            arguments.url,
            client.requests(arguments.url, arguments.images, *headers),
            rate=arguments.rate,
            seconds=arguments.seconds,
            seed=arguments.seed,
        )
    )
    sent = len(seen.lag)
    missing = [math.inf] * (sent - len(seen.accepted))
    result = {
        "sent": sent,
        "good_per_second": len(seen.accepted) / arguments.seconds,
        "p50_ms": client.milliseconds(seen.accepted, 50),
        "p99_ms": client.milliseconds(seen.accepted, 99),
        # Whoever was refused waits for ever.
        "p99_of_all_ms": client.milliseconds(seen.accepted + missing, 99),
        "refused_p99_ms": client.milliseconds(seen.refused, 99),
        "statuses": dict(sorted(seen.statuses.items())),
        "without_retry_after": seen.without_retry_after,
        "lag_p99_ms": client.milliseconds(seen.lag, 99),
        "client_cpu_ms": client.cpu_ms(sent),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

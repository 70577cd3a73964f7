"""What becomes of light clients beside one that sends what is dear. Run by `overload.py --mixed`.

Three clients send JPEGs of 640 x 480 one after the other, each with a deadline of 1.5 s. Beside
them run, one kind at a time: two clients of 49-megapixel PNGs (16-bit grey, RGBA), two that ask for
JPEGs of 17 MB to be drawn as PNG, 16 that send 32 x 32 canvases over /v2, and two that ask for
tiles of 12 megapixels. Every client waits as long as a refusal tells it to.

Light goodput is compared with what the light clients get alone, for equal core time: what the
neighbour's good answers cost (measured with the neighbour alone) is taken off the cores first.
"""

from __future__ import annotations

import asyncio
import collections
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import client
import numpy as np
from PIL import Image
from serving import Running

LIGHT, DEADLINE_MS = 3, 1500
LATE_SHARE = 0.005
GOODPUT_SHARE = 0.7
PROBE_P99_MS = 500.0
PROBE_SECONDS = 0.1


@dataclass
class Seen:
    """What came back to clients of one kind."""

    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    latencies: list[float] = field(default_factory=list)

    @property
    def good(self) -> int:
        return self.statuses[200]

    @property
    def late(self) -> float:
        """Share of those that were let in."""
        return self.statuses[504] / max(1, self.good + self.statuses[504])


def request(path: str, body: bytes, *headers: str, kind: str = "image/any") -> bytes:
    """A request, ready to be sent."""
    head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", *headers]
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def neighbours() -> dict[str, tuple[int, list[bytes]]]:
    """By name: how many clients, and what they send in turn."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (1530, 1530, 3), dtype=np.uint8))
    heavy = saved(coarse.resize((6120, 6120), Image.Resampling.BICUBIC), "JPEG", quality=88)
    slide = saved(coarse.resize((4000, 3000), Image.Resampling.BICUBIC), "JPEG", quality=85)
    bombs = [saved(Image.new(mode, (7000, 7000)), "PNG") for mode in ("I;16", "RGBA")]
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
    canvas = json.dumps({"inputs": [tensor]}).encode()
    infer = "/v2/models/blood-cells/infer"
    return {
        "49-MP PNGs": (2, [request("/v1/detect", each) for each in bombs]),
        f"drawn JPEGs of {len(heavy) / 1e6:.0f} MB": (
            2,
            [request("/v1/detect", heavy, "Accept: image/png")],
        ),
        "32 x 32 canvases": (16, [request(infer, canvas, kind="application/json")]),
        "tile=auto on 12 MP": (2, [request("/v1/detect?tile=auto", slide)]),
    }


async def closed_loop(
    pool: client.Pool, requests: list[bytes], clients: int, seen: Seen, until: float
) -> None:
    """Clients that send their next request when the last is answered."""

    async def one(position: int) -> None:
        while time.perf_counter() < until:
            sent = time.perf_counter()
            status, head = await pool.exchange(requests[position % len(requests)])
            position += 1
            seen.statuses[status] += 1
            if status == 200:
                seen.latencies.append(time.perf_counter() - sent)
            elif wait := client.retry_after(head):
                await asyncio.sleep(min(wait, max(0.0, until - time.perf_counter())))

    await asyncio.gather(*(one(index) for index in range(clients)))


async def probe(pool: client.Pool, path: str, seen: Seen, until: float) -> None:
    """Ask ten times a second how the service is."""
    while time.perf_counter() < until:
        sent = time.perf_counter()
        status, _ = await pool.exchange(get(path))
        seen.statuses[status] += 1
        seen.latencies.append(time.perf_counter() - sent)
        await asyncio.sleep(PROBE_SECONDS)


def measure(
    server: Running, seconds: float, *kinds: tuple[int, list[bytes]]
) -> tuple[list[Seen], dict[str, Seen], float]:
    """What each kind of client saw, what the probes saw, and the server's core seconds."""
    pool = client.Pool(server.url)
    seen, probes = [Seen() for _ in kinds], {path: Seen() for path in ("/healthz", "/metrics")}
    until = time.perf_counter() + seconds

    async def together() -> None:
        await asyncio.gather(
            *(
                closed_loop(pool, requests, clients, each, until)
                for (clients, requests), each in zip(kinds, seen, strict=True)
            ),
            *(probe(pool, path, each, until) for path, each in probes.items()),
        )
        pool.close()

    before = server.cpu_seconds()
    client.run(together())
    return seen, probes, server.cpu_seconds() - before


def mixed(
    server: Running, light: list[bytes], *, seconds: float, cores: int, say: Callable[[str], None]
) -> list[str]:
    """Print the table; what does not hold."""
    lights = (LIGHT, light)
    measure(server, 3.0, lights)
    (alone,), _, _ = measure(server, seconds, lights)
    rate = alone.good / seconds
    say(f"light clients alone: {rate:.1f}/s, p99 {client.milliseconds(alone.latencies, 99):.0f} ms")
    say("")
    say(
        "| beside | light good/s | of its share | p99 ms | refused | late | neighbour good/s | "
        "refused | late | /healthz p99 ms | /metrics p99 ms | peak MB |"
    )
    say("|---" * 12 + "|")
    found = []
    for name, neighbour in neighbours().items():
        measure(server, 3.0, neighbour)
        (by_itself,), _, cpu = measure(server, seconds, neighbour)
        price = cpu / max(1, by_itself.good)
        (ours, theirs), probes, _ = measure(server, seconds, lights, neighbour)
        left = max(0.0, 1.0 - theirs.good * price / (cores * seconds))
        share = ours.good / seconds / max(1e-9, rate * left)
        p99 = {path: client.milliseconds(each.latencies, 99) for path, each in probes.items()}
        say(
            f"| {name} | {ours.good / seconds:.1f} | {share:.0%} "
            f"| {client.milliseconds(ours.latencies, 99) or 0:.0f} | {ours.statuses[503]} "
            f"| {ours.late:.2%} "
            f"| {theirs.good / seconds:.2f} | {theirs.statuses[503]} | {theirs.late:.2%} "
            f"| {p99['/healthz']:.0f} | {p99['/metrics']:.0f} | {server.peak():.0f} |"
        )
        late = (ours.statuses[504] + theirs.statuses[504]) / max(
            1, ours.good + theirs.good + ours.statuses[504] + theirs.statuses[504]
        )
        if late > LATE_SHARE:
            found.append(f"{name}: {late:.2%} of those let in are late")
        if share < GOODPUT_SHARE:
            found.append(f"{name}: light clients get {share:.0%} of their share")
        found += [
            f"{name}: {path} p99 {each:.0f} ms"
            for path, each in p99.items()
            if each is None or each > PROBE_P99_MS
        ]
        if other := (set(ours.statuses) | set(theirs.statuses)) - {200, 503, 504}:
            found.append(f"{name}: also {sorted(other)}")
        found += [
            f"{name}: {path} answered {dict(each.statuses)}"
            for path, each in probes.items()
            if set(each.statuses) != {200}
        ]
    return found

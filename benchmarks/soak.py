"""Hours of mixed load, and what is left behind: memory, file descriptors, threads, tasks.

    python benchmarks/soak.py --minutes 60

Good clients (one image, many, tiles, drawn answers, the inference protocol), bad ones (rubbish,
wrong parameters, unknown paths), slow ones (a byte now and then) and vanishing ones (gone while the
body arrives or the answer is made) at once. Sampled every few seconds. In the end the load stops,
and what the service still holds is compared with what it held before.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import io
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
import numpy as np
from serving import Running, served

from service.imaging.samples import draw_smear
from service.settings import bundled_models

GROWTH = 0.05
"""Largest growth of resident memory from the end of the warm-up to the end."""
WARM_SHARE = 0.1
"""Of the time, and at least WARM_MINUTES: caches and arenas find their size."""
WARM_MINUTES = 1.0
EXPECTED = frozenset({200, 400, 404, 405, 408, 413, 415, 422, 503, 504})
"""Statuses that this load may see; anything else is a fault."""


class Sample(NamedTuple):
    """What the service holds at a moment."""

    minute: float
    resident_mb: float
    descriptors: int
    threads: int
    held: float
    """Images."""


class Load:
    """The clients, and what they saw."""

    def __init__(self, server: Running) -> None:
        parts = urlsplit(server.url)
        self._base = f"{parts.scheme}://{parts.netloc}"
        self._address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._images = _images()
        self._dice = random.Random(0)
        self.statuses: collections.Counter[str] = collections.Counter()
        self.refusals: list[str] = []
        self.stop = asyncio.Event()

    async def run(self, good: int) -> None:
        """All clients until `stop` is set."""
        kinds: list[Callable[[httpx.AsyncClient], Awaitable[None]]] = [
            *[self._good] * good,
            self._many,
            self._inference_protocol,
            *[self._bad] * 2,
            *[self._slow] * 8,
            *[self._vanishing] * 2,
        ]
        async with (
            httpx.AsyncClient(base_url=self._base, timeout=60, verify=False) as client,
            asyncio.TaskGroup() as tasks,
        ):
            for kind in kinds:
                tasks.create_task(self._repeat(kind, client))

    async def _repeat(
        self, kind: Callable[[httpx.AsyncClient], Awaitable[None]], client: httpx.AsyncClient
    ) -> None:
        while not self.stop.is_set():
            try:
                await kind(client)
            except (httpx.HTTPError, OSError, asyncio.IncompleteReadError) as error:
                self.statuses[type(error).__name__] += 1
                await asyncio.sleep(0.05)

    def _count(self, answer: httpx.Response) -> None:
        self.statuses[str(answer.status_code)] += 1

    async def _good(self, client: httpx.AsyncClient) -> None:
        query = self._dice.choice(("", "?format=coco", "?score_threshold=0.01", "?tile=auto"))
        accept = self._dice.choice(("*/*", "*/*", "*/*", "image/jpeg", "image/png"))
        body = self._dice.choice(self._images)
        headers = {"Accept": accept}
        self._count(await client.post(f"/v1/detect{query}", content=body, headers=headers))

    async def _many(self, client: httpx.AsyncClient) -> None:
        files = [("files", (f"{i}", each)) for i, each in enumerate(self._images)]
        files.append(("files", ("rubbish", b"no image")))
        accept = self._dice.choice(("application/json", "application/x-ndjson"))
        headers = {"Accept": accept}
        self._count(await client.post("/v1/detect/batch", files=files, headers=headers))

    async def _inference_protocol(self, client: httpx.AsyncClient) -> None:
        models = (await client.get("/v1/models")).json()["models"]
        data = base64.b64encode(self._images[0]).decode()
        tensor = {"name": "encoded_images", "datatype": "BYTES", "shape": [1], "data": [data]}
        path = f"/v2/models/{models[0]['name']}/infer"
        self._count(await client.post(path, json={"inputs": [tensor]}))
        self._count(await client.get("/metrics"))

    async def _bad(self, client: httpx.AsyncClient) -> None:
        image = bytearray(self._dice.choice(self._images))
        for _ in range(20):
            image[self._dice.randrange(len(image))] = self._dice.randrange(256)
        path, body = self._dice.choice(
            (
                ("/v1/detect", bytes(image)),
                ("/v1/detect", bytes(image[: len(image) // 2])),
                ("/v1/detect", self._dice.randbytes(2000)),
                ("/v1/detect", b""),
                ("/v1/detect?score_threshold=2", b"x"),
                ("/v1/detect?model=none", b"x"),
                ("/v1/detect/batch", b"{"),
                (f"/{self._dice.randrange(10**9)}", b"x"),
            )
        )
        self._count(await client.post(path, content=body))
        await asyncio.sleep(0.05)

    async def _slow(self, client: httpx.AsyncClient) -> None:
        del client
        async with self._raw() as (reader, writer):
            for byte in self._head(2000) + b"x" * self._dice.randrange(20):
                if self.stop.is_set():
                    return
                writer.write(bytes((byte,)))
                await writer.drain()
                await asyncio.sleep(self._dice.uniform(0.0, 0.3))
            if self._dice.random() < 0.5:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
                self.statuses[head[9:12].decode()] += 1

    async def _vanishing(self, client: httpx.AsyncClient) -> None:
        del client
        body = self._dice.choice(self._images)
        sent = self._dice.choice((len(body), self._dice.randrange(len(body))))
        async with self._raw() as (_, writer):
            writer.write(self._head(len(body)) + body[:sent])
            await asyncio.sleep(self._dice.uniform(0.0, 0.1))
        self.statuses["vanished"] += 1

    @contextlib.asynccontextmanager
    async def _raw(self):  # type: ignore[no-untyped-def]
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            yield reader, writer
        finally:
            writer.close()

    def _head(self, length: int) -> bytes:
        return f"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def _images() -> list[bytes]:
    bodies = []
    for seed, (width, height, kind) in enumerate(
        ((640, 480, "JPEG"), (480, 640, "PNG"), (1600, 1200, "JPEG"), (320, 320, "WEBP"))
    ):
        file = io.BytesIO()
        draw_smear(seed, width=width, height=height)[0].save(file, kind)
        bodies.append(file.getvalue())
    return bodies


async def look(server: Running, client: httpx.AsyncClient, started: float) -> Sample:
    """One sample."""
    metrics = (await client.get("/metrics")).text
    held = metrics.partition("\nretinaserve_pictures_held ")[2].partition("\n")[0]
    process = server.process
    return Sample(
        (time.monotonic() - started) / 60,
        server.resident(),
        process.num_fds(),
        process.num_threads(),
        float(held),
    )


async def soak(server: Running, *, minutes: float, good: int) -> tuple[list[Sample], Load]:
    """The whole run: idle, loaded, idle again."""
    base = server.url.removesuffix("/v1/detect")
    every = max(2.0, minutes * 60 / 200)
    load = Load(server)
    started = time.monotonic()
    async with httpx.AsyncClient(base_url=base, timeout=60, verify=False) as client:
        samples = [await look(server, client, started)]
        task = asyncio.create_task(load.run(good))
        while time.monotonic() < started + minutes * 60:
            await asyncio.sleep(every)
            samples.append(await look(server, client, started))
            if sys.stderr.isatty():
                print(_line(samples[-1]), end="\r", file=sys.stderr, flush=True)
            if task.done():
                task.result()
        load.stop.set()
        await task
        # Slow bodies run into their time-out, connections into their end.
        await asyncio.sleep(15)
        samples.append(await look(server, client, started))
        metrics = (await client.get("/metrics")).text
        load.refusals = [
            line.removeprefix("retinaserve_refusals_total")
            for line in metrics.splitlines()
            if line.startswith("retinaserve_refusals_total{")
        ]
    return samples, load


def faults(samples: list[Sample], load: Load) -> list[str]:
    """What does not hold."""
    first, last, busy = samples[0], samples[-1], samples[1:-1]
    minutes = max(WARM_MINUTES, WARM_SHARE * busy[-1].minute)
    warm = [each for each in busy if each.minute >= minutes] or busy
    third = max(1, len(warm) // 3)
    early = float(np.median([each.resident_mb for each in warm[:third]]))
    late = float(np.median([each.resident_mb for each in warm[-third:]]))
    print(f"resident: {early:.0f} MB in the first third after the warm-up, {late:.0f} in the last")
    found = []
    if late > early * (1 + GROWTH):
        found.append(f"memory grows: {early:.0f} MB, later {late:.0f} MB")
    if last.descriptors > first.descriptors + 1:
        found.append(f"descriptors stay open: {first.descriptors}, in the end {last.descriptors}")
    if last.threads > max(first.threads, warm[0].threads):
        found.append(f"threads stay: {first.threads}, in the end {last.threads}")
    if last.held:
        found.append(f"{last.held:g} images are still held")
    strange = {
        status for status in load.statuses if status.isdigit() and int(status) not in EXPECTED
    }
    if strange:
        found.append(f"unexpected statuses: {', '.join(sorted(strange))}")
    return found


def _line(sample: Sample) -> str:
    return (
        f"{sample.minute:6.1f} min  {sample.resident_mb:6.0f} MB  {sample.descriptors:4d} "
        f"descriptors  {sample.threads:3d} threads  {sample.held:4.0f} images held"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=bundled_models())
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--good", type=int, default=4, help="clients that behave")
    parser.add_argument("--csv", type=Path, help="write the samples")
    arguments = parser.parse_args()
    with served(arguments.models) as server:
        samples, load = asyncio.run(soak(server, minutes=arguments.minutes, good=arguments.good))
    for each in (samples[0], *samples[1 :: max(1, len(samples) // 12)], samples[-1]):
        print(_line(each))
    print(f"answers: {dict(sorted(load.statuses.items()))}")
    print(f"refusals: {' '.join(load.refusals)}")
    if arguments.csv is not None:
        lines = [",".join(Sample._fields), *(",".join(map(str, each)) for each in samples)]
        arguments.csv.write_text("\n".join(lines) + "\n")
    found = faults(samples, load)
    print("\n".join(found) if found else "nothing is left behind")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()

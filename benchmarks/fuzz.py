"""Broken and hostile requests against a real server: no 5xx, no hang, no growth, bounded memory.

    python benchmarks/fuzz.py --count 20000
    python benchmarks/fuzz.py --seed 7 --first 1234 --count 1
    python benchmarks/fuzz.py --url http://localhost:8000 --grpc localhost:8001

Images, forms, JSON, headers, query strings, tensors and gRPC messages. Each is made from the seed
and its number alone, so a finding is repeated by `--first NUMBER --count 1`. Bodies that fail are
kept in `--keep DIR`. Without --url a server is started, of the bundled model or of `--models DIR`,
and its memory watched (Linux): its peak, and from `GROWTH_CASES` requests on its growth after a
warm-up of a fifth of them. That server decodes within `DECODE_MEMORY_BYTES`, less than half of what
it may take in all, so that an image which takes more than was reckoned is found.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import fuzz_bodies
import fuzz_protocols
import grpc
import httpx
import psutil
from fuzz_bodies import CLOSED, Case, Source

EXPECTED = frozenset({"200", "400", "408", "413", "415", "422", "503"}) | {
    f"gRPC {name}"
    for name in ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAVAILABLE")
}
"""503 and UNAVAILABLE only with Retry-After; a kind of case may allow more."""
HANG_SECONDS = 60.0
SLOW_PROBE_SECONDS = 1.0
PROBE_PAUSE_SECONDS = 0.1
GROWTH_BYTES = 48 << 20
GROWTH_CASES = 10_000
"""The warm-up of fewer does not fill the allocators of all threads."""
PEAK_BYTES = 300_000_000
"""Above what the idle server has."""
DECODE_MEMORY_BYTES = 128 << 20

KINDS: tuple[tuple[int, Callable[[Source, random.Random], Case]], ...] = (
    (34, fuzz_bodies.image),
    (4, fuzz_bodies.large_image),
    (13, fuzz_bodies.form),
    (7, fuzz_bodies.document),
    (5, fuzz_protocols.query),
    (6, fuzz_protocols.headers),
    (7, fuzz_protocols.bare_bytes),
    (10, fuzz_protocols.tensors),
    (2, fuzz_protocols.about_models),
    (12, fuzz_protocols.message),
)
"""With their shares."""


def cases(seed: int, first: int, count: int, *, model: str) -> Iterator[tuple[int, Case]]:
    """Requests by number; each is the same whatever others are made."""
    source = Source(model)
    shares, makers = zip(*KINDS, strict=True)
    for number in range(first, first + count):
        rng = random.Random(f"{seed}-{number}")
        (make,) = rng.choices(makers, shares)
        yield number, make(source, rng)


@dataclass
class Report:
    """What came back."""

    statuses: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest: float = 0.0
    slowest_case: int | None = None
    slowest_probe: float = 0.0

    def add(self, other: Report) -> None:
        self.statuses.update(other.statuses)
        self.findings += other.findings
        if other.slowest > self.slowest:
            self.slowest, self.slowest_case = other.slowest, other.slowest_case
        self.slowest_probe = max(self.slowest_probe, other.slowest_probe)


class Answer(NamedTuple):
    """What came back for one case."""

    status: str
    retry_after: bool
    detail: str


async def run(
    url: str,
    chosen: Iterator[tuple[int, Case]],
    *,
    grpc_address: str | None,
    clients: int,
    keep: Path | None,
) -> Report:
    """Send the requests, `clients` at a time."""
    report = Report()
    # A client checks that the server still serves, and its own connection may be closed.
    async with (
        httpx.AsyncClient(base_url=url, timeout=HANG_SECONDS, verify=False) as client,
        grpc.aio.insecure_channel(grpc_address or url) as channel,
    ):

        async def work() -> None:
            for number, case in chosen:
                started = time.perf_counter()
                finding = await _finding(_ask(client, channel, case), case, report)
                seconds = time.perf_counter() - started
                if seconds > report.slowest:
                    report.slowest, report.slowest_case = seconds, number
                if finding is not None:
                    report.findings.append(f"number {number}, {case.path[:80]}: {finding}")
                    if keep is not None:
                        _keep(keep / f"{number}.body", case.body)

        with _probed(url, report):
            await asyncio.gather(*(work() for _ in range(clients)))
    return report


def _keep(file: Path, body: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(body)


async def _finding(asked: Awaitable[Answer], case: Case, report: Report) -> str | None:
    """What is wrong with the answer."""
    try:
        answer = await asyncio.wait_for(asked, HANG_SECONDS)
    except (TimeoutError, httpx.TimeoutException):
        return f"no answer within {HANG_SECONDS:g} s"
    except (OSError, httpx.TransportError) as error:
        return f"the connection broke: {error!r}"
    report.statuses[answer.status] += 1
    if answer.status not in EXPECTED | case.also:
        return f"{answer.status} {answer.detail[:200]}"
    if answer.status in ("503", "gRPC UNAVAILABLE") and not answer.retry_after:
        return f"{answer.status} without Retry-After: {answer.detail[:200]}"
    if '"status":500' in answer.detail:
        return f"an image of a batch: {answer.detail[:300]}"
    return None


def _ask(client: httpx.AsyncClient, channel: grpc.aio.Channel, case: Case) -> Awaitable[Answer]:
    if case.way == "grpc":
        return _ask_grpc(channel, case)
    return _ask_socket(client.base_url, case) if case.way == "socket" else _ask_http(client, case)


async def _ask_http(client: httpx.AsyncClient, case: Case) -> Answer:
    headers = [(name.encode(), value.strip().encode("latin-1")) for name, value in case.headers]
    answer = await client.request(case.method, case.path, content=case.body, headers=headers)
    text = "" if answer.headers.get("content-type", "").startswith("image/") else answer.text
    return Answer(str(answer.status_code), "retry-after" in answer.headers, text)


async def _ask_socket(url: httpx.URL, case: Case) -> Answer:
    context = None
    if url.scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(url.host, url.port, ssl=context)

    async def send() -> None:
        # The server may have answered and closed before all of it was sent.
        with contextlib.suppress(OSError):
            writer.write(case.body)
            await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()

    try:
        _, content = await asyncio.gather(send(), reader.read())
    except ConnectionError:
        return Answer(CLOSED, retry_after=False, detail="")
    finally:
        writer.close()
    # The worst of several.
    status = max(re.findall(rb"^HTTP/1\.1 ([2-9]\d\d)", content, re.MULTILINE), default=b"")
    text = content.decode("latin-1")
    return Answer(status.decode() or CLOSED, "\r\nretry-after:" in text.lower(), text)


async def _ask_grpc(channel: grpc.aio.Channel, case: Case) -> Answer:
    call = channel.unary_unary(case.path)(case.body, metadata=case.headers)
    try:
        await call
    except grpc.aio.AioRpcError as error:
        trailing = dict(error.trailing_metadata())
        return Answer(f"gRPC {error.code().name}", "retry-after" in trailing, str(error.details()))
    return Answer("gRPC OK", retry_after=False, detail="")


@contextlib.contextmanager
def _probed(url: str, report: Report) -> Iterator[None]:
    """Ask for /healthz ten times a second, in a thread: making requests takes time, too."""
    done = threading.Event()

    def probe() -> None:
        with httpx.Client(base_url=url, timeout=HANG_SECONDS, verify=False) as client:
            while not done.wait(PROBE_PAUSE_SECONDS):
                started = time.perf_counter()
                try:
                    status = str(client.get("/healthz").status_code)
                except httpx.TransportError as error:
                    status = repr(error)
                report.slowest_probe = max(report.slowest_probe, time.perf_counter() - started)
                if status != "200":
                    report.findings.append(f"/healthz: {status}")
                    return

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Running(NamedTuple):
    """A server that was started."""

    url: str
    grpc_address: str
    process: psutil.Process


@contextlib.contextmanager
def server(models: Path | None) -> Iterator[Running]:
    """A server on free ports."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--device", "cpu"]
    if models is not None:
        command += ["--models", str(models)]
    root = Path(__file__).resolve().parents[1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        grpc_port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "RETINASERVE_LOG_LEVEL": "error",
        "RETINASERVE_GRPC_PORT": str(grpc_port),
        "RETINASERVE_DECODE_MEMORY_BYTES": str(DECODE_MEMORY_BYTES),
    }
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = re.findall(r"http://\S+", process.stdout.readline())[0]
            url = url.replace("localhost", "127.0.0.1")
            while httpx.get(f"{url}/readyz").status_code != 200:
                time.sleep(0.5)
            yield Running(url, f"127.0.0.1:{grpc_port}", psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(60)


def peak_bytes(pid: int) -> int:
    """Most memory that a process has had (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def main() -> None:
    """Run, print, exit with 1 where something was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--url", help="of a server that runs; its memory is not watched")
    parser.add_argument("--grpc", metavar="HOST:PORT", help="of that server; default: no messages")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="for the bodies of findings")
    parser.add_argument("--models", type=Path, help="repository of the server that is started")
    parser.add_argument("--strict", action="store_true", help="a slow /healthz is a finding")
    given = parser.parse_args()

    def some(first: int, count: int, url: str, grpc_address: str | None) -> Report:
        model = httpx.get(f"{url}/v1/models", verify=False).json()["models"][0]["name"]
        chosen = cases(given.seed, first, count, model=model)
        if grpc_address is None:
            chosen = ((number, case) for number, case in chosen if case.way != "grpc")
        return asyncio.run(
            run(url, chosen, grpc_address=grpc_address, clients=given.clients, keep=given.keep)
        )

    if given.url:
        report = some(given.first, given.count, given.url, given.grpc)
        memory = "not watched"
    else:
        warm_up = given.count // 5
        with server(given.models) as (url, grpc_address, process):
            idle = process.memory_info().rss
            report = some(given.first, warm_up, url, grpc_address)
            early = process.memory_info().rss
            report.add(some(given.first + warm_up, given.count - warm_up, url, grpc_address))
            late, peak, files = (
                process.memory_info().rss,
                peak_bytes(process.pid),
                process.num_fds(),
            )
        memory = (
            f"{idle / 1e6:.0f} MB idle, {early / 1e6:.0f} MB after the warm-up, "
            f"{late / 1e6:.0f} MB at the end, {peak / 1e6:.0f} MB at its peak: "
            f"{(peak - idle) / 1e6:.0f} MB above idle; {files} open files"
        )
        if given.count >= GROWTH_CASES and late - early > GROWTH_BYTES:
            report.findings.append(f"memory grew by more than {GROWTH_BYTES / 1e6:.0f} MB")
        if peak - idle > PEAK_BYTES:
            report.findings.append(f"memory rose by more than {PEAK_BYTES / 1e6:.0f} MB")
    if given.strict and report.slowest_probe > SLOW_PROBE_SECONDS:
        report.findings.append(f"/healthz took more than {SLOW_PROBE_SECONDS:g} s")
    for status, count in sorted(report.statuses.items()):
        print(f"{status}: {count}")
    print(f"slowest answer: {report.slowest:.2f} s, number {report.slowest_case}")
    print(f"slowest /healthz beside: {report.slowest_probe:.2f} s")
    print(f"memory: {memory}")
    for finding in report.findings:
        print(f"FINDING {finding}")
    sys.exit(1 if report.findings else 0)


if __name__ == "__main__":
    main()

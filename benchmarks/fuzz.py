"""Mutated pictures and malformed forms against a real server: no 5xx, no hang, no growth.

    python benchmarks/fuzz.py --count 20000
    python benchmarks/fuzz.py --url http://localhost:8000 --seed 7 --first 1234 --count 1

Every body is made from the seed and its number alone, so a finding is repeated by `--first NUMBER
--count 1`. Bodies that fail are kept in `--keep DIR`. Without --url a server is started, of the
bundled model or of `--models DIR`, and its memory watched after a warm-up of a fifth of the bodies.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from PIL import Image

EXPECTED = frozenset({200, 400, 408, 413, 415, 422, 503})
"""503 only with Retry-After; everything else that begins with 5 is a finding."""
HANG_SECONDS = 60.0
GROWTH_BYTES = 48 << 20
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
BOUNDARY = b"----fuzz"


@dataclass(frozen=True)
class Case:
    """One request."""

    number: int
    path: str
    content_type: str
    body: bytes


@dataclass
class Report:
    """What came back."""

    statuses: Counter[int] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest: float = 0.0


def seeds() -> list[bytes]:
    """Small valid files of each kind, with every sort of extra that a file may carry."""
    picture = Image.frombytes("RGB", (48, 40), random.Random(0).randbytes(48 * 40 * 3))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a cell " * 20
    frames = [picture.rotate(90 * turn) for turn in range(1, 3)]
    profile = bytes(range(256)) * 8
    return [
        _save(picture, "JPEG"),
        _save(picture, "JPEG", progressive=True, exif=exif, icc_profile=profile),
        _save(picture.convert("L"), "JPEG", quality=30),
        _save(picture.convert("CMYK"), "JPEG"),
        _save(picture, "JPEG", restart_marker_blocks=2, comment=b"x" * 300),
        _save(picture, "PNG", exif=exif, icc_profile=profile),
        _save(picture.convert("RGBA"), "PNG"),
        _save(picture.quantize(16), "PNG", transparency=3),
        _save(picture.convert("1"), "PNG"),
        _save(picture.convert("I;16"), "PNG"),
        _save(picture, "PNG", save_all=True, append_images=frames),
        _save(picture, "WEBP", exif=exif.tobytes(), icc_profile=profile),
        _save(picture.convert("RGBA"), "WEBP", lossless=True),
        _save(picture, "WEBP", save_all=True, append_images=frames),
    ]


def cases(seed: int, first: int, count: int) -> Iterator[Case]:
    """Requests by number; each is the same whatever others are made."""
    files = seeds()
    for number in range(first, first + count):
        yield _case(random.Random(f"{seed}-{number}"), number, files)


def _case(rng: random.Random, number: int, files: list[bytes]) -> Case:
    picture = mutate(rng, rng.choice(files), files)
    kind = rng.random()
    if kind < 0.7:
        tile = "?tile=auto" if rng.random() < 0.1 else ""
        return Case(number, f"/v1/detect{tile}", "application/octet-stream", picture)
    if kind < 0.85:
        path, name = rng.choice((("/v1/detect", b"file"), ("/v1/detect/batch", b"files")))
        return Case(number, path, *form(rng, name, picture))
    if kind < 0.95:
        path = rng.choice(("/v1/detect", "/v1/detect/batch"))
        return Case(number, path, "application/json", document(rng, picture))
    accept = rng.choice(("image/png", "image/jpeg"))
    return Case(number, f"/v1/detect#{accept}", "image/png", picture)


def mutate(rng: random.Random, data: bytes, files: list[bytes]) -> bytes:
    """The file with a few things wrong."""
    result = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 4, 8, 32))):
        if not result:
            break
        rng.choice(_MUTATIONS)(rng, result)
    if rng.random() < 0.05:
        other = rng.choice(files)
        result += other[rng.randrange(len(other)) :]
    return bytes(result)


def _flip(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _flip_in_header(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(min(len(data), 80))] = rng.randrange(256)


def _number(rng: random.Random, data: bytearray) -> None:
    width = rng.choice((1, 2, 4))
    value = rng.choice(INTERESTING) & ((1 << 8 * width) - 1)
    start = rng.randrange(min(len(data), rng.choice((40, len(data)))))
    data[start : start + width] = value.to_bytes(width, rng.choice(("big", "little")))


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _remove(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 64)]


def _repeat(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    piece = data[start : start + rng.randrange(1, 256)]
    data[start:start] = piece * rng.choice((1, 2, 50))


def _insert(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    data[start:start] = rng.randbytes(rng.randrange(1, 64))


_MUTATIONS: tuple[Callable[[random.Random, bytearray], None], ...] = (
    *(_flip, _flip, _flip_in_header, _number, _number),
    *(_cut, _remove, _repeat, _insert),
)


def form(rng: random.Random, name: bytes, picture: bytes) -> tuple[str, bytes]:
    """A multipart body that is good, or bad in some way; with its Content-Type."""
    head = (
        b'Content-Disposition: form-data; name="%s"; filename="a.jpg"\r\n'
        b"Content-Type: image/jpeg\r\n\r\n" % name
    )
    part = b"--" + BOUNDARY + b"\r\n" + head + picture + b"\r\n"
    body = part * rng.choice((1, 1, 2, 5, 100)) + b"--" + BOUNDARY + b"--\r\n"
    wrong = rng.randrange(8)
    if wrong == 0:
        body = mutate(rng, body, [body])
    elif wrong == 1:
        body = body.replace(b"\r\n", b"\n")
    elif wrong == 2:
        body = body.replace(b"form-data", rng.randbytes(6))
    elif wrong == 3:
        body = b"--" + BOUNDARY + b"\r\n" + b"X: y\r\n" * 2000 + body
    elif wrong == 4:
        body = (b"\r\n--" + BOUNDARY[:-1]) * 500 + body
    elif wrong == 5:
        body = body[: rng.randrange(len(body))]
    elif wrong == 6:
        body = body.replace(b'filename="a.jpg"', b"filename*=" + rng.randbytes(20).hex().encode())
    boundary = rng.choice(("----fuzz", "----fuzz", "----fuzz", '"', "x" * 80, ""))
    return f"multipart/form-data; boundary={boundary}", body


def document(rng: random.Random, picture: bytes) -> bytes:
    """A JSON body that is good, or bad in some way."""
    import base64

    text = base64.b64encode(picture)
    body = rng.choice(
        (
            b'{"image": "%s"}' % text,
            b'{"images": [{"id": "a", "image": "%s"}, {"image": "%s"}]}' % (text, text[:-3]),
            b'{"images": [%s]}' % b",".join([b'{"image": 1}'] * 70),
            b'{"image": %s"%s"%s}' % (b"[" * 2000, text, b"]" * 2000),
            b'{"images": {"image": "%s"}}' % text,
        )
    )
    return mutate(rng, body, [body]) if rng.random() < 0.4 else body


async def run(url: str, chosen: Iterator[Case], *, clients: int, keep: Path | None) -> Report:
    """Send the requests, so many at a time."""
    report = Report()
    # A client checks that the server still serves, and its own connection may be closed.
    async with httpx.AsyncClient(base_url=url, timeout=HANG_SECONDS, verify=False) as client:

        async def work() -> None:
            for case in chosen:
                await _send(client, case, report, keep)

        await asyncio.gather(*(work() for _ in range(clients)))
    return report


async def _send(client: httpx.AsyncClient, case: Case, report: Report, keep: Path | None) -> None:
    path, _, accept = case.path.partition("#")
    headers = {"Content-Type": case.content_type} | ({"Accept": accept} if accept else {})
    started = time.perf_counter()
    finding = None
    try:
        answer = await client.post(path, content=case.body, headers=headers)
    except httpx.TimeoutException:
        finding = f"no answer within {HANG_SECONDS:g} s"
    except httpx.TransportError as error:
        finding = f"the connection broke: {error!r}"
    else:
        report.statuses[answer.status_code] += 1
        if answer.status_code not in EXPECTED:
            finding = f"{answer.status_code} {answer.text[:200]}"
        elif answer.status_code == 503 and "retry-after" not in answer.headers:
            finding = "503 without Retry-After"
        elif '"status":500' in answer.text:
            finding = f"a picture of a batch: {answer.text[:300]}"
    report.slowest = max(report.slowest, time.perf_counter() - started)
    if finding is not None:
        report.findings.append(f"number {case.number}, {case.path}: {finding}")
        if keep is not None:
            _keep(keep, case)


def _keep(folder: Path, case: Case) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{case.number}.body").write_bytes(case.body)


@contextlib.contextmanager
def server(models: Path | None) -> Iterator[tuple[str, psutil.Process]]:
    """A server on a free port."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--device", "cpu"]
    if models is not None:
        command += ["--models", str(models)]
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "RETINASERVE_LOG_LEVEL": "error"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = re.findall(r"http://\S+", process.stdout.readline())[0]
            url = url.replace("localhost", "127.0.0.1")
            while httpx.get(f"{url}/readyz").status_code != 200:
                time.sleep(0.5)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


def _print(report: Report) -> None:
    for status, count in sorted(report.statuses.items()):
        print(f"{status}: {count}")
    print(f"slowest answer: {report.slowest:.2f} s")
    for finding in report.findings[:20]:
        print(f"FINDING {finding}")


def main() -> None:
    """Run, print, exit with 1 where something was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--url")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--models", type=Path)
    given = parser.parse_args()

    def some(first: int, count: int, url: str) -> Report:
        chosen = cases(given.seed, first, count)
        return asyncio.run(run(url, chosen, clients=given.clients, keep=given.keep))

    if given.url:
        report = some(given.first, given.count, given.url)
        _print(report)
        sys.exit(1 if report.findings else 0)
    warm_up = given.count // 5
    with server(given.models) as (url, process):
        early = some(given.first, warm_up, url)
        before = process.memory_info().rss
        late = some(given.first + warm_up, given.count - warm_up, url)
        after = process.memory_info().rss
        files = process.num_fds()
        alive = httpx.get(f"{url}/healthz").status_code == 200
    late.statuses.update(early.statuses)
    late.findings[:0] = early.findings
    _print(late)
    print(f"memory: {before >> 20} MiB after the warm-up, {after >> 20} MiB at the end")
    print(f"open files at the end: {files}; alive: {alive}")
    sys.exit(1 if late.findings or not alive or after - before > GROWTH_BYTES else 0)


def _save(picture: Image.Image, kind: str, **options: object) -> bytes:
    target = io.BytesIO()
    picture.save(target, kind, **options)
    return target.getvalue()


if __name__ == "__main__":
    main()

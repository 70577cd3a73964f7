"""How soon the service is ready, and what memory it holds after many requests.

    python benchmarks/startup.py

Start-up is from the start of the process to the first `GET /readyz` that says 200, asked for every
20 ms; the first start is left out, it reads the files into the system's cache. Then one service
answers 10,000 requests of 16 closed-loop clients, and its resident memory is compared with that
after 500.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from report import Report, add_options
from serving import Running, draw_images, run_script, served

from service.settings import bundled_models

CLIENTS = 16
READY_SECONDS = 2.5
WARM_REQUESTS = 500
GROWTH = 1.05
RESIDENT_MB = 450.0
HOUR = 3600


def send(server: Running, images: Path, count: int) -> int:
    """Have `count` requests answered; how many of the answers were not good."""
    load = run_script(
        *("load.py", server.url, images, "--clients", CLIENTS),
        *("--seconds", HOUR, "--limit", count),
    )
    return int(load["requests"]) - int(load["statuses"].get("200", 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=bundled_models())
    parser.add_argument("--starts", type=int)
    parser.add_argument("--requests", type=int)
    add_options(parser)
    arguments = parser.parse_args()
    starts = arguments.starts or (3 if arguments.quick else 9)
    requests = arguments.requests or (800 if arguments.quick else 10_000)
    report = Report("startup", "Start-up and memory", arguments)
    seconds = report.table({"start": "d", "ready after, s": ".2f", "core-s": ".2f", "MB": ".1f"})
    ready: list[float] = []
    cost: list[float] = []
    with served(arguments.models):
        pass
    for number in range(1, starts + 1):
        with served(arguments.models) as server:
            ready.append(server.ready_seconds)
            cost.append(server.cpu_seconds())
            seconds.row(number, ready[-1], cost[-1], server.resident())
    levels = report.table({"requests": "d", "resident, MB": ".1f", "not 200": "d"})
    held: list[float] = []
    with tempfile.TemporaryDirectory() as scratch, served(arguments.models) as server:
        images = draw_images(Path(scratch) / "images")
        for done, more in ((WARM_REQUESTS, WARM_REQUESTS), (requests, requests - WARM_REQUESTS)):
            bad = send(server, images, more)
            held.append(server.resident())
            levels.row(done, held[-1], bad)
    report.figure("process start to ready", ready, better="lower", bound=READY_SECONDS, unit="s")
    report.figure("CPU time until then", cost, better="lower", unit="core-s")
    report.figure(
        f"resident memory after {requests} requests over that after {WARM_REQUESTS}",
        [held[1] / held[0]],
        better="lower",
        bound=GROWTH,
    )
    report.figure(
        f"resident memory after {requests} requests",
        [held[1]],
        better="lower",
        bound=RESIDENT_MB,
        unit="MB",
    )
    report.close()


if __name__ == "__main__":
    main()

"""What becomes of promises when far more is asked than can be done.

    python benchmarks/overload.py                       # bundled model, drawn images
    python benchmarks/overload.py --images FOLDER     # your own JPEGs
    python benchmarks/overload.py --mixed               # light clients beside one that is dear

First the capacity: answers a second under 16 closed-loop clients. Then open-loop arrivals at 0.5 to
10 times that, each with a deadline. Checked at every load: the 99th percentile of accepted requests
within the deadline, at most 0.1 % late ones, every refusal a 503 with Retry-After, nothing else;
and at the highest load at least 80 % of the answers that the load of 1 gave. `loop core-ms` is the
event loop's CPU time for each request. The two highest loads differ in nothing but refusals, so the
difference of the loop's time between them is what refusals cost.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import client
import neighbours
from serving import Running, draw_images, run_script, served

from service.settings import bundled_models
from service.system.cpus import cpu_count

FACTORS = (0.5, 1.0, 2.0, 5.0, 10.0)
CLIENTS = 16
LATE_SHARE = 0.001
GOODPUT_SHARE = 0.8


class PeakMemory:
    """The most memory that a service had resident while this was watching, in MB."""

    def __init__(self, server: Running) -> None:
        self.peak = 0.0
        self._server = server
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.peak = max(self.peak, self._server.resident())


def row(
    server: Running,
    images: Path,
    *,
    factor: float,
    capacity: float,
    seconds: float,
    deadline: int,
) -> dict[str, Any]:
    """One load."""
    before, loop_before = server.cpu_seconds(), server.loop_seconds()
    with PeakMemory(server) as memory:
        seen = run_script(
            *("load.py", server.url, images, "--rate", factor * capacity),
            *("--seconds", seconds, "--deadline", deadline),
        )
    cpu = server.cpu_seconds() - before
    loop = server.loop_seconds() - loop_before
    return seen | {
        "factor": factor,
        "peak_mb": memory.peak,
        "cores": cpu / seconds,
        "loop_ms": 1e3 * loop / seen["requests"],
    }


def faults(rows: list[dict[str, Any]], deadline: int) -> list[str]:
    """What does not hold."""
    found = []
    for each in rows:
        name = f"{each['factor']:g}x"
        if each["p99_ms"] is None or each["p99_ms"] > deadline:
            found.append(f"{name}: p99 of accepted requests is {each['p99_ms']} ms")
        late = each["statuses"].get("504", 0) / each["requests"]
        if late > LATE_SHARE:
            found.append(f"{name}: {late:.2%} are late")
        if each["without_retry_after"]:
            found.append(f"{name}: {each['without_retry_after']} refusals without Retry-After")
        if other := set(each["statuses"]) - {"200", "503", "504"}:
            found.append(f"{name}: also {', '.join(sorted(other))}")
    full = next(each["good_per_second"] for each in rows if each["factor"] == 1.0)
    if rows[-1]["good_per_second"] < GOODPUT_SHARE * full:
        found.append(f"goodput falls from {full:.1f}/s to {rows[-1]['good_per_second']:.1f}/s")
    return found


def refusal_ms(rows: list[dict[str, Any]]) -> float:
    """Core-milliseconds of the event loop that one more refusal costs."""
    few, many = rows[-2:]

    def refused(each: dict[str, Any]) -> int:
        return int(each["statuses"].get("503", 0))

    spent = many["loop_ms"] * many["requests"] - few["loop_ms"] * few["requests"]
    return float(spent / (refused(many) - refused(few)))


def show(each: dict[str, Any]) -> str:
    """A row of the table."""
    statuses, sent = each["statuses"], each["requests"]

    def share(status: str) -> str:
        return f"{statuses.get(status, 0) / sent:.2%}"

    def milliseconds(name: str) -> str:
        return "-" if each[name] is None else f"{each[name]:.0f}"

    return (
        f"| {each['factor']:g}x | {sent} | {each['good_per_second']:.1f} | "
        f"{milliseconds('p50_ms')} | {milliseconds('p99_ms')} | {share('503')} | {share('504')} | "
        f"{milliseconds('refused_p99_ms')} | {each['cores']:.2f} | {each['loop_ms']:.2f} | "
        f"{each['peak_mb']:.0f} | "
        f"{each['client_cpu_ms']:.2f} | {milliseconds('lag_p99_ms')} |"
    )


def beside_neighbours(arguments: argparse.Namespace) -> list[str]:
    """Light clients beside each kind of neighbour; what does not hold."""
    with tempfile.TemporaryDirectory() as scratch:
        images = arguments.images or draw_images(Path(scratch) / "images")
        with served(arguments.models) as server:
            light = client.requests(server.url, images, f"X-Deadline-Ms: {neighbours.DEADLINE_MS}")
            found = neighbours.mixed(
                server,
                light,
                seconds=arguments.seconds,
                cores=cpu_count(),
                say=lambda line: print(line, flush=True),
            )
    print("\n" + ("\n".join(found) if found else "every promise was kept"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=bundled_models())
    parser.add_argument("--images", type=Path, help="folder of JPEG images")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load")
    parser.add_argument("--deadline", type=int, default=1000, help="milliseconds")
    parser.add_argument("--mixed", action="store_true", help="what neighbours.py describes")
    arguments = parser.parse_args()
    if arguments.mixed:
        raise SystemExit(bool(beside_neighbours(arguments)))
    with tempfile.TemporaryDirectory() as scratch:
        images = arguments.images or draw_images(Path(scratch) / "images")
        with served(arguments.models) as server:
            run_script("load.py", server.url, images, "--clients", CLIENTS, "--seconds", 3)
            loaded = run_script(
                *("load.py", server.url, images, "--clients", CLIENTS),
                *("--seconds", arguments.seconds),
            )
            capacity = loaded["per_second"]
            print(f"capacity: {capacity:.1f}/s under {CLIENTS} clients; deadline", end=" ")
            print(f"{arguments.deadline} ms; {arguments.seconds:g} s a row\n")
            print(
                "| load | sent | good/s | p50 ms | p99 ms | 503 | 504 | 503 p99 ms | server cores "
                "| loop core-ms | peak MB | client core-ms | client lag p99 ms |"
            )
            print("|---" * 13 + "|")
            rows = []
            for factor in FACTORS:
                rows.append(
                    row(
                        server,
                        images,
                        factor=factor,
                        capacity=capacity,
                        seconds=arguments.seconds,
                        deadline=arguments.deadline,
                    )
                )
                print(show(rows[-1]), flush=True)
                time.sleep(arguments.deadline / 1e3)
    found = faults(rows, arguments.deadline)
    print(f"\na refusal costs {refusal_ms(rows):.2f} core-ms of the event loop")
    print("\n".join(found) if found else "every promise was kept")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()

"""How much of the bare runtime is left behind HTTP, and what a request costs beside it.

    python benchmarks/service_efficiency.py                     # bundled model, drawn images
    python benchmarks/service_efficiency.py --images FOLDER   # your own JPEGs

Alternates, in one run, between a bare loop (decode, letterbox, session; the same threads), two such
loops side by side, and the service under 16 closed-loop clients; then does the same with a
near-free network, where the difference in CPU time is the service's own cost. There the rounds are
many and short, so that what else the machine does weighs on all alike, and each round's difference
is told apart by thread. The extreme tenth of the rounds at either end is left out.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

from near_free_model import write_near_free_model
from report import Report, Table, add_options, trimmed
from serving import Running, draw_images, run_script, served

from service.runtime.artifact import scan_repository
from service.settings import bundled_models

CLIENTS = 16
RATIO = 0.95
EXTRA_MS = 0.8


class Round(NamedTuple):
    """A bare loop and the service after it; core-milliseconds are for each image."""

    ratio: float
    """Images a second by HTTP over those of the bare loop."""
    over_two: float
    """The same over those of two such loops side by side, with one session."""
    extra: float
    """The service's core-milliseconds beyond the bare loop's."""
    extra_over_two: float
    """The same beyond those of two bare loops, which keep the cores as busy as the service does:
    where virtual cores share a real one, the same work takes longer on both than on one."""
    event_loop: float
    threads: float
    """Of the threads that decode and run the session, beyond what both cost the bare loop."""


def measure(
    server: Running, model: Path, images: Path, table: Table, seconds: float, *, flip: bool
) -> Round:
    """One round; `flip` lets the service go first."""

    def alone(loops: int = 1) -> dict[str, float]:
        return run_script("bare_loop.py", model, images, "--seconds", seconds, "--loops", loops)

    two = alone(2)
    first = None if flip else alone()
    before, threads = server.cpu_seconds(), server.thread_seconds()
    load = run_script("load.py", server.url, images, "--clients", CLIENTS, "--seconds", seconds)
    if set(load["statuses"]) != {"200"}:
        raise SystemExit(f"not every answer was 200: {load['statuses']}")
    count = load["requests"]
    cpu_ms = 1e3 * (server.cpu_seconds() - before) / count
    by_thread = {
        name: 1e3 * (total - threads.get(name, 0.0)) / count
        for name, total in server.thread_seconds().items()
    }
    bare = first or alone()
    # On a CPU decode threads run the session too; onnxruntime's own are called as the loader.
    work = sum(by_thread.get(name, 0.0) for name in ("decode", "device", "model-loader"))
    found = Round(
        ratio=load["per_second"] / bare["per_second"],
        over_two=load["per_second"] / two["per_second"],
        extra=cpu_ms - bare["cpu_ms"],
        extra_over_two=cpu_ms - two["cpu_ms"],
        event_loop=by_thread["event loop"],
        threads=work - bare["cpu_ms"],
    )
    table.row(
        *(len(table.rows) + 1, two["per_second"], two["cpu_ms"]),
        *(bare["per_second"], bare["cpu_ms"]),
        *(load["per_second"], cpu_ms, found.ratio, load["p50_ms"], load["p99_ms"]),
        *(found.event_loop, found.threads, load["client_cpu_ms"]),
    )
    return found


def compare(
    server: Running, model: Path, images: Path, table: Table, *, rounds: int, seconds: float
) -> list[Round]:
    """Alternate bare loop and service."""
    run_script("load.py", server.url, images, "--clients", CLIENTS, "--seconds", 2)
    return [
        measure(server, model, images, table, seconds, flip=bool(number % 2))
        for number in range(rounds)
    ]


def table_of(report: Report, title: str) -> Table:
    """What a round shows."""
    return report.table(
        {"round": "d", "two bare, /s": ".1f", "two bare, core-ms": ".2f", "bare, /s": ".1f"}
        | {"bare, core-ms": ".2f"}
        | {"HTTP, /s": ".1f", "HTTP, core-ms": ".2f", "ratio": ".3f", "p50, ms": ".0f"}
        | {"p99, ms": ".0f", "event loop, core-ms": ".2f", "threads, extra": ".2f"}
        | {"client, core-ms": ".2f"},
        f"{title}, {CLIENTS} connections",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="repository folder; default: the bundled one")
    parser.add_argument("--images", type=Path, help="folder of JPEGs; default: drawn 640x480")
    parser.add_argument("--rounds", type=int, help="with the real network")
    parser.add_argument("--seconds", type=float, help="of each half of such a round")
    parser.add_argument("--free-rounds", type=int, help="with the near-free network")
    add_options(parser)
    arguments = parser.parse_args()
    rounds = arguments.rounds or (2 if arguments.quick else 6)
    seconds = arguments.seconds or (4.0 if arguments.quick else 6.0)
    free_rounds = arguments.free_rounds or (4 if arguments.quick else 12)
    repository = arguments.model or bundled_models()
    report = Report("ceiling", "What HTTP leaves of the bare loop", arguments)
    with tempfile.TemporaryDirectory() as scratch:
        images = arguments.images or draw_images(Path(scratch) / "images")
        model = scan_repository(repository)[-1].path
        table = table_of(report, model.parent.parent.name)
        with served(repository) as server:
            real = compare(server, model, images, table, rounds=rounds, seconds=seconds)
        free = write_near_free_model(Path(scratch) / "models")
        table = table_of(report, "near-free network")
        with served(Path(scratch) / "models") as server:
            light = compare(server, free, images, table, rounds=free_rounds, seconds=2.0)
    report.figure(
        "images/s through HTTP over bare loop",
        trimmed([each.ratio for each in real]),
        better="higher",
        bound=RATIO,
    )
    report.figure(
        "the same over two bare loops side by side",
        trimmed([each.over_two for each in real]),
        better="higher",
    )
    report.figure(
        "HTTP over bare loop, near-free network",
        trimmed([each.ratio for each in light]),
        better="higher",
    )
    for name, values, bound in (
        ("server CPU beyond decode and inference", [each.extra for each in light], EXTRA_MS),
        ("the same, beyond two bare loops", [each.extra_over_two for each in light], None),
        ("of it the event loop", [each.event_loop for each in light], None),
        ("of it the threads that decode and infer", [each.threads for each in light], None),
    ):
        report.figure(
            f"{name}, near-free network, each request",
            trimmed(values),
            better="lower",
            bound=bound,
            unit="core-ms",
        )
    report.close()


if __name__ == "__main__":
    main()

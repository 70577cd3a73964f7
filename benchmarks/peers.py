"""The service beside LitServe, BentoML, Ray Serve and plain FastAPI: the same file, decode, cores.

    python -m venv peers-venv
    peers-venv/bin/pip install -r benchmarks/peers/requirements.txt
    python benchmarks/peers.py --python peers-venv/bin/python
    python benchmarks/peers.py --python ... --only litserve --variants    # which set-up is best

All servers, ours too, run with the same interpreter and the same libraries, and the peers share one
recipe (`peers/recipe.py`): our decoding, our session options, our JSON. Each is set up in the way
that proved its best, see the head of its file. Before anything is measured, every server has to
find in a picture what ours finds.

In each round each server is started alone, warmed up, loaded at each number of connections, and
stopped: nobody idles beside another, for some cost CPU even then. The order turns by one from round
to round. Ratios are those of one round. CPU time is that of the server's whole process tree.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from near_free_model import write_near_free_model
from peer_servers import OURS, PEERS, Setup, Tree, best, running, variants
from report import Report, add_options
from serving import draw_pictures, run_script

from service.artifact import scan_repository
from service.settings import bundled_models

CONNECTIONS = (1, 8, 16, 32)
DECIDING = 16
WARM_SECONDS = 3.0
P99_BOUND = 0.9
NEAR_FREE_BOUNDS = {"litserve": 1.6, "fastapi": 1.1}
PIXELS, SCORE = 0.1, 0.002
"""By how much answers may differ: sums of other threads round differently."""
COLUMNS = {
    "server": "",
    "connections": "d",
    "pictures/s": ".1f",
    "lowest": ".1f",
    "highest": ".1f",
    "p50, ms": ".1f",
    "p99, ms": ".1f",
    "core-ms": ".2f",
    "cores": ".2f",
    "MB": ".0f",
    "ours: pictures/s": ".2f",
    "ours: p99": ".2f",
}
MEDIANS = ("p50_ms", "p99_ms", "cpu_ms", "busy", "resident")
Load = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What to measure, and with what."""

    python: Path
    rounds: int
    seconds: float
    connections: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """A model file and the pictures for it."""

    name: str
    repository: Path
    pictures: Path

    @property
    def picture(self) -> bytes:
        return min(self.pictures.glob("*.jpg")).read_bytes()


@dataclass
class Measured:
    """All rounds of one server."""

    name: str
    loads: dict[int, list[Load]] = field(default_factory=dict)

    def values(self, connections: int, what: str) -> list[float]:
        return [float(each[what]) for each in self.loads[connections]]

    def median(self, connections: int, what: str) -> float:
        return statistics.median(self.values(connections, what))

    def spread(self, connections: int) -> float:
        """Half of the range of pictures/s over the rounds, as a part of their median."""
        values = self.values(connections, "per_second")
        return (max(values) - min(values)) / 2 / statistics.median(values)


def measure(plan: Plan, task: Task, servers: Mapping[str, Setup]) -> dict[str, Measured]:
    """Every server in turn, `plan.rounds` times."""
    names = list(servers)
    found = {name: Measured(name, {each: [] for each in plan.connections}) for name in names}
    expected: list[dict[str, Any]] | None = None
    for turn in range(plan.rounds):
        first = turn % len(names) if turn else 0
        for name in names[first:] + names[:first]:
            with started(plan, task, servers[name]) as server:
                answer = server.answer(task.picture)["detections"]
                expected = answer if expected is None else expected
                must_agree(name, answer, expected)
                loads_of(plan, task, server, found[name])
    return found


@contextlib.contextmanager
def started(plan: Plan, task: Task, setup: Setup) -> Iterator[Tree]:
    model = scan_repository(task.repository)[-1].path
    with (
        tempfile.TemporaryDirectory(prefix="peers-") as scratch,
        running(
            setup,
            python=plan.python,
            repository=task.repository,
            model=model,
            picture=task.picture,
            scratch=Path(scratch),
        ) as server,
    ):
        yield server


def loads_of(plan: Plan, task: Task, server: Tree, found: Measured) -> None:
    """One turn of one server."""
    load = ["load.py", server.url, task.pictures, "--clients"]
    run_script(*load, DECIDING, "--seconds", WARM_SECONDS)
    for connections in plan.connections:
        before = server.cpu_seconds()
        answered = run_script(*load, connections, "--seconds", plan.seconds)
        if set(answered["statuses"]) != {"200"}:
            raise SystemExit(f"{found.name}: not every answer was 200: {answered['statuses']}")
        cpu = 1e3 * (server.cpu_seconds() - before) / answered["requests"]
        busy = cpu * answered["per_second"] / 1e3
        found.loads[connections].append(
            answered | {"cpu_ms": cpu, "busy": busy, "resident": server.resident()}
        )


def must_agree(
    name: str, answer: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse to compare servers that do not do the same work."""
    if len(answer) != len(expected) or not expected:
        raise SystemExit(f"{name} found {len(answer)} objects, expected {len(expected)}, not none")
    for one, other in zip(answer, expected, strict=True):
        boxes = [abs(one["box"][side] - other["box"][side]) for side in other["box"]]
        same = one["label"] == other["label"] and max(boxes) <= PIXELS
        if not same or abs(one["score"] - other["score"]) > SCORE:
            raise SystemExit(f"{name} found {one}, expected {other}")


def ratios(ours: Measured, peer: Measured, connections: int, what: str) -> list[float]:
    """Ours over the peer's, round by round."""
    pairs = zip(ours.values(connections, what), peer.values(connections, what), strict=True)
    return [one / other for one, other in pairs]


def tabulate(report: Report, title: str, found: Mapping[str, Measured], plan: Plan) -> None:
    """Medians over the rounds."""
    table, ours = report.table(COLUMNS, title), found.get(OURS)
    for connections in plan.connections:
        for name, each in found.items():
            rates = each.values(connections, "per_second")
            compared: list[float | None] = [None, None]
            if ours is not None and each is not ours:
                compared = [
                    statistics.median(ratios(ours, each, connections, what))
                    for what in ("per_second", "p99_ms")
                ]
            table.row(
                *(name, connections, statistics.median(rates), min(rates), max(rates)),
                *(each.median(connections, what) for what in MEDIANS),
                *compared,
            )


def judge_real(report: Report, found: Mapping[str, Measured], plan: Plan) -> None:
    """With a real network: never slower, and a shorter queue."""
    ours, peers = found[OURS], [each for name, each in found.items() if name != OURS]
    for connections in plan.connections:
        for peer in peers:
            spread = max(ours.spread(connections), peer.spread(connections))
            report.figure(
                f"real: pictures/s over {peer.name}'s, {connections} connections",
                ratios(ours, peer, connections, "per_second"),
                better="higher",
                # Slower by less than the rounds differ among themselves is not slower.
                bound=math.floor(1000 * (1 - spread)) / 1000,
            )
    if DECIDING in plan.connections:
        quickest = min(peers, key=lambda peer: peer.median(DECIDING, "p99_ms"))
        report.figure(
            f"real: p99 over the best peer's ({quickest.name}), {DECIDING} connections",
            ratios(ours, quickest, DECIDING, "p99_ms"),
            better="lower",
            bound=P99_BOUND,
        )


def judge_near_free(report: Report, found: Mapping[str, Measured], plan: Plan) -> None:
    """With hardly any network: the service itself."""
    ours = found[OURS]
    for name, bound in NEAR_FREE_BOUNDS.items():
        if name in found and DECIDING in plan.connections:
            report.figure(
                f"near-free: pictures/s over {name}'s, {DECIDING} connections",
                ratios(ours, found[name], DECIDING, "per_second"),
                better="higher",
                bound=bound,
            )


JUDGES: dict[str, Callable[[Report, Mapping[str, Measured], Plan], None]] = {
    "real": judge_real,
    "near-free": judge_near_free,
}


def main() -> None:
    arguments = _parser().parse_args()
    report = Report("peers", "The service beside its peers", arguments)
    connections = (DECIDING,) if arguments.variants else tuple(arguments.connections)
    rounds = arguments.rounds or (1 if report.quick else 5)
    seconds = arguments.seconds or (3.0 if report.quick else 15.0)
    plan = Plan(arguments.python.absolute(), rounds, seconds, connections)
    wanted = [OURS, *arguments.only]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pictures = draw_pictures(folder / "pictures")
        write_near_free_model(folder / "near-free")
        tasks = {
            "real": Task("real", bundled_models(), pictures),
            "near-free": Task("near-free", folder / "near-free", pictures),
        }
        for name in arguments.model:
            if arguments.variants:
                servers = {
                    f"{peer}: {setup}": setup for peer in wanted[1:] for setup in variants(peer)
                }
            else:
                servers = {peer: best(peer, keep_memory=arguments.keep_memory) for peer in wanted}
            found = measure(plan, tasks[name], servers)
            title = f"{name} model, {plan.rounds} rounds of {plan.seconds:g} s"
            tabulate(report, title, found, plan)
            if not arguments.variants:
                JUDGES[name](report, found, plan)
    if arguments.variants:
        return
    report.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, required=True, help="of the peers' environment")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="of each load")
    parser.add_argument("--connections", type=_numbers, default=CONNECTIONS, metavar="N,N...")
    parser.add_argument("--model", type=_names(JUDGES), default=list(JUDGES), metavar="real,...")
    parser.add_argument("--only", type=_names(PEERS), default=list(PEERS), metavar="PEER,...")
    parser.add_argument(
        "--variants", action="store_true", help="try every set-up of the peers; nothing is saved"
    )
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="tell the peers' allocator, as ours does its own, to keep what pictures leave behind",
    )
    add_options(parser)
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(","))


def _names(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    main()

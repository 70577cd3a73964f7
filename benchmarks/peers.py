"""The service beside LitServe, BentoML, Ray Serve and plain FastAPI: the same file, decode, cores.

    python -m venv .venv-peers
    .venv-peers/bin/pip install -r benchmarks/peers/requirements.txt
    python benchmarks/peers.py --python .venv-peers/bin/python
    python benchmarks/peers.py --python ... --model near-free --only litserve --quick

All servers, ours too, run with the same interpreter and the same libraries, and the peers share one
recipe (`peers/recipe.py`): our decoding, our session options, our JSON. Each peer runs in the one
of its set-ups (`peer_servers.py`) that is fastest at 16 connections just before, tried one after
the other; ours runs with its defaults. Before anything is measured, every server has to find in an
image what ours finds.

In each round every server is started, warmed up and frozen (SIGSTOP, its whole process tree). Then
for each number of connections they are loaded one after the other, each thawed for its turn: none
idles beside another, for some cost CPU even then, and little time lies between those that are
compared. They have several turns, and the first of them is another one each time: a machine that
others use is slow for some seconds at a time, and a long turn would meet more or less of that. What
a server did in a round is what it did in all its turns; ratios are those of one round. CPU time is
that of the server's whole process tree.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from near_free_model import write_near_free_model
from peer_rounds import Detections, Load, Measured, allowed, must_agree, ratios, together
from peer_servers import DEFAULTS, OURS, PEERS, NotStarted, Setup, Tree, running
from report import Report, add_options
from serving import draw_images, run_script

from service.runtime.artifact import scan_repository
from service.settings import bundled_models

CONNECTIONS = (1, 8, 16, 32)
DECIDING = 16
WARM_SECONDS = 3.0
THAW_SECONDS = 1.0
"""Of one client, before a turn is measured."""
P99_BOUND = 0.95
NEAR_FREE_BOUND = 1.1
DISTRIBUTIONS = ("fastapi", "litserve", "bentoml", "ray", "uvicorn", "onnxruntime", "pillow")
COLUMNS = {
    "server": "",
    "connections": "d",
    "images/s": ".1f",
    "lowest": ".1f",
    "highest": ".1f",
    "p50, ms": ".1f",
    "p99, ms": ".1f",
    "core-ms": ".2f",
    "cores": ".2f",
    "MB": ".0f",
    "ours: images/s": ".2f",
    "ours: p99": ".2f",
}
MEDIANS = ("p50_ms", "p99_ms", "cpu_ms", "busy", "resident")
SETUP_COLUMNS = {
    "peer": "",
    "set-up": "",
    "images/s": ".1f",
    "p50, ms": ".1f",
    "p99, ms": ".1f",
    "core-ms": ".2f",
    "cores": ".2f",
}


@dataclass(frozen=True)
class Plan:
    """What to measure, and with what."""

    python: Path
    rounds: int
    turns: int
    seconds: float
    connections: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """A model file and the images for it."""

    name: str
    repository: Path
    images: Path

    @property
    def image(self) -> bytes:
        return min(self.images.glob("*.jpg")).read_bytes()


def measure(plan: Plan, task: Task, servers: Mapping[str, Setup]) -> dict[str, Measured]:
    """Every server in turn, `plan.rounds` times."""
    names = list(servers)
    found = {name: Measured(name, {each: [] for each in plan.connections}) for name in names}
    with started(plan, task, DEFAULTS) as ours:
        expected = detections(ours, task)
    for number in range(plan.rounds):
        with contextlib.ExitStack() as stack:
            trees = {}
            for name, setup in servers.items():
                trees[name] = server = stack.enter_context(started(plan, task, setup))
                must_agree(name, detections(server, task), expected)
                load(task, server, DECIDING, WARM_SECONDS)
                server.freeze()
            first = number % len(names)
            for connections in plan.connections:
                turns: dict[str, list[Load]] = {name: [] for name in names}
                for _ in range(plan.turns):
                    for name in names[first:] + names[:first]:
                        trees[name].thaw()
                        turns[name].append(one_turn(plan, task, trees[name], connections, name))
                        trees[name].freeze()
                    first = (first + 1) % len(names)
                for name in names:
                    found[name].loads[connections].append(together(turns[name]))
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
            image=task.image,
            scratch=Path(scratch),
        ) as server,
    ):
        yield server


def load(task: Task, server: Tree, connections: int, seconds: float) -> Load:
    arguments = ("--clients", connections, "--seconds", seconds, "--latencies")
    return run_script("load.py", server.url, task.images, *arguments)


def one_turn(plan: Plan, task: Task, server: Tree, connections: int, name: str) -> Load:
    """One server at one number of connections."""
    load(task, server, 1, THAW_SECONDS)
    before = server.cpu_seconds()
    answered = load(task, server, connections, plan.seconds)
    if set(answered["statuses"]) != {"200"}:
        raise SystemExit(f"{name}: not every answer was 200: {answered['statuses']}")
    cpu_seconds = server.cpu_seconds() - before
    return answered | {"cpu_seconds": cpu_seconds, "resident": server.resident()}


def detections(server: Tree, task: Task) -> Detections:
    found: Detections = server.answer(task.image)["detections"]
    return found


def fastest(report: Report, plan: Plan, task: Task, peers: Sequence[str]) -> dict[str, Setup]:
    """Try every set-up of each peer, one after the other; the one with the highest rate.

    Not side by side: set-ups of one peer may want the same ports, as those of HAProxy do. A set-up
    that does not start here is left out.
    """
    table = report.table(SETUP_COLUMNS, f"{task.name} model, every set-up of the peers")
    chosen = {}
    for peer in peers:
        best = 0.0
        for setup in PEERS[peer]:
            name = str(setup)
            try:
                found = measure(plan, task, {name: setup})[name]
            except NotStarted as error:
                print(f"{peer}, {name}: {error}", flush=True)
                continue
            whats = ("per_second", "p50_ms", "p99_ms", "cpu_ms", "busy")
            table.row(peer, name, *(found.median(DECIDING, what) for what in whats))
            if found.median(DECIDING, "per_second") > best:
                best, chosen[peer] = found.median(DECIDING, "per_second"), setup
        if peer not in chosen:
            raise SystemExit(f"{peer}: none of its set-ups starts")
    return chosen


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
            report.figure(
                f"real: images/s over {peer.name}'s, {connections} connections",
                ratios(ours, peer, connections, "per_second"),
                better="higher",
                bound=allowed(ours, peer, connections),
            )
    if DECIDING in plan.connections:
        quickest = min(peers, key=lambda peer: peer.median(DECIDING, "p99_ms"))
        report.figure(
            f"real: p99 over the best peer's, {DECIDING} connections",
            ratios(ours, quickest, DECIDING, "p99_ms"),
            better="lower",
            bound=P99_BOUND,
        )


def judge_near_free(report: Report, found: Mapping[str, Measured], plan: Plan) -> None:
    """With hardly any network: the service itself."""
    ours = found[OURS]
    for name in found:
        if name != OURS and DECIDING in plan.connections:
            report.figure(
                f"near-free: images/s over {name}'s, {DECIDING} connections",
                ratios(ours, found[name], DECIDING, "per_second"),
                better="higher",
                bound=NEAR_FREE_BOUND,
            )


JUDGES: dict[str, Callable[[Report, Mapping[str, Measured], Plan], None]] = {
    "real": judge_real,
    "near-free": judge_near_free,
}


def environment(report: Report, python: Path) -> None:
    """What the servers run with: not what this script does."""
    code = "import sys; from importlib.metadata import version as v; print(*map(v, sys.argv[1:]))"
    told = subprocess.run([python, "-c", code, *DISTRIBUTIONS], capture_output=True, text=True)
    if told.returncode:
        why = told.stderr.strip().splitlines()[-1]
        raise SystemExit(f"{python}: {why}; install benchmarks/peers/requirements.txt there")
    table = report.table(dict.fromkeys(DISTRIBUTIONS, ""), "The servers' environment")
    table.row(*told.stdout.split())


def compare(report: Report, plan: Plan, task: Task, peers: Mapping[str, Setup]) -> None:
    """Ours beside each peer in one set-up."""
    found = measure(plan, task, {OURS: DEFAULTS, **peers})
    turns = f"{plan.turns} turns of {plan.seconds:g} s"
    titles = [f"{task.name} model, {plan.rounds} rounds, in each {turns}"]
    titles += [f"- {name}: {setup}" for name, setup in peers.items()]
    tabulate(report, "\n".join(titles), found, plan)
    JUDGES[task.name](report, found, plan)


def main() -> None:
    arguments = _parser().parse_args()
    name = "peers" if len(arguments.model) == len(JUDGES) else f"peers-{arguments.model[0]}"
    report = Report(name, "The service beside its peers", arguments)
    rounds = arguments.rounds or (1 if report.quick else 5)
    turns = arguments.turns or (1 if report.quick else 3)
    seconds = arguments.seconds or (3.0 if report.quick else 5.0)
    connections = tuple(arguments.connections)
    plan = Plan(arguments.python.absolute(), rounds, turns, seconds, connections)
    environment(report, plan.python)
    trial = replace(plan, rounds=1, connections=(DECIDING,))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = draw_images(folder / "images")
        write_near_free_model(folder / "near-free")
        repositories = {"real": bundled_models(), "near-free": folder / "near-free"}
        for name in arguments.model:
            task = Task(name, repositories[name], images)
            if arguments.setups == "fastest":
                peers = fastest(report, trial, task, arguments.only)
            else:
                peers = {peer: PEERS[peer][0] for peer in arguments.only}
            compare(report, plan, task, peers)
    report.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, required=True, help="of the peers' environment")
    parser.add_argument("--rounds", type=int, help="default: 5")
    parser.add_argument("--turns", type=int, help="of each server, at each load; default: 3")
    parser.add_argument("--seconds", type=float, help="of each turn; default: 5")
    parser.add_argument("--connections", type=_numbers, default=CONNECTIONS, metavar="N,N...")
    parser.add_argument("--model", type=_names(JUDGES), default=list(JUDGES), metavar="real,...")
    parser.add_argument("--only", type=_names(PEERS), default=list(PEERS), metavar="PEER,...")
    parser.add_argument(
        "--setups",
        choices=("fastest", "first"),
        default="fastest",
        help="each peer in the set-up that a trial finds fastest, or in the first of the list",
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

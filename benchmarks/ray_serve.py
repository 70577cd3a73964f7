"""What Ray Serve makes of replicas, and how long it takes to replace what dies.

    python benchmarks/ray_serve.py                       # needs the extra `scale`
    python benchmarks/ray_serve.py --images FOLDER     # your own JPEGs

A cluster of two nodes on this machine, the bundled model, replicas of one CPU each. First closed
loops of 16 clients on the service alone with one CPU, then through Ray's proxy on one replica and
on two: all of it, the clients too, shares the machine. Then four clients while a replica is killed,
and while a node is: the time until Ray has as many replicas again, the longest time without a good
answer, and the requests that were lost, each of them a 503 with `Retry-After`.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from report import Report, Table, add_options
from serving import draw_images, run_script, served

from service.settings import bundled_models
from tests.ray_cluster import Cluster, Load, Replica

CLIENTS = 16
CALM = 8
"""Good answers before something is killed, and after it was replaced."""
HEAD_CPUS, NODE_CPUS = 2, 1
TRIES = 10


def deploy(cluster: Cluster, replicas: int) -> list[Replica]:
    """So many replicas of the bundled model, of one CPU each."""

    def change(config: dict[str, Any]) -> None:
        (application,) = config["applications"]
        application["args"] |= {"cpu_inferences": 1, "log_level": "warning"}
        (deployment,) = application["deployments"]
        del deployment["autoscaling_config"]
        deployment["num_replicas"] = replicas

    cluster.deploy(change)
    ready: list[Replica] = cluster.wait_for_replicas(replicas)
    return ready


def throughput(report: Report, cluster: Cluster, images: Path, rounds: int, seconds: float) -> None:
    """Closed loops, in turn."""
    table = report.table(
        {"round": "d", "served by": "s", "images/s": ".1f", "p50, ms": ".0f", "p99, ms": ".0f"}
        | {"client core-ms": ".2f", "not 200": "d"},
        f"{CLIENTS} closed-loop clients",
    )
    more, cost = [], []
    for number in range(1, rounds + 1):
        # Ray's own processes are there all the time.
        with served(bundled_models(), cpus=1, cpu_inferences=1) as alone:
            bare = one_load(table, number, "the service alone, 1 CPU", alone.url, images, seconds)
        rates = []
        for replicas in (1, 2):
            deploy(cluster, replicas)
            name = f"Ray, {replicas} x 1 CPU"
            url = f"{cluster.url}/v1/detect"
            rates.append(one_load(table, number, name, url, images, seconds))
        more.append(rates[1] / rates[0])
        cost.append(rates[0] / bare)
    report.figure("two replicas over one", more, better="higher")
    report.figure("one replica over the service alone", cost, better="higher")


def one_load(table: Table, number: int, name: str, url: str, images: Path, seconds: float) -> float:
    """Good answers a second."""
    found = run_script("load.py", url, images, "--clients", CLIENTS, "--seconds", seconds)
    table.row(
        *(number, name, found["good_per_second"], found["p50_ms"], found["p99_ms"]),
        *(found["client_cpu_ms"], found["requests"] - found["statuses"].get("200", 0)),
    )
    return float(found["good_per_second"])


def recovery(report: Report, cluster: Cluster, images: list[bytes], rounds: int) -> None:
    """Kill a replica, then a node, and count."""
    table = report.table(
        {"killed": "s", "replaced after, s": ".1f", "longest without an answer, s": ".1f"}
        | {"lost": "d", "answers": "d"},
        "Two replicas under 4 clients",
    )
    found: dict[str, list[float]] = {"replica": [], "node": []}
    node = 1
    for _ in range(rounds):
        (victim,) = spread(cluster, node)
        kill = partial(os.kill, victim.pid, signal.SIGKILL)
        found["replica"].append(one_death(table, cluster, images, "a replica", kill, [victim]))
        kill = partial(cluster.kill_node, node)
        gone = [each for each in cluster.replicas() if each.address == address(node)]
        found["node"].append(one_death(table, cluster, images, "a node", kill, gone))
        cluster.add_node(NODE_CPUS)
        node += 1
    for name, seconds in found.items():
        report.figure(f"a {name} is replaced", seconds, better="lower", unit="s")


def spread(cluster: Cluster, node: int) -> list[Replica]:
    """Two replicas, one of them on this node; those that are not on it.

    Ray places them as it likes, and the first node has room for both.
    """
    for _ in range(TRIES):
        deploy(cluster, 1)
        elsewhere = [each for each in deploy(cluster, 2) if each.address != address(node)]
        if len(elsewhere) == 1:
            return elsewhere
    raise SystemExit(f"no replica was placed on {address(node)} in {TRIES} tries")


def address(node: int) -> str:
    """Of a node of the cluster, by its number."""
    return f"127.0.0.{node + 2}"


def one_death(
    table: Table,
    cluster: Cluster,
    images: list[bytes],
    name: str,
    kill: Callable[[], None],
    gone: list[Replica],
) -> float:
    """Seconds from the death until there are two replicas again, under load all the time."""
    with Load(cluster.url, images) as load:
        load.wait_for_answers(CALM)
        killed = time.monotonic()
        kill()
        cluster.wait_for_replicas(2, other_than=gone)
        seconds = time.monotonic() - killed
        load.wait_for_answers(CALM)
    good = sorted(each.at for each in load.seen if each.status == 200)
    lost = [each for each in load.seen if each.status != 200]
    if wrong := [each for each in lost if each.status != 503 or each.retry_after is None]:
        raise SystemExit(f"undocumented responses: {wrong[:3]}")
    pause = max(later - earlier for earlier, later in pairwise(good))
    table.row(name, seconds, pause, len(lost), len(load.seen))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of JPEGs; default: drawn ones")
    add_options(parser)
    arguments = parser.parse_args()
    report = Report("ray_serve", "Ray Serve on two nodes of one machine", arguments)
    rounds, seconds = (2, 8.0) if report.quick else (4, 15.0)
    with tempfile.TemporaryDirectory() as folder, Cluster((HEAD_CPUS, NODE_CPUS)) as cluster:
        images = arguments.images or draw_images(Path(folder) / "images")
        throughput(report, cluster, images, rounds, seconds)
        contents = [path.read_bytes() for path in sorted(images.glob("*.jpg"))]
        recovery(report, cluster, contents, rounds)
    report.close()


if __name__ == "__main__":
    main()

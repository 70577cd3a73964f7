"""A Ray cluster of several nodes on this machine, and load that writes down every answer.

The nodes are what `ray start` makes of them, each with an address of its own on the loopback
interface, and can be killed like machines that lose power. Nothing outside the cluster's own folder
is touched, and other clusters on the machine are left alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import httpx
import psutil
import yaml

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "deploy/ray/serve.yaml"
LAYERS = "service.ray_serve.proxy:layers"
PATIENCE = 120.0
"""Seconds; generous, since the machine may be busy with something else."""
_STORE_BYTES = 100_000_000
_LONGEST_WAIT = 1.0
"""Seconds that a refused client waits at most."""


class Replica(NamedTuple):
    """As Ray tells of it."""

    name: str
    pid: int
    address: str
    """Of its node."""


class Cluster:
    """Nodes with these numbers of CPUs; the first one has the proxy and Ray's own services."""

    def __init__(self, cpus: Sequence[int] = (2, 1)) -> None:
        # Ray's sockets have no room for a long path.
        self.folder = Path(tempfile.mkdtemp(prefix="rs-", dir="/tmp"))
        self.log = self.folder / "log"
        self._bin = Path(sys.executable).parent
        self._environment = {
            **{name: each for name, each in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.folder),
            "RAY_TMPDIR": str(self.folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Whether somebody has made a token on this machine changes nothing.
            "RAY_AUTH_MODE": "disabled",
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": LAYERS,
            "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
            # Otherwise 15: the load would go first, and not what it is put on.
            "RAY_worker_niceness": "0",
        }
        self._nodes: list[subprocess.Popen[bytes]] = []
        # Without `verify` it would read every certificate authority first.
        self._client = httpx.Client(timeout=30.0, verify=False)
        self._gcs, self._dashboard, self._http = free_ports(3)
        self._address = f"127.0.0.2:{self._gcs}"
        self.url = f"http://127.0.0.1:{self._http}"
        try:
            for count in cpus:
                self.add_node(count)
            # Where `serve run` would choose a port of its own.
            self._checked(
                *("start", f"--address={self._address}", "--proxy-location=HeadOnly"),
                *("--http-host=127.0.0.1", f"--http-port={self._http}"),
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def add_node(self, cpus: int) -> None:
        """Start a node, and wait until the cluster has it."""
        number = len(self._nodes)
        agent, client = free_ports(2)
        options: dict[str, object] = {
            # Ray takes 127.0.0.1 for a machine of its own.
            "node-ip-address": f"127.0.0.{number + 2}",
            "num-cpus": cpus,
            "object-store-memory": _STORE_BYTES,
            "dashboard-agent-listen-port": agent,
        }
        if number == 0:
            options |= {
                "head": None,
                "port": self._gcs,
                "temp-dir": self.folder / "ray",
                "include-dashboard": "true",
                "dashboard-host": "127.0.0.1",
                "dashboard-port": self._dashboard,
                "ray-client-server-port": client,
            }
        else:
            options["address"] = self._address
        words = [
            f"--{name}" if value is None else f"--{name}={value}" for name, value in options.items()
        ]
        with self.log.open("ab") as log:
            node = subprocess.Popen(
                [self._bin / "ray", "start", "--block", "--disable-usage-stats", *words],
                env=self._environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._nodes.append(node)
        try:
            wait_for(lambda: node.poll() is not None or self.alive() == self._running(), "a node")
        except TimeoutError as error:
            raise TimeoutError(f"node {number} is not there: {self.log.read_text()}") from error
        if node.poll() is not None:
            raise RuntimeError(f"node {number} has ended: {self.log.read_text()}")

    def alive(self) -> int:
        """Nodes that the cluster knows of."""
        nodes = self._ask("/nodes?view=summary")
        summary = [] if nodes is None else nodes["data"]["summary"]
        return sum(each["raylet"].get("state") == "ALIVE" for each in summary)

    def kill_node(self, number: int) -> None:
        """End all processes of a node at once."""
        _kill_tree(self._nodes[number])

    def deploy(self, changes: Callable[[dict[str, Any]], None] | None = None) -> None:
        """`serve deploy` of deploy/ray/serve.yaml, on this cluster's port, with `changes`."""
        config = yaml.safe_load(CONFIG.read_text())
        config["proxy_location"] = "HeadOnly"
        config["http_options"] |= {"host": "127.0.0.1", "port": self._http}
        if changes is not None:
            changes(config)
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        self._checked("deploy", path, "-a", f"http://127.0.0.1:{self._dashboard}")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`serve run` on this cluster, where Serve runs already; it does not stay."""
        options = ("--non-blocking", "--name=retinaserve", f"--address={self._address}")
        return self._serve("run", *options, *arguments)

    def application(self) -> dict[str, Any]:
        """What Ray tells of the application; empty while there is none."""
        found = self._ask("/api/serve/applications/") or {}
        application: dict[str, Any] = found.get("applications", {}).get("retinaserve", {})
        return application

    def replicas(self) -> list[Replica]:
        """Those that run."""
        deployments = self.application().get("deployments", {})
        return [
            Replica(each["replica_id"], each["pid"], each["node_ip"])
            for each in deployments.get("retinaserve", {}).get("replicas", ())
            if each["state"] == "RUNNING"
        ]

    def wait_for_replicas(
        self, count: int, *, other_than: Sequence[Replica] = (), seconds: float = PATIENCE
    ) -> list[Replica]:
        """Return `count` running replicas, none of them one of `other_than`, once all is done."""

        def there() -> list[Replica] | None:
            application = self.application()
            if application.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
                self._raise_if_failed(application)
            found = self.replicas()
            names = {each.name for each in found}.isdisjoint(each.name for each in other_than)
            done = application.get("status") == "RUNNING"
            return found if done and names and len(found) == count else None

        try:
            return wait_for(there, f"{count} replicas", seconds=seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self.application()}") from error

    def close(self) -> None:
        """End everything, and leave nothing behind."""
        for node in self._nodes:
            _kill_tree(node)
        for process in psutil.process_iter():
            # What Ray started in a session of its own, and whose parent has gone already.
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RAY_TMPDIR") == str(self.folder):
                    process.kill()
        self._client.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _checked(self, *words: object) -> None:
        done = self._serve(*words)
        if done.returncode != 0:
            raise RuntimeError(f"serve {words[0]}: {done.stdout}{done.stderr}")

    def _serve(self, *words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self._bin / "serve"), *map(str, words)],
            env=self._environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    def _running(self) -> int:
        return sum(node.poll() is None for node in self._nodes)

    def _ask(self, path: str) -> Any:
        """Ray's own JSON; None while it does not answer."""
        try:
            answer = self._client.get(f"http://127.0.0.1:{self._dashboard}{path}")
        except httpx.TransportError:
            return None
        return answer.json() if answer.is_success else None

    @staticmethod
    def _raise_if_failed(application: dict[str, Any]) -> None:
        told = [each.get("message", "") for each in application.get("deployments", {}).values()]
        if application["status"] == "DEPLOY_FAILED":
            raise RuntimeError("\n".join([application.get("message", ""), *told]))


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer."""

    at: float
    """When it came, on `time.monotonic`."""
    image: int
    status: int
    """0: the connection broke."""
    body: Any
    retry_after: str | None


class Load:
    """Closed-loop clients that post images until the block ends; refused ones wait as told."""

    def __init__(self, url: str, images: Sequence[bytes], *, clients: int = 4) -> None:
        self.seen: list[Seen] = []
        self._url = url
        self._images = images
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._post, args=(each,)) for each in range(clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def wait_for_answers(self, count: int, *, seconds: float = PATIENCE) -> None:
        """Return once `count` more images were answered with 200."""
        before = self.good()
        wait_for(lambda: self.good() >= before + count, f"{count} good answers", seconds=seconds)

    def good(self) -> int:
        """Images that were answered with 200."""
        return sum(each.status == httpx.codes.OK for each in list(self.seen))

    def _post(self, number: int) -> None:
        turn = number
        with httpx.Client(timeout=PATIENCE, verify=False) as client:
            while not self._over.is_set():
                image = turn % len(self._images)
                seen = _exchange(client, self._url, self._images[image], image)
                self.seen.append(seen)
                if seen.status == httpx.codes.OK:
                    turn += len(self._threads)
                else:
                    wait = float(seen.retry_after or _LONGEST_WAIT)
                    self._over.wait(min(wait, _LONGEST_WAIT))


def _exchange(client: httpx.Client, url: str, content: bytes, image: int) -> Seen:
    try:
        answer = client.post(f"{url}/v1/detect", content=content)
    except httpx.TransportError as error:
        return Seen(time.monotonic(), image, 0, repr(error), None)
    kind = answer.headers.get("content-type", "")
    body = answer.json() if "json" in kind else answer.text
    return Seen(
        time.monotonic(), image, answer.status_code, body, answer.headers.get("retry-after")
    )


def wait_for(condition: Callable[[], T], what: str, *, seconds: float = PATIENCE) -> T:
    """Return what the condition gives, once that is something."""
    limit = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > limit:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)
    return found


def free_ports(count: int) -> list[int]:
    """Free ports of loopback."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _kill_tree(node: subprocess.Popen[bytes]) -> None:
    for process in _tree(node.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()


def _tree(pid: int) -> Iterator[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        yield from [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return

"""One small interface over docker, podman and buildah: build an image, run it locked down."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

INNER_PORT = 8000


def capture(*command: str) -> str:
    """Standard output of a command that must succeed."""
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{run.stderr.strip()}")
    return run.stdout.strip()


class Engine(Protocol):
    """One container of one image, at most one at a time."""

    def build(self, image: str, arguments: dict[str, str], context: Path) -> None:
        """Build `image` from the Dockerfile in `context`."""

    def config(self, image: str) -> dict[str, Any]:
        """The image's configuration, in Docker's spelling."""

    def size(self, image: str) -> int:
        """Bytes of the image, unpacked."""

    def start(
        self, image: str, *, uid: int, models: Path | None, environment: Mapping[str, str]
    ) -> str:
        """Run with nothing that could be written to, /tmp included; returns the base URL."""

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside the service, as the same user."""

    def stop(self) -> None:
        """Send SIGTERM."""

    def wait(self, seconds: float) -> int:
        """Exit status of the service."""

    def logs(self) -> str:
        """What the service wrote."""

    def remove(self) -> None:
        """End the service if it still runs and clean up."""


class Docker:
    """docker, or podman, which takes the same words."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._container = ""

    def build(self, image: str, arguments: dict[str, str], context: Path) -> None:
        # podman drops the HEALTHCHECK from images of the OCI format.
        options = ["--format", "docker"] if self._program == "podman" else []
        for name, value in arguments.items():
            options += ["--build-arg", f"{name}={value}"]
        subprocess.run(
            [self._program, "build", *options, "--tag", image, str(context)], check=True
        )  # fmt: skip

    def config(self, image: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(capture(self._program, "image", "inspect", image))[0]
        config: dict[str, Any] = found["Config"]
        if self._program == "podman" and "Healthcheck" not in config:
            config["Healthcheck"] = found.get("HealthCheck") or found.get("Healthcheck")
        return config

    def size(self, image: str) -> int:
        return int(json.loads(capture(self._program, "image", "inspect", image))[0]["Size"])

    def start(
        self, image: str, *, uid: int, models: Path | None, environment: Mapping[str, str]
    ) -> str:
        options = [
            "--detach", "--read-only", "--user", f"{uid}:{uid}",
            "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
            "--publish", f"127.0.0.1::{INNER_PORT}",
        ]  # fmt: skip
        if self._program == "podman":
            options.append("--read-only-tmpfs=false")
        if models:
            options += ["--volume", f"{models}:/models:ro"]
            options += ["--env", "RETINASERVE_MODELS_DIR=/models"]
        for name, value in environment.items():
            options += ["--env", f"{name}={value}"]
        self._container = capture(self._program, "run", *options, image)
        published = capture(self._program, "port", self._container, str(INNER_PORT))
        return f"http://{published.splitlines()[0]}"

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._program, "exec", self._container, *command], capture_output=True, text=True
        )

    def stop(self) -> None:
        capture(self._program, "kill", "--signal", "TERM", self._container)

    def wait(self, seconds: float) -> int:
        run = subprocess.run(
            [self._program, "wait", self._container],
            check=True, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
        return int(run.stdout)

    def logs(self) -> str:
        run = subprocess.run(
            [self._program, "logs", self._container], capture_output=True, text=True
        )
        return run.stdout + run.stderr

    def remove(self) -> None:
        if self._container:
            capture(self._program, "rm", "--force", self._container)
            self._container = ""


class Buildah:
    """buildah builds only, so the image's tree is run by hand; needs root, but no daemon.

    A mount namespace gives what `docker run --read-only --user` gives; the network is the host's.
    """

    def __init__(self) -> None:
        self._container = ""
        self._root = ""
        self._uid = 0
        self._environment: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def build(self, image: str, arguments: dict[str, str], context: Path) -> None:
        options = ["--format", "docker", "--isolation", "chroot"]
        for name, value in arguments.items():
            options += ["--build-arg", f"{name}={value}"]
        subprocess.run(["buildah", "bud", *options, "--tag", image, str(context)], check=True)

    def config(self, image: str) -> dict[str, Any]:
        found = json.loads(capture("buildah", "inspect", "--type", "image", image))
        config: dict[str, Any] = found["Docker"]["config"]
        return config

    def size(self, image: str) -> int:
        self._mount(image)
        seen: dict[int, int] = {}
        for folder, _, names in os.walk(self._root):
            for name in names:
                status = (Path(folder) / name).lstat()
                seen[status.st_ino] = status.st_size
        return sum(seen.values())

    def start(
        self, image: str, *, uid: int, models: Path | None, environment: Mapping[str, str]
    ) -> str:
        self._mount(image)
        self._uid = uid
        config = self.config(image)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        root = shlex.quote(self._root)
        steps = [
            f"mount --bind {root} {root}",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /dev {root}/dev",
            f"mount --rbind /sys {root}/sys",
        ]
        self._environment = [*config["Env"], f"RETINASERVE_PORT={port}"]
        if models:
            steps.append(f"mount --bind {shlex.quote(str(models))} {root}/mnt")
            self._environment.append("RETINASERVE_MODELS_DIR=/mnt")
        # `env` takes the last of those that name the same.
        self._environment += [f"{name}={value}" for name, value in environment.items()]
        steps.append(f"mount -o remount,bind,ro {root}")
        command = self._inside(*config["Entrypoint"], *config["Cmd"])
        steps.append(f"exec {shlex.join(command)}")
        # Into a file: a pipe that is not read would stop the service once it is full.
        self._output = tempfile.NamedTemporaryFile(prefix="container-")  # noqa: SIM115
        self._process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-ec", "\n".join(steps)],
            stdout=self._output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return f"http://127.0.0.1:{port}"

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        assert self._process
        return subprocess.run(
            ["nsenter", "--target", str(self._process.pid), "--mount", *self._inside(*command)],
            capture_output=True, text=True,
        )  # fmt: skip

    def stop(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> int:
        assert self._process
        return self._process.wait(timeout=seconds)

    def logs(self) -> str:
        return "" if self._output is None else Path(self._output.name).read_text()

    def remove(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._container:
            capture("buildah", "rm", self._container)
            self._container = ""

    def _mount(self, image: str) -> None:
        if not self._container:
            self._container = capture("buildah", "from", "--pull-never", image)
            self._root = capture("buildah", "mount", self._container)

    def _inside(self, *command: str) -> list[str]:
        user = f"--userspec={self._uid}:{self._uid}"
        return ["chroot", user, self._root, "/usr/bin/env", "-i", *self._environment, *command]


def engine_named(name: str) -> Engine:
    """The engine that --engine names."""
    return Buildah() if name == "buildah" else Docker(name)

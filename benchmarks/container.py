"""Build the container image, run it as an operator would, and print what it costs.

    python benchmarks/container.py --engine docker --build
    sudo python benchmarks/container.py --engine buildah --build

`--api-suite` also runs tests/api against the container, with the interpreter of this script, which
needs what the tests need. `--variant gpu` on a machine without a GPU: with `--env
RETINASERVE_DEVICE=cpu`, which is then all that can be checked of it.

Every check that fails is printed and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from container_engines import Engine, engine_named
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DRAIN_SECONDS = 8.0
"""RETINASERVE_DRAIN_SECONDS as shipped."""

# Run inside the container: what must not be there, and what the environment weighs.
_LOOK_INSIDE = """
import errno, importlib.util, json, os, shutil, sys
found = [n for n in ("torch", "pip", "setuptools", "hatchling") if importlib.util.find_spec(n)]
found += [n for n in ("gcc", "cc", "make", "ld") if shutil.which(n)]
size = sum(
    os.lstat(os.path.join(folder, name)).st_size
    for folder, _, names in os.walk(sys.prefix) for name in names
)
writable = []
for folder in (sys.prefix, "/tmp", "/"):
    try:
        open(os.path.join(folder, "probe"), "w")
    except OSError as error:
        if error.errno == errno.EROFS:
            continue
    writable.append(folder)
print(json.dumps({"found": found, "size": size, "writable": writable, "uid": os.getuid()}))
"""


class Report:
    """Figures and checks, in the order they were made."""

    def __init__(self) -> None:
        self.failed = False

    def figure(self, name: str, value: str) -> None:
        print(f"{name:<42}{value}", flush=True)

    def check(self, name: str, passed: bool, seen: object) -> None:
        self.failed |= not passed
        self.figure(name, f"{'ok' if passed else 'FAILED'} ({seen})")


def noise_jpeg(at_least: int) -> bytes:
    """Return a JPEG of at least `at_least` bytes: noise hardly compresses."""
    side = 1024
    while True:
        out = io.BytesIO()
        Image.effect_noise((side, side), 80).convert("RGB").save(out, "JPEG", quality=95)
        if out.tell() >= at_least:
            return out.getvalue()
        side = side * 5 // 4


def post(url: str, body: bytes, content_type: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON answer of one POST."""
    request = urllib.request.Request(url, body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def post_multipart(url: str, image: bytes) -> tuple[int, dict[str, Any]]:
    """The image as the field `file` of a form."""
    edge = secrets.token_hex(16)
    head = f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
    body = head.encode() + image + f"\r\n--{edge}--\r\n".encode()
    return post(url, body, f"multipart/form-data; boundary={edge}")


def wait_until_ready(base: str, seconds: float) -> dict[str, Any]:
    """The answer of /readyz once it is 200."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{base}/readyz", timeout=2) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except OSError:
            time.sleep(0.02)
    raise SystemExit(f"{base}/readyz was not 200 within {seconds:g} s")


def inspect_image(engine: Engine, image: str, report: Report) -> list[str]:
    """Check the image's configuration; returns the command of its HEALTHCHECK."""
    config = engine.config(image)
    probe: list[str] = (config.get("Healthcheck") or {}).get("Test") or []
    user = str(config.get("User", "")).partition(":")[0]
    report.figure("image size, unpacked", f"{engine.size(image) / 1e6:.0f} MB")
    report.check("user is not root", user not in ("", "0", "root"), user)
    report.check("HEALTHCHECK is there", probe[:1] == ["CMD"], f"{len(probe)} words")
    report.check("STOPSIGNAL", config.get("StopSignal") == "SIGTERM", config.get("StopSignal"))
    return probe[1:]


def check_running(engine: Engine, base: str, probe: list[str], uid: int, report: Report) -> None:
    """Check what a running container is made of and that it detects."""
    inside = json.loads(engine.execute("python", "-c", _LOOK_INSIDE).stdout)
    report.figure("of it Python packages", f"{inside['size'] / 1e6:.0f} MB")
    report.check("no torch, pip or build tools", not inside["found"], inside["found"])
    report.check("runs as the given user", inside["uid"] == uid, f"uid {inside['uid']}")
    report.check("root is read-only", not inside["writable"], f"else: {inside['writable']}")
    health = engine.execute(*probe)
    report.check("HEALTHCHECK passes", health.returncode == 0, f"exit {health.returncode}")
    sample = (ROOT / "service" / "static" / "sample.jpg").read_bytes()
    status, answer = post(f"{base}/v1/detect", sample, "image/jpeg")
    found = len(answer.get("detections", []))
    report.check("POST /v1/detect, the page's sample", status == 200, f"{status}, {found} boxes")
    large = noise_jpeg(3_000_000)
    status, _ = post_multipart(f"{base}/v1/detect", large)
    report.check("multipart of 3 MB", status == 200, f"{status}, {len(large) / 1e6:.1f} MB")


def check_stop(engine: Engine, base: str, report: Report) -> None:
    """SIGTERM while a request is under way: it is answered, and the service ends with 0."""
    statuses: list[int] = []
    image = noise_jpeg(3_000_000)
    client = threading.Thread(
        target=lambda: statuses.append(post_multipart(f"{base}/v1/detect", image)[0])
    )
    client.start()
    time.sleep(0.02)
    began = time.monotonic()
    engine.stop()
    code = engine.wait(DRAIN_SECONDS + 5)
    took = time.monotonic() - began
    client.join()
    report.check("SIGTERM: exit status", code == 0, code)
    report.check("SIGTERM: within the drain time", took < DRAIN_SECONDS, f"{took:.2f} s")
    report.check("SIGTERM: request under way", statuses == [200], statuses)


def check_suite(engine: Engine, image: str, uid: int, env: dict[str, str], report: Report) -> None:
    """Run the API suite against a container that serves the model that it asks for."""
    from tests import tiny_model

    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        models.chmod(0o755)
        tiny_model.save(models)
        base = engine.start(image, uid=uid, models=models, environment=env)
        wait_until_ready(base, 60)
        command = [sys.executable, "-m", "pytest", "tests/api", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "-n", "0"],
            env=os.environ | {"RETINASERVE_TEST_URL": base},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        told = done.stdout.strip().splitlines()[-1:]
        report.check("the API suite", done.returncode == 0, *told)
        if done.returncode:
            print(done.stdout[-3000:])
        engine.remove()


def start_up(engine: Engine, start: Callable[[], str], report: Report) -> str:
    """Start the container and time it to readiness; returns the base URL."""
    began = time.monotonic()
    base = start()
    try:
        answer = wait_until_ready(base, 60)
    except SystemExit:
        engine.remove()
        print(engine.logs())
        raise
    report.figure("start to ready", f"{time.monotonic() - began:.2f} s on {answer['device']}")
    return base


def main() -> int:
    """Parse the arguments and run every check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=("docker", "podman", "buildah"), default="docker")
    parser.add_argument("--image", default="localhost/retinaserve:cpu")
    parser.add_argument("--build", action="store_true", help="build the image first")
    parser.add_argument("--variant", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--base-image", help="BASE_IMAGE of the build")
    parser.add_argument("--models", type=Path, help="model repository; default: the bundled one")
    parser.add_argument("--uid", type=int, default=23456, help="any but root's")
    parser.add_argument("--api-suite", action="store_true", help="run tests/api against it")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    environment = dict(each.split("=", 1) for each in options.env)
    engine = engine_named(options.engine)
    report = Report()
    if options.build:
        arguments = {"VARIANT": options.variant}
        if options.base_image:
            arguments["BASE_IMAGE"] = options.base_image
        began = time.monotonic()
        engine.build(options.image, arguments, ROOT)
        report.figure("build", f"{time.monotonic() - began:.0f} s")
    try:
        probe = inspect_image(engine, options.image, report)
        base = start_up(
            engine,
            lambda: engine.start(
                options.image, uid=options.uid, models=options.models, environment=environment
            ),
            report,
        )
        check_running(engine, base, probe, options.uid, report)
        check_stop(engine, base, report)
        if report.failed:
            print(engine.logs())
        if options.api_suite:
            engine.remove()
            check_suite(engine, options.image, options.uid, environment, report)
    finally:
        engine.remove()
    report.figure("on", f"{os.cpu_count()} cores, {options.engine}")
    return int(report.failed)


if __name__ == "__main__":
    raise SystemExit(main())

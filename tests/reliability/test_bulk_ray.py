"""`retinaserve bulk --engine ray` on a real cluster of this machine, a detector killed half-way."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests import tiny_model
from tests.images import RED, encoded, squares
from tests.reliability.conftest import command, environment

IMAGES = 60

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        not (find_spec("ray") and find_spec("pandas")),
        reason="Ray is not installed; `make test-scale` installs it and runs this",
    ),
]


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Whatever is still there at the end goes, with what it started."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()


def detectors(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "Detection" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_bulk_on_ray_survives_a_killed_detector(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    tiny_model.save(tmp_path / "models", work=12)
    (tmp_path / "in").mkdir()
    for i in range(IMAGES):
        content = b"bad" if i % 17 == 3 else encoded(squares((i, 16, RED)))
        (tmp_path / "in" / f"{i:03d}.png").write_bytes(content)
    options = ("--part-size", 5, "--models", tmp_path / "models", "--device", "cpu")
    output = tmp_path / "ray"
    ray = ("--engine", "ray", "--concurrency", 2, "--ray-address", "local")
    process = subprocess.Popen(
        command("bulk", tmp_path / "in", "--output", output, *options, *ray),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    processes.append(process)
    limit = time.monotonic() + 120
    while len(list(output.glob("part-*"))) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.01)
    killed = detectors(process)
    assert len(killed) == 2
    killed[0].kill()
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "Ray (detectors: 2; for each 1 CPU)" in stderr
    summary = json.loads(stdout)
    assert (summary["pictures"], summary["failed"], summary["parts"]) == (IMAGES, 4, 12)
    local = tmp_path / "local"
    subprocess.run(
        command("bulk", tmp_path / "in", "--output", local, *options),
        env=environment(), check=True, capture_output=True,
    )  # fmt: skip
    assert pq.read_table(output).to_pylist() == pq.read_table(local).to_pylist()
    assert len(list(output.glob("part-*"))) == 12
    # Whichever engine began a run, the other one may go on with it.
    (output / "part-0000007.parquet").unlink()
    last = subprocess.run(
        command("bulk", tmp_path / "in", "--output", output, *options),
        env=environment(), check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(last.stdout)["already_done"]["parts"] == 11
    assert pq.read_table(output).equals(pq.read_table(local))

"""`retinaserve bulk` that is killed or told to stop: nothing is lost, nothing twice."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import tiny_model
from tests.images import RED, encoded, squares
from tests.reliability.conftest import command, environment

IMAGES = 60
PART = 5


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Over images that take long enough to be killed in the middle."""
    tiny_model.save(tmp_path / "models", work=6)
    (tmp_path / "in").mkdir()
    for i in range(IMAGES):
        content = b"bad" if i % 17 == 3 else encoded(squares((i, 16, RED)))
        (tmp_path / "in" / f"{i:03d}.png").write_bytes(content)
    return command(
        *("bulk", tmp_path / "in", "--output", tmp_path / "out", "--part-size", PART),
        *("--models", tmp_path / "models", "--device", "cpu"),
    )


def begin(arguments: list[str], output: Path, parts: int) -> subprocess.Popen[str]:
    """Start the command and return it once `parts` more parts are written."""
    wanted = len(list(output.glob("part-*"))) + parts
    process = subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 60
    while len(list(output.glob("part-*"))) < wanted:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit, "no part was written"
        time.sleep(0.005)
    return process


def check_all_there_once(output: Path, stdout: str) -> None:
    rows = pq.read_table(output).to_pylist()
    assert Counter(Path(row["path"]).name for row in rows) == {
        f"{i:03d}.png": 1 for i in range(IMAGES)
    }
    for i, row in enumerate(rows):
        if i % 17 == 3:
            assert row["error"].startswith("unsupported-media-type: ")
        else:
            assert row["labels"][0] == "red"
            assert abs(row["boxes"][0][0] - i) <= 16
    summary = json.loads(stdout)
    assert (summary["pictures"], summary["failed"]) == (IMAGES, 4)


def test_bulk_resumes_after_sigkill(arguments: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    for _ in range(2):
        with begin(arguments, output, 2) as process:
            process.kill()
    done = {part: part.stat().st_mtime_ns for part in output.glob("part-*")}
    assert 4 <= len(done) < IMAGES // PART
    last = subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, check=True, timeout=60
    )
    check_all_there_once(output, last.stdout)
    assert json.loads(last.stdout)["already_done"]["parts"] == len(done)
    assert all(part.stat().st_mtime_ns == when for part, when in done.items())
    assert not list(output.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_bulk_stops_cleanly_on_signal(
    arguments: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "out"
    with begin(arguments, output, 1) as process:
        sent = time.monotonic()
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert time.monotonic() - sent < 10
    assert stdout == ""
    assert f"stopped by {number.name}. The same command goes on where it ended" in stderr
    assert not list(output.glob(".*"))
    for part in output.glob("part-*"):
        assert pq.read_table(part).num_rows == PART
    if number is signal.SIGTERM:
        last = subprocess.run(
            arguments, env=environment(), capture_output=True, text=True, check=True, timeout=60
        )
        check_all_there_once(output, last.stdout)

"""`detect` and `bulk` over odd folders: every file is answered or named, and none is lost."""

from __future__ import annotations

import csv
import ctypes
import io
import json
import os
import subprocess
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pyarrow.parquet as pq
import pytest

from tests import tiny_model
from tests.images import encoded, one_red
from tests.reliability.conftest import command, environment

LATIN = os.fsdecode(b"caf\xe9.png")
IMAGE = encoded(one_red())
SECONDS = 60.0
_DROP_FROM_BOUNDING_SET = 24
_IGNORE_PERMISSIONS = (1, 2)
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of Linux."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model repository, and images in `in`."""
    tiny_model.save(tmp_path / "models")
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("a.png", LATIN, "deep/b.png"):
        (tmp_path / "in" / name).write_bytes(IMAGE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def without_privileges() -> None:
    """Let root meet permissions as others do; nothing changes for another user."""
    for capability in _IGNORE_PERMISSIONS:
        ctypes.CDLL(None).prctl(_DROP_FROM_BOUNDING_SET, capability, 0, 0, 0)


def run(
    *arguments: object, stdout: int = subprocess.PIPE, encoding: str = "utf-8"
) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        command(*arguments),
        env=environment(models_dir="models", device="cpu") | {"PYTHONIOENCODING": encoding},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=SECONDS,
        preexec_fn=without_privileges,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    assert b"Exception ignored" not in done.stderr, done.stderr.decode()
    return done


def problems(done: subprocess.CompletedProcess[bytes]) -> list[str]:
    """What stderr says beside the progress bar."""
    lines = done.stderr.decode().replace("\r", "\n").split("\n")
    return [line for line in lines if line.startswith("retinaserve: ")]


def spoil(folder: Path) -> set[str]:
    """Add what folders may hold beside images; the names below `folder` that cannot be read."""
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "broken.png").symlink_to("nowhere")
    (folder / "device.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    (folder / "closed.png").write_bytes(IMAGE)
    (folder / "closed.png").chmod(0)
    (folder / "secret").mkdir(mode=0)
    (folder / "names").mkdir()
    (folder / "names" / "hidden.png").write_bytes(IMAGE)
    (folder / "names").chmod(0o400)
    (folder / "folder.png").mkdir()
    (folder / "folder.png" / "in it.png").write_bytes(IMAGE)
    (folder / "linked.png").symlink_to("folder.png")
    (folder / "new\nline.png").write_bytes(b"no image")
    with (folder / "vast.png").open("wb") as file:
        file.truncate(1 << 42)
    return {
        *("loop.png", "broken.png", "device.png", "pipe.png", "closed.png", "secret"),
        *("names/hidden.png", "new\nline.png", "vast.png"),
    }


def test_detect_reports_every_file_of_a_folder(folder: Path) -> None:
    failing = spoil(folder / "in")
    good = {"in/a.png", "in/deep/b.png", "in/folder.png/in it.png"}
    url = f"file://{folder}/in/caf%E9.png"

    done = run("detect", "in")
    results = json.loads(done.stdout)["results"]
    assert {each["id"] for each in results if each["status"] == 200} == {*good, url}
    assert {each["id"] for each in results if each["status"] != 200} == {
        f"in/{name}" for name in failing
    }
    assert done.returncode == 2
    lines = problems(done)
    assert len(lines) == len(failing)
    for name in failing:
        shown = name.replace("\n", "\\n")
        assert any(line.startswith(f"retinaserve: in/{shown}: ") for line in lines), name

    done = run("detect", "in", "--output", "coco")
    assert {row["file_name"] for row in json.loads(done.stdout)} == {*good, url}
    assert (done.returncode, problems(done)) == (2, lines)

    done = run("detect", "in", "--output", "csv")
    rows = csv.DictReader(io.StringIO(done.stdout.decode()))
    assert {row["file"] for row in rows} == {*good, url}

    for given in ("in", "in/**/*.png", "in/**"):
        done = run("bulk", given, "--output", f"found {len(given)}")
        assert done.returncode == 0, done.stderr
        found = pq.read_table(f"found {len(given)}").to_pylist()
        assert {row["path"] for row in found if row["error"] is None} == {
            *(f"{folder}/{name}" for name in good),
            url,
        }
        assert {row["path"] for row in found if row["error"] is not None} == {
            f"{folder}/in/{name}" for name in failing
        }
    assert unquote_to_bytes(url) == os.fsencode(f"file://{folder}/in/{LATIN}")
    # What a listing says of a name leads back to the file, and so does the output.
    assert run("bulk", "in", "--output", "found 2").returncode == 0
    assert run("bulk", url, "--output", "one", "--strict").returncode == 0


def test_detect_rejects_unreadable_folder(folder: Path) -> None:
    (folder / "in" / "deep").chmod(0)
    for arguments in (
        ("detect", "in/deep"),
        ("bulk", "in/deep", "--output", "found"),
        ("bulk", "in/deep/b.png", "--output", "found"),
        ("bulk", "in/deep/*.png", "--output", "found"),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert b"in/deep" in done.stderr
    (folder / "in" / "deep").chmod(0o700)


def test_detect_prints_any_file_name(folder: Path) -> None:
    (folder / "in" / "日本.png").write_bytes(IMAGE)
    for output in ("json", "csv", "coco"):
        done = run("detect", "in", "--output", output, encoding="ascii")
        assert done.returncode == 0
        assert "in/日本.png" in done.stdout.decode()
    done = run("bulk", LATIN, "--output", os.fsdecode(b"\xff"), encoding="ascii")
    assert done.returncode == 2
    (folder / LATIN).mkdir()
    (folder / LATIN / "a.png").write_bytes(IMAGE)
    for _ in range(2):
        done = run("bulk", LATIN, "--output", f"{LATIN}/found", encoding="ascii")
        assert done.returncode == 0
        assert json.loads(done.stdout)["output"] == f"file://{folder}/caf%E9.png/found"


def test_detect_ends_quietly_where_stdout_is_closed_early() -> None:
    for given, output in (("in", "json"), ("in/a.png", "csv")):
        reading, writing = os.pipe()
        os.close(reading)
        done = run("detect", given, "--output", output, stdout=writing)
        os.close(writing)
        assert (done.returncode, done.stderr) == (1, b"")


def test_detect_reports_full_disk_in_one_line(folder: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        for arguments in (("detect", "in"), ("detect", "in/a.png"), ("doctor",)):
            done = run(*arguments, stdout=full.fileno())
            assert done.returncode == 1
            assert problems(done) == ["retinaserve: error: [Errno 28] No space left on device"]


def test_detect_reports_unwritable_copy_and_keeps_detections(folder: Path) -> None:
    (folder / "drawn" / "a.png").mkdir(parents=True)
    (folder / "drawn" / "deep").write_bytes(b"no folder")
    done = run("detect", "in", "--save-dir", "drawn")
    assert done.returncode == 2
    assert [each["status"] for each in json.loads(done.stdout)["results"]] == [200, 200, 200]
    assert problems(done) == [
        "retinaserve: drawn/a.png: cannot be written: Is a directory",
        "retinaserve: drawn/deep/b.png: cannot be written: File exists",
    ]
    assert sorted(path.name for path in (folder / "drawn").iterdir()) == sorted(
        ("a.png", LATIN, "deep")
    )
    for place in ("in/a.png/drawn", "in/closed/drawn"):
        (folder / "in" / "closed").mkdir(mode=0, exist_ok=True)
        done = run("detect", "in/deep/b.png", "--save-dir", place)
        assert done.returncode == 2
        assert done.stdout == b""
        assert f"{place}: cannot be made" in done.stderr.decode() or b"Invalid" in done.stderr

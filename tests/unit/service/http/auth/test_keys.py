"""API keys: the file, the store that follows it, the command."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import orjson
import pytest
from click.testing import CliRunner

from service.cli import retinaserve
from service.errors import DataError
from service.http.app import create_app
from service.http.auth import keys
from service.http.auth.keys import Key, KeyStore, new_key, read_keys, revoke_key
from service.settings import Settings

NOBODY: Final = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the store; its only entry is the time."""
    now = [1000.0]
    monkeypatch.setattr(keys.time, "monotonic", lambda: now[0])
    return now


def test_new_key_is_found_by_its_value_alone(path: Path) -> None:
    client = new_key(path, "camera-1", admin=False)
    boss = new_key(path, "boss", admin=True)
    store = KeyStore(path)
    assert store.find(client) == Key("camera-1", admin=False)
    assert store.find(boss) == Key("boss", admin=True)
    for wrong in ("", client[:-1], client + "x", client.upper(), "camera-1", "x" * 100_000):
        assert store.find(wrong) is None
    assert store.find("\udce9 no UTF-8") is None


def test_hash_is_not_a_key(path: Path) -> None:
    new_key(path, "a", admin=False)
    assert KeyStore(path).find(read_keys(path)[0].sha256) is None


def test_keys_file_has_hashes_and_mode_0600(path: Path) -> None:
    key = new_key(path, "a", admin=False)
    assert key not in path.read_text()
    assert key.removeprefix("rs_") not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    new_key(path, "b", admin=False)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    names = [each.name for each in path.parent.iterdir()]
    assert names == ["keys.json"], "no temporary file stays behind"


def test_keys_are_unique_and_long(path: Path) -> None:
    made = {new_key(path, f"key-{i}", admin=False) for i in range(20)}
    assert len(made) == 20
    assert all(len(key) == 46 for key in made)


def test_revoked_key_is_not_found(path: Path, seconds: list[float]) -> None:
    gone, stays = new_key(path, "gone", admin=False), new_key(path, "stays", admin=False)
    store = KeyStore(path)
    revoke_key(path, "gone")
    seconds[0] += 1.1
    assert store.find(gone) is None
    assert store.find(stays) == Key("stays", admin=False)


def test_keys_file_is_read_once_a_second(path: Path, seconds: list[float]) -> None:
    key = new_key(path, "a", admin=False)
    store = KeyStore(path)
    revoke_key(path, "a")
    seconds[0] += 0.9
    assert store.find(key) is not None
    seconds[0] += 0.2
    assert store.find(key) is None


def test_service_without_keys_left_refuses_all(path: Path, seconds: list[float]) -> None:
    key = new_key(path, "a", admin=False)
    store = KeyStore(path)
    revoke_key(path, "a")
    seconds[0] += 2
    assert store.find(key) is None
    assert store.find("") is None


@pytest.mark.parametrize("broken", ["", '{"keys": [', "[]", '{"keys": [{"name": "a"}]}', None])
def test_broken_keys_file_keeps_the_keys(
    path: Path,
    seconds: list[float],
    broken: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    key = new_key(path, "a", admin=False)
    good = path.read_text()
    store = KeyStore(path)
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
    for _ in range(3):
        seconds[0] += 2
        assert store.find(key) == Key("a", admin=False)
    errors = [each for each in caplog.records if each.levelname == "ERROR"]
    assert len(errors) == 1, "one line for a change, not one a second"
    assert str(path) in errors[0].getMessage()
    path.write_text(good.replace('"a"', '"renamed"'))
    seconds[0] += 2
    assert store.find(key) == Key("renamed", admin=False)


def test_keys_file_follows_a_swapped_link(tmp_path: Path, seconds: list[float]) -> None:
    for version in ("..1", "..2"):
        (tmp_path / version).mkdir()
    old = new_key(tmp_path / "..1" / "keys.json", "old", admin=False)
    new = new_key(tmp_path / "..2" / "keys.json", "new", admin=False)
    # Equal in size and age: only the file behind the links differs.
    age = (tmp_path / "..1" / "keys.json").stat().st_mtime_ns
    os.utime(tmp_path / "..2" / "keys.json", ns=(age, age))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "keys.json").symlink_to("..data/keys.json")
    store = KeyStore(tmp_path / "keys.json")
    assert store.find(old) is not None
    (tmp_path / "..data_tmp").symlink_to("..2")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    seconds[0] += 1.1
    assert store.find(new) == Key("new", admin=False)
    assert store.find(old) is None


def test_writing_keys_keeps_a_link(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    real, link = tmp_path / "etc" / "keys.json", tmp_path / "keys.json"
    new_key(real, "a", admin=False)
    link.symlink_to(real)
    new_key(link, "b", admin=False)
    assert link.is_symlink()
    assert [entry.name for entry in read_keys(real)] == ["a", "b"]


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    """Without root's rights, where the tests have them."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(mine)


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A keys file in a folder that every user may write to, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder) / "keys.json"


def test_writing_keys_keeps_owner_group_and_mode(open_path: Path) -> None:
    new_key(open_path, "a", admin=False)
    owner = (NOBODY, NOBODY - 1) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(open_path, *owner)
    open_path.chmod(0o640)
    new_key(open_path, "b", admin=False)
    revoke_key(open_path, "a")
    after = open_path.stat()
    assert (after.st_uid, after.st_gid, stat.S_IMODE(after.st_mode)) == (*owner, 0o640)
    with as_another_user():
        assert [entry.name for entry in read_keys(open_path)] == ["b"]


def test_writing_keys_fails_where_the_owner_would_change(
    open_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_key(open_path, "a", admin=False)
    open_path.chmod(0o644)
    before = open_path.read_bytes()
    if os.geteuid() != 0:

        def refuse(*_: object) -> None:
            raise PermissionError

        monkeypatch.setattr(os, "chown", refuse)
    with as_another_user():
        for change in (lambda: new_key(open_path, "b", admin=False), lambda: revoke(open_path)):
            with pytest.raises(DataError, match=r"stays as it is.*run this command as user \d+"):
                change()
    assert open_path.read_bytes() == before
    assert [each.name for each in open_path.parent.iterdir()] == ["keys.json"]


def revoke(path: Path) -> None:
    revoke_key(path, "a")


def test_concurrent_changes_of_keys_are_all_kept(tmp_path: Path) -> None:
    real, link = tmp_path / "etc" / "keys.json", tmp_path / "keys.json"
    real.parent.mkdir()
    link.symlink_to(real)
    before = [f"old-{i}" for i in range(8)]
    for name in before:
        new_key(real, name, admin=False)
    added = [f"new-{i}" for i in range(16)]
    with ThreadPoolExecutor(24) as pool:
        gone = [pool.submit(revoke_key, real, name) for name in before]
        made = [
            pool.submit(new_key, (real, link)[i % 2], name, admin=False)
            for i, name in enumerate(added)
        ]
        for each in gone:
            each.result()
        keys = [each.result() for each in made]
    assert sorted(each.name for each in read_keys(real)) == sorted(added)
    store = KeyStore(link)
    assert [store.find(key) for key in keys] == [Key(name, admin=False) for name in added]


def test_writing_keys_waits_for_the_lock(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(new_key, path, "a", admin=False)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        assert not path.exists()
        os.close(folder)
        key = waiting.result(60)
    assert KeyStore(path).find(key) == Key("a", admin=False)


def test_key_revoked_while_unreadable_is_dropped_once_readable(
    open_path: Path, seconds: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    gone, stays = (new_key(open_path, name, admin=False) for name in ("gone", "stays"))
    store = KeyStore(open_path)
    revoke_key(open_path, "gone")
    open_path.chmod(0)
    with caplog.at_level(logging.INFO), as_another_user():
        for _ in range(3):
            seconds[0] += 2
            assert store.find(gone) == Key("gone", admin=False)
    # Neither time nor size nor inode tell that the mode is mended.
    open_path.chmod(0o644)
    seconds[0] += 2
    with caplog.at_level(logging.INFO):
        assert store.find(gone) is None
        assert store.find(stays) == Key("stays", admin=False)
        seconds[0] += 2
        assert store.find(stays) is not None
    said = [(each.levelname, each.getMessage()) for each in caplog.records]
    assert [level for level, _ in said] == ["ERROR", "INFO"], said
    assert "Permission denied" in said[0][1]
    assert "read 1 keys" in said[1][1]


def test_keys_file_change_with_equal_time_and_size_is_read(
    path: Path, seconds: list[float]
) -> None:
    key = new_key(path, "aa", admin=False)
    store = KeyStore(path)
    state = path.stat()
    with path.open("r+") as file:
        changed = file.read().replace('"aa"', '"bb"')
        file.seek(0)
        file.write(changed)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        state.st_ino,
        state.st_size,
        state.st_mtime_ns,
    )
    seconds[0] += 2
    assert store.find(key) == Key("bb", admin=False)


def remove(path: Path) -> None:
    path.unlink()


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(remove, "no keys file"), (make_folder, "not a regular"), (make_pipe, "not a regular")],
)
def test_restored_keys_file_is_read(
    path: Path,
    seconds: list[float],
    spoil: Callable[[Path], None],
    says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    key = new_key(path, "a", admin=False)
    aside = path.with_name("aside")
    store = KeyStore(path)
    revoke_key(path, "a")
    os.link(path, aside)
    spoil(path)
    for _ in range(3):
        seconds[0] += 2
        assert store.find(key) == Key("a", admin=False)
    (error,) = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
    assert says in error
    if path.is_dir():
        path.rmdir()
    aside.replace(path)
    seconds[0] += 2
    assert store.find(key) is None


def entry(**changed: Any) -> dict[str, Any]:
    return {"name": "a", "sha256": "0" * 64, "created": "2026-11-24"} | changed


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"nonsense", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b" " * (2 << 20), "larger"),
        (orjson.dumps([]), "the whole"),
        (orjson.dumps({"keys": {}}), "keys"),
        (orjson.dumps({"keys": [entry(name="two words")]}), "name"),
        (orjson.dumps({"keys": [entry(name="a\n")]}), "name"),
        (orjson.dumps({"keys": [entry(sha256="rs_plain")]}), "sha256"),
        (orjson.dumps({"keys": [entry(created="yesterday")]}), "created"),
        (orjson.dumps({"keys": [entry(amdin=True)]}), "amdin"),
        (orjson.dumps({"keys": [entry(), entry(sha256="1" * 64)]}), "two keys"),
    ],
)
def test_broken_keys_file_is_described(path: Path, content: bytes, says: str) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as raised:
        KeyStore(path)
    assert str(path) in str(raised.value)


def test_missing_keys_file_names_the_remedy(path: Path) -> None:
    with pytest.raises(DataError, match=f"retinaserve keys new NAME --file {path}"):
        KeyStore(path)


def test_service_does_not_start_without_its_keys_file(path: Path) -> None:
    with pytest.raises(DataError, match="keys new"):
        create_app(Settings(api_keys_file=path, device="cpu"))


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(retinaserve, ["keys", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_keys_command_creates_lists_and_revokes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETINASERVE_API_KEYS_FILE", str(path))
    code, key, hint = run("new", "camera")
    assert code == 0
    assert "once" in hint
    assert key.strip() not in hint
    assert KeyStore(path).find(key.strip()) == Key("camera", admin=False)
    code, boss, _ = run("new", "boss", "--admin")
    assert KeyStore(path).find(boss.strip()) == Key("boss", admin=True)
    code, listed, _ = run("list")
    rows = [line.split("\t") for line in listed.splitlines()]
    assert [(row[0], row[2]) for row in rows] == [("camera", "client"), ("boss", "admin")]
    assert key.strip() not in listed
    assert run("revoke", "camera")[0] == 0
    assert KeyStore(path).find(key.strip()) is None


def test_keys_command_rejects_bad_arguments(path: Path, tmp_path: Path) -> None:
    assert run("new", "a", "--file", path)[0] == 0
    before = path.read_bytes()
    for arguments, says in (
        (("new", "a", "--file", path), "already"),
        (("new", "two words", "--file", path), "letters"),
        (("revoke", "b", "--file", path), "it has: a"),
        (("list", "--file", tmp_path / "none.json"), "there is no keys file"),
        (("list",), "RETINASERVE_API_KEYS_FILE"),
        (("new", "a", "--file", tmp_path / "no" / "folder.json"), "cannot be written"),
    ):
        code, out, error = run(*arguments)
        assert (code, out) == (2, ""), arguments
        assert says in error
        assert error.count("\n") == 1
    assert path.read_bytes() == before

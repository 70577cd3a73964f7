"""API keys: a file of named, hashed keys, and the store that a running service reads it with.

Keys are 256 random bits, so a plain SHA-256 is the right hash: a dictionary attack cannot succeed,
and a slow password hash or a salt would only slow each request. The file does not reveal the keys.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Final, NamedTuple

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import DataError, shown

if sys.platform != "win32":
    import fcntl

_log = logging.getLogger("retinaserve.keys")

_PREFIX: Final = "rs_"
"""Lets people and secret scanners recognise a key."""
_KEY_BYTES: Final = 32
_LONGEST_KEY: Final = 256
"""Characters of a presented key that are hashed; ours have 46."""
_LARGEST_FILE: Final = 1 << 20
_LOOK_EVERY: Final = 1.0
"""Seconds between two reads of the file: a revoked key is refused within this time."""


class Key(NamedTuple):
    """The name of a key, and whether it may administer models."""

    name: str
    admin: bool


class Entry(BaseModel):
    """A key in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: date
    admin: bool = False


class KeyFile(BaseModel):
    """The file's content."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[Entry, ...]

    @model_validator(mode="after")
    def _no_name_twice(self) -> KeyFile:
        names = [entry.name for entry in self.keys]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two keys are called {name!r}")
        return self


class KeyStore:
    """The keys of one file, which is read again at most once a second. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises DataError that names the remedy."""
        self._path = path
        self._lock = threading.Lock()
        self._content = _read(path)
        self._keys = _hashes(_parse(path, self._content))
        self._problem: str | None = None
        """Why the last read of the file failed; logged once."""
        self._looked = time.monotonic()
        if not self._keys:
            _log.warning("%s holds no key, so every request is refused; %s", path, _remedy(path))

    def find(self, presented: str) -> Key | None:
        """Return the key that was presented; None for an unknown one. Takes constant time."""
        self._refresh()
        if len(presented) > _LONGEST_KEY:
            return None
        digest = _hash(presented)
        found = None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY or not self._lock.acquire(blocking=False):
            return
        try:
            self._looked = now
            self._look()
        finally:
            self._lock.release()

    def _look(self) -> None:
        """Read the file, and replace the keys if its content has changed.

        The content is compared: mode, times and size can be equal for other content.
        """
        try:
            content = _read(self._path)
            if content == self._content and self._problem is None:
                return
            self._keys = _hashes(_parse(self._path, content))
        except DataError as error:
            if str(error) != self._problem:
                # Without a traceback, which adds nothing to the message.
                _log.log(logging.ERROR, "the keys stay as they were: %s", error)
            self._problem = str(error)
        else:
            self._content = content
            self._problem = None
            _log.info("read %d keys from %s", len(self._keys), self._path)


def read_keys(path: Path) -> tuple[Entry, ...]:
    """Return the keys of a file. Raises DataError that names the remedy."""
    return _parse(path, _read(path))


class _NoFileError(DataError):
    """The keys file does not exist."""


def _read(path: Path) -> bytes:
    """Return the content of a keys file. Raises DataError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            # Opening a pipe would block until something writes into it.
            raise DataError(f"the keys file {path} is not a regular file")
        with path.open("rb") as source:
            content = source.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise _NoFileError(f"there is no keys file {path}; {_remedy(path)}") from None
    except OSError as error:
        raise DataError(
            f"the keys file {path} cannot be read: {error.strerror}; "
            "the user that runs the service must be able to read it"
        ) from error
    if len(content) > _LARGEST_FILE:
        raise DataError(f"{path} is larger than {_LARGEST_FILE} bytes: not a keys file")
    return content


def _parse(path: Path, content: bytes) -> tuple[Entry, ...]:
    try:
        return KeyFile.model_validate(orjson.loads(content)).keys
    except orjson.JSONDecodeError as error:
        raise DataError(f"the keys file {path} is not valid JSON: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise DataError(
            f"the keys file {path} is not a list of keys: {place}: {first['msg']}; {_remedy(path)}"
        ) from error


def new_key(path: Path, name: str, *, admin: bool) -> str:
    """Add a key to a file, which is created if missing, and return it. Raises DataError."""
    key = _PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    try:
        entry = Entry(
            name=name,
            sha256=_hash(key).hex(),
            created=datetime.now(UTC).date(),
            admin=admin,
        )
    except ValidationError:
        raise DataError(
            f"{shown(name)} is not a name for a key; use 1 to 64 letters, digits, '.', '_' or '-'"
        ) from None
    with _exclusive(path) as target:
        try:
            entries = read_keys(target)
        except _NoFileError:
            entries = ()
        if any(each.name == name for each in entries):
            raise DataError(
                f"{path} has a key called {name!r} already; choose another name, or "
                f"`retinaserve keys revoke {name}` first"
            )
        _write(target, (*entries, entry))
    return key


def revoke_key(path: Path, name: str) -> None:
    """Remove a key from a file. Raises DataError."""
    with _exclusive(path) as target:
        entries = read_keys(target)
        rest = tuple(entry for entry in entries if entry.name != name)
        if len(rest) == len(entries):
            names = ", ".join(entry.name for entry in entries) or "none"
            raise DataError(f"{path} has no key called {shown(name)}; it has: {names}")
        _write(target, rest)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[Path]:
    """Hold the lock of a keys file's folder, and yield the file behind any links.

    The folder is locked because the file itself is replaced, and may not exist yet. Windows has no
    such lock. Raises DataError.
    """
    # Replacing a link would leave the real file as it was.
    target = Path(os.path.realpath(path))
    if sys.platform == "win32":
        yield target
        return
    with contextlib.ExitStack() as stack:
        try:
            folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError as error:
            raise DataError(
                f"{target} cannot be written: its folder cannot be locked: {error.strerror}"
            ) from error
        yield target


def _write(path: Path, entries: tuple[Entry, ...]) -> None:
    """Replace the file atomically.

    Owner, group and mode stay, so that the service can still read it. Raises DataError.
    """
    content = KeyFile(keys=entries).model_dump_json(indent=2) + "\n"
    try:
        # mkstemp makes files of mode 0600.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            if path.exists():
                _copy_ownership(path, name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _copy_ownership(old: Path, new: str) -> None:
    """Give a new file the owner, group, mode and access list of the old. Raises DataError."""
    state = old.stat()
    if sys.platform != "win32":
        try:
            os.chown(new, state.st_uid, state.st_gid)
        except PermissionError:
            raise DataError(
                f"{old} stays as it is: it belongs to user {state.st_uid} and group "
                f"{state.st_gid}, a new file would not, and the service might not be able to read "
                f"that; run this command as user {state.st_uid} or as root"
            ) from None
    shutil.copystat(old, new)


def _hashes(entries: tuple[Entry, ...]) -> tuple[tuple[bytes, Key], ...]:
    return tuple((bytes.fromhex(each.sha256), Key(each.name, each.admin)) for each in entries)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _remedy(path: Path) -> str:
    return f"`retinaserve keys new NAME --file {path}` makes a key"

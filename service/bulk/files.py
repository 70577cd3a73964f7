"""Files of images and results: this machine's, or those that fsspec reaches by a URL."""

from __future__ import annotations

import os
import posixpath
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, BinaryIO, Final, Literal, NamedTuple, Protocol
from urllib.parse import unquote_to_bytes
from urllib.request import url2pathname

from service.bulk.installed import check_fsspec
from service.errors import DataError, TooLarge, Unreadable

UNFINISHED: Final = ".unfinished"
"""Ends the name of a file that is being written."""


_AT_ONCE: Final = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Windows has the second and not the first."""


class Entry(NamedTuple):
    """An entry of a folder."""

    name: str
    folder: bool


class Files(Protocol):
    """Files by their full names: absolute paths, or URLs."""

    remote: bool

    def kind(self, name: str) -> Literal["file", "folder"] | None:
        """Return what a name is; None if it does not exist. Raises DataError."""

    def scan(self, folder: str) -> list[Entry]:
        """Return the entries of a folder, by name. Raises DataError."""

    def open(self, name: str) -> BinaryIO:
        """Open to read. Raises OSError."""

    def read(self, name: str, most: int) -> bytes:
        """Return the content, or its first `most` bytes. Raises OSError."""

    def write(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open to write. The file is there under its name once the block ends, whole; else not."""

    def make(self, folder: str) -> None:
        """Make a folder and its parents if they are missing. Raises DataError."""

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""


def files_of(name: str) -> Files:
    """Return the files that a full name belongs to. Raises DataError if they cannot be reached."""
    protocol, separator, rest = name.partition("://")
    return _remote(protocol, rest.partition("/")[0]) if separator else _LOCAL


def full_name(given: str) -> str:
    """Return the absolute path or the URL for what a user wrote.

    >>> full_name("s3://images/2024/"), full_name("file:///data/a.jpg")
    ('s3://images/2024', '/data/a.jpg')
    """
    if given.startswith("file://"):
        path = given.removeprefix("file://")
        # The bytes of a name need not be UTF-8, which `url2pathname` would take them for.
        given = url2pathname(path) if os.name == "nt" else os.fsdecode(unquote_to_bytes(path))
    if "://" in given:
        return given.rstrip("/")
    # Links stay what they are called.
    return os.path.normpath(Path(given).expanduser().absolute())


def join(folder: str, name: str) -> str:
    """Return a name below a folder; a full name is returned as it is.

    >>> join("s3://images", "a/b.jpg"), join("/data", "/other/b.jpg")
    ('s3://images/a/b.jpg', '/other/b.jpg')
    """
    if "://" in name or Path(name).is_absolute():
        return full_name(name)
    return posixpath.join(folder, name) if "://" in folder else os.path.normpath(f"{folder}/{name}")


def parent(name: str) -> str:
    """Return the folder of a full name."""
    return name.rpartition("/")[0] if "://" in name else str(Path(name).parent)


def read_image(name: str, most: int) -> bytes:
    """Return an image's bytes. Raises Unreadable, or TooLarge for more than `most`."""
    try:
        data = files_of(name).read(name, most + 1)
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # What the libraries behind URLs raise has no common base class.
        raise Unreadable(f"cannot be read: {str(error) or type(error).__name__}") from error
    return check_bytes(data, most)


def check_bytes(data: bytes, most: int) -> bytes:
    """Return the same bytes. Raises TooLarge for more than `most` of them."""
    if len(data) > most:
        raise TooLarge(
            f"the file has more than {most} bytes; RETINASERVE_MAX_BODY_BYTES is the limit"
        )
    return data


class LocalFiles:
    """This machine's files."""

    remote = False

    def kind(self, name: str) -> Literal["file", "folder"] | None:
        """Return what a name is; None if it does not exist."""
        try:
            mode = Path(name).stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error
        return "folder" if S_ISDIR(mode) else "file"

    def scan(self, folder: str) -> list[Entry]:
        """Return the entries of a folder, by name. Links to folders are left out, not followed.

        All else counts as a file: pipes, devices and broken links fail when they are read.
        """
        try:
            with os.scandir(folder) as found:
                entries = [
                    Entry(each.name, each.is_dir(follow_symlinks=False))
                    for each in found
                    if not (each.is_symlink() and _is_folder(each))
                ]
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed: {error.strerror or error}") from error
        return sorted(entries)

    def open(self, name: str) -> BinaryIO:
        """Open to read. Raises OSError."""
        return os.fdopen(_open_plain(name), "rb")

    def read(self, name: str, most: int) -> bytes:
        """Return the content, or its first `most` bytes."""
        # For every image: Path and buffers would take longer than the system does.
        number = _open_plain(name)
        try:
            wanted = min(os.fstat(number).st_size + 1, most)
            data = os.read(number, wanted)
            while len(data) < wanted and (more := os.read(number, wanted - len(data))):
                data += more
            return data
        finally:
            os.close(number)

    @contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        """Write to a temporary name, sync to disk, then rename."""
        path = Path(name)
        # Not longer for a long name: file systems end at 255 bytes.
        unfinished = path.with_name(f".{uuid.uuid4().hex[:8]}{UNFINISHED}")
        try:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def make(self, folder: str) -> None:
        """Make a folder and its parents."""
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot be made: {error.strerror or error}") from error

    def remove(self, name: str) -> None:
        """Remove a file."""
        Path(name).unlink(missing_ok=True)


class RemoteFiles:
    """Files of one of fsspec's file systems. Thread-safe."""

    remote = True

    def __init__(self, system: Any) -> None:
        self._system = system

    def kind(self, name: str) -> Literal["file", "folder"] | None:
        """Return what a name is; None if it does not exist."""
        # Object stores have no empty folders; a name that nothing begins with is none.
        if self._system.isdir(name):
            return "folder"
        return "file" if self._system.exists(name) else None

    def scan(self, folder: str) -> list[Entry]:
        """Return the entries of a folder, by name."""
        try:
            found = self._system.ls(folder, detail=True, refresh=True)
        except Exception as error:
            # What the libraries behind URLs raise has no common base class.
            raise DataError(f"{folder}: cannot be listed: {error}") from error
        own = self._system._strip_protocol(folder).rstrip("/")
        names = ((each["name"].rstrip("/"), each["type"] == "directory") for each in found)
        # Some stores have an object for the folder itself.
        return sorted(
            Entry(name.rpartition("/")[2], is_folder) for name, is_folder in names if name != own
        )

    def open(self, name: str) -> BinaryIO:
        """Open to read."""
        file: BinaryIO = self._system.open(name, "rb")
        return file

    def read(self, name: str, most: int) -> bytes:
        """Return the content, or its first `most` bytes."""
        with self.open(name) as file:
            return file.read(most)

    @contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        """Write to a temporary name, then rename: some file systems show files while they grow."""
        folder, _, last = name.rpartition("/")
        unfinished = f"{folder}/.{last}.{uuid.uuid4().hex[:8]}{UNFINISHED}"
        try:
            with self._system.open(unfinished, "wb") as file:
                yield file
            self._system.mv(unfinished, name)
        except BaseException:
            with suppress(Exception):
                self._system.rm_file(unfinished)
            raise

    def make(self, folder: str) -> None:
        """Make a folder, if the file system has folders."""
        try:
            self._system.makedirs(folder, exist_ok=True)
        except Exception as error:
            raise DataError(f"{folder}: cannot be made: {error}") from error

    def remove(self, name: str) -> None:
        """Remove a file."""
        with suppress(FileNotFoundError):
            self._system.rm_file(name)


_LOCAL: Final = LocalFiles()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link to itself, say.
        return False


def _open_plain(name: str) -> int:
    """Return a file descriptor. Raises OSError for all but regular files: a pipe may never end."""
    number = os.open(name, os.O_RDONLY | _AT_ONCE)
    if S_ISREG(os.fstat(number).st_mode):
        return number
    os.close(number)
    raise OSError("not a regular file")


@lru_cache(maxsize=64)
def _remote(protocol: str, authority: str) -> Files:
    url = f"{protocol}://{authority}"
    check_fsspec(url)
    from fsspec.core import url_to_fs

    try:
        return RemoteFiles(url_to_fs(url)[0])
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: cannot be reached: {error}") from error

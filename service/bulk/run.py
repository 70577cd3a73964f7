"""A run: its images, model and parameters, and which of its parts are finished.

OUTPUT/part-0000000.parquet …   the results
OUTPUT/_run/manifest.json       what the run is; there once the images are listed
OUTPUT/_run/listing.parquet     its images
OUTPUT/_run/summary.json        what came of it; there once it is finished
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from service.bulk.files import UNFINISHED, files_of, join
from service.bulk.listing import Lister, Listing, difference, write_listing
from service.bulk.parts import Counts, part_name, read_counts
from service.errors import DataError

_PART: Final = re.compile(r"part-(\d{7,})\.parquet")
_LOOKERS: Final = 16
"""Threads that look at finished parts: each look is a few waits for the disk or the network."""


class Parameters(BaseModel):
    """The parameters of detection. None: the model's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    score_threshold: float | None
    iou_threshold: float | None
    max_detections: int | None
    classes: tuple[str, ...] | None
    tile: str
    max_image_pixels: int
    max_body_bytes: int


class ModelId(BaseModel):
    """The identity of the model file."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str
    version: int | None
    sha256: str


class Manifest(BaseModel):
    """The description of a run, which never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    input: tuple[str, ...]
    """Full names."""
    column: str | None
    name_column: str | None
    part_size: int
    pictures: int
    model: ModelId
    class_names: tuple[str, ...]
    parameters: Parameters
    retinaserve: str
    """Version that began it."""
    started: str

    @property
    def run_id(self) -> str:
        """The id that the parts of this run share."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return what every part says of the run."""
        return self.model_dump(mode="json")

    def differences(self, other: Manifest) -> list[str]:
        """Return in words what another run would do differently."""
        then, now = self._decisive(), other._decisive()
        return [
            f"{name} was {_written(then[name])}, now it is {_written(now[name])}"
            for name in then
            if then[name] != now[name]
        ]

    def _decisive(self) -> dict[str, Any]:
        return {
            "INPUT": self.input,
            "--column": self.column,
            "--name-column": self.name_column,
            "--part-size": self.part_size,
            # Not by its name: the same file may lie elsewhere now.
            "the model file's sha256": self.model.sha256,
            **{_option(name): value for name, value in self.parameters},
        }


class Todo(NamedTuple):
    """The parts to do."""

    parts: Sequence[int]
    """Parts that are not there."""
    again: Sequence[int] = ()
    """Parts that are there, whose failed images get another try."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run on disk."""

    output: str
    manifest: Manifest
    listing: Listing

    @property
    def parts(self) -> int:
        """The number of parts."""
        return self.listing.parts

    def done(self) -> dict[int, Counts]:
        """Return the counts of the finished parts by number."""
        names = [entry.name for entry in files_of(self.output).scan(self.output)]
        numbers = sorted(int(found[1]) for name in names if (found := _PART.fullmatch(name)))
        with ThreadPoolExecutor(_LOOKERS) as pool:
            counts = pool.map(self._counts, numbers)
            return {
                number: each
                for number, each in zip(numbers, counts, strict=True)
                if each is not None
            }

    def _counts(self, number: int) -> Counts | None:
        return read_counts(part_name(self.output, number), self.manifest.run_id)


def begin(output: str, wanted: Manifest, lister: Lister) -> None:
    """List the images of a new run and write its manifest. Raises DataError."""
    files = files_of(output)
    if any(_PART.fullmatch(entry.name) for entry in files.scan(output)):
        raise DataError(
            f"{output} holds parts, but not what run they are of (_run/manifest.json); "
            "give an empty --output"
        )
    folder = join(output, "_run")
    files.make(folder)
    count = write_listing(join(folder, "listing.parquet"), lister.items(), wanted.part_size)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    manifest = wanted.model_copy(
        update={"pictures": count, "column": lister.column, "started": started}
    )
    # From here on it is a run that can be resumed.
    _write(join(folder, "manifest.json"), manifest.model_dump(mode="json"))


def open_run(output: str) -> Run:
    """Open a run that has begun. Raises DataError."""
    folder = join(output, "_run")
    name = join(folder, "manifest.json")
    try:
        with files_of(name).open(name) as file:
            manifest = Manifest.model_validate_json(file.read())
    except (OSError, ValidationError) as error:
        raise DataError(f"{name}: no readable manifest of a run: {error}") from error
    return Run(output, manifest, Listing(join(folder, "listing.parquet")))


def has_begun(output: str) -> bool:
    """Return whether there is a run to resume."""
    name = join(join(output, "_run"), "manifest.json")
    return files_of(name).kind(name) == "file"


def check_same(run: Run, wanted: Manifest, lister: Lister | None) -> None:
    """Raise DataError where a run is not the one that is wanted, and say what differs.

    `lister` goes through the input as it is now; None: whatever is there now, the listing holds.
    """
    if run.manifest.column is not None and wanted.column is None:
        wanted = wanted.model_copy(update={"column": run.manifest.column})
    if other := run.manifest.differences(wanted):
        raise DataError(
            f"{run.output} has a run of other arguments: {'; '.join(other)}. Give the same to "
            "resume it, or another --output"
        )
    if lister is not None and (found := difference(run.listing, lister.items())) is not None:
        raise DataError(
            f"{run.output} has a run over other images: {found}. --as-listed resumes it with "
            "the images that it began with; another --output begins anew"
        )


@contextmanager
def locked(output: str) -> Iterator[None]:
    """Lock the output. Raises DataError if another process holds the lock.

    Remove unfinished files of a killed process. URLs are not locked.
    """
    files = files_of(output)
    folder = join(output, "_run")
    files.make(folder)
    if files.remote:
        yield
        return
    try:
        import fcntl
    except ImportError:  # pragma: no cover: Windows has no such locks
        yield
        return
    with Path(folder, "lock").open("ab") as file:
        try:
            # Gone with the process, however that ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{output}: another process works on it") from error
        for place in (output, folder):
            for entry in files.scan(place):
                if entry.name.startswith(".") and entry.name.endswith(UNFINISHED):
                    files.remove(join(place, entry.name))
        yield


def write_summary(run: Run, summary: dict[str, Any]) -> None:
    """Write down what came of a run."""
    _write(join(join(run.output, "_run"), "summary.json"), summary)


def _write(name: str, document: dict[str, Any]) -> None:
    with files_of(name).write(name) as file:
        file.write(orjson.dumps(document, option=orjson.OPT_INDENT_2))


def _option(parameter: str) -> str:
    limits = {
        "max_image_pixels": "RETINASERVE_MAX_IMAGE_PIXELS",
        "max_body_bytes": "RETINASERVE_MAX_BODY_BYTES",
    }
    return limits.get(parameter, "--" + parameter.replace("_", "-"))


def _written(value: Any) -> str:
    if value is None:
        return "left open"
    return (
        ", ".join(map(str, value))
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )

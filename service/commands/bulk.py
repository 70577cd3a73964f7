"""`retinaserve bulk`: any number of images to detections in Parquet files, resumable."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import click
import orjson

from service.bulk.engine import Done
from service.bulk.files import files_of, full_name
from service.bulk.listing import Lister
from service.bulk.local import LocalDetection
from service.bulk.parts import Counts
from service.bulk.progress import Progress
from service.bulk.run import (
    Manifest,
    ModelId,
    Parameters,
    Run,
    Todo,
    begin,
    check_same,
    has_begun,
    locked,
    open_run,
    write_summary,
)
from service.bulk.stopping import Stopped, stop_on_signals
from service.bulk.walk import root_of
from service.commands.offline import FoundModel, find_model
from service.engine.postprocessing import resolve, split_classes
from service.engine.tiling import parse_tile
from service.errors import BulkFailed, DataError
from service.filenames import written
from service.settings import Settings, load_settings
from service.version import package_version


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command line."""

    inputs: Sequence[str]
    output: str
    engine: str
    given: dict[str, object]
    """Settings that options override."""
    model: str | None
    column: str | None
    name_column: str | None
    score_threshold: float | None
    iou_threshold: float | None
    max_detections: int | None
    classes: Sequence[str]
    tile: str
    part_size: int
    concurrency: int | None
    ray_address: str | None
    as_listed: bool
    retry_failed: bool


class Engine(Protocol):
    """Does the remaining parts."""

    @property
    def where(self) -> str:
        """The devices, for messages."""

    def detect(
        self, run: Run, todo: Todo, progress: Progress, on_part: Callable[[Done], None]
    ) -> None:
        """Do the remaining parts. Raises BulkFailed, ArtifactError, DeviceError or Stopped."""


def run(asked: Asked) -> tuple[int, int]:
    """Do the remaining parts. Return the number of failed images and an exit code.

    Prints a summary as JSON. Raises DataError, ArtifactError, UnknownModel, InvalidParameter or
    DeviceError before any image is touched, BulkFailed after.
    """
    # Pillow words its warnings after each odd image, and Python remembers each wording.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    output = full_name(asked.output)
    try:
        with stop_on_signals(), ExitStack() as stack:
            summary = _run(asked, output, stack)
    except Stopped as stopped:
        click.echo(f"retinaserve: stopped by {stopped}. {_resume(output)}", err=True)
        return 0, stopped.status
    except (BulkFailed, OSError) as error:
        raise BulkFailed(f"{error}. {_resume(output)}") from error
    click.echo(orjson.dumps(summary, option=orjson.OPT_INDENT_2).decode())
    return summary["failed"], 0


def _run(asked: Asked, output: str, stack: ExitStack) -> dict[str, Any]:
    """Return the summary."""
    _check_apart(asked, output)
    settings = load_settings(**asked.given)
    model = find_model(settings, asked.model)
    wanted = _manifest(asked, settings, model)
    files_of(output).make(output)
    stack.enter_context(locked(output))
    engine = _engine(asked, settings, model, stack)
    opened = _open(asked, output, wanted, stack)
    done = opened.done()
    todo = Todo(
        [number for number in range(opened.parts) if number not in done],
        [n for n, each in done.items() if each.failed] if asked.retry_failed else [],
    )
    _announce(opened, done, engine)
    started = time.monotonic()
    total, before = opened.manifest.pictures, sum(done.values(), Counts())
    again = sum(done[number].failed for number in todo.again)
    progress = Progress(total, done=before.images - again, failed=before.failed - again)
    stack.callback(progress.close)

    def on_part(part: Done) -> None:
        done[part.number] = part.counts

    if todo.parts or todo.again:
        engine.detect(opened, todo, progress, on_part)
    progress.close()
    counts = sum(done.values(), Counts())
    summary: dict[str, Any] = {
        "output": written(output),
        "model": opened.manifest.model.model_dump(include={"name", "version"}),
        **counts.to_json(),
        "parts": opened.parts,
        "already_done": {"pictures": before.images, "parts": opened.parts - len(todo.parts)},
        "seconds": round(time.monotonic() - started, 2),
        "pictures_per_second": round(progress.rate, 2),
    }
    write_summary(opened, summary)
    return summary


def _check_apart(asked: Asked, output: str) -> None:
    """Raise DataError where results would lie among the files of INPUT, or become some of them.

    Next to images there is room for them in a folder of their own, but not next to Parquet: the run
    would find its results in INPUT when it is resumed.
    """
    place = _real(output)
    for given in asked.inputs:
        name = full_name(given)
        root = _real(root_of(name))
        searched = root == _real(name) or "**" in name
        tables = asked.column is not None or name.endswith(".parquet")
        if place == root or (tables and searched and place.startswith(root.rstrip("/") + "/")):
            raise DataError(
                f"--output {asked.output} lies in INPUT {given}; name a folder outside of it"
            )


def _real(name: str) -> str:
    return name if "://" in name else os.path.realpath(name)


def _manifest(asked: Asked, settings: Settings, model: FoundModel) -> Manifest:
    """Return the manifest of the arguments, without images. Raises InvalidParameter."""
    metadata = model.artifact.metadata
    classes = split_classes(asked.classes, metadata.classes) if asked.classes else None
    resolve(metadata, classes=classes)
    return Manifest(
        input=tuple(written(full_name(given)) for given in asked.inputs),
        column=asked.column,
        name_column=asked.name_column,
        part_size=asked.part_size,
        pictures=0,
        model=ModelId(name=model.name, version=model.version, sha256=model.artifact.sha256),
        class_names=metadata.classes,
        parameters=Parameters(
            score_threshold=asked.score_threshold,
            iou_threshold=asked.iou_threshold,
            max_detections=asked.max_detections,
            classes=None if classes is None else tuple(classes),
            tile=str(parse_tile(asked.tile)),
            max_image_pixels=settings.max_image_pixels,
            max_body_bytes=settings.max_body_bytes,
        ),
        retinaserve=package_version(),
        started="",
    )


def _engine(asked: Asked, settings: Settings, model: FoundModel, stack: ExitStack) -> Engine:
    if asked.engine == "local":
        for option, value in (
            ("concurrency", asked.concurrency),
            ("ray-address", asked.ray_address),
        ):
            if value is not None:
                raise DataError(f"--{option} needs --engine ray")
        return LocalDetection(model.artifact, settings)
    from service.bulk.ray_engine import connected

    return stack.enter_context(
        connected(
            model.artifact, settings, address=asked.ray_address, concurrency=asked.concurrency
        )
    )


def _open(asked: Asked, output: str, wanted: Manifest, stack: ExitStack) -> Run:
    """Open the run that was begun, or begin one."""
    lister = Lister(asked.inputs, column=asked.column, name_column=asked.name_column)
    resumed = has_begun(output)
    if not resumed:
        click.echo("retinaserve: listing the images", err=True)
        begin(output, wanted, lister)
    opened = open_run(output)
    stack.callback(opened.listing.close)
    if resumed:
        check_same(opened, wanted, None if asked.as_listed else lister)
    return opened


def _announce(opened: Run, done: dict[int, Counts], engine: Engine) -> None:
    manifest = opened.manifest
    there = f"; {len(done)} of {opened.parts} parts are there already" if done else ""
    if manifest.retinaserve != package_version():
        there += f"; version {manifest.retinaserve} began it, this is {package_version()}"
    click.echo(
        f"retinaserve: {manifest.pictures} images in {opened.parts} parts, "
        f"{manifest.model.name} on {engine.where}{there}",
        err=True,
    )


def _resume(output: str) -> str:
    begun = has_begun(output)
    return "The same command goes on where it ended" if begun else "Nothing was begun yet"

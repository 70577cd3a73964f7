"""`retinaserve detect`: files and folders to detections, without a server."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TextIO

import orjson
from PIL import Image
from tqdm import tqdm

from service.bulk.files import files_of, read_image
from service.bulk.walk import walk_folder
from service.commands.coco_ids import CocoIds, image_names, read_ids
from service.commands.offline import find_model
from service.engine import postprocessing as results
from service.engine.drawing import Encoding, LabelFont, draw, encode
from service.engine.offline import Found, OfflineRunner
from service.engine.postprocessing import Selection
from service.engine.tiling import Tile
from service.engine.work import Servable
from service.errors import DataError, RetinaserveError, shown_list
from service.filenames import csv_cell, identity, one_line, refuse_to_replace, written
from service.http.problems import problem_of
from service.imaging.decode import SUFFIXES, decode, media_type
from service.imaging.memory_budget import DecodeMemory
from service.runtime.artifact import Artifact
from service.runtime.detector import Detections, Detector
from service.runtime.devices import open_detector, resolve_for
from service.settings import Settings, load_settings
from service.system.cpus import cpu_count

_ENCODINGS: Final[dict[str, Encoding]] = {
    "image/jpeg": "JPEG",
    "image/png": "PNG",
    "image/webp": "WEBP",
}


@dataclass(frozen=True, slots=True)
class Source:
    """An image to detect on."""

    path: Path
    relative: Path
    """Relative to the folder in PATH; also the place of the annotated copy in `--save-dir`."""

    @property
    def name(self) -> str:
        """The name in outputs."""
        return written(self.path)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The model in use."""

    name: str
    version: int | None
    artifact: Artifact
    detector: Detector
    on_cpu: bool
    selection: Selection

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label."""
        return self.detector.metadata.classes

    def to_json(self) -> dict[str, Any]:
        """Return the model as responses name it."""
        return {"name": self.name, "version": self.version}

    def runner(self, settings: Settings, tile: Tile) -> OfflineRunner:
        """Return a runner for the model."""
        return OfflineRunner(
            Servable(self.name, self.version or 1, self.artifact, (self.detector,)),
            self.selection,
            decode_threads=cpu_count(),
            decoders_infer=self.on_cpu,
            tile=tile,
            memory=DecodeMemory(settings.decode_memory_bytes),
            max_pixels=settings.max_image_pixels,
        )


class Writer(Protocol):
    """One output format."""

    def add(self, index: int, source: Source, found: Found | RetinaserveError) -> None:
        """Write one image's result."""

    def close(self) -> None:
        """Write what comes last."""


def run(
    paths: Sequence[Path],
    *,
    model: str | None,
    score_threshold: float | None,
    device: str | None,
    output: str,
    save_dir: Path | None,
    tile: Tile = "off",
    max_detections: int | None = None,
    like: Path | None = None,
) -> int:
    """Detect on everything below `paths`. Return the number of images that failed or are unsaved.

    `like` is a COCO annotation file whose ids COCO results have; an image that is in one of the
    file and `paths` alone counts as failed. Raises DataError, ArtifactError, UnknownModel or
    DeviceError before any image is touched.
    """
    settings = load_settings(device=device)
    sources = find_images(paths)
    reader = Reader(settings)
    saver = None
    if save_dir is not None:
        saver = Saver(save_dir, sources, reader, LabelFont(settings.font_file))
    loaded = load_model(settings, model, score_threshold, max_detections)
    failed, ids = 0, None
    if like is not None:
        ids = read_ids(like, loaded.classes, [source.path for source in sources])
        sources = [source for source in sources if source.path in ids.images]
        failed += _report_differences(like, ids)
    alone = len(paths) == 1 and paths[0].is_file()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # JSON is UTF-8, and no other encoding has all names.
        sys.stdout.reconfigure(encoding="utf-8")
    writer = _writer(output, loaded, ids, alone=alone)
    with ExitStack() as stack:
        runner = stack.enter_context(loaded.runner(settings, tile))
        bar = stack.enter_context(
            tqdm(total=len(sources), unit="image", file=sys.stderr, disable=len(sources) == 1)
        )
        results_of_all = runner.detect_all(partial(reader.read, each.path) for each in sources)
        for index, (source, found) in enumerate(zip(sources, results_of_all, strict=True)):
            problem = None
            if isinstance(found, RetinaserveError):
                problem = f"{source.name}: {found}"
            elif saver is not None:
                problem = saver.save(source, found.detections, loaded.classes)
            if problem is not None:
                failed += 1
                complain(problem)
            writer.add(index, source, found)
            bar.update()
    # Not after an exception: what is cut short should not look whole.
    writer.close()
    return failed


def find_images(paths: Sequence[Path]) -> list[Source]:
    """Files as named, and every image below the folders, by name. Raises DataError.

    Folders that cannot be listed are among them: reading them fails.
    """
    sources: list[Source] = []
    taken: set[Path] = set()
    for path in paths:
        if path.is_dir():
            found = [Path(name) for name in walk_folder(str(path), _is_image)]
            if not found:
                kinds = ", ".join(sorted(SUFFIXES))
                raise DataError(f"{path}: no image in this folder ({kinds})")
            pairs = [(p, p.relative_to(path)) for p in found]
        else:
            pairs = [(path, Path(path.name))]
        for file, relative in pairs:
            unique = _unique(relative, taken)
            taken.add(unique)
            sources.append(Source(file, unique))
    return sources


class Reader:
    """Reads and decodes images within the limits of the settings. For any thread."""

    def __init__(self, settings: Settings) -> None:
        self._max_pixels = settings.max_image_pixels
        # A 16-bit RGBA PNG that is hardly compressed has 8 bytes a pixel.
        self._max_bytes = max(settings.max_body_bytes, 8 * settings.max_image_pixels)

    def read(self, path: Path) -> bytes:
        """Return the content of a regular file. Raises Unreadable or TooLarge."""
        return read_image(str(path), self._max_bytes)

    def decode(self, data: bytes) -> Image.Image:
        """Decode an image in full. Raises MalformedImage, UnsupportedMedia or TooLarge."""
        return decode(data, max_pixels=self._max_pixels)


class Saver:
    """Writes annotated copies, and none over an image that is read or over another copy."""

    def __init__(
        self, folder: Path, sources: Sequence[Source], reader: Reader, font: LabelFont
    ) -> None:
        """Raises DataError if a copy would replace a source, or the folder cannot be made."""
        self._folder = folder
        self._reader = reader
        self._font = font
        paths = [source.path for source in sources]
        refuse_to_replace((folder / source.relative for source in sources), paths)
        self._kept = {identity(path) for path in paths}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot be made: {error.strerror or error}") from error

    def save(self, source: Source, found: Detections, classes: Sequence[str]) -> str | None:
        """Write a copy of an image with its boxes drawn; what is wrong where that fails."""
        target = self._folder / source.relative
        there = identity(target)
        # Where letter case does not count, or by links, two names may be one file.
        if there is not None and there in self._kept:
            return f"{written(target)}: not written: it is another image's; name another folder"
        try:
            data = self._reader.read(source.path)
            image = draw(self._reader.decode(data), found, classes, self._font)
            content = encode(image, _ENCODINGS[media_type(data)])
            target.parent.mkdir(parents=True, exist_ok=True)
            with files_of(str(target)).write(str(target)) as file:
                file.write(content)
        except Exception as error:
            # A full disk, or any trouble of the encoder: the image is answered all the same.
            reason = error.strerror if isinstance(error, OSError) else None
            return f"{written(target)}: cannot be written: {reason or error}"
        self._kept.add(identity(target))
        return None


def load_model(
    settings: Settings,
    model: str | None,
    score_threshold: float | None,
    max_detections: int | None,
) -> LoadedModel:
    """Load a model file, or a model of the repository, on the first device."""
    device = resolve_for(settings).devices[0]
    found = find_model(settings, model)
    return LoadedModel(
        found.name,
        found.version,
        found.artifact,
        open_detector(found.artifact, device),
        device.kind == "cpu",
        results.resolve(
            found.artifact.metadata,
            score_threshold=score_threshold,
            max_detections=max_detections,
        ),
    )


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _unique(relative: Path, taken: set[Path]) -> Path:
    candidate, number = relative, 2
    while candidate in taken:
        candidate = relative.with_stem(f"{relative.stem}-{number}")
        number += 1
    return candidate


def _report_differences(like: Path, ids: CocoIds) -> int:
    """Name the images that are in one of the annotation file and PATH alone; return their count."""
    if ids.unlisted:
        names = shown_list(image_names(ids.unlisted))
        complain(f"{len(ids.unlisted)} images without an entry in {like} are left out: {names}")
    if ids.unmatched:
        complain(
            f"{len(ids.unmatched)} images of {like} are not given, and count as without detections "
            f"where results are compared with it: {shown_list(ids.unmatched)}"
        )
    for note in ids.notes:
        complain(f"note: {note}")
    return len(ids.unlisted) + len(ids.unmatched)


def complain(problem: str) -> None:
    """Write a line to stderr, above a progress bar."""
    tqdm.write(one_line(f"retinaserve: {problem}"), file=sys.stderr)


def _writer(output: str, loaded: LoadedModel, ids: CocoIds | None, *, alone: bool) -> Writer:
    if output == "csv":
        return CsvWriter(sys.stdout, loaded)
    if output == "coco":
        return CocoWriter(sys.stdout, ids)
    return OneWriter(sys.stdout, loaded) if alone else BatchWriter(sys.stdout, loaded)


class OneWriter:
    """The response of POST /v1/detect; nothing for an image that failed."""

    def __init__(self, stream: TextIO, loaded: LoadedModel) -> None:
        self._stream = stream
        self._loaded = loaded

    def add(self, index: int, source: Source, found: Found | RetinaserveError) -> None:
        """Write the one image's result."""
        if isinstance(found, Found):
            document = {
                "model": self._loaded.to_json(),
                **_image_json(found, self._loaded),
                "timing_ms": _milliseconds(found),
            }
            self._stream.write(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")

    def close(self) -> None:
        """Do nothing."""


class BatchWriter:
    """The response of POST /v1/detect/batch, written as images finish; `id` is the path."""

    def __init__(self, stream: TextIO, loaded: LoadedModel) -> None:
        self._stream = stream
        self._loaded = loaded
        self._between = "\n"
        stream.write('{"results": [')

    def add(self, index: int, source: Source, found: Found | RetinaserveError) -> None:
        """Write one image's result."""
        answer: dict[str, Any] = {"index": index, "id": source.name}
        if isinstance(found, Found):
            answer |= {"status": 200} | _image_json(found, self._loaded)
        else:
            error = problem_of(found, instance=source.name, request_id="-")
            answer |= {"status": found.status, "error": error}
        self._stream.write(self._between + orjson.dumps(answer).decode())
        self._between = ",\n"

    def close(self) -> None:
        """Close the list."""
        model = orjson.dumps(self._loaded.to_json()).decode()
        self._stream.write(f'\n], "model": {model}}}\n')


class CocoWriter:
    """One list of COCO results; `file_name` says which image it was.

    Without `ids`, `image_id` counts the images, and `category_id` is the model's label.
    """

    def __init__(self, stream: TextIO, ids: CocoIds | None = None) -> None:
        self._stream = stream
        self._ids = ids
        self._between = "\n"
        stream.write("[")

    def add(self, index: int, source: Source, found: Found | RetinaserveError) -> None:
        """Write one image's detections."""
        if not isinstance(found, Found):
            return
        if self._ids is not None:
            rows = self._ids.rows(source.path, found.detections)
        else:
            rows = results.coco(found.detections, image_id=index)
        for row in rows:
            row["file_name"] = source.name
            self._stream.write(self._between + orjson.dumps(row).decode())
            self._between = ",\n"

    def close(self) -> None:
        """Close the list."""
        self._stream.write("\n]\n")


class CsvWriter:
    """A line per detection. No byte-order mark: in a pipe it would be part of the first name."""

    def __init__(self, stream: TextIO, loaded: LoadedModel) -> None:
        self._stream = stream
        # Up to Python 3.12 a carriage return in a cell is quoted only if one ends the lines.
        self._writer = csv.writer(self, lineterminator="\r\n")
        self._loaded = loaded
        self._writer.writerow(("file", "label", "class_id", "score", "x1", "y1", "x2", "y2"))

    def add(self, index: int, source: Source, found: Found | RetinaserveError) -> None:
        """Write one image's detections."""
        if not isinstance(found, Found):
            return
        for row in results.native(found.detections, self._loaded.classes):
            names = csv_cell(source.name), csv_cell(row["label"])
            self._writer.writerow((*names, row["class_id"], row["score"], *row["box"].values()))

    def write(self, line: str) -> None:
        """Take a line of the CSV writer's."""
        self._stream.write(line.removesuffix("\r\n") + "\n")

    def close(self) -> None:
        """Do nothing."""


def _image_json(found: Found, loaded: LoadedModel) -> dict[str, Any]:
    return {
        "image": results.image(found.image, found.canvases),
        "detections": results.native(found.detections, loaded.classes),
    }


def _milliseconds(found: Found) -> dict[str, float]:
    stages = found.timing._asdict() | {"total": sum(found.timing)}
    return {stage: round(seconds * 1e3, 2) for stage, seconds in stages.items()}

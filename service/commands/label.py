"""`retinaserve label`: detections as annotations that people open in a tool and correct."""

from __future__ import annotations

import filecmp
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

import click
from tqdm import tqdm

from service.bulk.files import files_of
from service.commands.detect import (
    LoadedModel,
    Reader,
    Source,
    complain,
    find_images,
    load_model,
)
from service.commands.label_formats import FORMATS, LabelFormat, LabelledImage, Origin
from service.engine.tiling import Tile
from service.errors import DataError, RetinaserveError, Unreadable, shown
from service.filenames import refuse_to_replace
from service.imaging.canvas import Size
from service.imaging.decode import SUFFIXES
from service.runtime.detector import Detections
from service.settings import load_settings

_UNWRITABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that neither XML nor YAML can hold, nor a list of one name a line."""


def run(
    paths: Sequence[Path],
    *,
    model: str | None,
    output: Path,
    layout: str,
    score_threshold: float | None,
    device: str | None,
    tile: Tile = "off",
    link: bool = False,
    overwrite: bool = False,
) -> int:
    """Label everything below `paths`. Return the number of images that failed.

    Raises DataError, ArtifactError, UnknownModel or DeviceError before any image is touched.
    """
    settings = load_settings(device=device)
    refuse_inside(output, paths)
    # An image that is named twice, by a folder and by itself, is one.
    by_path: dict[Path, Source] = {}
    for source in find_images(paths):
        by_path.setdefault(source.path.absolute(), source)
    sources = list(by_path.values())
    reader = Reader(settings)
    loaded = load_model(settings, model, score_threshold, None)
    folder = LabelFolder(output, FORMATS[layout], origin_of(loaded), reader, link=link)
    wanted, kept = folder.open(sources, overwrite=overwrite)
    failed = 0
    with (
        loaded.runner(settings, tile) as runner,
        tqdm(total=len(wanted), unit="image", file=sys.stderr, disable=len(wanted) == 1) as bar,
    ):
        found_on = runner.detect_all(partial(reader.read, source.path) for source in wanted)
        for source, found in zip(wanted, found_on, strict=True):
            try:
                if isinstance(found, RetinaserveError):
                    raise found
                folder.add(source, found.image, found.detections)
            except RetinaserveError as error:
                failed += 1
                complain(f"{source.name}: {error}")
            bar.update()
    # Not after an exception: what is cut short should not look whole.
    folder.close()
    click.echo(str(folder) + (f"; {kept} that have labels are left as they are" if kept else ""))
    click.echo(FORMATS[layout].next.format(shlex.quote(str(output))))
    return failed


def origin_of(loaded: LoadedModel) -> Origin:
    """Return what labels say of their model. Raises DataError for a class that has no name."""
    for name in loaded.classes:
        if not name.strip() or _UNWRITABLE.search(name):
            raise DataError(
                f"the model's class {shown(name)} cannot be written into label files; export it "
                "with a name of printable characters"
            )
    version = "" if loaded.version is None else f"@{loaded.version}"
    return Origin(f"{loaded.name}{version}", loaded.classes)


def refuse_inside(output: Path, paths: Iterable[Path]) -> None:
    """Raise DataError where a folder is written to that images are read from."""
    for path in paths:
        if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
            raise DataError(
                f"--output {output} lies in {path}, whose images are read: the next run would "
                "label the copies, too; name a folder outside of it"
            )


class LabelFolder:
    """Writes images and their labels into a folder; replaces no image, and labels if asked."""

    def __init__(
        self, folder: Path, layout: LabelFormat, origin: Origin, reader: Reader, *, link: bool
    ) -> None:
        self._folder = folder
        self._format = layout
        self._origin = origin
        self._reader = reader
        self._link = link
        self._names: Mapping[Source, str] = {}
        self._overwrite = False
        self._images = self._objects = 0
        self._shared: list[LabelledImage] = []

    def __str__(self) -> str:
        return f"{self._images} images with {self._objects} objects in {self._folder}"

    def open(self, sources: Sequence[Source], *, overwrite: bool) -> tuple[list[Source], int]:
        """Make the folder. Return the images without labels, and how many have some.

        With `overwrite` all are without. Labels count where their image is there, too. Raises
        DataError if a file would be lost.
        """
        self._names = flat_names(sources)
        self._overwrite = overwrite
        places = {source: self._folder / self._place(source) for source in sources}
        settings = self._settings()
        written = {*places.values(), *settings}
        refuse_to_replace(written, (source.path for source in sources))
        if overwrite:
            wanted = list(sources)
        else:
            for path in settings:
                if path.exists() and path.read_bytes() != settings[path]:
                    raise DataError(
                        f"{path}: it names other classes than the model; name another folder, or "
                        "replace it by --overwrite"
                    )
            if self._format.shared:
                for path in set(places.values()):
                    if path.exists():
                        raise DataError(
                            f"{path} is there already; name another folder, or replace it by "
                            "--overwrite"
                        )
            wanted = [
                source
                for source, place in places.items()
                if not (place.exists() and _same(source.path, self._image(source)))
            ]
        for path in {self._folder / self._format.images, *(each.parent for each in written)}:
            files_of(str(path)).make(str(path))
        return wanted, len(sources) - len(wanted)

    def add(self, source: Source, size: Size, detections: Detections) -> Path:
        """Write an image and its labels; return where the image is. Raises RetinaserveError."""
        name = self._names[source]
        check_name(name)
        image = LabelledImage(name, size, detections)
        target, labels = self._image(source), self._folder / self._place(source)
        alone = not (self._format.shared or self._overwrite or target.exists())
        if alone and labels.exists():
            raise DataError(
                f"{labels} is there without {target.name}, and may be another image's; name "
                "another folder, or replace it by --overwrite"
            )
        self._put(source.path, target)
        if self._format.shared:
            self._shared.append(image)
        else:
            write(labels, self._format.write([image], self._origin))
        self._images += 1
        self._objects += len(detections)
        return target

    def close(self) -> None:
        """Write the files of all images. Raises DataError."""
        for path, content in self._settings().items():
            write(path, content)
        if self._format.shared:
            content = self._format.write(self._shared, self._origin)
            write(self._folder / self._format.place(""), content)

    def _settings(self) -> dict[Path, bytes]:
        made = self._format.settings(self._origin)
        return {self._folder / name: content for name, content in made.items()}

    def _place(self, source: Source) -> str:
        return self._format.place(self._names[source])

    def _image(self, source: Source) -> Path:
        return self._folder / self._format.images / self._names[source]

    def _put(self, source: Path, target: Path) -> None:
        """Copy or link an image. Raises DataError if another one is there, or it cannot be."""
        if target.exists():
            if not _same(source, target):
                raise DataError(f"{target} is another image; name another folder")
        elif self._link:
            with _named(target):
                target.symlink_to(source.absolute())
        else:
            write(target, self._reader.read(source))


def write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all. Raises DataError."""
    with _named(path), files_of(str(path)).write(str(path)) as file:
        file.write(content)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise DataError with the file's name for what the system says."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error


def _same(source: Path, target: Path) -> bool:
    """Return whether two files have the same content; not where one of them cannot be read."""
    try:
        return target.samefile(source) or filecmp.cmp(source, target, shallow=False)
    except OSError:
        return False


def check_name(name: str) -> None:
    """Raise Unreadable for a file name that label files or tools cannot have."""
    if _UNWRITABLE.search(name):
        raise Unreadable("its name has characters that label files cannot hold; rename it")
    if PurePosixPath(name).suffix.lower() not in SUFFIXES:
        kinds = ", ".join(sorted(SUFFIXES))
        raise Unreadable(f"labelling tools go by the suffix of an image ({kinds}); rename it")


def flat_names(sources: Iterable[Source]) -> dict[Source, str]:
    """Return a file name for each image: a/b.jpg is a_b.jpg, and no two stems are alike.

    Readers take a backslash for a slash, as on Windows. Tools find labels by the stem alone, and
    some look into one folder only. Stems that differ by case or Unicode form are one file on some
    disks.
    """
    taken: set[str] = set()
    names: dict[Source, str] = {}
    for source in sources:
        # Not hidden: readers of labels pass hidden files over.
        path = PurePosixPath("_".join(source.relative.parts).replace("\\", "_").lstrip("."))
        stem, number = path.stem, 2
        while (key := unicodedata.normalize("NFC", stem.casefold())) in taken:
            stem, number = f"{path.stem}-{number}", number + 1
        taken.add(key)
        names[source] = f"{stem}{path.suffix}"
    return names

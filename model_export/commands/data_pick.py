"""`retinaserve data pick`: the images to label next, with pre-labels and the reasons."""

from __future__ import annotations

import csv
import io
import math
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import click
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from model_export.data.picking import Descriptors, Pick, describe, doubts, pick, unmatched
from model_export.evaluation.error_images import data_uri
from model_export.evaluation.html_report import page_templates
from service.commands.detect import (
    LoadedModel,
    Reader,
    Source,
    complain,
    find_images,
    load_model,
)
from service.commands.label import (
    LabelFolder,
    check_name,
    flat_names,
    origin_of,
    refuse_inside,
    write,
)
from service.commands.label_formats import FORMATS
from service.engine.drawing import LabelFont, draw
from service.engine.offline import Found
from service.engine.postprocessing import resolve
from service.engine.tiling import Tile
from service.errors import DataError, RetinaserveError
from service.filenames import csv_cell
from service.runtime.detector import Detections
from service.settings import Settings, load_settings

TABLE: Final = "why.csv"
SHEET: Final = "why.html"

_SHOWN: Final = 500
"""Images on the sheet."""
_THUMBNAIL: Final = (320, 240)
_NAMED: Final = 3

_Read = Callable[[Path], bytes]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image of the pool that could be read."""

    source: Source
    found: Found
    """Its detections are those above the model's thresholds."""
    descriptor: NDArray[np.float32]
    score: float
    reasons: tuple[str, ...]


def run(
    pool: Path,
    *,
    model: str | None,
    against: str | None,
    count: int,
    output: Path,
    labelled: Path | None,
    layout: str,
    tile: Tile,
    device: str | None,
    link: bool,
) -> int:
    """Choose images, write them and the reasons. Return the number of images that failed.

    Raises DataError, ArtifactError, UnknownModel or DeviceError before any image is touched.
    """
    settings = load_settings(device=device)
    folders = [pool] if labelled is None else [pool, labelled]
    refuse_inside(output, folders)
    if output.is_dir() and any(output.iterdir()):
        raise DataError(f"{output} is not empty; name a new folder")
    sources = find_images([pool])
    known = [] if labelled is None else find_images([labelled])
    reader = Reader(settings)
    scorer = _Scorer(settings, reader, model, against, tile)
    origin = origin_of(scorer.model)
    candidates, failed = scorer.score(sources)
    if not candidates:
        raise DataError(f"{pool}: no image in it could be read; the lines above say why")
    picks = pick(
        np.array([each.score for each in candidates]),
        np.stack([each.descriptor for each in candidates]),
        _descriptors(known, reader, settings),
        count,
    )
    if not picks:
        raise DataError(
            f"{pool}: its {len(candidates)} images are near-duplicates of labelled ones; add others"
        )
    chosen = [candidates[each.index] for each in picks]
    folder = LabelFolder(output, FORMATS[layout], origin, reader, link=link)
    folder.open([each.source for each in chosen], overwrite=False)
    written: list[tuple[Candidate, Pick, Path]] = []
    for each, place in zip(chosen, picks, strict=True):
        try:
            target = folder.add(each.source, each.found.image, each.found.detections)
            written.append((each, place, target))
        except RetinaserveError as error:
            failed += 1
            complain(f"{each.source.name}: {error}")
    folder.close()
    _write_table(output, written)
    _write_sheet(output, written, scorer, reader, settings)
    click.echo(f"{folder}, of {len(candidates)} in {pool}; why: {output / SHEET}")
    if len(picks) < min(count, len(candidates)):
        click.echo(
            f"no more than {len(picks)}: the other {len(candidates) - len(picks)} images are "
            "near-duplicates of these or of labelled ones"
        )
    click.echo(FORMATS[layout].next.format(shlex.quote(str(output))))
    return failed


class _Scorer:
    """Detects on the pool with one model or two, and judges each image."""

    def __init__(
        self,
        settings: Settings,
        reader: Reader,
        model: str | None,
        against: str | None,
        tile: Tile,
    ) -> None:
        self._settings = settings
        self._reader = reader
        self._tile = tile
        self.model = load_model(settings, model, None, None)
        self._thresholds = self.model.selection.scores
        # Lower scores are in no doubt.
        lower = resolve(
            self.model.artifact.metadata, score_threshold=float(self._thresholds.min()) / 2
        )
        self._lower = replace(self.model, selection=lower)
        self.other = None if against is None else load_model(settings, against, None, None)

    def score(self, sources: Sequence[Source]) -> tuple[list[Candidate], int]:
        """Return the images that could be read, and the number of the others."""
        descriptors: dict[Path, NDArray[np.float32]] = {}

        names = {source.path: name for source, name in flat_names(sources).items()}

        def read(path: Path) -> bytes:
            # Not chosen: it could not be written.
            check_name(names[path])
            # In a decode thread, where the bytes are at hand.
            data = self._reader.read(path)
            descriptors[path] = describe(data, max_pixels=self._settings.max_image_pixels)
            return data

        candidates: list[Candidate] = []
        others: Iterator[Found | RetinaserveError | None] = (None for _ in sources)
        if self.other is not None:
            others = iter([*self._detect(self.other, sources, self._reader.read)])
        found_on = self._detect(self._lower, sources, read)
        for source, found, other in zip(sources, found_on, others, strict=True):
            failure = next((x for x in (found, other) if isinstance(x, RetinaserveError)), None)
            if failure is not None:
                complain(f"{source.name}: {failure}")
            elif isinstance(found, Found):
                theirs = other.detections if isinstance(other, Found) else None
                candidates.append(self._judge(source, found, theirs, descriptors[source.path]))
        return candidates, len(sources) - len(candidates)

    def _detect(
        self, model: LoadedModel, sources: Sequence[Source], read: _Read
    ) -> Iterator[Found | RetinaserveError]:
        with (
            model.runner(self._settings, self._tile) as runner,
            tqdm(total=len(sources), unit="image", file=sys.stderr, disable=None) as bar,
        ):
            for found in runner.detect_all(partial(read, source.path) for source in sources):
                bar.update()
                yield found

    def _judge(
        self,
        source: Source,
        found: Found,
        theirs: Detections | None,
        descriptor: NDArray[np.float32],
    ) -> Candidate:
        every = found.detections
        near = doubts(every.scores, self._thresholds[every.labels])
        score, reasons = float(near.sum()), []
        order = np.argsort(-near, kind="stable")[: int((near > 0).sum())]
        if len(order):
            named = ", ".join(
                f"{self.model.classes[every.labels[i]]} {every.scores[i]:.2f}"
                for i in order[:_NAMED]
            )
            more = ", …" if len(order) > _NAMED else ""
            reasons.append(f"{len(order)} scores near the threshold ({named}{more})")
        kept = every.pick(every.scores > self._thresholds[every.labels])
        if theirs is not None and self.other is not None:
            ours = (kept.boxes, [self.model.classes[i] for i in kept.labels])
            alone = unmatched(ours, (theirs.boxes, [self.other.classes[i] for i in theirs.labels]))
            score += sum(alone)
            for number, whose in zip(alone, ("the model", "--against"), strict=True):
                if number:
                    reasons.append(f"{number} objects of {whose} alone")
        return Candidate(source, found._replace(detections=kept), descriptor, score, tuple(reasons))


def _descriptors(sources: Sequence[Source], reader: Reader, settings: Settings) -> Descriptors:
    """Return the descriptors of the labelled images; one that cannot be read is named."""
    found: list[NDArray[np.float32]] = []
    for source in sources:
        try:
            data = reader.read(source.path)
            found.append(describe(data, max_pixels=settings.max_image_pixels))
        except RetinaserveError as error:
            complain(f"{source.name}: {error}; images like it are not left out")
    return np.stack(found) if found else np.zeros((0, 0), dtype=np.float32)


def _reasons(candidate: Candidate, place: Pick) -> str:
    far = f"{place.distance:.0f} grey levels from the nearest labelled or chosen image"
    reasons = [*candidate.reasons, *([far] if math.isfinite(place.distance) else [])]
    return "; ".join(reasons) or "no doubts; the first image"


def _write_table(output: Path, written: Sequence[tuple[Candidate, Pick, Path]]) -> None:
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(("file", "score", "reasons", "source"))
    for each, place, target in written:
        cells = target.name, f"{each.score:.3f}", _reasons(each, place), each.source.name
        rows.writerow([csv_cell(cell) for cell in cells])
    write(output / TABLE, text.getvalue().encode())


def _write_sheet(
    output: Path,
    written: Sequence[tuple[Candidate, Pick, Path]],
    scorer: _Scorer,
    reader: Reader,
    settings: Settings,
) -> None:
    font = LabelFont(settings.font_file)
    images = [
        {
            "source": _thumbnail(each, scorer.model, reader, font),
            "file": target.name,
            "score": each.score,
            "reasons": _reasons(each, place),
            "objects": Counter(scorer.model.classes[i] for i in each.found.detections.labels),
        }
        for each, place, target in written[:_SHOWN]
    ]
    page = (
        page_templates()
        .get_template("pick.html")
        .render(
            model=scorer.model.name,
            other=None if scorer.other is None else scorer.other.name,
            images=images,
            total=len(written),
        )
    )
    write(output / SHEET, page.encode())


def _thumbnail(each: Candidate, model: LoadedModel, reader: Reader, font: LabelFont) -> str:
    image = reader.decode(reader.read(each.source.path))
    wide = image.width
    image.thumbnail(_THUMBNAIL)
    found = each.found.detections
    small = Detections(found.boxes * (image.width / wide), found.scores, found.labels)
    return data_uri(draw(image, small, model.classes, font))

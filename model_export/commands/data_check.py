"""`retinaserve data check`: counts, problems and a recommendation for a labelled folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from model_export.commands.export import parse_canvas
from model_export.commands.labelled_data import data_config
from model_export.commands.options import DEFAULT_RECIPE
from model_export.config import DataConfig, TrainConfig, load_config
from model_export.data import datasets
from model_export.data.account import FileCount, account
from model_export.data.datasets import Dataset
from model_export.data.folder import LabelledFolder
from model_export.data.problems import BadData, Problem, describe_all
from model_export.data.report import DataReport, summarise
from model_export.training.recommendation import Recommendation, recommend
from model_export.training.speed import within
from service.errors import DataError
from service.filenames import refuse_to_replace

_USUAL: Final = ("train", "val", "test")
_SHOWN_BOXES: Final = 10


def run(
    root: Path,
    *,
    labels: Mapping[str, Any],
    splits: Sequence[str],
    canvas: str | None,
    config_file: Path | None,
    budget_ms: float,
    json_file: Path | None,
) -> None:
    """Print a summary of a folder. Raises DataError if a problem in it stops training."""
    data_config(labels)
    refuse_to_replace(filter(None, (json_file,)), filter(None, (root, config_file)))
    overrides = {f"data.{key}": value for key, value in labels.items()}
    if canvas is not None:
        overrides["canvas"] = parse_canvas(canvas).model_dump(mode="json")
    config = load_config(config_file or DEFAULT_RECIPE, overrides)
    folder = LabelledFolder(root)
    found = _read_all(folder, splits or _splits_of(folder, config.data), config.data)
    reports = [
        summarise(each, config.canvas, config.model.anchors, config.matching)
        for each in found.datasets
    ]
    for report in reports:
        click.echo(f"{report}\n")
        for line in _unreached(report):
            click.echo(line)
    counts = account(folder, found.datasets, format=config.data.format) if found.is_sound else ()
    for count in counts:
        click.echo(str(count))
    advice = _advice(found.datasets, config, budget_ms)
    if advice is not None:
        click.echo(str(advice))
    if json_file is not None:
        _write(json_file, _answer(root, reports, found.fatal, counts, advice))
    _refuse(root, found)


class _Found:
    """The splits that were read, and the problems of the others."""

    def __init__(self) -> None:
        self.datasets: list[Dataset] = []
        self.fatal: list[Problem] = []
        self.errors: list[str] = []
        """Other errors that stopped a split: the first line is the reason."""

    @property
    def is_sound(self) -> bool:
        """Whether every split could be read."""
        return not (self.fatal or self.errors)


def _read_all(folder: LabelledFolder, splits: Sequence[str], choice: DataConfig) -> _Found:
    found = _Found()
    classes: tuple[str, ...] | None = None
    for split in splits:
        try:
            dataset = datasets.load(
                folder,
                split,
                format=choice.format,
                classes=classes,
                keep=choice.classes,
                remap=choice.remap,
            )
        except BadData as error:
            # Reading another split again finds what is wrong with train.
            found.fatal = list(dict.fromkeys([*found.fatal, *error.problems]))
        except DataError as error:
            found.errors.append(str(error))
        else:
            classes = dataset.classes
            found.datasets.append(dataset)
    return found


def _refuse(root: Path, found: _Found) -> None:
    """List the problems that stop training on stderr, then raise DataError if there are any."""
    if found.fatal:
        click.echo(describe_all(found.fatal, limit=len(found.fatal)), err=True)
        count = len(found.fatal)
        raise DataError(f"{root}: {count} problem{'s' * (count > 1)} to solve before training")
    if found.errors:
        reason, *listing = found.errors[0].splitlines()
        for line in listing:
            click.echo(line, err=True)
        raise DataError(reason)


def _splits_of(folder: LabelledFolder, choice: DataConfig) -> list[str]:
    there = datasets.split_names(folder, format=choice.format)
    return [split for split in _USUAL if split in there] or list(there)


def _advice(
    found: Sequence[Dataset], config: TrainConfig, budget_ms: float
) -> Recommendation | None:
    """Recommend from the train split, as `train` does."""
    training = next((each for each in found if each.split == "train"), None)
    if training is None or not any(len(sample.boxes) for sample in training.samples):
        return None
    return recommend(training, config, limit=within(config.model, len(training.classes), budget_ms))


def _unreached(report: DataReport) -> Iterator[str]:
    if not report.missed:
        return
    yield f"objects that no anchor reaches, the smallest of {len(report.missed)}:"
    for each in report.missed[:_SHOWN_BOXES]:
        yield f"  {each}"
    yield ""


def _write(path: Path, answer: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(answer, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: cannot be written: {reason}; name another file") from error
    click.echo(f"wrote {path}")


def _answer(
    root: Path,
    reports: Sequence[DataReport],
    fatal: Sequence[Problem],
    counts: Sequence[FileCount],
    advice: Recommendation | None,
) -> dict[str, Any]:
    return {
        "data": root.resolve().name,
        "files": {count.what.replace(" ", "_"): count.to_dict() for count in counts},
        "splits": {report.split: report.to_dict() for report in reports},
        "stops_training": [problem.to_dict() for problem in fatal],
        "recommended": None if advice is None else advice.to_dict(),
    }

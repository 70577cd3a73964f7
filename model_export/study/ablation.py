"""A grid of training runs that differ in a few settings, repeated over seeds, and their table.

Every run has a folder of its own. A finished one holds result.json and is not run again; one that
was killed goes on from its last epoch.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import json
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model_export.config import TrainConfig, apply_overrides, describe
from model_export.datasets import Dataset
from model_export.recording import LAST, METRICS
from model_export.trainee import TrainingError
from model_export.training import train
from service.errors import DataError

RESULT: Final = "result.json"


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RowConfig(_Config):
    """One row of the table, or several: one for each combination of what `grid` lists."""

    name: str = Field(min_length=1)
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted settings, as --set has them."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Dotted settings with the values that each takes."""
    paper: float | None = None
    """AP of the paper's row, in points, to stand beside ours."""


class StudyConfig(_Config):
    """A study: what all runs share, and in what they differ."""

    title: str = "Ablation"
    pictures: int | None = Field(default=None, ge=1)
    """Size of the fixed subset of the train split; left out: all of it."""
    validation_pictures: int | None = Field(default=None, ge=1)
    subset_seed: int = 0
    """Which subset. It does not change with the seeds of the runs."""
    merge_classes: str | None = Field(default=None, min_length=1)
    """Every object becomes one of this class: a few hundred pictures cannot teach many classes."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    base: dict[str, Any] = Field(default_factory=dict)
    """A training config, as for `train --config`."""
    rows: tuple[RowConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        names = [row.name for row in expand(self.rows)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"rows repeat: {', '.join(repeated)}; every row needs its own name")
        folders = [_slug(name) for name in names]
        if len(set(folders)) != len(folders):
            raise ValueError(f"rows differ in signs only: {', '.join(sorted(names))}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds repeat: {self.seeds}")
        return self


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a name and its settings."""

    name: str
    settings: Mapping[str, Any]
    paper: float | None


@dataclass(frozen=True, slots=True)
class Run:
    """One training run of a study."""

    row: Row
    seed: int
    config: TrainConfig
    folder: Path


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to."""

    row: str
    seed: int
    ap: float
    """COCO AP of the last epoch's averaged weights, in [0, 1]; 0 of a run that diverged."""
    ap50: float
    minutes: float
    diverged: str | None
    """Why the run gave up, or None."""


def expand(rows: Sequence[RowConfig]) -> list[Row]:
    """Rows with their grids multiplied out, in the order of the config.

    >>> [row.name for row in expand([RowConfig(name="FL", grid={"loss.gamma": [0, 2]})])]
    ['FL, gamma 0', 'FL, gamma 2']
    """
    expanded = []
    for row in rows:
        keys = list(row.grid)
        for values in itertools.product(*row.grid.values()):
            names = [
                f"{key.rsplit('.', 1)[-1]} {value}" for key, value in zip(keys, values, strict=True)
            ]
            settings = {**row.set, **dict(zip(keys, values, strict=True))}
            expanded.append(Row(", ".join([row.name, *names]), settings, row.paper))
    return expanded


def load_study(path: Path) -> StudyConfig:
    """Read a study's YAML. Raises DataError that names the file and the field."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        return StudyConfig.model_validate(values)
    except ValidationError as error:
        raise DataError(f"{path}: {describe(error)}") from error


def plan(study: StudyConfig, output: Path, overrides: Mapping[str, Any]) -> list[Run]:
    """All runs, seed by seed, so that a study that is stopped has whole columns.

    Every config is checked here, before the first run. `overrides` go over all of them. Raises
    DataError.
    """
    runs = []
    for seed in study.seeds:
        for row in expand(study.rows):
            settings = {**row.settings, **overrides, "seed": seed}
            try:
                config = apply_overrides(study.base, settings)
            except DataError as error:
                raise DataError(f"row {row.name!r}: {error}") from error
            runs.append(Run(row, seed, config, output / _slug(row.name) / f"seed-{seed}"))
    return runs


def subset(dataset: Dataset, pictures: int | None, *, seed: int) -> Dataset:
    """`pictures` of a data set, chosen by a hash of the seed and the file name alone.

    Raises DataError if there are fewer.
    """
    if pictures is None:
        return dataset
    if pictures > len(dataset.samples):
        raise DataError(
            f"{dataset.root}: {pictures} pictures of {dataset.split!r} are asked for, there are "
            f"{len(dataset.samples)}"
        )

    def key(index: int) -> str:
        text = f"{seed}/{dataset.samples[index].path.name}"
        return hashlib.sha256(text.encode()).hexdigest()

    chosen = sorted(sorted(range(len(dataset.samples)), key=key)[:pictures])
    return dataclasses.replace(dataset, samples=tuple(dataset.samples[index] for index in chosen))


def merge_classes(dataset: Dataset, name: str | None) -> Dataset:
    """The data set with all its classes as one called `name`; None leaves it as it is."""
    if name is None:
        return dataset
    samples = tuple(
        dataclasses.replace(sample, labels=np.zeros_like(sample.labels))
        for sample in dataset.samples
    )
    return dataclasses.replace(dataset, classes=(name,), samples=samples)


def execute(
    run: Run, training: Dataset, validation: Dataset, *, weights: Path | None, device: str
) -> Result:
    """Train one run, or go on with it, and leave its result in its folder."""
    started = time.monotonic()
    diverged = None
    try:
        train(
            run.config,
            training,
            validation,
            run.folder,
            weights=weights,
            resume=(run.folder / LAST).exists(),
            device=device,
        )
    except TrainingError as error:
        diverged = str(error)
    ap, ap50, minutes = (0.0, 0.0, (time.monotonic() - started) / 60)
    if diverged is None:
        ap, ap50, minutes = _last_row(run.folder / METRICS)
    result = Result(run.row.name, run.seed, ap, ap50, minutes, diverged)
    partial = run.folder / f"{RESULT}.part"
    partial.write_text(json.dumps(dataclasses.asdict(result), indent=2, allow_nan=False) + "\n")
    partial.replace(run.folder / RESULT)
    # The best checkpoint, of the last epoch here, stays for `study cdf`.
    (run.folder / LAST).unlink(missing_ok=True)
    return result


def finished(run: Run) -> Result | None:
    """The result that an earlier call left, if there is one. Raises DataError."""
    path = run.folder / RESULT
    if not path.exists():
        return None
    try:
        return Result(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a result ({error}); delete it to run it again") from error


@dataclass(frozen=True, slots=True)
class Summary:
    """One row over its seeds, AP in points."""

    name: str
    runs: int
    diverged: int
    mean: float
    deviation: float | None
    """Standard deviation over the seeds (n - 1); None of a single run."""
    least: float
    most: float
    ap50: float
    minutes: float
    paper: float | None


def summarise(rows: Sequence[Row], results: Sequence[Result]) -> list[Summary]:
    """Each row that has a result, in the order of the rows."""
    summaries = []
    for row in rows:
        own = [result for result in results if result.row == row.name]
        if not own:
            continue
        points = [100 * result.ap for result in own]
        summaries.append(
            Summary(
                name=row.name,
                runs=len(own),
                diverged=sum(result.diverged is not None for result in own),
                mean=statistics.mean(points),
                deviation=statistics.stdev(points) if len(points) > 1 else None,
                least=min(points),
                most=max(points),
                ap50=statistics.mean(100 * result.ap50 for result in own),
                minutes=statistics.mean(result.minutes for result in own),
                paper=row.paper,
            )
        )
    return summaries


def table(summaries: Sequence[Summary]) -> Iterator[str]:
    """The rows as lines of Markdown."""
    yield "| row | runs | AP | sd | min to max | AP50 | minutes | paper's AP |"
    yield "|---|---|---|---|---|---|---|---|"
    for each in summaries:
        runs = f"{each.runs}" + (f", {each.diverged} diverged" if each.diverged else "")
        deviation = "-" if each.deviation is None else f"{each.deviation:.1f}"
        paper = "-" if each.paper is None else f"{each.paper:.1f}"
        yield (
            f"| {each.name} | {runs} | {each.mean:.1f} | {deviation} | {each.least:.1f} to "
            f"{each.most:.1f} | {each.ap50:.1f} | {each.minutes:.1f} | {paper} |"
        )


def write_results(results: Sequence[Result], path: Path) -> None:
    """One line a run."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Result)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(result) for result in results)


def _last_row(metrics: Path) -> tuple[float, float, float]:
    with metrics.open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return float(last["ap"] or 0), float(last["ap50"] or 0), float(last["minutes"])


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")

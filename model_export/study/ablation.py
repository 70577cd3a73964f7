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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model_export.config import TrainConfig, apply_overrides, describe
from model_export.data.datasets import Dataset
from model_export.provenance import provenance
from model_export.training.callbacks import LAST, METRICS
from model_export.training.lightning_module import TrainingError
from model_export.training.trainer import train
from service.errors import DataError

RESULT: Final = "result.json"
MADE_OF: Final = "run.json"

_OF_THE_STUDY: Final = {
    "seed": "the seeds of a study are its `seeds`",
    "data": "all rows have the same data; it belongs into base",
}
"""Settings that no row may have."""


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RowConfig(_Config):
    """One row of the table, or several: one for each combination of what `grid` lists."""

    name: str = Field(pattern=r"^[^|$]*[A-Za-z0-9][^|$]*$")
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted settings, as --set has them."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Dotted settings with the values that each takes."""
    paper: float | None = None
    """AP of the paper's row, in points, to stand beside ours."""
    reference: str | None = None
    """The row from which the difference is taken; left out, the study's."""

    @model_validator(mode="after")
    def _check(self) -> RowConfig:
        if self.grid and self.paper is not None:
            raise ValueError("paper is the AP of one row, a grid makes several; list them singly")
        for key in (*self.set, *self.grid):
            if key.split(".")[0] in _OF_THE_STUDY:
                raise ValueError(f"{key}: {_OF_THE_STUDY[key.split('.')[0]]}")
        return self


class StudyConfig(_Config):
    """A study: the settings that all runs share, and the rows that differ."""

    title: str = "Ablation"
    pictures: int | None = Field(default=None, ge=1)
    """Size of the fixed subset of the train split; left out: all of it."""
    validation_pictures: int | None = Field(default=None, ge=1)
    subset_seed: int = 0
    """Which subset. It does not change with the seeds of the runs."""
    merge_classes: str | None = Field(default=None, min_length=1)
    """Every object becomes one of this class: a few hundred images cannot teach many classes."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    base: dict[str, Any] = Field(default_factory=dict)
    """A training config, as for `train --config`."""
    rows: tuple[RowConfig, ...] = Field(min_length=1)
    reference: str | None = None
    """The row from which the others' differences are taken, seed by seed."""

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        names = [row.name for row in expand(self.rows)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"rows repeat: {', '.join(repeated)}; every row needs its own name")
        folders = [_slug(name) for name in names]
        if len(set(folders)) != len(folders):
            raise ValueError(f"rows differ in signs only: {', '.join(sorted(names))}")
        for reference in (self.reference, *(row.reference for row in self.rows)):
            if reference is not None and reference not in names:
                raise ValueError(f"reference {reference!r} is no row; one of {', '.join(names)}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds repeat: {self.seeds}")
        if "seed" in self.base:
            raise ValueError(f"base.seed: {_OF_THE_STUDY['seed']}")
        return self


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a name and its settings."""

    name: str
    settings: Mapping[str, Any]
    paper: float | None = None
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One training run of a study."""

    row: Row
    seed: int
    config: TrainConfig
    folder: Path
    weights: Path | None = None
    """ImageNet weights from which the backbone starts."""


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a run."""

    row: str
    seed: int
    ap: float
    """COCO AP of the last epoch's averaged weights, in [0, 1]; 0 of a run that diverged."""
    ap50: float
    minutes: float
    diverged: str | None
    """Why the run gave up, or None."""


def expand(rows: Sequence[RowConfig], reference: str | None = None) -> list[Row]:
    """Return rows with their grids multiplied out, in the order of the config.

    `reference` is that of rows without one of their own.

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
            name = ", ".join([row.name, *names])
            expanded.append(Row(name, settings, row.paper, row.reference or reference))
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
    """Return all runs, seed by seed, so that a stopped study has complete seeds.

    Every config is checked here, before the first run. `overrides` go over all of them, but not
    over what makes the rows differ. Raises DataError.
    """
    for row in expand(study.rows):
        for key in overrides:
            if key == "seed":
                raise DataError(f"--set seed: {_OF_THE_STUDY['seed']}")
            if any(
                f"{own}.".startswith(f"{key}.") or f"{key}.".startswith(f"{own}.")
                for own in row.settings
            ):
                raise DataError(f"--set {key}: the row {row.name!r} sets that itself")
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


def subset(dataset: Dataset, images: int | None, *, seed: int) -> Dataset:
    """`images` of a data set, chosen by a hash of the seed and the file name alone.

    Raises DataError if there are fewer.
    """
    if images is None:
        return dataset
    if images > len(dataset.samples):
        raise DataError(
            f"{dataset.root}: {images} images of {dataset.split!r} are asked for, there are "
            f"{len(dataset.samples)}"
        )

    def key(index: int) -> str:
        text = f"{seed}/{dataset.samples[index].path.name}"
        return hashlib.sha256(text.encode()).hexdigest()

    chosen = sorted(sorted(range(len(dataset.samples)), key=key)[:images])
    return dataclasses.replace(dataset, samples=tuple(dataset.samples[index] for index in chosen))


def merge_classes(dataset: Dataset, name: str | None) -> Dataset:
    """Return the data set with all its classes as one called `name`; None leaves it as it is."""
    if name is None:
        return dataset
    samples = tuple(
        dataclasses.replace(
            sample,
            labels=np.zeros_like(sample.labels),
            crowd_labels=np.zeros_like(sample.crowd_labels),
        )
        for sample in dataset.samples
    )
    return dataclasses.replace(dataset, classes=(name,), samples=samples)


def run_inputs(run: Run, training: Dataset, validation: Dataset) -> dict[str, Any]:
    """Return the inputs that determine a run's result: settings, images and weights."""

    def digest(dataset: Dataset) -> str:
        names = "\n".join(sample.path.name for sample in dataset.samples)
        return hashlib.sha256(names.encode()).hexdigest()

    weights = run.weights
    content = {
        "config": run.config.model_dump(mode="json"),
        "classes": training.classes,
        "train": digest(training),
        "val": digest(validation),
        "weights": None if weights is None else hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    found: dict[str, Any] = json.loads(json.dumps(content))
    return found


def check_folder(run: Run, content: Mapping[str, Any]) -> None:
    """Raise DataError if a folder holds a run of other inputs."""
    path = run.folder / MADE_OF
    if not path.exists():
        if (run.folder / RESULT).exists() or (run.folder / LAST).exists():
            raise DataError(f"{run.folder}: has no {MADE_OF}, so its inputs are unknown; delete it")
        return
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete {run.folder}") from error
    before["config"] = _with_defaults(before.get("config"))
    differing = [key for key, value in content.items() if before.get(key) != value]
    if differing:
        raise DataError(
            f"{run.folder}: holds a run with another {' and '.join(differing)}; name another "
            "--output, or delete the folder to run it again"
        )


def _with_defaults(config: Any) -> Any:
    """Return a run's settings, those that its version did not know at their defaults."""
    try:
        return TrainConfig.model_validate(config).model_dump(mode="json")
    except ValidationError:
        return config


@dataclass(frozen=True, slots=True)
class Execution:
    """Trains or resumes a run, and writes its result into its folder."""

    training: Dataset
    validation: Dataset
    device: str

    def __call__(self, run: Run) -> Result:
        """Return the result of the run."""
        started = time.monotonic()
        content = run_inputs(run, self.training, self.validation)
        run.folder.mkdir(parents=True, exist_ok=True)
        replace_file(run.folder / MADE_OF, json.dumps(content, indent=2) + "\n")
        diverged = None
        try:
            train(
                run.config,
                self.training,
                self.validation,
                run.folder,
                weights=run.weights,
                resume=(run.folder / LAST).exists(),
                device=self.device,
                provenance=provenance(
                    config=run.config.model_dump(mode="json"),
                    data=self.training,
                    weights=run.weights,
                    init=None,
                    licences=(),
                ),
            )
        except TrainingError as error:
            diverged = str(error)
        ap, ap50, minutes = (0.0, 0.0, (time.monotonic() - started) / 60)
        if diverged is None:
            ap, ap50, minutes = _last_row(run.folder / METRICS)
        result = Result(run.row.name, run.seed, ap, ap50, minutes, diverged)
        text = json.dumps(dataclasses.asdict(result), indent=2, allow_nan=False)
        replace_file(run.folder / RESULT, text + "\n")
        # best.ckpt stays, for `study cdf`; this one is as large and no longer needed.
        (run.folder / LAST).unlink(missing_ok=True)
        return result


def finished(run: Run) -> Result | None:
    """Return the result of a finished run, or None. Raises DataError."""
    path = run.folder / RESULT
    if not path.exists():
        return None
    try:
        return Result(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a result ({error}); delete it to run it again") from error


def _last_row(metrics: Path) -> tuple[float, float, float]:
    with metrics.open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return float(last["ap"] or 0), float(last["ap50"] or 0), float(last["minutes"])


def replace_file(path: Path, text: str) -> None:
    """Write beside the target and rename, so that a kill never leaves half a file."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text, newline="")
    partial.replace(path)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")

"""Load labelled folders for a command: problems on stderr, the reason to stop in one line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from model_export.config import DataConfig, describe
from model_export.data import datasets
from model_export.data.datasets import Dataset
from model_export.data.folder import LabelledFolder
from model_export.data.problems import problem_listing
from service.errors import DataError


def load(
    root: Path | LabelledFolder,
    split: str,
    choice: DataConfig | None = None,
    *,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Read one split. Problems that stop it are listed on stderr before DataError is raised."""
    choice = choice or DataConfig()
    try:
        return datasets.load(
            root,
            split,
            format=choice.format,
            classes=classes,
            keep=choice.classes,
            remap=choice.remap,
        )
    except DataError as error:
        reason, *listing = str(error).splitlines()
        for line in listing:
            click.echo(line, err=True)
        raise DataError(reason) from error


def load_measured(
    root: Path, split: str, choice: DataConfig | None = None, *, classes: Sequence[str]
) -> Dataset:
    """As `load`, and what is dropped, and so in no figure, is named on stderr."""
    dataset = load(root, split, choice, classes=classes)
    if dataset.problems:
        click.echo(problem_listing(dataset.problems), err=True)
    return dataset


def data_config(labels: Mapping[str, Any]) -> DataConfig:
    """Return the settings of --format, --classes and --remap. Raises click.UsageError."""
    try:
        return DataConfig.model_validate(dict(labels))
    except ValidationError as error:
        raise click.UsageError(describe(error).lstrip(": ")) from error


def as_options(choice: DataConfig) -> str:
    """Return the settings as options of a command line, with a trailing space."""
    words = [] if choice.format == "auto" else ["--format", choice.format]
    if choice.classes is not None:
        words += ["--classes", ",".join(choice.classes)]
    for old, new in choice.remap.items():
        words += ["--remap", f"{old}={new}"]
    return "".join(f"{shlex.quote(word)} " for word in words)

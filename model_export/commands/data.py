"""Reading labelled folders for a command: problems are listed, the reason to stop is one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from model_export.datasets import Dataset, load_voc
from service.errors import DataError


def load(root: Path, split: str, *, classes: Sequence[str] | None = None) -> Dataset:
    """Read one split. What stops it is listed on stderr; DataError then says it in one line."""
    try:
        return load_voc(root, split, classes=classes)
    except DataError as error:
        reason, *listing = str(error).splitlines()
        for line in listing:
            click.echo(line, err=True)
        raise DataError(reason) from error

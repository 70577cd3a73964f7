"""Options that several commands share."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import click


class PathOption(click.Path):
    """A path that is given: `Path("")`, of an empty shell variable, is the current folder."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | bytes | os.PathLike[str]:
        """Return the path. Fails for an empty one."""
        if not os.fspath(value):
            self.fail("it is empty; give a path, or leave it out", param, ctx)
        return super().convert(value, param, ctx)


class Number(click.FloatRange):
    """A finite number in a range; `nan` is inside every range of click's."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number. Fails for one that is none, not finite, or out of the range."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number; give one, or leave it out", param, ctx)
        return number


models_option = click.option(
    "--models",
    "models_dir",
    type=PathOption(path_type=Path),
    metavar="DIR",
    help="Model repository; default: the bundled one.",
)
devices_option = click.option("--device", help="auto, cpu, cuda, or a list such as cuda:0,cuda:1.")

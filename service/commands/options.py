"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

models_option = click.option(
    "--models",
    "models_dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Model repository; default: the bundled one.",
)
devices_option = click.option("--device", help="auto, cpu, cuda, or a list such as cuda:0,cuda:1.")

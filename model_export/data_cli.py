"""`retinaserve data`: what is in a labelled folder; heavy imports wait, as in `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from model_export.cli import Recipe, label_options

_CONTEXT = {"help_option_names": ["-h", "--help"]}
_EXAMPLE = """\b
Example:
  retinaserve data check cells
  retinaserve data check cells --canvas 384x512 --json cells.json
"""


@click.group(context_settings=_CONTEXT)
def data() -> None:
    """Labelled pictures: what is in them, what is wrong with them."""


@data.command(context_settings=_CONTEXT, epilog=_EXAMPLE)
@click.argument(
    "folder", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR"
)
@label_options
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="NAME",
    help="Which part; repeatable; default: train, val and test, as far as they are there.",
)
@click.option(
    "--canvas",
    metavar="HxW[,HxW…]|short-side:S,L",
    help="Canvas to judge the anchors on; default: the config's, and one is recommended.",
)
@click.option(
    "--config",
    "config_file",
    type=Recipe(),
    metavar="RECIPE|FILE.yaml",
    help="Settings of `train`: its canvas and anchors are the ones that are judged.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write all of it, with every problem and every box that no anchor reaches.",
)
def check(
    folder: Path,
    labels: dict[str, Any],
    splits: tuple[str, ...],
    canvas: str | None,
    config_file: Path | None,
    json_file: Path | None,
) -> None:
    """Count and judge labelled pictures, and recommend canvas and anchors.

    Everything that is wrong is named by file and line; what would stop training ends with exit 2.
    """
    from model_export.commands import check as command

    command.run(
        folder,
        labels=labels,
        splits=splits,
        canvas=canvas,
        config_file=config_file,
        json_file=json_file,
    )

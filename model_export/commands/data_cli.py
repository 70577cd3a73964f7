"""`retinaserve data`: what is in a labelled folder; heavy imports wait, as in `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from model_export.commands.options import Recipe, label_options

_CONTEXT = {"help_option_names": ["-h", "--help"]}
_EXAMPLE = """\b
Example:
  retinaserve data check cells
  retinaserve data check cells --canvas 384x512 --json cells.json
"""
_SAMPLE_EXAMPLE = """\b
Example:
  retinaserve data sample cells --images 60
"""


@click.group(context_settings=_CONTEXT)
def data() -> None:
    """Labelled images: what is in them, what is wrong with them."""


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
    """Count and judge labelled images, and recommend canvas and anchors.

    Everything that is wrong is named by file and line; what would stop training ends with exit 2.
    """
    from model_export.commands import data_check as command

    command.run(
        folder,
        labels=labels,
        splits=splits,
        canvas=canvas,
        config_file=config_file,
        json_file=json_file,
    )


def _width_and_height(_context: Any, _parameter: Any, value: str) -> tuple[int, int]:
    width, separator, height = value.partition("x")
    if not (separator and width.isdecimal() and height.isdecimal()):
        raise click.BadParameter(f"{value!r}: expected WIDTHxHEIGHT in pixels, such as 640x480")
    if not all(64 <= int(side) <= 4096 for side in (width, height)):
        raise click.BadParameter(f"{value!r}: both sides must be within 64 and 4096 pixels")
    return int(width), int(height)


@data.command(context_settings=_CONTEXT, epilog=_SAMPLE_EXAMPLE)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), metavar="DIR")
@click.option(
    "--images",
    "--pictures",
    "images",
    type=click.IntRange(1, 1_000_000),
    default=40,
    show_default=True,
    metavar="N",
)
@click.option(
    "--size",
    default="640x480",
    show_default=True,
    callback=_width_and_height,
    metavar="WIDTHxHEIGHT",
    help="In pixels; larger images show the same number of cells, larger.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws others."
)
def sample(folder: Path, images: int, size: tuple[int, int], seed: int) -> None:
    """Draw labelled images, to try everything without data of your own.

    They look like the stained blood smears that the bundled model knows, with Pascal VOC labels of
    RBC, WBC and Platelets beside them. They are drawings: what is measured on them says nothing
    about photographs.
    """
    from model_export.commands import data_sample as command

    width, height = size
    command.run(folder, images=images, width=width, height=height, seed=seed)

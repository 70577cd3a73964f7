"""`retinaserve study`: the paper's exhibits; heavy imports inside the functions, as in `cli`."""

from __future__ import annotations

from pathlib import Path

import click

from model_export.commands.options import Recipe

_CONTEXT = {"help_option_names": ["-h", "--help"]}
_DATA = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_CONFIGS = Path(__file__).parents[1] / "study" / "configs"

_output = click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder for the figures and tables; made if need be.",
)
_data = click.option("--data", type=_DATA, required=True, metavar="DIR", help="Labelled images.")
_device = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")


@click.group(context_settings=_CONTEXT)
def study() -> None:
    """The exhibits of Focal Loss, arXiv 1708.02002, from this code and your data."""


@study.command()
@_output
def curves(output: Path) -> None:
    """Loss and gradient against p_t for several gamma (figure 1), and FL*."""
    from model_export.commands import study as command

    command.curves(output)


@study.command()
@click.argument("checkpoint", type=_FILE, metavar="CHECKPOINT")
@_data
@click.option("--split", default="val", show_default=True, help="Which part of the data.")
@_output
@click.option(
    "--merge-classes", is_flag=True, help="All objects are of the checkpoint's one class."
)
@_device
def cdf(
    checkpoint: Path, data: Path, split: str, output: Path, merge_classes: bool, device: str
) -> None:
    """Which examples carry the loss of a trained model (figure 4), over a whole data set."""
    from model_export.commands import study as command

    command.cdf(
        checkpoint, data=data, split=split, output=output, merge=merge_classes, device=device
    )


@study.command()
@click.option(
    "--config",
    "config_file",
    type=Recipe(_CONFIGS),
    required=True,
    metavar="STUDY|FILE.yaml",
    help="losses, detector, detector-blood-cells (all small), grid, anchors, blood-cells, or a "
    "file of your own.",
)
@_data
@_output
@click.option(
    "--weights", type=_FILE, metavar="FILE", help="Start backbones from ImageNet weights."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="One setting for all runs, such as epochs=3; repeatable.",
)
@click.option("--row", "rows", multiple=True, metavar="NAME", help="Run this row only; repeatable.")
@_device
def ablate(
    config_file: Path,
    data: Path,
    output: Path,
    weights: Path | None,
    settings: tuple[str, ...],
    rows: tuple[str, ...],
    device: str,
) -> None:
    """A grid of training runs, one row each, over several seeds.

    Started again with the same --output, it goes on where it stopped. With several processes give
    each its own rows; whichever ends last writes the whole table.
    """
    from model_export.commands import study as command

    command.ablate(
        config_file=config_file,
        data=data,
        output=output,
        weights=weights,
        settings=settings,
        only=rows,
        device=device,
    )

"""The options of `retinaserve bulk`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from service.commands.options import Number, PathOption, devices_option, models_option

_PLACE = PathOption(readable=False)
"""A path or a URL, not empty."""


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=_PLACE, metavar="INPUT…")
@click.option(
    "--output",
    type=_PLACE,
    required=True,
    metavar="DIR",
    help="Folder (or URL) for the Parquet files; a run that is there is resumed.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="local: this process; ray: a detector for each GPU or share of the cores of a cluster.",
)
@click.option(
    "--model",
    metavar="NAME[@VERSION]|FILE.onnx",
    help="Model of the repository, or a model file; default: the default model.",
)
@models_option
@devices_option
@click.option(
    "--column",
    metavar="NAME",
    help="INPUT is Parquet, and this column has paths, URLs or the bytes of images.",
)
@click.option(
    "--name-column", metavar="NAME", help="Column of what `path` is to say in the output."
)
@click.option(
    "--score-threshold",
    type=Number(0.0, 1.0),
    help="Only detections that score above this; default: the model's own.",
)
@click.option(
    "--iou-threshold",
    type=Number(0.0, 1.0),
    help="A box that overlaps a better one of its class by more is suppressed.",
)
@click.option(
    "--max-detections", type=click.IntRange(1, 1000), help="Most detections for an image."
)
@click.option("--classes", multiple=True, metavar="A,B", help="Only these classes; repeatable.")
@click.option(
    "--tile",
    default="off",
    show_default=True,
    metavar="off|auto|N",
    help="Cut large images into overlapping tiles, as `retinaserve detect` does.",
)
@click.option(
    "--part-size",
    type=click.IntRange(1, 1_000_000),
    default=1000,
    show_default=True,
    help="Images in one Parquet file: what is done again after a crash.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    metavar="N",
    help="With Ray: number of detectors; default: one per GPU, else one per two cores.",
)
@click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="With Ray: the cluster; default: RAY_ADDRESS, the one on this machine, or a new one.",
)
@click.option(
    "--as-listed",
    is_flag=True,
    help="Resume with the images that were listed first, whatever INPUT has now.",
)
@click.option("--retry-failed", is_flag=True, help="Try images again that failed before.")
@click.option("--strict", is_flag=True, help="Exit with 1 if an image failed.")
def bulk(
    inputs: tuple[str, ...],
    models_dir: Path | None,
    device: str | None,
    strict: bool,
    **options: Any,
) -> None:
    """Detect objects in any number of images, into Parquet files; resumable.

    INPUT is a folder, a glob, an image, or Parquet; a path or a URL. An image that fails has its
    error in its row, and the others go on. What is finished stays: after a crash or a signal the
    same command goes on.
    """
    from service.bulk.installed import check_pyarrow, check_ray

    check_pyarrow()
    if options["engine"] == "ray":
        check_ray()
    from service.commands import bulk as command
    from service.system.process import leave

    given: dict[str, object] = {"models_dir": models_dir, "device": device}
    failed, status = command.run(command.Asked(inputs=inputs, given=given, **options))
    if status:
        # A thread may be in the middle of an inference.
        leave(status)
    sys.exit(int(strict and failed > 0))

"""`retinaserve import-torchvision`; heavy imports inside the function, as in `cli`."""

from __future__ import annotations

from pathlib import Path

import click

from model_export.commands.options import licence_option

_CONTEXT = {"help_option_names": ["-h", "--help"]}
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_EXAMPLE = """\b
Example:
  retinaserve import-torchvision retinanet_resnet50_fpn_coco.pth \\
      --arch retinanet_resnet50_fpn --output coco.safetensors
  retinaserve export coco.safetensors --score-threshold 0.05 \\
      --output models/coco/1/model.onnx
"""


@click.command("import-torchvision", context_settings=_CONTEXT, epilog=_EXAMPLE)
@click.argument("state_dict", type=_FILE, metavar="STATE_DICT.pth")
@click.option(
    "--arch",
    "architecture",
    metavar="NAME",
    help="retinanet_resnet50_fpn or retinanet_resnet50_fpn_v2; default: told from the file.",
)
@click.option(
    "--labels",
    type=_FILE,
    metavar="FILE",
    help="Class names, one a line, from class 0 on; default: COCO's if there are 91.",
)
@click.option(
    "--norm-eps",
    type=float,
    metavar="E",
    help="Eps of the backbone's batch norms; default: 0 if they are frozen, else 1e-5.",
)
@click.option(
    "--min-size",
    type=click.IntRange(min=1),
    default=800,
    show_default=True,
    help="Images are scaled to this shorter side ...",
)
@click.option(
    "--max-size",
    type=click.IntRange(min=1),
    default=1333,
    show_default=True,
    help="... unless the longer one would pass this.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="CHECKPOINT",
    help="Where the checkpoint goes, for export and for train --init: a safetensors file.",
)
@licence_option
def import_torchvision(
    state_dict: Path,
    architecture: str | None,
    labels: Path | None,
    norm_eps: float | None,
    min_size: int,
    max_size: int,
    output: Path,
    licences: tuple[str, ...],
) -> None:
    """Turn a RetinaNet of torchvision's into a checkpoint.

    Any number of classes, keys of old and new releases. All classes are kept with their numbers:
    class 0 of torchvision's own models is the background, which they never answer.
    """
    from model_export.commands import import_torchvision as command

    command.run(
        state_dict,
        output,
        architecture=architecture,
        labels_file=labels,
        norm_eps=norm_eps,
        min_size=min_size,
        max_size=max_size,
        licences=licences,
    )

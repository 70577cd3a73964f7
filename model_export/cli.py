"""The commands of the `train` extra; `service.cli` finds them by their entry points.

torch and its companions are imported inside the functions: `--help` is quick, and `service.cli`
names the remedy where the extra is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from model_export.commands.options import Recipe, label_options, licence_option
from service.commands.options import Number, PathOption

_CONTEXT = {"help_option_names": ["-h", "--help"]}
_FOLDER = PathOption(file_okay=False, path_type=Path)
_DATA = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW_FILE = PathOption(dir_okay=False, path_type=Path)
_STUDIES = Path(__file__).parent / "study" / "configs"

_data_option = click.option(
    "--data", type=_DATA, required=True, metavar="DIR", help="Labelled images."
)
_split_option = click.option("--split", default="val", show_default=True, help="Split of the data.")
_device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)


# "\b" keeps click from joining the lines.
_TRAIN_EXAMPLE = """\b
Example:
  retinaserve train --data cells --config light --weights imagenet \\
      --max-minutes 60 --output runs/cells
"""


@click.command(context_settings=_CONTEXT, epilog=_TRAIN_EXAMPLE)
@_data_option
@label_options
@click.option(
    "--output",
    type=_FOLDER,
    required=True,
    metavar="RUN",
    help="Folder for last.ckpt, best.ckpt, metrics.csv, config.yaml and curves.",
)
@click.option(
    "--backbone",
    help="resnet18, -34, -50, -101, mobilenet_v2, mobilenet_v2_tf or efficientnet_lite0.",
)
@click.option(
    "--weights", metavar="FILE|imagenet", help="Start the backbone from ImageNet weights."
)
@click.option(
    "--init", metavar="CHECKPOINT|bundled", help="Fine-tune a checkpoint, on any class list."
)
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the data.")
@click.option(
    "--max-minutes",
    type=Number(min=0, min_open=True),
    help="Time limit; the schedule is fitted to it.",
)
@click.option(
    "--config",
    "config_file",
    type=Recipe(),
    metavar="RECIPE|FILE.yaml",
    help="Settings: light (a network for CPUs, the default), paper (ResNet-50, for GPUs), "
    "blood-cells, foreign-objects, or a file of your own.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="One setting, such as optimiser.lr=0.005; repeatable, overrides --config.",
)
@click.option(
    "--anchors",
    type=click.Choice(["auto"]),
    help="Take the anchors that `data check` recommends, even where the settings name others.",
)
@click.option(
    "--budget-ms",
    type=Number(min=0, min_open=True),
    metavar="MS",
    help="Time that an image may take on two CPU cores, which limits the canvas that is chosen for "
    "the data; default: 100 on a CPU, no limit on a GPU.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Images per step, over all processes."
)
@click.option("--seed", type=int, help="The same seed gives the same run.")
@_device_option
@click.option(
    "--devices",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes on this machine that share each batch, one GPU each; default 1. "
    "Several machines: start the command by torchrun.",
)
@click.option("--resume", is_flag=True, help="Continue the run in --output.")
@licence_option
def train(**options: Any) -> None:
    """Train a detector on labelled images.

    Canvas and anchors are chosen for the data unless the settings name them. Before it starts it
    prints them, a summary of the data, the objects that no anchor reaches, and the time of a step.
    """
    from model_export.commands import train as command

    command.run(**options)


_EVALUATE_EXAMPLE = """\b
Example:
  retinaserve evaluate cells.onnx --data cells --against older.onnx --report cells.html
"""


@click.command(context_settings=_CONTEXT, epilog=_EVALUATE_EXAMPLE)
@click.argument("model", type=_FILE, metavar="MODEL.onnx")
@_data_option
@_split_option
@label_options
@_device_option
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Images per call; default: the device's."
)
@click.option("--against", type=_FILE, metavar="OTHER.onnx", help="Compare with another file.")
@click.option("--json", "json_file", type=_NEW_FILE, metavar="FILE", help="Write all figures.")
@click.option("--plots", type=_FOLDER, metavar="DIR", help="Write figures as PNG.")
@click.option("--report", type=_NEW_FILE, metavar="FILE.html", help="Write a self-contained page.")
@click.option(
    "--predictions",
    type=_NEW_FILE,
    metavar="FILE",
    help="Write the measured detections as COCO results, with the ids of the data's own COCO file; "
    "in other formats image_id counts the images by file name, category_id the classes, from 0.",
)
def evaluate(**options: Any) -> None:
    """COCO metrics and score calibration of a model file on labelled images.

    Measures the file through the service's own pipeline, at score 0.01 and 300 detections.
    F1 and thresholds of the classes are chosen on these images, and flatter; below them is F1 by
    cross-validation over the same images, each judged by thresholds chosen without it.
    --against gives the difference of two files with a 95 % interval. --report shows figures,
    curves, confusions, calibration and the worst mistakes on a page that needs no other file.
    """
    from model_export.commands import evaluate as command

    command.run(**options)


_EXPORT_EXAMPLE = """\b
Example:
  retinaserve export runs/cells/best.ckpt --data cells \\
      --output models/cells/1/model.onnx
"""


@click.command(context_settings=_CONTEXT, epilog=_EXPORT_EXAMPLE)
@click.argument("checkpoint_file", type=_FILE, metavar="CHECKPOINT")
@click.option("--output", type=_NEW_FILE, required=True, metavar="MODEL.onnx", help="The file.")
@click.option("--name", help="Name of the model; default: by its place in a repository, or file.")
@click.option(
    "--canvas",
    metavar="HxW[,HxW…]|short-side:S,L",
    help="Another canvas than in training: smaller is faster, larger detects smaller objects.",
)
@click.option(
    "--score-threshold",
    "score",
    type=Number(0.0, 1.0),
    help="Threshold of the file for every class; otherwise --data or --calibrate choose them.",
)
@click.option(
    "--data",
    type=_DATA,
    metavar="DIR",
    help="Measure the file here, and choose the thresholds that it holds.",
)
@click.option("--split", default="val", show_default=True, help="Split of --data.")
@label_options
@click.option(
    "--calibrate",
    "calibrate_on",
    type=_DATA,
    metavar="DIR",
    help="Calibrate the scores on labelled images that were not trained on.",
)
@click.option("--calibrate-split", default="val", show_default=True, help="Split of --calibrate.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="Of the network: fp16 for GPUs, int8 for CPUs (needs --data).",
)
@click.option(
    "--max-loss",
    type=Number(min=0),
    metavar="POINTS",
    help="AP that a smaller precision may cost, of 100; default: fp16 0.5, int8 1.5.",
)
@click.option(
    "--inputs",
    type=click.Choice(["optional", "required"]),
    default="optional",
    show_default=True,
    help="optional: all but images have a default; required: none has, as OpenVINO needs it.",
)
@click.option(
    "--save-weights",
    "weights_file",
    type=_NEW_FILE,
    metavar="FILE.safetensors",
    help="Also write a small checkpoint (weights only, float16) for train --init.",
)
@licence_option
def export(**options: Any) -> None:
    """Write a checkpoint as a model file.

    The file is verified against torch, alone and in batches, and the difference printed. A
    smaller precision is compared with fp32, and refused where it costs too much AP. Calibrate on
    images that the network was not trained on: on its training images it is overconfident.

    Labelled images choose the thresholds: that of highest F1 over all classes, and each class's
    own, the nearer to it the fewer objects the class has. F1 is printed on the images that they
    were chosen on, which flatters, and by cross-validation over the same images, each judged by
    thresholds chosen without it.
    """
    from model_export.commands import export as command

    command.run(**options)


_IMPORT_EXAMPLE = """\b
Example:
  retinaserve import-torchvision retinanet_resnet50_fpn_coco.pth \\
      --arch retinanet_resnet50_fpn --output coco.safetensors
  retinaserve export coco.safetensors --score-threshold 0.05 \\
      --output models/coco/1/model.onnx
"""


@click.command("import-torchvision", context_settings=_CONTEXT, epilog=_IMPORT_EXAMPLE)
@click.argument("source", type=_FILE, metavar="STATE_DICT.pth")
@click.option(
    "--arch",
    "architecture",
    metavar="NAME",
    help="retinanet_resnet50_fpn or retinanet_resnet50_fpn_v2; default: detected from the file.",
)
@click.option(
    "--labels",
    "labels_file",
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
    type=_NEW_FILE,
    required=True,
    metavar="CHECKPOINT",
    help="The checkpoint, for export and for train --init: a safetensors file.",
)
@licence_option
def import_torchvision(**options: Any) -> None:
    """Convert a RetinaNet of torchvision's to a checkpoint.

    Any number of classes, keys of old and new releases. All classes keep their numbers: class 0
    of torchvision's own models is the background, which they never output.
    """
    from model_export.commands import import_torchvision as command

    command.run(**options)


_PULL_EXAMPLE = """\b
Example:
  retinaserve pull coco
  retinaserve serve --models models
"""


@click.command(context_settings=_CONTEXT, epilog=_PULL_EXAMPLE)
@click.argument("name", required=False, metavar="[NAME]")
@click.option(
    "--from",
    "source",
    type=_FILE,
    metavar="FILE",
    help="The published file, fetched on another machine, in place of the download.",
)
@click.option(
    "--canvas",
    default="short-side:400,667",
    show_default=True,
    metavar="HxW[,HxW…]|short-side:S,L",
    help="Size that images are scaled to. The default is for CPUs; short-side:800,1333 is the "
    "published size, for GPUs: four times the work, finds smaller objects.",
)
@click.option(
    "--output",
    type=_NEW_FILE,
    metavar="MODEL.onnx",
    help="The file; default: models/NAME/1/model.onnx, which must not exist yet.",
)
def pull(**options: Any) -> None:
    """Make a model file of a published detector.

    Without a name it lists what there is. The weights are downloaded once into
    ~/.cache/retinaserve, an interrupted download is continued, and the file's hash is checked.
    Nothing in it is executed. The model file is verified against torch.
    """
    from model_export.commands import pull as command

    command.run(**options)


# --- data ----------------------------------------------------------------------------------------


@click.group(context_settings=_CONTEXT)
def data() -> None:
    """Check labelled images, pick those to label next, or draw a sample data set."""


_CHECK_EXAMPLE = """\b
Example:
  retinaserve data check cells
  retinaserve data check cells --canvas 384x512 --json cells.json
"""


@data.command(context_settings=_CONTEXT, epilog=_CHECK_EXAMPLE)
@click.argument("root", type=_DATA, metavar="DIR")
@label_options
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="NAME",
    help="Split to check; repeatable; default: those of train, val and test that exist.",
)
@click.option(
    "--canvas",
    metavar="HxW[,HxW…]|short-side:S,L",
    help="Canvas on which the anchors are judged; default: the config's, and one is recommended.",
)
@click.option(
    "--config",
    "config_file",
    type=Recipe(),
    metavar="RECIPE|FILE.yaml",
    help="Settings of `train`, whose canvas and anchors are judged; default: light.",
)
@click.option(
    "--budget-ms",
    type=Number(min=0, min_open=True),
    default=100.0,
    show_default=True,
    metavar="MS",
    help="Time that an image may take on two CPU cores, which limits the recommended canvas.",
)
@click.option(
    "--json",
    "json_file",
    type=_NEW_FILE,
    metavar="FILE",
    help="Write all of it, with every problem and every box that no anchor reaches.",
)
def check(**options: Any) -> None:
    """Count and judge labelled images, and recommend canvas and anchors.

    Every problem is named by file and line or entry; those that would stop training end with
    exit 2.
    """
    from model_export.commands import data_check as command

    command.run(**options)


_PICK_EXAMPLE = """\b
Example:
  retinaserve data pick new-images --model models/cells/1/model.onnx \\
      --count 50 --labelled cells --output to-correct
"""


@data.command(context_settings=_CONTEXT, epilog=_PICK_EXAMPLE)
@click.argument("pool", type=_DATA, metavar="POOL")
@click.option(
    "--model",
    metavar="NAME[@VERSION]|FILE.onnx",
    help="Model of the repository, or a model file; default: the default model.",
)
@click.option(
    "--against",
    metavar="NAME[@VERSION]|FILE.onnx",
    help="Another version: objects that only one of the two finds count as doubts, too.",
)
@click.option(
    "--count", type=click.IntRange(min=1), default=200, show_default=True, help="Images to choose."
)
@click.option(
    "--output", type=_FOLDER, required=True, metavar="DIR", help="New folder, outside of POOL."
)
@click.option(
    "--labelled",
    type=_DATA,
    metavar="DIR",
    help="Images that are labelled already: they and their near-duplicates are left out.",
)
@click.option(
    "--format",
    "layout",
    type=click.Choice(["voc", "yolo", "coco", "label-studio"]),
    default="voc",
    show_default=True,
    help="Of the pre-labels, as `label` writes them.",
)
@click.option(
    "--tile",
    default="off",
    show_default=True,
    metavar="off|auto|N",
    help="Cut large images into overlapping tiles, as `detect` does.",
)
@click.option("--device", help="auto, cpu, cuda or cuda:1.")
@click.option("--link", is_flag=True, help="Link the images (symbolic links) instead of copying.")
def pick(tile: str, **options: Any) -> None:
    """Choose the unlabelled images that teach a model most.

    First those with many detections near the threshold of their class, spread over the pool: each
    further image counts by its distance from all that are labelled or chosen, compared as images
    of 16 x 16 pixels, and near-duplicates, such as the next frame of a video, are left out. The
    same pool and model give the same choice.

    DIR gets the images with pre-labels, as `label` writes them, why.csv with the score and the
    reasons of each, and why.html to look at.
    """
    from model_export.commands import data_pick as command
    from service.engine.tiling import parse_tile

    failed = command.run(tile=parse_tile(tile), **options)
    sys.exit(2 if failed else 0)


_SAMPLE_EXAMPLE = """\b
Example:
  retinaserve data sample cells --images 60
"""


def _width_and_height(_context: Any, _parameter: Any, value: str) -> tuple[int, int]:
    width, separator, height = value.partition("x")
    if not (separator and width.isdecimal() and height.isdecimal()):
        raise click.BadParameter(f"{value!r}: expected WIDTHxHEIGHT in pixels, such as 640x480")
    if not all(64 <= int(side) <= 4096 for side in (width, height)):
        raise click.BadParameter(f"{value!r}: both sides must be within 64 and 4096 pixels")
    return int(width), int(height)


@data.command(context_settings=_CONTEXT, epilog=_SAMPLE_EXAMPLE)
@click.argument("folder", type=_FOLDER, metavar="DIR")
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
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Another seed draws other images.",
)
def sample(**options: Any) -> None:
    """Draw labelled images, to try all commands without data of your own.

    They look like the stained blood smears of the bundled model, with Pascal VOC labels of RBC,
    WBC and Platelets beside them. They are drawings: metrics on them say nothing about
    photographs.
    """
    from model_export.commands import data_sample as command

    command.run(**options)


# --- study ---------------------------------------------------------------------------------------

_exhibit_option = click.option(
    "--output",
    type=_FOLDER,
    required=True,
    metavar="DIR",
    help="Folder for the figures and tables; created if needed.",
)


@click.group(context_settings=_CONTEXT)
def study() -> None:
    """The exhibits of Focal Loss, arXiv 1708.02002, from this code and your data."""


@study.command()
@_exhibit_option
def curves(output: Path) -> None:
    """Loss and gradient against p_t for several gamma (figure 1), and FL*."""
    from model_export.commands import study as command

    command.curves(output)


@study.command()
@click.argument("checkpoint_file", type=_FILE, metavar="CHECKPOINT")
@_data_option
@_split_option
@_exhibit_option
@click.option(
    "--merge-classes",
    "merge",
    is_flag=True,
    help="Count all objects as of the checkpoint's only class.",
)
@_device_option
def cdf(**options: Any) -> None:
    """Which examples carry the loss of a trained model (figure 4), over a whole data set."""
    from model_export.commands import study as command

    command.cdf(**options)


@study.command()
@click.option(
    "--config",
    "config_file",
    type=Recipe(_STUDIES),
    required=True,
    metavar="STUDY|FILE.yaml",
    help="losses, losses-tuning, imbalance, blood-cells, recipe, recipe-blood-cells, detector, "
    "detector-blood-cells (an hour or two each), anchors (for a GPU), or a file of your own.",
)
@_data_option
@_exhibit_option
@click.option("--weights", metavar="FILE|imagenet", help="Start backbones from ImageNet weights.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="One setting for all runs, such as epochs=3; repeatable.",
)
@click.option("--row", "only", multiple=True, metavar="NAME", help="Run this row only; repeatable.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Runs at once, each with one thread.",
)
@_device_option
def ablate(**options: Any) -> None:
    """A grid of training runs, one row each, over several seeds.

    Started again with the same --output, it continues where it stopped.
    """
    from model_export.commands import study as command

    command.ablate(**options)

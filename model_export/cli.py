"""The commands of the `train` extra; `service.cli` finds them by their entry points.

torch and its companions are imported inside the functions: `--help` is quick, and what is missing
without the extra is found when a command runs, where `service.cli` names the remedy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from model_export.commands.options import Recipe, label_options, licence_option

_CONTEXT = {"help_option_names": ["-h", "--help"]}
_FOLDER = click.Path(file_okay=False, path_type=Path)
_DATA = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW_FILE = click.Path(dir_okay=False, path_type=Path)


# "\b" keeps click from joining the lines.
_TRAIN_EXAMPLE = """\b
Example:
  retinaserve train --data cells --config light --weights imagenet \\
      --max-minutes 60 --output runs/cells
"""
_EVALUATE_EXAMPLE = """\b
Example:
  retinaserve evaluate cells.onnx --data cells --against older.onnx --report cells.html
"""
_EXPORT_EXAMPLE = """\b
Example:
  retinaserve export runs/cells/best.ckpt --data cells \\
      --output models/cells/1/model.onnx
"""


@click.command(context_settings=_CONTEXT, epilog=_TRAIN_EXAMPLE)
@click.option("--data", type=_DATA, required=True, metavar="DIR", help="Labelled images.")
@label_options
@click.option(
    "--output",
    type=_FOLDER,
    required=True,
    metavar="RUN",
    help="Folder for last.ckpt, best.ckpt, metrics.csv, config.yaml and curves.",
)
@click.option("--backbone", help="resnet18, -34, -50, -101, mobilenet_v2 or mobilenet_v2_tf.")
@click.option(
    "--weights", metavar="FILE|imagenet", help="Start the backbone from ImageNet weights."
)
@click.option(
    "--init", metavar="CHECKPOINT|bundled", help="Fine-tune a checkpoint, on any class list."
)
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the data.")
@click.option(
    "--max-minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="Time that there is; the schedule is shaped to it.",
)
@click.option(
    "--config",
    "config_file",
    type=Recipe(),
    metavar="RECIPE|FILE.yaml",
    help="Settings: light (a network for CPUs), blood-cells, or a file of your own.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="One setting, such as optimiser.lr=0.005; repeatable, above --config.",
)
@click.option(
    "--anchors",
    type=click.Choice(["auto"]),
    help="Take the anchors that `data check` recommends, and its canvas where none is named.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Images per step, of all processes together."
)
@click.option("--seed", type=int, help="The same seed gives the same run.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option(
    "--devices",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes on this machine that share each batch, one GPU each; default 1. "
    "Several machines: start the command by torchrun.",
)
@click.option("--resume", is_flag=True, help="Go on where the run in --output stopped.")
@licence_option
def train(
    data: Path,
    labels: dict[str, Any],
    output: Path,
    backbone: str | None,
    weights: str | None,
    init: str | None,
    epochs: int | None,
    max_minutes: float | None,
    config_file: Path | None,
    settings: tuple[str, ...],
    anchors: str | None,
    batch_size: int | None,
    seed: int | None,
    device: str,
    devices: int | None,
    resume: bool,
    licences: tuple[str, ...],
) -> None:
    """Train a detector on labelled images.

    Before it starts it prints what is in the data and what no anchor reaches.
    """
    from model_export.commands import train as command

    if weights is not None and init is not None:
        raise click.UsageError("--weights and --init exclude each other: --init brings a backbone")
    given: dict[str, Any] = {
        "model.backbone": backbone,
        "epochs": epochs,
        "max_minutes": max_minutes,
        "batch_size": batch_size,
        "seed": seed,
    }
    command.run(
        data=data,
        output=output,
        config_file=config_file,
        overrides=dict(map(command.parse_setting, settings))
        | {key: value for key, value in given.items() if value is not None}
        | {f"data.{key}": value for key, value in labels.items()},
        fit_anchors=anchors == "auto",
        weights=weights,
        init=init,
        resume=resume,
        device=device,
        devices=devices,
        licences=licences,
    )


@click.command(context_settings=_CONTEXT, epilog=_EVALUATE_EXAMPLE)
@click.argument("model", type=_FILE, metavar="MODEL.onnx")
@click.option("--data", type=_DATA, required=True, metavar="DIR", help="Labelled images.")
@click.option("--split", default="val", show_default=True, help="Which part of the data.")
@label_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Images per call; default: the device's."
)
@click.option("--against", type=_FILE, metavar="OTHER.onnx", help="Compare with another file.")
@click.option("--json", "json_file", type=_NEW_FILE, metavar="FILE", help="Write all figures.")
@click.option("--plots", type=_FOLDER, metavar="DIR", help="Write figures as PNG.")
@click.option(
    "--report", type=_NEW_FILE, metavar="FILE.html", help="Write all of it as one page to look at."
)
def evaluate(
    model: Path,
    data: Path,
    split: str,
    labels: dict[str, Any],
    device: str,
    batch_size: int | None,
    against: Path | None,
    json_file: Path | None,
    plots: Path | None,
    report: Path | None,
) -> None:
    """COCO metrics of a model file on labelled images, and whether its scores can be trusted.

    Measures the file through the service's own pipeline, at score 0.01 and 300 detections.
    --against gives the difference of two files with a 95 % interval. --report shows figures,
    curves, confusions, calibration and the worst mistakes on a page that needs no other file.
    """
    from model_export.commands import evaluate as command

    command.run(
        model,
        data=data,
        split=split,
        labels=labels,
        device=device,
        batch_size=batch_size,
        against=against,
        json_file=json_file,
        plots=plots,
        report=report,
    )


@click.command(context_settings=_CONTEXT, epilog=_EXPORT_EXAMPLE)
@click.argument("checkpoint", type=_FILE, metavar="CHECKPOINT")
@click.option("--output", type=_NEW_FILE, required=True, metavar="MODEL.onnx", help="The file.")
@click.option("--name", help="Name of the model; default: by its place in a repository, or file.")
@click.option(
    "--canvas",
    metavar="HxW[,HxW…]|short-side:S,L",
    help="Another canvas than it was trained on: smaller is faster, larger sees smaller objects.",
)
@click.option(
    "--score-threshold",
    "score",
    type=click.FloatRange(0.0, 1.0),
    help="Default threshold of the file; with --data it is chosen per class by F1 otherwise.",
)
@click.option(
    "--data", type=_DATA, metavar="DIR", help="Measure the file here and choose thresholds."
)
@click.option("--split", default="val", show_default=True, help="Which part of --data.")
@label_options
@click.option(
    "--calibrate",
    "calibrate_on",
    type=_DATA,
    metavar="DIR",
    help="Make scores mean what they say: fit them on labelled images that were not trained on.",
)
@click.option(
    "--calibrate-split", default="val", show_default=True, help="Which part of --calibrate."
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="Of the network: fp16 for GPUs, int8 for CPUs (needs --data).",
)
@click.option(
    "--max-loss",
    type=click.FloatRange(min=0),
    metavar="POINTS",
    help="AP that a smaller precision may cost, of 100; default: fp16 0.5, int8 1.5.",
)
@click.option(
    "--save-weights",
    type=_NEW_FILE,
    metavar="FILE.safetensors",
    help="Also write a small checkpoint (weights only, float16) for train --init.",
)
@licence_option
def export(
    checkpoint: Path,
    output: Path,
    name: str | None,
    canvas: str | None,
    score: float | None,
    data: Path | None,
    split: str,
    labels: dict[str, Any],
    calibrate_on: Path | None,
    calibrate_split: str,
    precision: str,
    max_loss: float | None,
    save_weights: Path | None,
    licences: tuple[str, ...],
) -> None:
    """Write a checkpoint as a model file.

    The file is verified against torch, alone and in batches, and the difference printed. A
    smaller precision is measured beside fp32, and refused where it costs too much AP. Calibrate on
    images that the network has not learnt by heart: of its own training images it is too sure.
    """
    from model_export.commands import export as command
    from model_export.export.precision import Precision

    command.run(
        checkpoint,
        output,
        name=name,
        canvas=canvas,
        score=score,
        data=data,
        split=split,
        labels=labels,
        weights_file=save_weights,
        licences=licences,
        calibrate_on=calibrate_on,
        calibrate_split=calibrate_split,
        precision=Precision(precision),
        max_loss=max_loss,
    )

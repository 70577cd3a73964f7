"""`retinaserve export`: write a checkpoint as a model file."""

from __future__ import annotations

import dataclasses
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from model_export.checkpoints import Checkpoint, load_checkpoint, save_weights
from model_export.commands.evaluate import table
from model_export.commands.labelled_data import data_config, load_measured
from model_export.config import DataConfig, describe
from model_export.data import datasets
from model_export.data.datasets import Dataset, Sample
from model_export.data.splits import FOLDS
from model_export.evaluation.calibration import Calibration
from model_export.export.comparison import table as comparison_table
from model_export.export.pipeline import VERIFIED_IMAGES, PrecisionOptions, export_model
from model_export.export.precision import RANGE_IMAGES, Precision
from service.errors import DataError
from service.filenames import refuse_to_replace
from service.imaging.canvas import Buckets, ShortSide, Size
from service.imaging.samples import draw_smear
from service.runtime.artifact import MODEL_FILE, entry_of, read_artifact, why_skipped

_SIZE = re.compile(r"(\d+)x(\d+)")
_SHORT_SIDE = re.compile(r"short-side:(\d+),(\d+)")
_MEANT_AS_VERSION = re.compile(r"(?:v|version)?[-_. ]*\d[\d._]*", re.IGNORECASE)


def run(
    checkpoint_file: Path,
    output: Path,
    *,
    name: str | None,
    canvas: str | None,
    score: float | None,
    data: Path | None,
    split: str,
    labels: Mapping[str, Any],
    weights_file: Path | None,
    licences: Sequence[str],
    calibrate_on: Path | None = None,
    calibrate_split: str = "val",
    precision: str = Precision.FP32,
    max_loss: float | None = None,
    inputs: str = "optional",
) -> None:
    """Write, verify and, given data, measure a model file. Raises RetinaserveError."""
    target = Precision(precision)
    if target is Precision.INT8 and data is None:
        raise DataError(
            "--precision int8 needs --data DIR: images show which activations there are, and "
            "labels what it costs"
        )
    if weights_file is not None and weights_file.suffix != ".safetensors":
        raise DataError(f"--save-weights {weights_file}: expected a name that ends in .safetensors")
    check_repository_path(output)
    refuse_to_replace(
        filter(None, (output, weights_file)), filter(None, (checkpoint_file, data, calibrate_on))
    )
    rule = None if canvas is None else parse_canvas(canvas)
    checkpoint = _with_licences(load_checkpoint(checkpoint_file), licences)
    classes = checkpoint.description.classes
    held_out = calibration_data = None
    if data is not None:
        held_out = load_measured(data, split, data_config(labels), classes=classes)
        if target is Precision.INT8 and not any(len(each.labels) for each in held_out.samples):
            raise DataError(
                f"--precision int8: no object is labelled in the split {split!r} of {data}, so "
                "what it costs cannot be measured; name a split with objects"
            )
    if calibrate_on is not None:
        calibration_data = load_measured(
            calibrate_on, calibrate_split, data_config(labels), classes=classes
        )
    images = images_to_verify(held_out)
    done = export_model(
        checkpoint,
        output,
        name=name or default_name(output),
        canvas=rule,
        score=score,
        held_out=held_out,
        images=images,
        calibrate_on=calibration_data,
        reduction=_reduction(target, held_out, data_config(labels), images, max_loss),
        required_inputs=inputs == "required",
    )
    click.echo(f"wrote {output}, {output.stat().st_size / 1e6:.1f} MB")
    click.echo(str(done.report))
    if done.calibration is not None:
        for line in calibration_lines(done.calibration, classes):
            click.echo(line)
    if done.reduced is not None:
        click.echo(f"{precision}: {done.reduced}")
        for line in comparison_table(done.rows):
            click.echo(line)
    if done.evaluation is not None:
        for line in table(done.evaluation):
            click.echo(line)
    if done.chosen is not None:
        click.echo(str(done.chosen))
    thresholds = read_artifact(output).metadata.thresholds
    # In full: a rounded threshold may keep other detections.
    own = "".join(f", {label} {value}" for label, value in thresholds.per_class.items())
    click.echo(f"score thresholds: {thresholds.score}{own}")
    if weights_file is not None:
        weights_file.parent.mkdir(parents=True, exist_ok=True)
        save_weights(checkpoint, weights_file, half=True)
        click.echo(f"wrote {weights_file}, {weights_file.stat().st_size / 1e6:.1f} MB")


def calibration_lines(calibration: Calibration, classes: Sequence[str]) -> Iterator[str]:
    """Return the effect of the calibration as lines of text."""
    yield (
        f"calibrated on {calibration.detections} detections of {calibration.images} images; "
        f"calibration error {calibration.before:.4f}, afterwards {calibration.after:.4f} by "
        f"{FOLDS}-fold cross-validation"
    )
    score_map = calibration.score_map
    for name, scale, offset in zip(classes, score_map.scales, score_map.offsets, strict=True):
        yield f"  {name}: logit * {scale:.3f} {offset:+.3f}"


def parse_canvas(text: str) -> Buckets | ShortSide:
    """Return a canvas rule: "384x512,512x384" (height x width) or "short-side:800,1333".

    Raises click.BadParameter.
    """
    try:
        if short_side := _SHORT_SIDE.fullmatch(text):
            return ShortSide(short=int(short_side[1]), long=int(short_side[2]))
        sizes = [_SIZE.fullmatch(part.strip()) for part in text.split(",")]
        if all(sizes):
            return Buckets(
                sizes=tuple(Size(int(size[1]), int(size[2])) for size in sizes if size is not None)
            )
        reason = ""
    except ValidationError as error:
        reason = f"{describe(error)}; "
    raise click.BadParameter(
        f"--canvas {text!r}: {reason}expected HEIGHTxWIDTH[,…] in multiples of 32, such as "
        "384x512,512x384, or short-side:SHORT,LONG"
    )


def check_repository_path(output: Path) -> None:
    """Refuse NAME/VERSION/model.onnx where the service would skip the file for one of the names.

    Paths of any other form are accepted: a model file may lie outside a repository. Raises
    DataError.
    """
    # Unlike resolve(), as the service sees it: the name of a link counts.
    path = Path(os.path.abspath(output))  # noqa: PTH100
    place = path.relative_to(path.anchor).parts[-3:]
    if min(len(place), len(output.parts)) < 3 or output.name != MODEL_FILE:
        return
    reason = why_skipped(place)
    if reason is not None and _MEANT_AS_VERSION.fullmatch(place[1]):
        raise DataError(
            f"--output {output}: the service would skip this file, because {reason}; choose "
            f"<name>/<version>/{MODEL_FILE} of such names, or another file name"
        )


def default_name(output: Path) -> str:
    """Return the model name by a file's path: NAME/VERSION/model.onnx in a repository, or its stem.

    >>> default_name(Path("models/cells/1/model.onnx")), default_name(Path("cells.onnx"))
    ('cells', 'cells')
    """
    entry = entry_of(output.resolve())
    return output.stem if entry is None else entry.name


def _with_licences(checkpoint: Checkpoint, licences: Sequence[str]) -> Checkpoint:
    if not licences:
        return checkpoint
    provenance = {**checkpoint.description.provenance, "licences": list(licences)}
    description = checkpoint.description.model_copy(update={"provenance": provenance})
    return dataclasses.replace(checkpoint, description=description)


def _reduction(
    precision: Precision,
    held_out: Dataset | None,
    choice: DataConfig,
    images: Sequence[bytes],
    max_loss: float | None,
) -> PrecisionOptions | None:
    """Return the options of a smaller precision; int8 is calibrated on training images."""
    if precision is Precision.FP32:
        return None
    if precision is Precision.INT8 and held_out is not None:
        images = range_images(held_out, choice)
    return PrecisionOptions(precision, images, max_loss)


def range_images(held_out: Dataset, choice: DataConfig) -> list[bytes]:
    """Return images of the train split, evenly spread; where there is none, the measured ones."""
    try:
        samples = datasets.load(
            held_out.root,
            "train",
            format=choice.format,
            classes=held_out.classes,
            keep=choice.classes,
            remap=choice.remap,
        ).samples
    except DataError:
        samples = held_out.samples
    step = max(1, len(samples) // RANGE_IMAGES)
    return _read(samples[::step][:RANGE_IMAGES])


def images_to_verify(held_out: Dataset | None = None) -> list[bytes]:
    """Return images to verify on: the data's own, then drawn ones, landscape and portrait."""
    images: list[bytes] = []
    if held_out is not None:
        images = _read(held_out.samples[:VERIFIED_IMAGES])
    for seed in range(len(images), VERIFIED_IMAGES):
        width, height = ((640, 480), (480, 640))[seed % 2]
        file = io.BytesIO()
        draw_smear(seed, width=width, height=height)[0].save(file, "PNG")
        images.append(file.getvalue())
    return images


def _read(samples: Sequence[Sample]) -> list[bytes]:
    try:
        return [each.path.read_bytes() for each in samples]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error

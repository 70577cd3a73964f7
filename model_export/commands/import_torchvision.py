"""`retinaserve import-torchvision`: convert a state dict of torchvision's to a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from model_export.checkpoints import read_state_dict, save_weights
from model_export.provenance import imported
from model_export.torchvision_import import ARCHITECTURES, convert, read_labels
from service.errors import DataError
from service.filenames import refuse_to_replace
from service.imaging.canvas import ShortSide


def run(
    source: Path,
    output: Path,
    *,
    architecture: str | None,
    labels_file: Path | None,
    norm_eps: float | None,
    min_size: int,
    max_size: int,
    licences: Sequence[str],
) -> None:
    """Convert a state dict and print a summary. Raises DataError."""
    if architecture is not None and architecture not in ARCHITECTURES:
        raise DataError(f"--arch {architecture}: expected one of {', '.join(ARCHITECTURES)}")
    if norm_eps is not None and not 0 <= norm_eps < 1:
        raise DataError(f"--norm-eps {norm_eps}: expected a small number, such as 0 or 1e-5")
    if max_size < min_size:
        raise DataError(f"--max-size {max_size} must not be below --min-size {min_size}")
    refuse_to_replace([output], filter(None, (source, labels_file)))
    canvas = ShortSide(short=min_size, long=max_size)
    done = convert(
        read_state_dict(source),
        path=source,
        architecture=architecture,
        labels=None if labels_file is None else read_labels(labels_file),
        eps=norm_eps,
        canvas=canvas,
        provenance=imported(
            source=source, config={"canvas": canvas.model_dump(mode="json")}, licences=licences
        ),
    )
    description = done.checkpoint.description
    output.parent.mkdir(parents=True, exist_ok=True)
    save_weights(done.checkpoint, output, half=False)
    for note in done.notes:
        click.echo(f"note: {note}")
    classes = description.classes
    shown = ", ".join(classes[:4]) + (", …" if len(classes) > 4 else "")
    click.echo(
        f"{done.architecture}, {len(classes)} classes ({shown}), "
        f"norm eps {description.model.norm_eps:g}"
    )
    click.echo(
        f"wrote {output}, {output.stat().st_size / 1e6:.1f} MB; next:\n"
        f"  retinaserve export {output} --output models/NAME/1/model.onnx --score-threshold 0.05"
    )

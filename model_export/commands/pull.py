"""`retinaserve pull`: make a model file of a published detector."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from model_export.checkpoints import read_state_dict
from model_export.commands.export import (
    check_repository_path,
    default_name,
    images_to_verify,
    parse_canvas,
)
from model_export.download import CACHE, check_hash, fetch
from model_export.export.pipeline import export_model
from model_export.provenance import imported
from model_export.torchvision_import import convert
from service.errors import DataError
from service.filenames import refuse_to_replace
from service.runtime.artifact import MODEL_FILE, entry_of

PUBLISHED_CANVAS: Final = "short-side:800,1333"
SCORE: Final = 0.5
"""Without labelled images to choose a threshold on: that of detectron2's demo."""
LICENCES: Final = (
    "BSD-3-Clause (weights, by torchvision)",
    "CC BY 4.0 (annotations that they were trained on, by COCO)",
)


@dataclass(frozen=True, slots=True)
class Published:
    """A detector of torchvision's, trained on COCO's train2017."""

    url: str
    sha256: str
    megabytes: int
    """Size of the download."""
    architecture: str
    norm_eps: float
    """Eps of the backbone's batch norms, with which torchvision runs it."""
    ap: float
    """COCO's box AP on val2017 in points of 100, as torchvision publishes it."""


PUBLISHED: Final[Mapping[str, Published]] = {
    "coco": Published(
        url="https://download.pytorch.org/models/retinanet_resnet50_fpn_v2_coco-5905b1c5.pth",
        sha256="5905b1c544219215e544dbe319720397bc4e68de61a733a59350d7976645b769",
        megabytes=153,
        architecture="retinanet_resnet50_fpn_v2",
        norm_eps=1e-5,
        ap=41.5,
    ),
    "coco-v1": Published(
        url="https://download.pytorch.org/models/retinanet_resnet50_fpn_coco-eeacb38b.pth",
        sha256="eeacb38b7cec8cf93c57867e05eaab621047f19b0d2ec5accaa405f690da15b7",
        megabytes=137,
        architecture="retinanet_resnet50_fpn",
        norm_eps=0.0,
        ap=36.4,
    ),
}


def run(name: str | None, *, source: Path | None, canvas: str, output: Path | None) -> None:
    """Download, check, convert, export and verify a detector. Raises RetinaserveError."""
    if name is None:
        if source is not None or output is not None:
            raise click.UsageError(f"--from and --output need a NAME: {' or '.join(PUBLISHED)}")
        for each, what in PUBLISHED.items():
            click.echo(
                f"{each:<8} torchvision's {what.architecture}: 80 everyday classes of COCO, "
                f"AP {what.ap}, {what.megabytes} MB"
            )
        return
    published = PUBLISHED.get(name)
    if published is None:
        raise DataError(f"{name}: not a published detector; expected {' or '.join(PUBLISHED)}")
    rule = parse_canvas(canvas)
    if output is None:
        output = Path("models", name, "1", MODEL_FILE)
        if output.exists():
            raise DataError(
                f"{output}: is there already; delete it, or name another version: --output "
                f"{Path('models', name, '2', MODEL_FILE)}"
            )
    check_repository_path(output)
    if source is None:
        path = fetch(published.url, CACHE, option="--from", sha256=published.sha256)
    else:
        refuse_to_replace([output], [source])
        path = check_hash(source, published.sha256, f"fetch {published.url}")
    provenance = imported(
        source=path, config={"canvas": rule.model_dump(mode="json")}, licences=LICENCES
    )
    measured = {"ap": published.ap / 100, "data": "COCO val2017", "canvas": PUBLISHED_CANVAS}
    converted = convert(
        read_state_dict(path),
        path=path,
        architecture=published.architecture,
        labels=None,
        eps=published.norm_eps,
        canvas=rule,
        provenance={**provenance, "url": published.url, "published": measured},
    )
    done = export_model(
        converted.checkpoint,
        output,
        name=default_name(output),
        canvas=None,
        score=SCORE,
        held_out=None,
        images=images_to_verify(),
    )
    click.echo(f"wrote {output}, {output.stat().st_size / 1e6:.1f} MB")
    click.echo(str(done.report))
    click.echo(
        f"torchvision's {published.architecture}; AP {published.ap} on COCO val2017 at "
        f"{PUBLISHED_CANVAS}, as published"
    )
    click.echo(f"canvas: {canvas}; smaller is faster, larger finds smaller objects")
    click.echo(f"score threshold: {SCORE}; a request's own replaces it")
    click.echo(f"licences: {'; '.join(LICENCES)}")
    place = output.resolve()
    if entry_of(place) is not None:
        click.echo(f"next:\n  retinaserve serve --models {os.path.relpath(place.parents[2])}")

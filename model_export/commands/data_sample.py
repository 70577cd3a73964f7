"""`retinaserve data sample`: a labelled folder of drawn images."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from service.commands.label_formats import voc_xml
from service.errors import DataError
from service.imaging.canvas import Size
from service.imaging.samples import draw_smear


def run(folder: Path, *, images: int, size: tuple[int, int], seed: int) -> None:
    """Write images of `size` (width, height), and labels beside them. Raises DataError."""
    width, height = size
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    digits = max(3, len(str(images)))
    objects = 0
    for number in tqdm(range(1, images + 1), desc="drawing", unit="image", disable=None):
        # Of its own for each image: asking for more of them leaves the first ones as they are.
        rng = np.random.default_rng([seed, number])
        image, cells = draw_smear(
            int(rng.integers(2**32)),
            width=width,
            height=height,
            red=int(rng.integers(8, 16)),
            white=int(rng.integers(0, 3)),
            platelets=int(rng.integers(0, 4)),
        )
        path = folder / f"smear-{number:0{digits}}.jpg"
        image.save(path, quality=90)
        path.with_suffix(".xml").write_bytes(voc_xml(path.name, Size(height, width), cells))
        objects += len(cells)
    click.echo(
        f"{images} images with {objects} objects in {folder}; next:\n"
        f"  retinaserve data check {folder}"
    )

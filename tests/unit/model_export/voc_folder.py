"""Draws small Pascal VOC folders, sound or broken, for the tests of the data side."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw

from model_export.data.datasets import load

Box = tuple[float, float, float, float]
Named = tuple[str, Box]

load_voc = functools.partial(load, format="voc")


def annotation(
    objects: Iterable[Named] = (),
    *,
    size: tuple[int, int] | None = (80, 60),
    filename: str = "",
    difficult: str = "0",
) -> str:
    """An annotation in VOC's usual form; `size` is (width, height)."""
    lines = ["<annotation>"]
    if filename:
        lines.append(f"  <filename>{filename}</filename>")
    if size is not None:
        lines.append(f"  <size><width>{size[0]}</width><height>{size[1]}</height></size>")
    for name, (x1, y1, x2, y2) in objects:
        lines += [
            "  <object>",
            f"    <name>{name}</name>",
            f"    <difficult>{difficult}</difficult>",
            "    <bndbox>",
            f"      <xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>",
            "    </bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def image(path: Path, *, size: tuple[int, int] = (80, 60), orientation: int = 1) -> Path:
    """A drawn image of `size` (width, height) before EXIF orientation."""
    drawn = Image.new("RGB", size, (200, 180, 190))
    ImageDraw.Draw(drawn).ellipse((10, 10, 40, 40), fill=(120, 30, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    drawn.save(path, exif=exif.tobytes())
    return path


class VocFolder:
    """A VOC folder being filled: images, annotations and split files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.annotations = root / "Annotations"
        self.images = root / "JPEGImages"
        self.lists = root / "ImageSets" / "Main"
        for folder in (self.annotations, self.images):
            folder.mkdir(parents=True)

    def add(self, stem: str, objects: Iterable[Named] = ()) -> None:
        """A sound pair of image and annotation."""
        image(self.images / f"{stem}.jpg")
        self.annotate(stem, annotation(objects))

    def annotate(self, stem: str, text: str) -> Path:
        """Write an annotation file as it is given."""
        path = self.annotations / f"{stem}.xml"
        path.write_text(text, encoding="utf-8")
        return path

    def list(self, split: str, *lines: str) -> Path:
        """Write a split file."""
        self.lists.mkdir(parents=True, exist_ok=True)
        path = self.lists / f"{split}.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

"""Writes the labels of a Pascal VOC folder as COCO and as YOLO, beside the same images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from model_export.data.annotations import LabelledImage
from model_export.data.folder import LabelledFolder
from model_export.data.voc import read

SPLITS = ("train", "val")


def labelled(source: Path, split: str, most: int | None = None) -> list[LabelledImage]:
    """The first images of a split, with what is written about them."""
    return list(read(LabelledFolder(source), split, naming=False).images[:most])


def write_voc(source: Path, root: Path, *, most: int | None = None) -> Path:
    """The same folder with fewer images."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for split in SPLITS:
        images = labelled(source, split, most)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(
            "".join(f"{each.image.stem}\n" for each in images)
        )
        for each in images:
            (root / "JPEGImages" / each.image.name).symlink_to(each.image.resolve())
            (root / "Annotations" / each.annotation.name).symlink_to(each.annotation.resolve())
    return root


def write_coco(source: Path, root: Path, names: Sequence[str], *, most: int | None = None) -> Path:
    """COCO's own layout; ids have gaps and do not follow the class order."""
    ids = {name: 100 - 7 * number for number, name in enumerate(names)}
    (root / "annotations").mkdir(parents=True)
    for split in SPLITS:
        folder = root / f"{split}2017"
        folder.mkdir()
        images, annotations = [], []
        for number, each in enumerate(labelled(source, split, most)):
            (folder / each.image.name).symlink_to(each.image.resolve())
            images.append(_coco_image(3 * number + 11, each))
            for item in each.objects:
                x1, y1, x2, y2 = item.box
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": 3 * number + 11,
                        "category_id": ids[item.name],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "iscrowd": 0,
                    }
                )
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": key, "name": name} for name, key in ids.items()],
        }
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def write_yolo(source: Path, root: Path, names: Sequence[str], *, most: int | None = None) -> Path:
    """images/train, labels/train and data.yaml; fractions are written in full."""
    for split in SPLITS:
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for each in labelled(source, split, most):
            (root / "images" / split / each.image.name).symlink_to(each.image.resolve())
            lines = "".join(f"{line}\n" for line in _yolo_lines(each, names))
            (root / "labels" / split / f"{each.image.stem}.txt").write_text(lines)
    described = {"path": ".", "train": "images/train", "val": "images/val", "names": list(names)}
    (root / "data.yaml").write_text(yaml.safe_dump(described))
    return root


def _coco_image(key: int, each: LabelledImage) -> dict[str, Any]:
    image: dict[str, Any] = {"id": key, "file_name": each.image.name}
    if each.size is not None:
        image |= {"height": each.size[0], "width": each.size[1]}
    return image


def _yolo_lines(each: LabelledImage, names: Sequence[str]) -> Iterator[str]:
    assert each.size is not None
    height, width = each.size
    for item in each.objects:
        x1, y1, x2, y2 = item.box
        centre = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
        sides = ((x2 - x1) / width, (y2 - y1) / height)
        yield " ".join(map(repr, (names.index(item.name), *centre, *sides)))

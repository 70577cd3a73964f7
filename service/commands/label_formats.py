"""Detections as the annotation files that labelling tools open: VOC, YOLO, COCO, Label Studio.

All coordinates are of the upright image, after EXIF orientation, as labelImg, CVAT, Label Studio
and FiftyOne show it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final, Protocol
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np

from service.engine.postprocessing import rounded
from service.imaging.canvas import Size
from service.runtime.detector import Detections

_CHECK: Final = "next, once they are corrected:\n  retinaserve data check {}"

Edges = Sequence[float]
"""x1, y1, x2, y2 in pixels."""


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image of the output folder, and the detections on it."""

    name: str
    """Its file name there."""
    size: Size
    """Upright."""
    detections: Detections


@dataclass(frozen=True, slots=True)
class Origin:
    """The model that labels."""

    model: str
    """NAME or NAME@VERSION."""
    classes: tuple[str, ...]


class LabelFormat(Protocol):
    """One format: where images and labels are, and what the files hold."""

    images: str
    """Folder of the images in the output folder; "" for that folder itself."""
    shared: bool
    """Whether one label file holds all images, and not one each."""
    next: str
    """What to do with the output folder, {}."""

    def place(self, name: str) -> str:
        """Return the label file of an image, in the output folder."""

    def write(self, images: Sequence[LabelledImage], origin: Origin) -> bytes:
        """Return the content of the label file of `images`, of one unless it is shared."""

    def settings(self, origin: Origin) -> Mapping[str, bytes]:
        """Return the files beside the labels, by name: they depend on the classes alone."""


class Voc:
    """NAME.xml beside NAME.jpg, as labelImg writes it and CVAT imports it."""

    images = ""
    shared = False
    next = _CHECK

    def place(self, name: str) -> str:
        """Return NAME.xml."""
        return f"{PurePosixPath(name).stem}.xml"

    def write(self, images: Sequence[LabelledImage], origin: Origin) -> bytes:
        """Return the XML."""
        (image,) = images
        boxes, _ = rounded(image.detections)
        names = [origin.classes[label] for label in image.detections.labels.tolist()]
        return voc_xml(image.name, image.size, zip(names, boxes.tolist(), strict=True))

    def settings(self, origin: Origin) -> Mapping[str, bytes]:
        """Return nothing: the XML names the classes."""
        return {}


def voc_xml(name: str, size: Size, objects: Iterable[tuple[str, Edges]]) -> bytes:
    """Return Pascal VOC's XML of the image `name` with (class, box) of each object."""
    root = ElementTree.Element("annotation")
    _texts(root, filename=name)
    _texts(ElementTree.SubElement(root, "size"), width=size.width, height=size.height, depth=3)
    _texts(root, segmented=0)
    for label, (x1, y1, x2, y2) in objects:
        item = ElementTree.SubElement(root, "object")
        _texts(item, name=label, pose="Unspecified", truncated=0, difficult=0)
        edges = {"xmin": x1, "ymin": y1, "xmax": x2, "ymax": y2}
        box = ElementTree.SubElement(item, "bndbox")
        _texts(box, **{tag: f"{edge:.8g}" for tag, edge in edges.items()})
    ElementTree.indent(root)
    content: bytes = ElementTree.tostring(root, encoding="utf-8")
    return content + b"\n"


def _texts(parent: ElementTree.Element, **values: object) -> None:
    for tag, value in values.items():
        ElementTree.SubElement(parent, tag).text = str(value)


class Yolo:
    """images/NAME.jpg, labels/NAME.txt and data.yaml, as Ultralytics and CVAT read them.

    FiftyOne looks for dataset.yaml, which is the same file.
    """

    images = "images"
    shared = False
    next = _CHECK

    def place(self, name: str) -> str:
        """Return labels/NAME.txt."""
        return f"labels/{PurePosixPath(name).stem}.txt"

    def write(self, images: Sequence[LabelledImage], origin: Origin) -> bytes:
        """Return a line of class, centre and size for each detection."""
        (image,) = images
        boxes = image.detections.boxes.astype(np.float64) / _sides(image.size)
        lines = [
            f"{label} {(x1 + x2) / 2:.6f} {(y1 + y2) / 2:.6f} {x2 - x1:.6f} {y2 - y1:.6f}\n"
            for label, (x1, y1, x2, y2) in zip(
                image.detections.labels.tolist(), boxes.tolist(), strict=True
            )
        ]
        return "".join(lines).encode()

    def settings(self, origin: Origin) -> Mapping[str, bytes]:
        """Return the YAML, under both of its names."""
        names = "".join(f"  - {_yaml_text(name)}\n" for name in origin.classes)
        content = f"train: ./images/\nnc: {len(origin.classes)}\nnames:\n{names}".encode()
        return {"data.yaml": content, "dataset.yaml": content}


def _yaml_text(text: str) -> str:
    r"""Return text as a double-quoted scalar of YAML.

    >>> print(_yaml_text('a "b"'))
    "a \U00000022b\U00000022"
    """
    # Not json.dumps: its pairs of surrogates are two characters in YAML.
    plain = (
        each if each.isprintable() and each not in '"\\' else f"\\U{ord(each):08x}" for each in text
    )
    return f'"{"".join(plain)}"'


class Coco:
    """data/NAME.jpg and labels.json, as FiftyOne's COCODetectionDataset."""

    images = "data"
    shared = True
    next = _CHECK

    def place(self, name: str) -> str:
        """Return labels.json."""
        return "labels.json"

    def write(self, images: Sequence[LabelledImage], origin: Origin) -> bytes:
        """Return the annotation file; an annotation's score is that of the detection."""
        entries: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, image in enumerate(images, start=1):
            size = {"width": image.size.width, "height": image.size.height}
            entries.append({"id": number, "file_name": image.name, **size})
            boxes, scores = rounded(image.detections)
            for label, score, (x1, y1, x2, y2) in zip(
                image.detections.labels.tolist(), scores.tolist(), boxes.tolist(), strict=True
            ):
                width, height = round(x2 - x1, 2), round(y2 - y1, 2)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": label + 1,
                        "bbox": [x1, y1, width, height],
                        "area": round(width * height, 2),
                        "iscrowd": 0,
                        "score": score,
                    }
                )
        return _json(
            {
                "info": {"description": f"Detections of {origin.model}, to be corrected"},
                "images": entries,
                "annotations": annotations,
                "categories": [
                    {"id": number, "name": name}
                    for number, name in enumerate(origin.classes, start=1)
                ],
            }
        )

    def settings(self, origin: Origin) -> Mapping[str, bytes]:
        """Return nothing: the one file names the classes."""
        return {}


class LabelStudio:
    """images/NAME.jpg, tasks.json with `predictions`, and config.xml: the labelling interface."""

    images = "images"
    shared = True
    next = "next: import tasks.json into a Label Studio project whose interface is config.xml"

    def place(self, name: str) -> str:
        """Return tasks.json."""
        return "tasks.json"

    def write(self, images: Sequence[LabelledImage], origin: Origin) -> bytes:
        """Return the tasks."""
        return _json([_task(image, origin) for image in images])

    def settings(self, origin: Origin) -> Mapping[str, bytes]:
        """Return the labelling interface, whose names the predictions refer to."""
        view = ElementTree.Element("View")
        ElementTree.SubElement(view, "Image", name="image", value="$image")
        labels = ElementTree.SubElement(view, "RectangleLabels", name="label", toName="image")
        for name in origin.classes:
            ElementTree.SubElement(labels, "Label", value=name)
        ElementTree.indent(view)
        content: bytes = ElementTree.tostring(view, encoding="utf-8")
        return {"config.xml": content + b"\n"}


def _task(image: LabelledImage, origin: Origin) -> dict[str, Any]:
    """Return a task: coordinates are percent of the upright image's sides."""
    boxes = 100 * image.detections.boxes.astype(np.float64) / _sides(image.size)
    _, scores = rounded(image.detections)
    results = [
        {
            "id": f"detection-{number}",
            "type": "rectanglelabels",
            "from_name": "label",
            "to_name": "image",
            "original_width": image.size.width,
            "original_height": image.size.height,
            "image_rotation": 0,
            "score": score,
            "value": {
                "x": round(x1, 5),
                "y": round(y1, 5),
                "width": round(x2 - x1, 5),
                "height": round(y2 - y1, 5),
                "rotation": 0,
                "rectanglelabels": [origin.classes[label]],
            },
        }
        for number, (label, score, (x1, y1, x2, y2)) in enumerate(
            zip(image.detections.labels.tolist(), scores.tolist(), boxes.tolist(), strict=True)
        )
    ]
    prediction: dict[str, Any] = {"model_version": origin.model, "result": results}
    if results:
        # By this Label Studio sorts: the task with the most doubtful detection comes first.
        prediction["score"] = min(scores.tolist())
    place = f"/data/local-files/?d=images/{quote(image.name)}"
    return {"data": {"image": place}, "predictions": [prediction]}


def _sides(size: Size) -> tuple[int, int, int, int]:
    return size.width, size.height, size.width, size.height


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"


FORMATS: Final[Mapping[str, LabelFormat]] = {
    "voc": Voc(),
    "yolo": Yolo(),
    "coco": Coco(),
    "label-studio": LabelStudio(),
}

"""`label`: what it writes, tools open and our readers read back as it was detected."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from model_export.data import datasets
from service import cli
from service.commands import label
from service.commands.detect import find_images
from service.runtime.artifact import read_artifact, write_metadata
from tests import tiny_model
from tests.images import BLUE, GREEN, RED, encoded, one_red, rotated, squares

CLASSES = ("red & <hot>", "Größe 'x' \"y\" 🩸", "no: #1")
"""Spaces, and what XML and YAML have a meaning for."""
OBJECTS = 22
"""In the images of `folder`: in a scaled image two cells may find one square."""
READ = ("voc", "yolo", "coco")
SUFFIX = {"voc": "cells.xml", "yolo": "labels/cells.txt"}

Objects = list[tuple[str, NDArray[np.float64]]]
"""Class and box, sorted."""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "models"
    path = tiny_model.save(root)
    metadata = read_artifact(path).metadata
    thresholds = metadata.thresholds.model_copy(update={"per_class": {CLASSES[2]: 0.8}})
    update = {"classes": CLASSES, "thresholds": thresholds}
    write_metadata(path, metadata.model_copy(update=update))
    monkeypatch.setenv("RETINASERVE_MODELS_DIR", str(root))
    monkeypatch.setenv("RETINASERVE_DEVICE", "cpu")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Names and sizes that go wrong elsewhere, by the name that each has in the output."""
    root = tmp_path / "pool"
    odd = squares((30, 20, GREEN), (70, 50, RED), size=(131, 97))
    content = {
        "one cell.png": encoded(squares((32, 16, BLUE))),
        "Größe 測 🩸.png": encoded(odd),
        "&<'>;#%+.png": encoded(squares((7, 9, RED), size=(61, 203))),
        "turned.png": rotated(odd, 6),
        "mirrored.png": rotated(odd, 7),
        "empty.png": encoded(squares()),
        "north/c.png": encoded(squares((0, 0, RED))),
        "south/c.png": encoded(squares((64, 32, GREEN))),
        "south/c.jpg": encoded(squares((32, 32, RED), size=(333, 77)), "JPEG", quality=95),
        "north/images/train/d.png": encoded(squares((16, 16, GREEN))),
        "Labels/val/d.png": encoded(squares((48, 16, RED))),
        "test/.hidden.png": encoded(squares((64, 16, RED))),
        "back\\slash.png": encoded(squares((16, 48, RED))),
    }
    for name, data in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.retinaserve, [str(each) for each in arguments])


def labelled(pool: Path, output: Path, layout: str, *options: object) -> Result:
    result = run("label", pool, "--output", output, "--format", layout, *options)
    assert result.exit_code == 0, result.output
    return result


def detected(pool: Path) -> dict[str, Objects]:
    """What `detect` finds, by the image's name in an output folder."""
    results = json.loads(run("detect", pool).stdout)["results"]
    flat = label.flat_names(find_images([pool]))
    names = {str(source.path): name for source, name in flat.items()}
    return {
        names[each["id"]]: in_order(
            (found["label"], list(found["box"].values())) for found in each["detections"]
        )
        for each in results
    }


def read_back(output: Path, layout: str) -> dict[str, Objects]:
    """The same as our reader has it, from both sides of the split by hash."""
    found = {}
    for split in ("train", "val"):
        part = datasets.load(output, split, format=layout, classes=CLASSES)
        for sample in part.samples:
            boxes = zip(sample.labels.tolist(), sample.boxes.tolist(), strict=True)
            found[sample.path.name] = in_order((CLASSES[each], box) for each, box in boxes)
    return found


def in_order(objects: Iterator[tuple[str, list[float]]]) -> Objects:
    return [(name, np.array(box)) for name, box in sorted(objects)]


def check_same(found: dict[str, Objects], expected: dict[str, Objects]) -> None:
    """To half a pixel."""
    assert found.keys() == expected.keys()
    for name, objects in expected.items():
        assert [each for each, _ in found[name]] == [each for each, _ in objects], name
        for (_, box), (_, wanted) in zip(found[name], objects, strict=True):
            assert np.abs(box - wanted).max() <= 0.5, name


@pytest.mark.parametrize("layout", READ)
@pytest.mark.parametrize("link", [(), ("--link",)])
def test_labels_are_read_back_as_they_were_detected(
    models: Path, folder: Path, tmp_path: Path, layout: str, link: tuple[str, ...]
) -> None:
    output = tmp_path / "to correct"
    result = labelled(folder, output, layout, *link)
    assert f"13 images with {OBJECTS} objects in {output}" in result.stdout
    assert f"retinaserve data check '{output}'" in result.stdout
    expected = detected(folder)
    assert expected["empty.png"] == []
    check_same(read_back(output, layout), expected)
    checked = run("data", "check", output)
    assert checked.exit_code == 0, checked.output
    images = [path for path in output.rglob("*") if path.suffix in (".png", ".jpg")]
    assert len(images) == 13
    assert all(path.is_symlink() == bool(link) for path in images)


def test_label_studio_tasks_show_what_was_detected(
    models: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "to-correct"
    assert "tasks.json" in labelled(folder, output, "label-studio").stdout
    view = ElementTree.parse(output / "config.xml").getroot()
    image, labels = view
    assert tuple(each.attrib["value"] for each in labels) == CLASSES
    assert (image.tag, labels.tag) == ("Image", "RectangleLabels")
    found = {}
    for task in json.loads((output / "tasks.json").read_text()):
        assert image.attrib["value"] == "$image"
        place, _, query = task["data"]["image"].partition("?d=")
        assert place == "/data/local-files/"
        path = output / unquote(query)
        assert path.is_file()
        (prediction,) = task["predictions"]
        assert prediction["model_version"] == "tiny@1"
        scores = [each["score"] for each in prediction["result"]]
        assert prediction.get("score") == min(scores, default=None)
        objects = []
        for each in prediction["result"]:
            assert each["from_name"] == labels.attrib["name"]
            assert each["to_name"] == labels.attrib["toName"] == image.attrib["name"]
            value, x_scale, y_scale = (
                each["value"],
                each["original_width"] / 100,
                each["original_height"] / 100,
            )
            x, y = value["x"] * x_scale, value["y"] * y_scale
            width, height = value["width"] * x_scale, value["height"] * y_scale
            (name,) = value["rectanglelabels"]
            objects.append((name, [x, y, x + width, y + height]))
        found[path.name] = in_order(iter(objects))
    check_same(found, detected(folder))


def test_fiftyone_layouts(models: Path, folder: Path, tmp_path: Path) -> None:
    """As fiftyone.types.COCODetectionDataset and YOLOv5Dataset document them."""
    labelled(folder, tmp_path / "coco", "coco")
    tables: dict[str, Any] = json.loads((tmp_path / "coco" / "labels.json").read_text())
    names = {path.name for path in (tmp_path / "coco" / "data").iterdir()}
    assert {each["file_name"] for each in tables["images"]} == names
    assert {path.name for path in (tmp_path / "coco").iterdir()} == {"data", "labels.json"}
    ids = {each["id"]: each["name"] for each in tables["categories"]}
    assert tuple(ids.values()) == CLASSES
    assert {each["category_id"] for each in tables["annotations"]} == ids.keys()
    assert all({"bbox", "area", "iscrowd"} <= each.keys() for each in tables["annotations"])

    labelled(folder, tmp_path / "yolo", "yolo")
    described = yaml.safe_load((tmp_path / "yolo" / "dataset.yaml").read_text())
    assert tuple(described["names"]) == CLASSES
    images = sorted((tmp_path / "yolo" / described["train"]).rglob("*"))
    assert {path.name for path in images} == names
    for path in images:
        assert (
            (tmp_path / "yolo" / "labels" / path.relative_to(path.parent))
            .with_suffix(".txt")
            .is_file()
        )
    same = (tmp_path / "yolo" / "data.yaml").read_bytes()
    assert same == (tmp_path / "yolo" / "dataset.yaml").read_bytes()


@pytest.mark.parametrize("layout", SUFFIX)
def test_corrected_labels_are_kept(models: Path, tmp_path: Path, layout: str) -> None:
    pool, output = tmp_path / "pool", tmp_path / "out"
    pool.mkdir()
    (pool / "cells.png").write_bytes(encoded(one_red()))
    labelled(pool, output, layout)
    place = output / SUFFIX[layout]
    written = place.read_bytes()
    place.write_bytes(b"corrected")
    (pool / "new.png").write_bytes(encoded(one_red()))
    result = labelled(pool, output, layout)
    assert "1 images with 1 objects" in result.stdout
    assert "; 1 that have labels are left as they are" in result.stdout
    assert place.read_bytes() == b"corrected"
    assert "2 images with 2 objects" in labelled(pool, output, layout, "--overwrite").stdout
    assert place.read_bytes() == written


@pytest.mark.parametrize("layout", SUFFIX)
def test_labels_of_other_images_are_not_taken_for_theirs(
    models: Path, tmp_path: Path, layout: str
) -> None:
    pool, other, output = tmp_path / "pool", tmp_path / "other", tmp_path / "out"
    for folder, name, content in (
        (pool, "cells.png", one_red()),
        (other, "cells.png", squares((0, 0, BLUE))),
        (other, "dots.png", squares((0, 0, RED))),
    ):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(encoded(content))
    labelled(pool, output, layout)
    place = output / SUFFIX[layout]
    written = place.read_bytes()
    # The same name in another folder.
    result = run("label", other, "--output", output, "--format", layout)
    assert result.exit_code == 2
    assert "cells.png is another image; name another folder" in result.stderr
    assert "1 images with 1 objects" in result.stdout
    assert place.read_bytes() == written
    # A new image that takes the name of the first, which becomes cells-2.
    (pool / "cells.jpg").write_bytes(encoded(squares((0, 0, GREEN)), "JPEG"))
    result = run("label", pool, "--output", output, "--format", layout)
    assert result.exit_code == 2
    assert f"{place} is there without cells.jpg, and may be another image's" in result.stderr
    assert place.read_bytes() == written
    assert not [*output.rglob("cells.jpg")]


@pytest.mark.parametrize("layout", [*READ, "label-studio"])
def test_file_that_cannot_be_written_is_named(
    models: Path, folder: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full for all but the smallest images: as for root, modes forbid nothing."""
    real = os.fsync

    def full(number: int) -> None:
        if os.fstat(number).st_size > 500:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    monkeypatch.setattr(os, "fsync", full)
    result = run("label", folder, "--output", tmp_path / "out", "--format", layout)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if "No space left" in line]
    assert lines
    assert all(re.search(r"/out/.+ cannot be written: No space left", line) for line in lines)
    assert not [*(tmp_path / "out").rglob("*.unfinished")]


@pytest.mark.parametrize(("layout", "name"), [("coco", "labels"), ("label-studio", "tasks")])
def test_one_file_of_labels_is_kept(
    models: Path, folder: Path, tmp_path: Path, layout: str, name: str
) -> None:
    output = tmp_path / "out"
    labelled(folder, output, layout)
    place = output / f"{name}.json"
    written = place.read_bytes()
    place.write_bytes(b"corrected")
    result = run("label", folder, "--output", output, "--format", layout)
    assert result.exit_code == 2
    assert f"{place} is there already; name another folder, or replace it by" in result.stderr
    assert place.read_bytes() == b"corrected"
    labelled(folder, output, layout, "--overwrite")
    assert place.read_bytes() == written


def test_class_list_of_another_model_is_kept(models: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "data.yaml").write_text("train: images\nnames: [cat]\n")
    result = run("label", folder, "--output", output, "--format", "yolo")
    assert result.exit_code == 2
    assert "data.yaml: it names other classes than the model" in result.stderr
    assert [path.name for path in output.iterdir()] == ["data.yaml"]


@pytest.mark.parametrize("inside", ["", "new", "north/new"])
def test_output_among_the_images_is_refused(models: Path, folder: Path, inside: str) -> None:
    before = sorted(folder.rglob("*"))
    result = run("label", folder, "--output", folder / inside)
    assert result.exit_code == 2
    assert "name a folder outside of it" in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_images_are_never_replaced(models: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "empty.png").write_bytes(b"of somebody else")
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    result = run("label", folder, "--output", output, "--overwrite")
    assert result.exit_code == 2
    assert f"{output}/empty.png is another image; name another folder" in result.stderr
    assert f"12 images with {OBJECTS} objects" in result.stdout
    assert (output / "empty.png").read_bytes() == b"of somebody else"
    assert not (output / "empty.xml").exists()
    assert {path: path.read_bytes() for path in before} == before
    # An image that is named by itself may have its labels beside it.
    image = folder / "empty.png"
    assert run("label", image, "--output", folder).exit_code == 0
    assert (folder / "empty.xml").is_file()
    assert image.read_bytes() == before[image]
    result = run("label", image, folder / "empty.xml", "--output", folder, "--overwrite")
    assert result.exit_code == 2
    assert "empty.xml: writing it would replace" in result.stderr


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("broken.png", b"no image", "not an accepted image type"),
        ("line\nbreak.png", encoded(one_red()), "its name has characters that label files cannot"),
        (os.fsdecode(b"caf\xe9.png"), encoded(one_red()), "its name has characters that label"),
        ("cells.bin", encoded(one_red()), "labelling tools go by the suffix of an image"),
    ],
)
def test_one_bad_image_costs_itself_alone(
    models: Path, tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    bad, good = tmp_path / name, tmp_path / "good.png"
    bad.write_bytes(data)
    good.write_bytes(encoded(one_red()))
    result = run("label", bad, good, good, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert reason in result.stderr
    assert "1 images with 1 objects" in result.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.png", "good.xml"]


def test_score_threshold_replaces_those_of_the_model(
    models: Path, folder: Path, tmp_path: Path
) -> None:
    assert (
        "with 0 objects" in labelled(folder, tmp_path / "a", "voc", "--score-threshold", 1).stdout
    )
    lower = labelled(folder, tmp_path / "b", "voc", "--score-threshold", 0.2).stdout
    assert int(lower.split()[3]) > OBJECTS


@pytest.mark.parametrize("name", ["two\nlines", " ", "\x01"])
def test_class_that_no_label_file_can_hold_is_refused(
    models: Path, folder: Path, tmp_path: Path, name: str
) -> None:
    path = models / "tiny" / "1" / "model.onnx"
    metadata = read_artifact(path).metadata
    update = {"classes": (name, *CLASSES[1:])}
    write_metadata(path, metadata.model_copy(update=update))
    result = run("label", folder, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "cannot be written into label files" in result.stderr
    assert not (tmp_path / "out").exists()


def test_label_needs_no_extra(models: Path, folder: Path, tmp_path: Path) -> None:
    probe = (
        "import sys; from click.testing import CliRunner; from service import cli\n"
        "result = CliRunner().invoke(cli.retinaserve, sys.argv[1:])\n"
        "assert result.exit_code == 0, result.output\n"
        "extra = {'torch', 'yaml', 'matplotlib', 'model_export', 'pyarrow'} & set(sys.modules)\n"
        "assert not extra, extra"
    )
    for layout in (*READ, "label-studio"):
        words = ["label", folder, "--output", tmp_path / layout, "--format", layout]
        subprocess.run([sys.executable, "-c", probe, *map(str, words)], check=True)

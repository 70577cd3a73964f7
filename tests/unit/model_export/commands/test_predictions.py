"""COCO results of `evaluate --predictions` and `detect --like`, judged by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from service.cli import retinaserve
from tests import tiny_model
from tests.unit.model_export import rectangles

CATEGORIES = {"green": 3, "blue": 90, "red": 7}
IMAGES = 6
FIGURES = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
"""In the order of pycocotools."""

Content = dict[str, Any]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(retinaserve, [str(each) for each in arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path: Path = tiny_model.save(tmp_path / "models")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Squares of random colours and places as COCO, their boxes drawn a little beside them."""
    root = tmp_path / "squares"
    (root / "annotations").mkdir(parents=True)
    (root / "val" / "deep").mkdir(parents=True)
    generator = np.random.default_rng(5)
    images: list[Content] = []
    annotations: list[Content] = []
    for number in range(IMAGES):
        name = f"deep/{number}.png" if number % 2 else f"{number}.png"
        pixels = np.zeros((96, 128, 3), dtype=np.uint8)
        for x in (0, 44, 88):
            channel = int(generator.integers(3))
            left, top = x + int(generator.integers(-8, 8)), int(generator.integers(0, 48))
            pixels[top : top + 32, max(left, 0) : left + 32, channel] = generator.integers(90, 250)
            box = [max(left, 0) + 1.25, top + 1.5, 28.75, 27.5]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 5 + 3 * number,
                    "category_id": CATEGORIES[tiny_model.CLASSES[channel]],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(len(annotations) == 7),
                }
            )
        Image.fromarray(pixels).save(root / "val" / name)
        images.append({"id": 5 + 3 * number, "file_name": name, "width": 128, "height": 96})
    categories = [{"id": key, "name": name} for name, key in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return root


def truth_of(data: Path) -> Path:
    return data / "annotations" / "instances_val.json"


def judged(truth: Path, results: Path, *categories: int) -> list[float]:
    """pycocotools' own figures, of all categories or some."""
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(str(truth))
        run = COCOeval(known, known.loadRes(str(results)), "bbox")
        run.params.catIds = list(categories) or run.params.catIds
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [float(each) for each in run.stats]


def evaluated(model: Path, data: Path, folder: Path, *more: object) -> tuple[Content, Path, Result]:
    figures, predictions = folder / "figures.json", folder / "predictions.json"
    result = call(
        *("evaluate", model, "--data", data, "--device", "cpu"),
        *("--json", figures, "--predictions", predictions, *more),
    )
    assert result.exit_code == 0, result.output
    return json.loads(figures.read_text()), predictions, result


def write_image_ids_as_text(content: Content) -> None:
    for each in content["images"]:
        each["id"] = f"frame-{each['id']}"
    for each in content["annotations"]:
        each["image_id"] = f"frame-{each['image_id']}"


def write_category_ids_as_text(content: Content) -> None:
    for each in content["categories"]:
        each["id"] = str(each["id"])
    for each in content["annotations"]:
        each["category_id"] = str(each["category_id"])


def write_ids_as_floats(content: Content) -> None:
    for table, names in (
        ("images", ["id"]),
        ("categories", ["id"]),
        ("annotations", ["id", "image_id", "category_id"]),
    ):
        for each in content[table]:
            each.update({name: float(each[name]) for name in names})


def turn_tables(content: Content) -> None:
    content["categories"].insert(0, {"id": 1, "name": "unused"})
    for table in content.values():
        table.reverse()


def write_paths_of_windows(content: Content) -> None:
    for each in content["images"]:
        each["file_name"] = "D:\\set\\" + each["file_name"].replace("/", "\\")


def write_other_case_and_suffix(content: Content) -> None:
    for each in content["images"]:
        each["file_name"] = each["file_name"].replace("0.png", "0.PNG").replace("1.png", "1.jpg")


def write_areas_of_outlines(content: Content) -> None:
    # The boxes themselves are all small.
    for number, each in enumerate(content["annotations"]):
        each["area"] = (500.5, 1500, 10_000)[number % 3]


CHANGES: dict[str, Callable[[Content], None]] = {
    "as it is": lambda content: None,
    "text for images": write_image_ids_as_text,
    "text for categories": write_category_ids_as_text,
    "floats": write_ids_as_floats,
    "another order": turn_tables,
    "paths of Windows": write_paths_of_windows,
    "other case and suffix": write_other_case_and_suffix,
    "areas of outlines": write_areas_of_outlines,
}


@pytest.mark.parametrize("change", CHANGES)
def test_pycocotools_gives_the_figures_of_evaluate(
    change: str, model: Path, data: Path, tmp_path: Path
) -> None:
    content = json.loads(truth_of(data).read_text())
    CHANGES[change](content)
    truth_of(data).write_text(json.dumps(content))
    figures, predictions, _ = evaluated(model, data, tmp_path)
    detected = call(
        *("detect", data / "val", "--model", model, "--device", "cpu"),
        *("--output", "coco", "--like", truth_of(data)),
        *("--score-threshold", "0.01", "--max-detections", "300"),
    )
    assert detected.exit_code == 0, detected.stderr
    (tmp_path / "detected.json").write_text(detected.stdout)
    metrics = figures["metrics"]
    assert 0.1 < metrics["ap"] < 0.9
    assert (metrics["ap_medium"] is None) == (change != "areas of outlines")
    for results in (predictions, tmp_path / "detected.json"):
        judgement = judged(truth_of(data), results)
        ours = [-1.0 if metrics[name] is None else metrics[name] for name in FIGURES]
        assert judgement == pytest.approx(ours, abs=1e-12)
        rows = json.loads(results.read_text())
        assert any(row["score"] != round(row["score"], 4) for row in rows), "unrounded"


def test_renamed_classes_have_their_category_s_id(model: Path, data: Path, tmp_path: Path) -> None:
    content = json.loads(truth_of(data).read_text())
    content["categories"] = [
        {"id": each["id"], "name": f"{each['name']}ish"} for each in content["categories"]
    ]
    truth_of(data).write_text(json.dumps(content))
    names = [part for name in CATEGORIES for part in ("--remap", f"{name}ish={name}")]
    figures, predictions, _ = evaluated(model, data, tmp_path, *names)
    assert judged(truth_of(data), predictions)[0] == pytest.approx(figures["metrics"]["ap"])


def test_some_of_the_classes(model: Path, data: Path, tmp_path: Path) -> None:
    figures, predictions, result = evaluated(model, data, tmp_path, "--classes", "green,red")
    assert "only those of --classes were measured" in result.stdout
    judgement = judged(truth_of(data), predictions, CATEGORIES["green"], CATEGORIES["red"])
    assert judgement[0] == pytest.approx(figures["metrics"]["ap"], abs=1e-12)


def test_images_that_were_not_measured_are_named(model: Path, data: Path, tmp_path: Path) -> None:
    content = json.loads(truth_of(data).read_text())
    # Labelled at another size: left out.
    content["images"][1]["width"] = 100
    content["annotations"][0]["id"] = 0
    truth_of(data).write_text(json.dumps(content))
    _, predictions, result = evaluated(model, data, tmp_path)
    assert "note: 1 images of the annotation file were not measured: 'deep/1.png'" in result.stdout
    assert "have ids that are 0, missing or repeated" in result.stdout
    assert 8 not in {row["image_id"] for row in json.loads(predictions.read_text())}


def test_what_pycocotools_counts_otherwise_is_named(
    model: Path, data: Path, tmp_path: Path
) -> None:
    content = json.loads(truth_of(data).read_text())
    content["categories"].append({"id": 91, "name": "car"})
    content["annotations"][0]["category_id"] = 91
    content["annotations"][2]["id"] = content["annotations"][1]["id"]
    content["annotations"][3]["image_id"] = str(content["annotations"][3]["image_id"])
    content["images"][0]["file_name"] = "0.PNG"
    truth_of(data).write_text(json.dumps(content))
    _, _, result = evaluated(model, data, tmp_path, "--classes", "green,blue,red")
    detected = call(
        *("detect", data / "val", "--model", model, "--device", "cpu"),
        *("--output", "coco", "--like", truth_of(data)),
    )
    for said in (result.stdout, detected.stderr):
        assert "annotations have ids that are 0, missing or repeated" in said
        assert "ids that those do not have, or have as text" in said
        assert "it has objects of 'car', of which there are no detections" in said
        assert "1 images are there with other case or suffix: '0.PNG'" in said


def test_in_other_formats_ids_count_file_names_and_classes(
    rectangles_model: Path, rectangles_data: Path, tmp_path: Path
) -> None:
    _, predictions, _ = evaluated(rectangles_model, rectangles_data, tmp_path)
    rows = json.loads(predictions.read_text())
    # Image 9 has no object, and image i is of colour i % 2.
    assert [(row["image_id"], row["category_id"]) for row in rows] == [
        (number, number % 2) for number in range(9)
    ]
    assert Path(rows[3]["file_name"]).name == "image-3.png"


def test_predictions_never_replace_the_model(rectangles_model: Path, rectangles_data: Path) -> None:
    before = rectangles_model.read_bytes()
    result = call(
        "evaluate", rectangles_model, "--data", rectangles_data, "--predictions", rectangles_model
    )
    assert result.exit_code == 2
    assert "writing it would replace" in result.stderr
    assert rectangles_model.read_bytes() == before


# --- what has no certain id ----------------------------------------------------------------------


def drop_category(content: Content) -> None:
    content["categories"] = [each for each in content["categories"] if each["name"] != "blue"]
    content["annotations"] = [each for each in content["annotations"] if each["category_id"] != 90]


def repeat_category(content: Content) -> None:
    content["categories"].append({"id": 91, "name": "blue"})
    content["annotations"] += [
        {"id": 99, "image_id": 5, "category_id": key, "bbox": [0, 0, 9, 9], "area": 81}
        for key in (90, 91)
    ]


UNCERTAIN: dict[str, tuple[Callable[[Content], None], str]] = {
    "no category": (drop_category, "has no category for the model's 'blue'; its categories are"),
    "two categories": (repeat_category, "the categories 90, 91 are all 'blue'"),
}


@pytest.mark.parametrize("case", UNCERTAIN)
def test_uncertain_ids_are_refused(case: str, model: Path, data: Path, tmp_path: Path) -> None:
    change, words = UNCERTAIN[case]
    content = json.loads(truth_of(data).read_text())
    change(content)
    truth_of(data).write_text(json.dumps(content))
    output = tmp_path / "predictions.json"
    for arguments in (
        ("evaluate", model, "--data", data, "--predictions", output),
        ("detect", data / "val", "--model", model, "--output", "coco", "--like", truth_of(data)),
    ):
        result = call(*arguments, "--device", "cpu")
        assert result.exit_code == 2, result.output
        assert words in result.stderr.splitlines()[-1]
        assert result.stdout == ""
    assert not output.exists()


def test_what_is_dropped_from_the_measured_data_is_named(
    model: Path, data: Path, tmp_path: Path
) -> None:
    content = json.loads(truth_of(data).read_text())
    content["annotations"][0]["bbox"][2] = 0
    truth_of(data).write_text(json.dumps(content))
    _, _, result = evaluated(model, data, tmp_path)
    assert "box without area, dropped" in result.stderr
    assert "instances_val.json" in result.stderr
    assert "without area" not in result.stdout


# --- without objects -----------------------------------------------------------------------------


def test_a_split_without_objects(rectangles_model: Path, tmp_path: Path) -> None:
    data = rectangles.draw_data(tmp_path / "empty", val_objects=False)
    figures, _, result = evaluated(
        rectangles_model,
        data,
        tmp_path,
        *("--plots", tmp_path / "plots", "--report", tmp_path / "r.html"),
    )
    assert "10 images, 0 objects" in result.stdout
    assert figures["metrics"]["ap"] is None
    refused = call("evaluate", rectangles_model, "--data", data, "--against", rectangles_model)
    assert refused.exit_code == 2
    assert refused.stderr.endswith("name a split with objects\n")
    assert refused.stdout == "", "before anything is measured"

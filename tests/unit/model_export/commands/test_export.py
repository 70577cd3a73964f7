"""What `retinaserve export` says and refuses about calibration and precision."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from model_export.commands.export import calibration_lines, check_repository_path, range_images
from model_export.commands.labelled_data import load
from model_export.config import DataConfig
from model_export.evaluation.calibration import Calibration, ScoreMap
from service.cli import retinaserve
from tests.unit.model_export import rectangles


def test_int8_needs_labelled_images(tmp_path: Path) -> None:
    checkpoint = tmp_path / "some.ckpt"
    checkpoint.touch()
    result = CliRunner().invoke(
        retinaserve,
        ["export", str(checkpoint), "--output", str(tmp_path / "m.onnx"), "--precision", "int8"],
    )
    assert result.exit_code == 2
    assert "--precision int8 needs --data DIR" in result.stderr
    assert not (tmp_path / "m.onnx").exists()


PLACES = {
    "models/my model/v1/model.onnx": "'my model' is not a model's name.*'v1' is not a version",
    "models/my model/1/model.onnx": "'my model' is not a model's name",
    "models/cells/v1/model.onnx": "'v1' is not a version.*<name>/<version>/model.onnx",
    "models/cells/1.0.0/model.onnx": "'1.0.0' is not a version",
    "models/cells/01/model.onnx": "without a leading zero",
    "models/cells/version-2/model.onnx": "'version-2' is not a version",
    "models/cells/\u0661/model.onnx": "18 ASCII digits",
    f"models/cells/{10**18}/model.onnx": "at most 18",
}


@pytest.mark.parametrize(("place", "why"), PLACES.items(), ids=PLACES)
def test_export_refuses_a_place_that_the_service_would_skip(
    tmp_path: Path, place: str, why: str
) -> None:
    checkpoint = tmp_path / "some.ckpt"
    checkpoint.touch()
    output = tmp_path / place
    result = CliRunner().invoke(retinaserve, ["export", str(checkpoint), "--output", str(output)])
    assert result.exit_code == 2
    assert re.search(why, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    "place",
    [
        "model.onnx",
        "out/model.onnx",
        "v1/model.onnx",
        "./model.onnx",
        "runs/cells/model.onnx",
        "my runs/cells/model.onnx",
        "my cells/v1/cells.onnx",
        "my cells.onnx",
        "models/cells/1/model.onnx",
        "../models/cells/12/model.onnx",
        "/1/model.onnx",
    ],
)
def test_export_writes_anywhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = tmp_path / "my work" / "v1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    check_repository_path(Path(place))


def test_the_calibration_says_what_it_was_judged_on() -> None:
    calibration = Calibration(
        score_map=ScoreMap(np.array([2.5, 1.0]), np.array([-0.25, 0.5])),
        strength=10.0,
        before=0.1,
        after=0.025,
        detections=1234,
        images=87,
    )
    assert list(calibration_lines(calibration, ("red", "green"))) == [
        (
            "calibrated on 1234 detections of 87 images; calibration error 0.1000, afterwards "
            "0.0250 by 5-fold cross-validation"
        ),
        "  red: logit * 2.500 -0.250",
        "  green: logit * 1.000 +0.500",
    ]


def test_ranges_come_from_the_train_split(tmp_path: Path) -> None:
    root = rectangles.draw_data(tmp_path / "data")
    val = load(root, "val", classes=rectangles.CLASSES)
    train = load(root, "train", classes=rectangles.CLASSES)
    own = [sample.path.read_bytes() for sample in val.samples]
    assert range_images(val, DataConfig()) == [s.path.read_bytes() for s in train.samples]
    (root / "ImageSets" / "Main" / "train.txt").unlink()
    assert range_images(val, DataConfig()) == own

"""What `retinaserve export` says and refuses about calibration and precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from click.testing import CliRunner

from model_export.calibration import Calibration, ScoreMap
from model_export.commands.data import load
from model_export.commands.export import calibration_lines, range_pictures
from model_export.config import DataConfig
from service.cli import retinaserve
from tests.unit.model_export import rectangles


def test_int8_needs_labelled_pictures(tmp_path: Path) -> None:
    checkpoint = tmp_path / "some.ckpt"
    checkpoint.touch()
    result = CliRunner().invoke(
        retinaserve,
        ["export", str(checkpoint), "--output", str(tmp_path / "m.onnx"), "--precision", "int8"],
    )
    assert result.exit_code == 2
    assert "--precision int8 needs --data DIR" in result.stderr
    assert not (tmp_path / "m.onnx").exists()


def test_the_calibration_says_what_it_was_judged_on() -> None:
    calibration = Calibration(
        score_map=ScoreMap(np.array([2.5, 1.0]), np.array([-0.25, 0.5])),
        strength=10.0,
        before=0.1,
        after=0.025,
        detections=1234,
        pictures=87,
    )
    assert list(calibration_lines(calibration, ("red", "green"))) == [
        (
            "calibrated on 1234 detections of 87 pictures; calibration error 0.1000, afterwards "
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
    assert range_pictures(val, DataConfig()) == [s.path.read_bytes() for s in train.samples]
    (root / "ImageSets" / "Main" / "train.txt").unlink()
    assert range_pictures(val, DataConfig()) == own

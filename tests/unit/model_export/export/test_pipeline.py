"""Releases that calibrate their scores or come in a smaller precision, without a torch export."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_export.checkpoints import Checkpoint
from model_export.data.datasets import Dataset, Sample, load
from model_export.evaluation.calibration import logits
from model_export.evaluation.inference import detect, evaluate_file
from model_export.export import pipeline as pipeline
from model_export.export.comparison import Row
from model_export.export.pipeline import PrecisionOptions, export_model
from model_export.export.precision import Precision
from model_export.export.verify import VerificationError
from service.imaging.canvas import Size
from service.imaging.samples import draw_smear
from service.runtime import devices
from service.runtime.artifact import Metadata, read_artifact
from service.runtime.detector import Detections, Detector
from tests.unit.model_export import rectangles
from tests.unit.model_export.random_model import CLASSES, RandomModel


@pytest.fixture(autouse=True)
def without_torch_s_exporter(exported: RandomModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export copies the file that there is already: another one would be the same."""

    def export(checkpoint: Checkpoint, output: Path, **_: Any) -> Metadata:
        shutil.copyfile(exported.path, output)
        return exported.metadata

    monkeypatch.setattr(pipeline, "export", export)


@pytest.fixture
def verified_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """The float32 file agrees with its network; another test shows that."""
    monkeypatch.setattr(pipeline, "verify", lambda *_: None)


def opened(path: Path) -> Detector:
    return devices.open_detector(read_artifact(path), devices.Device("cpu"))


@pytest.fixture(scope="module")
def data(exported: RandomModel, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Images whose objects are what the random network finds, the surer the likelier."""
    folder = tmp_path_factory.mktemp("smears")
    generator = np.random.default_rng(0)
    samples = []
    for seed in range(6):
        path = folder / f"{seed}.png"
        draw_smear(seed, width=160, height=120)[0].save(path)
        empty = Sample(path, Size(120, 160), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
        (found,) = detect(opened(exported.path), [empty], batch_size=1)
        # A score means less than it says: odds of a third of the square.
        odds = np.exp(2 * logits(found.scores) - 1)
        there = generator.random(len(found)) < odds / (1 + odds)
        samples.append(Sample(path, empty.size, found.boxes[there], found.labels[there]))
    return Dataset(folder, "val", CLASSES, tuple(samples), ())


def go(exported: RandomModel, output: Path, data: Dataset, **options: Any) -> pipeline.ExportResult:
    given: dict[str, Any] = {
        "name": "random", "canvas": None, "score": None, "held_out": None,
        "images": [each.path.read_bytes() for each in data.samples[:1]], **options,
    }  # fmt: skip
    return export_model(exported.checkpoint, output, **given)


def found_in(model: Path, data: Dataset) -> list[Detections]:
    return detect(opened(model), data.samples, batch_size=1)


def test_a_calibrated_release(exported: RandomModel, data: Dataset, tmp_path: Path) -> None:
    output = tmp_path / "model.onnx"
    done = go(exported, output, data, calibrate_on=data)
    calibration = done.calibration
    assert calibration is not None
    assert done.report.against.agrees
    assert done.report.against.detections > 100
    # What made the objects is found again, by the file's own scores.
    assert np.median(calibration.score_map.scales) == pytest.approx(2.0, abs=0.5)
    assert calibration.after < calibration.before / 2
    metadata = read_artifact(output).metadata
    assert metadata.calibrated
    told = metadata.provenance["calibration"]
    assert (told["pictures"], told["split"]) == (6, "val")
    assert told["scale"]["blue"] == pytest.approx(calibration.score_map.scales[2], abs=1e-4)
    # Thresholds mean calibrated scores.
    plain = metadata.thresholds.per_class
    assert plain.keys() == set(CLASSES)
    assert plain != exported.metadata.thresholds.per_class
    assert done.chosen is not None
    assert (metadata.thresholds.score, plain) == (
        done.chosen.thresholds.score, done.chosen.thresholds.per_class
    )  # fmt: skip
    of = {"data": data.root.name, "split": "val"}
    assert metadata.provenance["thresholds"] == {**of, **done.chosen.to_dict()}
    assert metadata.thresholds.iou == exported.metadata.thresholds.iou
    for before, after in zip(found_in(exported.path, data), found_in(output, data), strict=True):
        wanted = calibration.score_map.detections(before)
        kept = wanted.pick(wanted.scores > 0.2)
        # Farther down the 300 best of each file need not be the same ones.
        assert after.scores[: len(kept)] == pytest.approx(kept.scores, abs=1e-4)


@pytest.mark.usefixtures("verified_already")
def test_a_file_measured_without_objects_names_no_metrics(tmp_path: Path) -> None:
    model = rectangles.write_model(tmp_path / "model.onnx")
    root = rectangles.draw_data(tmp_path / "data", val_objects=False)
    dataset = load(root, "val", classes=rectangles.CLASSES)
    measured = evaluate_file(model, dataset, device="cpu")
    before = read_artifact(model).metadata
    assert pipeline._describe_measured(model, dataset, *measured, choose=True) is None
    metadata = read_artifact(model).metadata
    assert metadata.metrics is None
    assert (metadata.thresholds, metadata.provenance) == (before.thresholds, before.provenance)


def test_a_smaller_release_measured_beside_the_float32_one(
    exported: RandomModel, data: Dataset, tmp_path: Path
) -> None:
    data = dataclasses.replace(data, samples=data.samples[:2])
    images = [each.path.read_bytes() for each in data.samples]
    reduction = PrecisionOptions(Precision.INT8, images, accepted_loss=100.0)
    done = go(exported, tmp_path / "model.onnx", data, held_out=data, reduction=reduction)
    assert [row.precision for row in done.rows] == ["fp32", "int8"]
    assert done.evaluation is not None
    assert done.rows[1].ap == done.evaluation.ap
    assert done.rows[0].ap != done.rows[1].ap
    metadata = read_artifact(tmp_path / "model.onnx").metadata
    assert metadata.provenance["precision"] == "int8"
    assert metadata.metrics is not None
    assert metadata.metrics.ap == round(done.evaluation.ap or 0, 4)
    # Chosen by the smaller file's own scores.
    assert done.chosen is not None
    assert metadata.thresholds.per_class == done.chosen.thresholds.per_class != {}
    assert metadata.provenance["thresholds"]["images"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.sha256"]


@pytest.mark.usefixtures("verified_already")
def test_a_release_that_costs_too_much_leaves_the_old_file(
    exported: RandomModel, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.onnx").write_text("the old one")
    rows = [Row(Precision.FP32, 1, 1, 1, 0.60, 0.9), Row(Precision.INT8, 1, 1, 1, 0.58, 0.9)]
    monkeypatch.setattr(pipeline, "side_by_side", lambda *_: (rows, {}))
    images = [each.path.read_bytes() for each in data.samples[:1]]
    with pytest.raises(VerificationError, match=r"2.00 points of AP"):
        go(
            exported, tmp_path / "model.onnx", data,
            reduction=PrecisionOptions(Precision.INT8, images),
        )  # fmt: skip
    assert (tmp_path / "model.onnx").read_text() == "the old one"
    assert len(list(tmp_path.iterdir())) == 1

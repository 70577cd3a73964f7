"""Verification: files that differ from their network are found, and never come to their place."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from model_export.checkpoints import Checkpoint
from model_export.export import pipeline as pipeline
from model_export.export.pipeline import export_model
from model_export.export.verify import (
    NO_DIFFERENCE,
    Difference,
    VerificationError,
    compare,
    verify,
)
from service.imaging.canvas import ShortSide, Size
from service.imaging.samples import draw_smear
from service.runtime import devices
from service.runtime.artifact import Metadata, read_artifact, write_checksum
from service.runtime.detector import Detections, Detector
from tests.unit.model_export.random_model import CANVAS, RandomModel

Row = tuple[tuple[float, float, float, float], float, int]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def found(*rows: Row) -> Detections:
    return Detections(
        np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
        np.array([row[1] for row in rows], np.float32),
        np.array([row[2] for row in rows], np.int64),
    )


BOX = (10.0, 10.0, 50.0, 50.0)
NEAR_BOX = (10.0, 10.3, 50.0, 50.0)
OTHER_BOX = (60.0, 60.0, 90.0, 90.0)


# --- compare -------------------------------------------------------------------------------------


def test_nothing_equals_nothing() -> None:
    assert compare(found(), found()) == NO_DIFFERENCE
    assert NO_DIFFERENCE.agrees


def test_differences_of_pairs() -> None:
    answer = compare(
        found((BOX, 0.9, 0), (OTHER_BOX, 0.5, 1)), found((OTHER_BOX, 0.52, 1), (NEAR_BOX, 0.9, 0))
    )
    assert (answer.detections, answer.unpaired) == (2, 0)
    assert answer.boxes == pytest.approx(0.3, abs=1e-5)
    assert answer.scores == pytest.approx(0.02, abs=1e-6)
    assert not answer.agrees


def test_another_class_is_no_counterpart() -> None:
    answer = compare(found((BOX, 0.9, 0)), found((BOX, 0.9, 1)))
    assert (answer.detections, answer.unpaired) == (0, 2)
    assert not answer.agrees


def test_every_detection_pairs_once() -> None:
    answer = compare(found((BOX, 0.9, 0), (BOX, 0.8, 0)), found((BOX, 0.9, 0)))
    assert (answer.detections, answer.unpaired) == (1, 1)


def test_boxes_far_apart_are_different_detections() -> None:
    answer = compare(found((BOX, 0.9, 0)), found((OTHER_BOX, 0.9, 0)))
    assert (answer.boxes, answer.unpaired) == (0.0, 2)


def test_at_the_threshold_a_detection_may_be_missing() -> None:
    assert compare(found((BOX, 0.0505, 0)), found()).unpaired == 0
    assert compare(found(), found((BOX, 0.0505, 0))).unpaired == 0
    assert compare(found((BOX, 0.0515, 0)), found()).unpaired == 1


def test_a_full_list_may_end_before_a_detection() -> None:
    rows = [((20.0 * i, 0.0, 20.0 * i + 10, 10.0), 0.9 - 0.001 * i, 0) for i in range(300)]
    extra = ((0.0, 50.0, 10.0, 60.0), 0.95, 0)
    answer = compare(found(*rows), found(extra, *rows[:299]))
    # The one that came in is a fault, the one that it pushed out is not.
    assert (answer.detections, answer.unpaired) == (299, 1)
    answer = compare(found(*rows[:299]), found(extra, *rows[:298]))
    assert (answer.detections, answer.unpaired) == (298, 2)


def test_suppression_by_a_hair_is_a_tie_with_what_follows_from_it() -> None:
    kept = ((0.0, 0.0, 100.0, 100.0), 0.9, 0)
    # It shares 5000 of 10000 square pixels with `kept`.
    tie = ((0.0, 0.0, 100.0, 50.0), 0.8, 0)
    # 4600 of 10000 with `kept`, which leaves it be, but 4000 of 5600 with `tie`.
    follower = ((0.0, 10.0, 100.0, 56.0), 0.7, 0)
    assert compare(found(kept, tie), found(kept)).unpaired == 0
    assert compare(found(kept, tie), found(kept, follower)).unpaired == 0
    assert compare(found(kept, follower), found(kept, tie)).unpaired == 0
    assert compare(found(kept), found(kept, follower)).unpaired == 1
    other_class = (tie[0], tie[1], 1)
    assert compare(found(kept, other_class), found(kept)).unpaired == 1


def test_differences_add_up() -> None:
    a = Difference(boxes=0.1, scores=2e-4, detections=600, unpaired=0)
    b = Difference(boxes=0.4, scores=1e-4, detections=400, unpaired=1)
    assert a | b == Difference(boxes=0.4, scores=2e-4, detections=1000, unpaired=1)
    assert (a | b).agrees
    assert not (a | b | Difference(boxes=0, scores=0, detections=0, unpaired=1)).agrees
    assert not (a | Difference(boxes=0.51, scores=0, detections=1, unpaired=0)).agrees
    assert not (a | Difference(boxes=0, scores=1.1e-3, detections=1, unpaired=0)).agrees


# --- verify --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    answer = []
    for seed in range(5):
        file = io.BytesIO()
        width, height = ((160, 120), (120, 160))[seed % 2]
        draw_smear(seed, width=width, height=height)[0].save(file, "PNG")
        answer.append(file.getvalue())
    return answer


@pytest.fixture(scope="module")
def detector(exported: RandomModel) -> Detector:
    return devices.open_detector(read_artifact(exported.path), devices.Device("cpu"))


def test_a_file_agrees_with_its_network(
    exported: RandomModel, detector: Detector, images: list[bytes]
) -> None:
    report = verify(exported.checkpoint.build(), detector, images, CANVAS)
    assert report.canvases == (Size(96, 128), Size(128, 96))
    assert report.images == 5
    # Every image on every canvas; in company, batches of 1, 2 and 5 make 5 + 4 + 5 of each.
    assert report.against.detections > 200
    assert report.in_company.detections > 2 * report.against.detections
    assert "verified on 5 images, canvases 96x128, 128x96, batches of 1, 2, 5" in str(report)


def test_a_rule_without_fixed_canvases(
    exported: RandomModel, detector: Detector, images: list[bytes]
) -> None:
    report = verify(exported.checkpoint.build(), detector, images[:2], ShortSide(short=64, long=96))
    assert set(report.canvases) == {Size(64, 96), Size(96, 64)}


@pytest.mark.parametrize(
    "weight", ["backbone.layer3.0.conv1.weight", "regression_head.out.bias", "fpn.p6.weight"]
)
def test_another_network_is_found_out(
    weight: str, exported: RandomModel, detector: Detector, images: list[bytes]
) -> None:
    network = exported.checkpoint.build()
    with torch.no_grad():
        network.get_parameter(weight).add_(0.05)
    with pytest.raises(VerificationError, match="does not do what the network does"):
        verify(network, detector, images, CANVAS)


# --- release -------------------------------------------------------------------------------------


def write_instead(
    monkeypatch: pytest.MonkeyPatch, exported: RandomModel, *, disturbance: float
) -> None:
    """The export writes the file that there is already, one weight of it disturbed."""
    model = onnx.load(exported.path)
    heaviest = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    values = onnx.numpy_helper.to_array(heaviest) + np.float32(disturbance)
    heaviest.CopyFrom(onnx.numpy_helper.from_array(values, heaviest.name))

    def export(checkpoint: Checkpoint, output: Path, **_: Any) -> Metadata:
        onnx.save(model, output)
        write_checksum(output)
        return exported.metadata

    monkeypatch.setattr(pipeline, "export", export)


def test_a_file_that_fails_leaves_the_old_one_alone(
    exported: RandomModel, images: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_instead(monkeypatch, exported, disturbance=0.05)
    for name in ("model.onnx", "model.sha256"):
        (tmp_path / name).write_text(f"the old {name}")
    with pytest.raises(VerificationError):
        export_model(
            exported.checkpoint, tmp_path / "model.onnx", name="random", canvas=None, score=None,
            held_out=None, images=images,
        )  # fmt: skip
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "model.onnx": "the old model.onnx",
        "model.sha256": "the old model.sha256",
    }


def test_a_file_that_fails_leaves_nothing(
    exported: RandomModel, images: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_instead(monkeypatch, exported, disturbance=0.05)
    with pytest.raises(VerificationError):
        export_model(
            exported.checkpoint, tmp_path / "new" / "model.onnx", name="random", canvas=None,
            score=None, held_out=None, images=images,
        )  # fmt: skip
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_that_agrees_comes_to_its_place(
    exported: RandomModel, images: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_instead(monkeypatch, exported, disturbance=0.0)
    output = tmp_path / "random" / "1" / "model.onnx"
    done = export_model(
        exported.checkpoint, output, name="random", canvas=None, score=None, held_out=None,
        images=images,
    )  # fmt: skip
    assert done.evaluation is None
    assert done.report.against.agrees
    assert sorted(path.name for path in output.parent.iterdir()) == ["model.onnx", "model.sha256"]
    assert read_artifact(output).metadata == exported.metadata

"""Numbers that torchvision itself gave: the same weights, images, boxes and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_export.checkpoints import Checkpoint, Description
from model_export.export.graph import export
from model_export.retinanet.anchors import AnchorConfig, level_base_anchors
from model_export.retinanet.model import ModelConfig, RetinaNet
from model_export.torchvision_import import ANCHORS, ARCHITECTURES, COCO_CLASSES, convert, rename
from service.imaging.canvas import ShortSide, Size
from service.runtime import devices
from service.runtime.artifact import read_artifact
from service.runtime.detector import Detections, Detector
from tests.unit.model_export.golden import parity
from tests.unit.model_export.golden.parity import Difference, Run

RULE = ShortSide(short=800, long=1333)
BOX_TOLERANCE = 0.05
"""Canvas pixels."""

SMALL = ModelConfig(
    backbone="resnet18",
    fpn_channels=64,
    head_width=64,
    norm_eps=0.0,
    p6_from="p5",
    head_norm="group",
    anchors=ANCHORS,
)
"""Every peculiarity of either version at once."""


def small_network(config: ModelConfig = SMALL) -> RetinaNet:
    network = RetinaNet(config, classes=7)
    missing, unexpected = network.load_state_dict(
        rename(parity.load("small").state_dict()), strict=False
    )
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return network.eval()


def differences(found: list[Detections], run: Run) -> list[Difference]:
    return [
        parity.compare(mine, theirs, max_detections=run.max_detections)
        for mine, theirs in zip(found, run.found, strict=True)
    ]


def agree(found: list[Detections], run: Run) -> bool:
    return all(
        each.boxes <= BOX_TOLERANCE
        and each.scores <= parity.SCORE_TOLERANCE
        and each.unexplained == 0
        and each.pairs >= 0.99 * run.max_detections
        for each in differences(found, run)
    )


# --- what the golden files are -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keys", "parameters"),
    [
        ("v1", 301, 34_014_999),
        ("v1_unpublished", 354, 32_242_559),
        ("v2", 362, 38_198_935),
    ],
)
def test_sizes_of_torchvision_s_models(name: str, keys: int, parameters: int) -> None:
    about = parity.load(name).about
    assert len(about["state_dict"]) == keys
    assert about["parameters"] == parameters
    frozen = not any(key.endswith("num_batches_tracked") for key in about["state_dict"])
    learned = {
        key: shape
        for key, shape in about["state_dict"].items()
        if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))
        # Frozen norms learn nothing, not even their weights.
        and not (frozen and key.startswith("backbone.body.") and len(shape) == 1)
    }
    assert sum(int(np.prod(shape)) for shape in learned.values()) == parameters


def test_golden_detections_put_the_network_to_the_test() -> None:
    for name in ("small", "v1", "v1_unpublished", "v2"):
        for run in parity.load(name).runs:
            for found in run.found:
                assert len(found) == run.max_detections
                assert len(set(found.labels.tolist())) >= 3
                assert found.scores.min() > parity.SCORE
                assert found.scores.max() - found.scores.min() > 0.01
    canvases = [run.canvases.shape[:3] for run in parity.load("small").runs]
    assert canvases == [(2, 160, 224), (1, 800, 1088), (2, 800, 1344)]


def test_base_anchors() -> None:
    expected = parity.load("v1").about["base_anchors"]
    found = [base.tolist() for base in level_base_anchors(ANCHORS)]
    assert found == expected
    assert parity.load("v2").about["base_anchors"] == expected


def test_names_of_coco_s_classes() -> None:
    theirs = parity.load("v1").about["categories"]
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 91
    assert [name if name != "N/A" else f"class_{i}" for i, name in enumerate(theirs)] == list(
        COCO_CLASSES
    )


# --- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_everything_at_once(number: int) -> None:
    run = parity.load("small").runs[number]
    found = parity.run_network(small_network(), run)
    assert agree(found, run), differences(found, run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1", "v1_unpublished", "v2"])
def test_a_random_state_dict_detects_what_it_does_in_torchvision(name: str) -> None:
    golden = parity.load(name)
    imported = convert(
        golden.state_dict(),
        path=Path("random.pth"),
        architecture=None,
        labels=None,
        eps=None,
        canvas=RULE,
        provenance={},
    )
    assert imported.architecture == (
        "retinanet_resnet50_fpn_v2" if name == "v2" else "retinanet_resnet50_fpn"
    )
    checkpoint = imported.checkpoint
    assert len(checkpoint.description.classes) == golden.about["classes"]
    found = parity.run_network(checkpoint.build(), golden.runs[0])
    assert agree(found, golden.runs[0]), differences(found, golden.runs[0])


def anchors(**change: Any) -> ModelConfig:
    return SMALL.model_copy(update={"anchors": ANCHORS.model_copy(update=change)})


@pytest.mark.parametrize(
    "config",
    [
        SMALL.model_copy(update={"norm_eps": 1e-5}),
        anchors(stride="level"),
        anchors(round_corners=False),
        anchors(offset=0.5),
        anchors(sizes=AnchorConfig().sizes),
    ],
    ids=["eps", "strides", "corners", "offset", "sizes"],
)
def test_without_one_peculiarity_the_numbers_differ(config: ModelConfig) -> None:
    """What the test above would not notice, it would not prove."""
    run = parity.load("small").runs[0]
    assert not agree(parity.run_network(small_network(config), run), run)


def test_p6_from_c5_needs_other_weights() -> None:
    for name, source in (("retinanet_resnet50_fpn", "p5"), ("retinanet_resnet50_fpn_v2", "c5")):
        assert ARCHITECTURES[name].p6_from == source
    with pytest.raises(RuntimeError, match=r"fpn\.p6\.weight"):
        small_network(SMALL.model_copy(update={"p6_from": "c5"}))


# --- the file ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(untraced_exporter: None, tmp_path_factory: pytest.TempPathFactory) -> Detector:
    path = tmp_path_factory.mktemp("small") / "model.onnx"
    checkpoint = Checkpoint(
        path=Path("small.safetensors"),
        description=Description(
            classes=tuple(f"class_{index}" for index in range(7)), model=SMALL, canvas=RULE
        ),
        weights=small_network().state_dict(),
    )
    metadata = export(checkpoint, path, name="small")
    # An image of 600 x 800 comes onto the canvas of the golden one.
    placed = metadata.canvas.fit(Size(600, 800))
    assert (placed.resized, placed.canvas) == (Size(800, 1066), Size(800, 1088))
    return devices.open_detector(read_artifact(path), devices.Device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_exported_file(detector: Detector, number: int) -> None:
    run = parity.load("small").runs[number]
    found = detector(
        run.canvases,
        run.sizes,
        score_threshold=parity.SCORE,
        iou_threshold=parity.IOU,
        max_detections=run.max_detections,
    )
    assert agree(found, run), differences(found, run)


# --- the comparison itself -----------------------------------------------------------------------


def detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    return Detections(
        np.array([row[:4] for row in rows], dtype=np.float32).reshape(-1, 4),
        np.array([row[4] for row in rows], dtype=np.float32),
        np.array([row[5] for row in rows], dtype=np.int64),
    )


A = (0.0, 0.0, 10.0, 10.0, 0.9, 1)
B = (20.0, 0.0, 30.0, 10.0, 0.5, 1)


def test_what_is_the_same_is_paired() -> None:
    moved = (20.0, 0.0, 30.25, 10.0, 0.50005, 1)
    found = parity.compare(detections(A, moved), detections(A, B), max_detections=300)
    assert (found.boxes, found.pairs, found.ties, found.unexplained) == (0.25, 2, 0, 0)
    assert found.scores == pytest.approx(5e-5, rel=0.01)


@pytest.mark.parametrize(
    "other",
    [
        (20.0, 0.0, 30.0, 10.0, 0.5, 2),
        (20.0, 0.0, 30.0, 10.0, 0.49, 1),
        (24.0, 0.0, 34.0, 10.0, 0.5, 1),
    ],
)
def test_another_class_score_or_place_is_another_detection(
    other: tuple[float, float, float, float, float, int],
) -> None:
    found = parity.compare(detections(A, other), detections(A, B), max_detections=300)
    assert (found.pairs, found.unexplained) == (1, 2)


@pytest.mark.parametrize(
    ("lost", "why"),
    [
        ((50.0, 0.0, 60.0, 10.0, 0.05005, 1), "at the threshold"),
        # 10 x 5 of 10 x 10 each way shared with B: IoU is 50 / 100.
        ((20.0, 0.0, 30.0, 5.0, 0.4, 1), "overlaps by the threshold"),
        ((20.0, 0.0, 30.0, 9.0, 0.50003, 1), "overlaps one of equal score"),
    ],
)
def test_ties_are_told_from_faults(
    lost: tuple[float, float, float, float, float, int], why: str
) -> None:
    found = parity.compare(detections(A, B), detections(A, B, lost), max_detections=300)
    assert (found.pairs, found.ties, found.unexplained) == (2, 1, 0), why


def test_the_last_of_a_full_list_may_be_another() -> None:
    other = (50.0, 0.0, 60.0, 10.0, 0.50005, 3)
    found = parity.compare(detections(A, other), detections(A, B), max_detections=2)
    assert (found.pairs, found.ties, found.unexplained) == (1, 2, 0)
    found = parity.compare(detections(A, other), detections(A, B), max_detections=3)
    assert found.unexplained == 2

"""Regions of many objects teach nothing: neither that they are objects nor that they are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model_export.data.augmentation import Augmentation, Example, augment
from model_export.data.batches import CanvasCache, collate, transpose
from model_export.data.samples import CROWD, Sample
from model_export.retinanet.matching import (
    BACKGROUND,
    IGNORED,
    AtssMatcher,
    IouMatcher,
    Matcher,
    share_inside,
)
from model_export.training.detection_loss import assign
from service.imaging.canvas import Buckets, Size

ANCHORS = torch.tensor(
    [
        [0.0, 0, 10, 10],  # the object
        [40, 0, 60, 20],  # half in the crowd, which begins at x = 50
        [39, 0, 59, 20],  # less than half in it
        [60, 0, 70, 10],  # inside, and an object of its own
        [20, 20, 30, 30],  # nowhere
    ]
)
CROWD_BOX = [50.0, 0, 100, 100]


def matched(
    boxes: list[list[float]], labels: list[int], matcher: Matcher | None = None
) -> list[int]:
    (found,) = assign(
        [ANCHORS[:, None]],
        [torch.tensor(boxes).reshape(-1, 4)],
        [torch.tensor(labels, dtype=torch.int64)],
        matcher or IouMatcher(),
    )
    return found.tolist()


def test_anchors_in_a_crowd_are_ignored_and_objects_in_it_are_learned() -> None:
    objects = [[60.0, 0, 70, 10], CROWD_BOX, [0.0, 0, 10, 10]]
    assert matched(objects, [1, CROWD, 0]) == [2, IGNORED, BACKGROUND, 0, BACKGROUND]
    # Without the crowd they would be background.
    without = matched([objects[0], objects[2]], [1, 0])
    assert without == [1, BACKGROUND, BACKGROUND, 0, BACKGROUND]


def test_adaptive_matching_ignores_crowds_alike() -> None:
    objects = [[60.0, 0, 70, 10], CROWD_BOX, [0.0, 0, 10, 10]]
    found = matched(objects, [1, CROWD, 0], AtssMatcher())
    assert found == [2, IGNORED, BACKGROUND, 0, BACKGROUND]


def test_a_crowd_claims_no_anchor_however_well_it_fits() -> None:
    assert matched([[0.0, 0, 10, 10]], [CROWD]) == [IGNORED] + [BACKGROUND] * 4
    assert matched([], []) == [BACKGROUND] * 5


def test_shares_of_hand() -> None:
    shares = share_inside(ANCHORS[:3], torch.tensor([CROWD_BOX]))
    assert shares[:, 0].tolist() == pytest.approx([0, 0.5, 9 / 20])


def test_crowds_go_with_the_images(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 32)).save(path)
    crowd = np.array([[32, 0, 64, 32]], dtype=np.float32)
    sample = Sample(
        path,
        Size(32, 64),
        np.array([[0, 0, 8, 8]], dtype=np.float32),
        np.array([2], dtype=np.int64),
        crowd,
        np.array([0], dtype=np.int64),
    )
    example = CanvasCache([sample], Buckets(sizes=(Size(64, 128),)), progress=False)[0]
    assert example.boxes.tolist() == [[0, 0, 16, 16], [64, 0, 128, 64]]
    assert example.labels.tolist() == [2, CROWD]
    assert example.labels.dtype == np.int64
    turned = transpose(collate([example]))
    assert turned.boxes[0].tolist() == [[0, 0, 16, 16], [0, 64, 64, 128]]
    assert turned.labels[0].tolist() == [2, CROWD]


def test_what_is_cut_of_a_crowd_stays_ignored() -> None:
    # Zoomed by 4, an eighth of the crowd at most is left: an object would be dropped.
    canvas = np.zeros((64, 64, 3), dtype=np.uint8)
    box = np.array([[0, 0, 64, 64]], dtype=np.float32)
    still = Augmentation(scale=(4, 4), aspect=0, translate=0, min_visible=0.5, mosaic=0)
    left = {}
    for label in (0, CROWD):
        example = Example(canvas, Size(64, 64), box, np.array([label], dtype=np.int64))
        rng = np.random.default_rng(0)
        left[label] = augment(example, still, rng, others=lambda: example)  # noqa: B023 - at once
    assert left[0].boxes.shape == (0, 4)
    assert left[CROWD].boxes.tolist() == [[0, 0, 64, 64]]
    assert left[CROWD].labels.tolist() == [CROWD]

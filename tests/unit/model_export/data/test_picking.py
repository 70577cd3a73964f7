"""Doubts, disagreement, and the choice of images by both and their distance."""

from __future__ import annotations

import numpy as np
import pytest

from model_export.data.picking import NEAR, describe, distances, doubts, pick, unmatched
from tests.images import RED, encoded, noise, rotated, squares


def features(*levels: float) -> np.ndarray:
    return np.array([[level] * 768 for level in levels], dtype=np.float32)


NONE = np.zeros((0, 768), dtype=np.float32)


@pytest.mark.parametrize(
    ("score", "threshold", "doubt"),
    [
        (0.5, 0.5, 1.0),
        (0.25, 0.5, 0.0),
        (0.75, 0.5, 0.0),
        (0.3, 0.2, 0.75),
        (0.15, 0.2, 0.5),
        (0.05, 0.2, 0.0),
        (0.9, 0.8, 0.0),
        (0.85, 0.8, 0.5),
        (0.5, 0.0, 0.0),
        (1.0, 1.0, 1.0),
    ],
)
def test_doubt_is_highest_at_the_threshold(score: float, threshold: float, doubt: float) -> None:
    (found,) = doubts(np.float32([score]), np.float32([threshold]))
    assert found == pytest.approx(doubt, abs=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs", "alone"),
    [
        ([(0, 0, 10, 10, "a")], [(1, 0, 10, 10, "a")], (0, 0)),
        ([(0, 0, 10, 10, "a")], [(0, 0, 10, 10, "b")], (1, 1)),
        ([(0, 0, 10, 10, "a")], [(6, 0, 16, 10, "a")], (1, 1)),
        ([(0, 0, 10, 10, "a")], [], (1, 0)),
        ([], [(0, 0, 10, 10, "a")], (0, 1)),
        ([(0, 0, 10, 10, "a"), (0, 0, 9, 10, "a")], [(0, 0, 10, 10, "a")], (1, 0)),
    ],
)
def test_objects_of_one_model_alone(
    ours: list[tuple[int, int, int, int, str]],
    theirs: list[tuple[int, int, int, int, str]],
    alone: tuple[int, int],
) -> None:
    def split(rows: list[tuple[int, int, int, int, str]]) -> tuple[np.ndarray, list[str]]:
        boxes = np.array([row[:4] for row in rows], dtype=np.float32).reshape(-1, 4)
        return boxes, [row[4] for row in rows]

    assert unmatched(split(ours), split(theirs)) == alone


@pytest.mark.parametrize(
    ("scores", "levels", "labelled", "count", "expected"),
    [
        # By score first, then away from what is chosen: 1 and 2 are one scene.
        ([1.0, 3.0, 2.9, 1.0], [0, 100, 105, 200], [], 3, [1, 0, 3]),
        # Without doubts the farthest first.
        ([0.0, 0.0, 0.0], [0, 10, 90], [0], 2, [2, 1]),
        # Near-duplicates of labelled and of chosen images are left out.
        ([9.0, 1.0, 1.0, 1.0], [50, 80, 81, 120], [51], 4, [3, 2]),
        ([1.0, 1.0], [5, 5], [], 2, [0]),
        ([1.0, 2.0], [5, 50], [], 9, [1, 0]),
    ],
)
def test_images_are_picked_by_score_and_distance(
    scores: list[float], levels: list[float], labelled: list[float], count: int, expected: list[int]
) -> None:
    known = features(*labelled) if labelled else NONE
    found = pick(np.array(scores), features(*levels), known, count)
    assert [each.index for each in found] == expected


def test_descriptor_tells_scenes_apart_and_not_frames() -> None:
    def of(data: bytes) -> np.ndarray:
        return describe(data, max_pixels=10**6)[None]

    scene = squares((30, 20, RED), size=(640, 480))
    scene.paste(noise((320, 480)).resize((320, 480)), (320, 0))
    frame = scene.copy()
    frame.paste((250, 250, 250), (100, 300, 108, 308))
    first = of(encoded(scene))
    assert distances(first, of(encoded(frame)))[0] < NEAR
    assert distances(first, of(encoded(scene, "JPEG", quality=60)))[0] < NEAR
    assert distances(first, of(rotated(scene, 6)))[0] < NEAR
    for other in (scene.rotate(180), squares(size=(640, 480)), scene.crop((0, 0, 320, 480))):
        assert distances(first, of(encoded(other)))[0] > 2 * NEAR
    assert distances(first, NONE)[0] == np.inf

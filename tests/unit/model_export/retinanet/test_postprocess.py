"""From predictions to detections: the best pairs per level, clipping, and suppression."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_export.retinanet.box_coding import decode
from model_export.retinanet.model import Level
from model_export.retinanet.postprocess import (
    MANY_CLASSES,
    TOP_K,
    best_pairs,
    candidates,
    suppress,
)


def random_level(generator: torch.Generator, *, images: int, anchors: int, classes: int) -> Level:
    corners = torch.rand(anchors, 2, generator=generator) * 200
    sizes = 8 + torch.rand(anchors, 2, generator=generator) * 60
    return Level(
        logits=torch.randn(images, anchors, classes, generator=generator) * 3,
        deltas=torch.randn(images, anchors, 4, generator=generator) * 0.5,
        anchors=torch.cat([corners, corners + sizes], dim=1),
    )


@pytest.mark.parametrize("classes", [3, MANY_CLASSES])
def test_the_best_pairs_of_each_level(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # The first level has more than 1000 pairs, the others fewer.
    counts = (3600 // classes + 900, 150 // classes, 1)
    levels = [random_level(generator, images=2, anchors=count, classes=classes) for count in counts]
    total = 1000 + (counts[1] + counts[2]) * classes
    sizes = torch.tensor([[150, 210], [180, 120]])
    boxes, scores, labels = candidates(levels, sizes)
    assert TOP_K == 1000
    assert boxes.shape == (2, total, 4)
    assert scores.shape == labels.shape == (2, total)
    for image, (height, width) in enumerate(sizes.tolist()):
        start = 0
        for level in levels:
            pairs = sorted(
                (
                    (level.logits[image, anchor, label].item(), anchor, label)
                    for anchor in range(len(level.anchors))
                    for label in range(classes)
                ),
                reverse=True,
            )[:TOP_K]
            part = slice(start, start + len(pairs))
            start += len(pairs)
            chosen = torch.tensor([anchor for _, anchor, _ in pairs])
            expected = decode(level.deltas[image][chosen], level.anchors[chosen])
            expected[:, 0::2] = expected[:, 0::2].clamp(0, width)
            expected[:, 1::2] = expected[:, 1::2].clamp(0, height)
            assert torch.allclose(boxes[image, part], expected, atol=1e-3)
            assert labels[image, part].tolist() == [label for *_, label in pairs]
            logits = torch.tensor([logit for logit, *_ in pairs])
            assert torch.allclose(scores[image, part], logits.sigmoid(), atol=1e-6)


def test_one_anchor_may_give_several_classes() -> None:
    level = Level(
        logits=torch.tensor([[[2.0, 3.0]]]),
        deltas=torch.zeros(1, 1, 4),
        anchors=torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
    )
    boxes, scores, labels = candidates([level], torch.tensor([[32, 32]]))
    assert boxes[0].tolist() == [[1, 2, 3, 4]] * 2
    assert labels[0].tolist() == [1, 0]
    assert scores[0].tolist() == [pytest.approx(0.952574), pytest.approx(0.880797)]


def test_boxes_are_clipped_to_their_own_image() -> None:
    level = Level(
        logits=torch.zeros(2, 1, 1),
        deltas=torch.zeros(2, 1, 4),
        anchors=torch.tensor([[-10.0, -20.0, 100.0, 200.0]]),
    )
    boxes, _, _ = candidates([level], torch.tensor([[50, 30], [300, 90]]))
    assert boxes.tolist() == [[[0, 0, 30, 50]], [[0, 0, 90, 200]]]


def test_no_image_depends_on_its_companions() -> None:
    generator = torch.Generator().manual_seed(1)
    level = random_level(generator, images=3, anchors=40, classes=2)
    sizes = torch.tensor([[100, 200], [200, 100], [64, 64]])
    together = candidates([level], sizes)
    for index in range(3):
        one = slice(index, index + 1)
        alone = candidates([Level(level.logits[one], level.deltas[one], level.anchors)], sizes[one])
        for found, expected in zip(alone, together, strict=True):
            assert torch.allclose(found, expected[one], rtol=1e-6)


# --- suppression ---------------------------------------------------------------------------------


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def by_brute_force(
    boxes: list[list[float]],
    scores: list[float],
    labels: list[int],
    *,
    score: float,
    overlap: float,
    most: int,
) -> list[int]:
    order = sorted((i for i in range(len(boxes)) if scores[i] > score), key=lambda i: -scores[i])
    kept: list[int] = []
    for i in order:
        if not any(labels[i] == labels[j] and iou(boxes[i], boxes[j]) > overlap for j in kept):
            kept.append(i)
    return kept[:most]


detection = st.tuples(
    st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.integers(0, 12),
    st.integers(0, 64), st.integers(0, 2),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.lists(detection, max_size=25),
    st.sampled_from([0.0, 0.25, 0.5]),
    # No IoU of boxes of whole pixels up to 12 is within rounding of these.
    st.sampled_from([0.0, 0.3003, 0.5003, 0.7003, 1.0]),
    st.integers(0, 10),
)
def test_suppression_is_brute_force(
    rows: list[tuple[int, ...]], score: float, overlap: float, most: int
) -> None:
    boxes = [[float(v) for v in (x, y, x + w, y + h)] for x, y, w, h, _, _ in rows]
    scores = [row[4] / 64 for row in rows]
    labels = [row[5] for row in rows]
    kept = suppress(
        torch.tensor(boxes).reshape(-1, 4),
        torch.tensor(scores),
        torch.tensor(labels, dtype=torch.int64),
        score_threshold=score,
        iou_threshold=overlap,
        max_detections=most,
    )
    assert kept.dtype == torch.int64
    assert kept.tolist() == by_brute_force(
        boxes, scores, labels, score=score, overlap=overlap, most=most
    )


def kept_of(
    boxes: list[list[float]],
    scores: list[float],
    labels: list[int],
    *,
    score: float = 0.05,
    overlap: float = 0.5,
    most: int = 100,
) -> list[int]:
    return suppress(
        torch.tensor(boxes),
        torch.tensor(scores),
        torch.tensor(labels),
        score_threshold=score,
        iou_threshold=overlap,
        max_detections=most,
    ).tolist()


def test_both_thresholds_are_strict() -> None:
    far = [[0.0, 0, 2, 2], [10.0, 0, 12, 2]]
    assert kept_of(far, [0.5, 0.25], [0, 0], score=0.25) == [0]
    # IoU of exactly one half: 2 x 4 within 4 x 4.
    half = [[0.0, 0, 4, 4], [0.0, 0, 4, 2]]
    assert kept_of(half, [0.9, 0.8], [0, 0], overlap=0.5) == [0, 1]
    assert kept_of(half, [0.9, 0.8], [0, 0], overlap=0.49) == [0]


def test_other_classes_do_not_suppress() -> None:
    same = [[0.0, 0, 4, 4]] * 3
    assert kept_of(same, [0.7, 0.9, 0.8], [0, 1, 0]) == [1, 2]


def test_a_suppressed_box_does_not_suppress() -> None:
    # Each overlaps the next by 3 / 5 of their union, the first and the third by a third.
    chain = [[0.0, 0, 8, 1], [2.0, 0, 10, 1], [4.0, 0, 12, 1]]
    assert kept_of(chain, [0.9, 0.8, 0.7], [0, 0, 0]) == [0, 2]


def test_at_most_so_many_over_all_classes() -> None:
    apart = [[float(10 * i), 0, 10.0 * i + 5, 5] for i in range(4)]
    assert kept_of(apart, [0.6, 0.9, 0.7, 0.8], [0, 1, 2, 0], most=3) == [1, 3, 2]


def test_scores_that_are_not_numbers_are_no_detections() -> None:
    apart = [[0.0, 0, 2, 2], [10.0, 0, 12, 2]]
    assert kept_of(apart, [math.nan, 0.8], [0, 0]) == [1]


@given(
    anchors=st.integers(1, 40),
    classes=st.sampled_from([1, 3, MANY_CLASSES, 20]),
    count=st.integers(1, 60),
    values=st.integers(2, 1000),
    seed=st.integers(0, 1000),
)
def test_two_steps_find_what_one_does(
    anchors: int, classes: int, count: int, values: int, seed: int
) -> None:
    """However often values repeat; of equal pairs any may be the last."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(values, (2, anchors, classes), generator=generator).float()
    best, anchor, label = best_pairs(logits, count)
    expected = logits.flatten(1).sort(dim=1, descending=True).values[:, :count]
    assert torch.equal(best, expected)
    for image in range(2):
        assert torch.equal(logits[image, anchor[image], label[image]], best[image])
        pairs = list(zip(anchor[image].tolist(), label[image].tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)

"""IoU and the assignment of anchors, against tables made by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_export.retinanet.anchors import AnchorConfig, level_anchors
from model_export.retinanet.matching import (
    BACKGROUND,
    IGNORED,
    AtssMatcher,
    IouMatcher,
    box_iou,
    match,
    match_adaptively,
)

NAN, INF = math.nan, math.inf


def boxes(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


# --- IoU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 4, 4), (1, 1, 3, 3), 1 / 4),
        ((0, 0, 10, 10), (5, 0, 10, 10), 1 / 2),
        # Edges and corners that touch share nothing.
        ((0, 0, 2, 2), (2, 0, 4, 2), 0.0),
        ((0, 0, 2, 2), (2, 2, 4, 4), 0.0),
        ((0, 0, 2, 2), (3, 3, 4, 4), 0.0),
        # Beside each other in both axes: two negative sides have no positive product.
        ((0, 0, 1, 1), (-9, -9, -8, -8), 0.0),
        # Zero area, also against itself.
        ((1, 1, 1, 5), (0, 0, 9, 9), 0.0),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
    ],
)
def test_iou(a: tuple[float, ...], b: tuple[float, ...], expected: float) -> None:
    assert box_iou(boxes(a), boxes(b)).item() == pytest.approx(expected, abs=1e-7)
    assert box_iou(boxes(b), boxes(a)).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    "wrong",
    [
        (NAN, 0, 2, 2),
        (0, 0, NAN, 2),
        (NAN, NAN, NAN, NAN),
        (0, 0, INF, INF),
        (-INF, -INF, INF, INF),
        (0, 0, INF, 2),
        (INF, INF, INF, INF),
        (0, 0, 1e30, 1e30),
        (2, 2, 0, 0),
        (2, 0, 0, 2),
    ],
)
def test_boxes_that_are_none_overlap_nothing(wrong: tuple[float, ...]) -> None:
    anchors = boxes((0, 0, 2, 2), (-4, -4, 4, 4))
    assert box_iou(boxes(wrong), anchors).tolist() == [[0.0, 0.0]]
    assert match(box_iou(boxes(wrong), anchors)).tolist() == [BACKGROUND, BACKGROUND]


def test_iou_of_no_boxes() -> None:
    assert box_iou(boxes(), boxes((0, 0, 1, 1))).shape == (0, 1)
    assert box_iou(boxes((0, 0, 1, 1)), boxes()).shape == (1, 0)


corner = st.integers(0, 30)
side = st.integers(0, 30)


@given(st.tuples(corner, corner, side, side), st.tuples(corner, corner, side, side))
def test_iou_counts_pixels(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    def pixels(box: tuple[int, ...]) -> set[tuple[int, int]]:
        x, y, width, height = box
        return {(i, j) for i in range(x, x + width) for j in range(y, y + height)}

    def edges(box: tuple[int, ...]) -> tuple[int, ...]:
        return box[0], box[1], box[0] + box[2], box[1] + box[3]

    union = pixels(a) | pixels(b)
    expected = len(pixels(a) & pixels(b)) / len(union) if union else 0.0
    assert box_iou(boxes(edges(a)), boxes(edges(b))).item() == pytest.approx(expected, abs=1e-6)


# --- matching ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iou", "expected"),
    [
        # The thresholds: 0.5 is foreground, 0.4 is not background, just below is.
        ([[0.5, 0.4999, 0.4, 0.3999, 0.0]], [0, IGNORED, IGNORED, BACKGROUND, BACKGROUND]),
        # The best object wins an anchor.
        ([[0.6, 0.7], [0.8, 0.55]], [1, 0]),
        # An object below 0.5 everywhere goes without.
        ([[0.9, 0.1], [0.3, 0.45]], [0, IGNORED]),
        ([[1.0]], [0]),
    ],
)
def test_matching_without_low_quality(iou: list[list[float]], expected: list[int]) -> None:
    assert match(torch.tensor(iou), low_quality_matches=False).tolist() == expected


@pytest.mark.parametrize(
    ("iou", "expected"),
    [
        # The best anchor of an object that no anchor reaches.
        ([[0.1, 0.3, 0.2]], [BACKGROUND, 0, BACKGROUND]),
        ([[0.42, 0.45, 0.2]], [IGNORED, 0, BACKGROUND]),
        # Every anchor that shares the best.
        ([[0.3, 0.1, 0.3]], [0, BACKGROUND, 0]),
        # An object without any overlap claims nothing.
        ([[0.0, 0.0]], [BACKGROUND, BACKGROUND]),
        ([[0.0, 0.0], [0.0, 0.2]], [BACKGROUND, 1]),
        # A claimed anchor learns its own best object: the second claims what the first has.
        ([[0.8, 0.1], [0.3, 0.0]], [0, BACKGROUND]),
        # Ordinary matches stay.
        ([[0.6, 0.7, 0.1], [0.1, 0.2, 0.3]], [0, 0, 1]),
    ],
)
def test_low_quality_matches(iou: list[list[float]], expected: list[int]) -> None:
    assert match(torch.tensor(iou), low_quality_matches=True).tolist() == expected


def test_a_tie_goes_to_one_of_the_objects_that_share_it() -> None:
    matched = match(torch.tensor([[0.6], [0.6], [0.2]]), low_quality_matches=False)
    assert matched.item() in (0, 1)


@pytest.mark.parametrize("low_quality", [True, False])
def test_without_objects_everything_is_background(low_quality: bool) -> None:
    matched = match(torch.zeros(0, 5), low_quality_matches=low_quality)
    assert matched.tolist() == [BACKGROUND] * 5
    assert matched.dtype == torch.int64


def test_without_anchors_there_is_nothing_to_match() -> None:
    assert match(torch.zeros(0, 0)).tolist() == []


def test_other_thresholds() -> None:
    iou = torch.tensor([[0.65, 0.5, 0.25]])
    assert match(iou, foreground=0.6, background=0.3, low_quality_matches=False).tolist() == [
        0,
        IGNORED,
        BACKGROUND,
    ]
    # No band between: nothing is ignored.
    assert match(iou, foreground=0.5, background=0.5, low_quality_matches=False).tolist() == [
        0,
        0,
        BACKGROUND,
    ]


ious = st.lists(
    st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=6, max_size=6),
    min_size=1,
    max_size=4,
)


@given(ious)
def test_matching_is_what_the_rules_say(rows: list[list[float]]) -> None:
    iou = torch.tensor(rows)
    strict = match(iou, low_quality_matches=False).tolist()
    kind = match(iou, low_quality_matches=True).tolist()
    for anchor in range(6):
        column = [row[anchor] for row in rows]
        best = max(column)
        if best >= 0.5:
            assert column[strict[anchor]] == best
        else:
            assert strict[anchor] == (IGNORED if best >= 0.4 else BACKGROUND)
        claimed = any(row[anchor] == max(row) > 0 for row in rows)
        if claimed or best >= 0.5:
            assert column[kind[anchor]] == best
        else:
            assert kind[anchor] == strict[anchor]
    # No object with any overlap goes unlearned, unless a better one has its anchor.
    for index, row in enumerate(rows):
        if max(row) > 0:
            own = [anchor for anchor in range(6) if row[anchor] == max(row)]
            assert all(kind[anchor] >= 0 for anchor in own)
            assert any(
                kind[anchor] == index or rows[kind[anchor]][anchor] >= max(row) for anchor in own
            )


# --- ATSS ----------------------------------------------------------------------------------------

# Two levels: four cells of 16 px with one anchor of 16 x 16, one cell of 32 px with one of 32 x 32.
TWO_LEVELS = (
    boxes((0, 0, 16, 16), (16, 0, 32, 16), (0, 16, 16, 32), (16, 16, 32, 32))[:, None],
    boxes((0, 0, 32, 32))[:, None],
)


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        # IoUs 1, 0, 0, 0, 1/4: mean 0.25, standard deviation 0.433, threshold 0.683.
        ([(0, 0, 16, 16)], [0, -1, -1, -1, -1]),
        # IoUs 1/4 four times and 1: mean 0.4, standard deviation 0.335, threshold 0.735.
        ([(0, 0, 32, 32)], [-1, -1, -1, -1, 0]),
        # Both; the large one keeps its own anchor.
        ([(0, 0, 16, 16), (0, 0, 32, 32)], [0, -1, -1, -1, 1]),
        # Two objects, one box: the first one learns, as IoU cannot tell them apart.
        ([(0, 0, 16, 16), (0, 0, 16, 16)], [0, -1, -1, -1, -1]),
        # 6 x 6 px in a corner: IoUs 36/256, 0, 0, 0 and 36/1024. No anchor's centre is inside, so
        # it takes the anchor that it overlaps most.
        ([(0, 0, 6, 6)], [0, -1, -1, -1, -1]),
        # The second one's best anchor is taken by one that overlaps it more.
        ([(0, 0, 16, 16), (0, 0, 6, 6)], [0, -1, -1, -1, -1]),
        # Outside of all anchors, without area, or not a box at all.
        ([(99, 99, 120, 120)], [-1] * 5),
        ([(4, 4, 4, 12)], [-1] * 5),
        ([(NAN, 0, 16, 16)], [-1] * 5),
        ([(0, 0, INF, INF)], [-1] * 5),
        ([], [-1] * 5),
    ],
)
def test_adaptive_matching_by_hand(objects: list[tuple[float, ...]], expected: list[int]) -> None:
    assert match_adaptively(TWO_LEVELS, boxes(*objects)).tolist() == expected


def plain_atss(levels: Sequence[torch.Tensor], box: tuple[float, ...], cells: int) -> set[int]:
    """Return the anchors that learn one object by the paper's algorithm 1."""
    x1, y1, x2, y2 = box
    anchors = torch.cat([level.flatten(0, 1) for level in levels]).tolist()
    middles = [((a[0] + a[2]) / 2, (a[1] + a[3]) / 2) for a in anchors]
    candidates: list[int] = []
    first = 0
    for level in levels:
        count, per_cell = level.shape[:2]
        starts = range(first, first + count * per_cell, per_cell)
        distances = [(math.dist(middles[i], ((x1 + x2) / 2, (y1 + y2) / 2)), i) for i in starts]
        for _, start in sorted(distances)[:cells]:
            candidates += range(start, start + per_cell)
        first += count * per_cell
    ious = box_iou(boxes(box), boxes(*(tuple(anchors[i]) for i in candidates)))[0].tolist()
    least = statistics.mean(ious) + statistics.stdev(ious)
    return {
        i
        for i, iou in zip(candidates, ious, strict=True)
        if iou >= least and x1 < middles[i][0] < x2 and y1 < middles[i][1] < y2
    }


# Odd thirds: no two cells are equally far, and no centre lies on an edge.
place = st.integers(0, 150).map(lambda value: value / 3 + 0.1)


@given(place, place, place, place)
def test_adaptive_matching_of_one_object_is_the_paper_s(
    x: float, y: float, width: float, height: float
) -> None:
    config = AnchorConfig(sizes=((8,), (16,), (32,), (64,), (128,)), ratios=(0.5, 1.0))
    levels = level_anchors(config, 64, 96)
    objects = boxes((x, y, x + width + 0.4, y + height + 0.7))
    learned = plain_atss(levels, tuple(objects[0].tolist()), cells=4)
    matched = match_adaptively(levels, objects, cells=4)
    found = set(torch.nonzero(matched == 0)[:, 0].tolist())
    if learned:
        assert found == learned
    else:
        overlaps = box_iou(objects, torch.cat([level.flatten(0, 1) for level in levels]))
        assert found == ({int(overlaps.argmax())} if overlaps.max() > 0 else set())


def test_small_objects_learn_from_many_anchors() -> None:
    """28 px on a 128 px canvas: about 31 anchors, where fixed thresholds leave 3."""
    sizes = ((12, 15, 19), (24, 30, 38), (48, 60, 76), (96, 121, 152), (192, 242, 305))
    levels = level_anchors(AnchorConfig(sizes=sizes), 128, 128)
    objects = boxes((40, 43, 68, 70))
    fixed = match(box_iou(objects, torch.cat([level.flatten(0, 1) for level in levels])))
    adaptive = match_adaptively(levels, objects)
    assert (adaptive >= 0).sum() > 2 * (fixed >= 0).sum()
    assert not (adaptive == IGNORED).any()


@pytest.mark.parametrize("matcher", [IouMatcher(), AtssMatcher()])
def test_many_objects_are_matched_in_parts_as_together(
    matcher: IouMatcher | AtssMatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = level_anchors(AnchorConfig(), 160, 224)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=generator) * 120
    boxes = torch.cat([corners, corners + 4 + torch.rand(60, 2, generator=generator) * 40], dim=1)
    together = matcher(levels, boxes)
    assert len(set(together.tolist())) > 40
    monkeypatch.setattr("model_export.retinanet.matching._AT_ONCE", 7)
    assert torch.equal(matcher(levels, boxes), together)

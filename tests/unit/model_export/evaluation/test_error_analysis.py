import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_export.evaluation.coco_metrics import match
from model_export.evaluation.error_analysis import Outcome, analyse, confusion, find_mistakes
from service.engine.postprocessing import Selection, resolve
from service.runtime.artifact import Thresholds
from tests.unit.model_export.cases import (
    CLASSES,
    EMPTY,
    NOTHING,
    detections,
    measurement,
    model_file,
    random_case,
    sample,
    with_crowds,
    with_difficult,
)

FULL = [0, 0, 100, 100]
ELSEWHERE = [300, 300, 400, 400]


def at(*scores: float, most: int = 300) -> Selection:
    """A threshold for each class."""
    per_class = dict(zip(CLASSES, scores, strict=True))
    metadata = model_file(thresholds=Thresholds(per_class=per_class)).metadata
    return resolve(metadata, max_detections=most)


def outcomes(truth, found, selection=None) -> list[str]:
    return [str(each) for each in analyse(truth, found, selection or at(0.1, 0.1)).outcomes]


# --- one image ---------------------------------------------------------------------------------


def test_one_of_each():
    truth = sample([FULL, ELSEWHERE, [500, 0, 600, 100], [0, 300, 100, 400]], [0, 1, 0, 1])
    boxes = [
        FULL,  # right
        [0, 0, 100, 95],  # again
        ELSEWHERE,  # a cell, but labelled a speck
        [500, 0, 600, 30],  # IoU 0.3
        [200, 0, 210, 10],  # nothing there
    ]
    analysis = analyse(truth, detections(boxes, [0.9, 0.8, 0.7, 0.6, 0.5], [0] * 5), at(0.1, 0.1))
    assert analysis.outcomes == (
        Outcome.HIT,
        Outcome.DUPLICATE,
        Outcome.CONFUSED,
        Outcome.MISPLACED,
        Outcome.FALSE,
    )
    assert analysis.objects.tolist() == [0, 0, 1, 2, -1]
    assert analysis.missed.tolist() == [3]
    assert analysis.faint.tolist() == [0.0]


@pytest.mark.parametrize(
    ("height", "expected"), [(50, "hit"), (49, "misplaced"), (10, "misplaced"), (9, "false")]
)
def test_overlap_at_the_borders(height, expected):
    found = detections([[0, 0, 100, height]], [0.9], [0])
    assert outcomes(sample([FULL], [0]), found) == [expected]


def test_other_class_that_overlaps_less_than_half_is_false():
    assert outcomes(sample([FULL], [1]), detections([[0, 0, 100, 40]], [0.9], [0])) == ["false"]


def test_own_class_goes_before_a_better_overlap_with_another():
    truth = sample([[0, 0, 100, 80], FULL], [0, 1])
    assert analyse(truth, detections([FULL], [0.9], [0]), at(0.1, 0.1)).objects.tolist() == [0]


def test_a_hit_that_comes_later_keeps_its_object_from_being_confused():
    found = detections([FULL, FULL], [0.9, 0.5], [1, 0])
    assert outcomes(sample([FULL], [0]), found) == ["duplicate", "hit"]


def test_thresholds_are_per_class_and_strict():
    found = detections([FULL, ELSEWHERE], [0.5, 0.5], [0, 1])
    analysis = analyse(sample([FULL, ELSEWHERE], [0, 1]), found, at(0.5, 0.4))
    assert analysis.shown.labels.tolist() == [1]
    assert analysis.missed.tolist() == [0]
    # What was held back is told.
    assert analysis.faint.tolist() == [0.5]


def test_no_more_than_the_file_shows():
    found = detections([FULL, ELSEWHERE], [0.9, 0.8], [0, 0])
    assert len(analyse(EMPTY, found, at(0.1, 0.1, most=1)).shown) == 1


def test_in_a_crowd_of_its_class_nothing_is_a_mistake():
    truth = dataclasses.replace(
        sample([[0, 0, 50, 50]], [0]),
        crowds=np.array([FULL], dtype=np.float32),
        crowd_labels=np.array([0]),
    )
    boxes = [[0, 0, 50, 50], [20, 20, 60, 60], [50, 0, 150, 50], [51, 0, 151, 50]]
    found = detections(boxes, [0.9, 0.8, 0.7, 0.6], [0] * 4)
    assert outcomes(truth, found) == ["hit", "ignored", "ignored", "false"]
    other = detections([[20, 20, 60, 60]], [0.8], [1])
    assert outcomes(truth, other) == ["false"]


def test_of_a_difficult_object_nothing_is_a_mistake():
    truth = dataclasses.replace(sample([FULL, ELSEWHERE], [0, 0]), difficult=np.array([0]))
    # Twice over it, half of it, less than half of it, and another class over it.
    boxes = [FULL, FULL, [0, 0, 100, 50], [0, 0, 100, 49], FULL]
    found = detections(boxes, [0.9, 0.8, 0.7, 0.6, 0.5], [0, 0, 0, 0, 1])
    analysis = analyse(truth, found, at(0.1, 0.1))
    assert [str(each) for each in analysis.outcomes] == ["ignored"] * 3 + ["false"] * 2
    assert analysis.missed.tolist() == [1]
    assert confusion([truth], [analysis], 2).counts.tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 0]]


def test_nothing_at_all():
    analysis = analyse(EMPTY, NOTHING, at(0.1, 0.1))
    assert analysis.outcomes == ()
    assert analysis.missed.shape == analysis.faint.shape == (0,)


# --- all images --------------------------------------------------------------------------------


def test_worst_first():
    truth = [sample([FULL, [200, 0, 210, 10]], [0, 0]), sample([ELSEWHERE], [0])]
    found = [
        detections([[400, 0, 420, 20]], [0.7], [0]),
        detections([[400, 0, 420, 20], ELSEWHERE], [0.8, 0.05], [1, 0]),
    ]
    analyses = [analyse(s, f, at(0.1, 0.1)) for s, f in zip(truth, found, strict=True)]
    mistakes = find_mistakes(truth, analyses)
    false = [each.score for each in mistakes if each.outcome is Outcome.FALSE]
    assert false == pytest.approx([0.8, 0.7])
    # The large one that nothing speaks for, the small one, the one with a low score.
    missed = [(each.image, each.thing) for each in mistakes if each.outcome is Outcome.MISSED]
    assert missed == [(0, 0), (0, 1), (1, 0)]
    # By the areas of the outlines the second is larger.
    truth[0] = dataclasses.replace(truth[0], annotated_areas=np.array([20.0, np.nan]))
    worst = [each for each in find_mistakes(truth, analyses) if each.outcome is Outcome.MISSED]
    assert [each.thing for each in worst] == [1, 0, 0]


def test_confusion_by_hand():
    truth = [sample([FULL, ELSEWHERE, [500, 0, 600, 100]], [0, 1, 0]), EMPTY]
    found = [
        detections([FULL, ELSEWHERE, [500, 0, 600, 30]], [0.9, 0.8, 0.7], [0, 0, 0]),
        detections([FULL], [0.6], [1]),
    ]
    analyses = [analyse(s, f, at(0.1, 0.1)) for s, f in zip(truth, found, strict=True)]
    table = confusion(truth, analyses, 2)
    # Detected as: cell, speck, nothing. A misplaced box is a miss and a false detection.
    assert table.counts.tolist() == [[1, 0, 1], [1, 0, 0], [1, 1, 0]]
    assert table.precision().tolist() == [1 / 3, 0.0]
    assert table.recall().tolist() == [0.5, 0.0]
    assert table.row_shares()[2].tolist() == [0.5, 0.5, 0.0]


def test_confusion_of_nothing():
    table = confusion([EMPTY], [analyse(EMPTY, NOTHING, at(0.1, 0.1))], 2)
    assert not table.counts.any()
    assert np.isnan(table.precision()).all()
    assert not table.row_shares().any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), score=st.floats(0.02, 0.9))
def test_diagonal_is_what_coco_matches(seed, score):
    truth, found = random_case(seed)
    truth = with_difficult(with_crowds(truth, seed), seed)
    selection = at(score, score)
    analyses = [analyse(s, f, selection) for s, f in zip(truth, found, strict=True)]
    table = confusion(truth, analyses, len(CLASSES))
    matches = match(truth, [each.shown for each in analyses], CLASSES)
    assert np.diagonal(table.counts)[:-1].tolist() == [int(each.hits[0].sum()) for each in matches]
    # Every object and every detection is counted once.
    assert table.counts[:-1].sum() == sum(each.counted.sum() for each in truth)
    judged = sum(each.outcomes.count(Outcome.IGNORED) for each in analyses)
    assert table.counts[:, :-1].sum() == sum(len(each.shown) for each in analyses) - judged


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_confusion_agrees_with_the_curve_at_the_files_threshold(seed):
    truth, found = random_case(seed)
    measured = measurement(with_difficult(with_crowds(truth, seed), seed), found)
    for label, name in enumerate(CLASSES):
        points = measured.points[name]
        if points is None:
            continue
        precision, recall, _ = points.at(float(measured.selection.scores[label]))
        assert measured.confusion.recall()[label] == pytest.approx(recall)
        if precision is not None:
            assert measured.confusion.precision()[label] == pytest.approx(precision)

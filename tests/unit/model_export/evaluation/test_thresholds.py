import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_export.evaluation.coco_metrics import match
from model_export.evaluation.thresholds import (
    F1,
    choose,
    choose_thresholds,
    operating_points,
)
from service.engine.postprocessing import resolve
from service.runtime.artifact import Thresholds
from tests.unit.model_export.cases import (
    CLASSES,
    EMPTY,
    NOTHING,
    detections,
    model_file,
    random_case,
    sample,
)

FULL = [0, 0, 100, 100]
MISS = [400, 0, 450, 50]


def chosen(truth, found, classes=CLASSES) -> Thresholds | None:
    return choose(match(truth, found, classes), classes)


# --- operating points ----------------------------------------------------------------------------


def test_points_at_a_threshold():
    truth = [sample([FULL, [200, 200, 300, 300]], [0, 0])]
    found = [detections([FULL, MISS], [0.875, 0.75], [0, 0])]
    points = operating_points(match(truth, found, CLASSES)[0])
    assert points.at(0.5) == (0.5, 0.5, 0.5)
    # Strictly above: the one of 0.75 does not pass 0.75.
    assert points.at(0.75) == (1.0, 0.5, pytest.approx(2 / 3))
    assert points.at(0.875) == (None, 0.0, 0.0)


def test_points_at_a_threshold_that_float32_rounds_up():
    # The service compares in float32, where 0.3 is 0.300000012: that score does not pass.
    found = [detections([FULL], [0.3], [0])]
    points = operating_points(match([sample([FULL], [0])], found, CLASSES)[0])
    assert points.scores[0] > 0.3
    assert points.at(0.3) == (None, 0.0, 0.0)


def test_operating_points_by_hand():
    truth = [sample([FULL, [200, 200, 300, 300]], [0, 0])]
    boxes = [FULL, MISS, [200, 200, 300, 300], MISS]
    found = [detections(boxes, [0.875, 0.75, 0.5, 0.25], [0, 0, 0, 0])]
    points = operating_points(match(truth, found, CLASSES)[0])
    assert points.scores.tolist() == [0.875, 0.75, 0.5, 0.25]
    assert points.precision == pytest.approx([1, 1 / 2, 2 / 3, 2 / 4])
    assert points.recall == pytest.approx([0.5, 0.5, 1, 1])
    assert points.f1 == pytest.approx([2 / 3, 1 / 2, 4 / 5, 2 / 3])
    # Midway between the last score kept, 0.5, and the first left out, 0.25.
    assert points.best_threshold() == 0.375


def test_operating_points_of_two_classes_are_of_one_list():
    truth = [sample([FULL, FULL], [0, 1])]
    found = [detections([FULL, FULL, MISS], [0.75, 0.25, 0.5], [0, 1, 1])]
    points = operating_points(*match(truth, found, CLASSES))
    assert points.scores.tolist() == [0.75, 0.5, 0.25]
    assert points.f1 == pytest.approx([2 / 3, 2 / 4, 4 / 5])


def test_detections_of_equal_score_pass_together():
    truth = [sample([FULL], [0])]
    found = [detections([FULL, MISS], [0.5, 0.5], [0, 0])]
    points = operating_points(match(truth, found, CLASSES)[0])
    assert points.scores.tolist() == [0.5]
    assert points.precision.tolist() == [0.5]


# --- the choice ----------------------------------------------------------------------------------


def test_thresholds_are_shrunk_by_hand():
    classes = ("cell", "speck", "unseen", "missed")
    corners = [[100 * index, 200, 100 * index + 80, 280] for index in range(4)]
    truth = [sample([FULL, *corners, [500, 400, 600, 470]], [0, 1, 1, 1, 1, 3])]
    found = [
        detections(
            [*corners, MISS, FULL, MISS, MISS],
            [0.875, 0.875, 0.875, 0.875, 0.75, 0.5, 0.25, 0.125],
            [1, 1, 1, 1, 1, 0, 0, 2],
        )
    ]
    choice = choose_thresholds(truth, match(truth, found, classes), classes)
    # All together: F1 is 8/10 down to 0.875, 8/11 to 0.75, 10/12 to 0.5, 10/13 to 0.25. So 0.375.
    # The one cell alone has the same; the four specks have (0.875 + 0.75) / 2 = 0.8125, and
    # (4 * 0.8125 + 10 * 0.375) / (4 + 10) = 0.5.
    assert choice.thresholds == Thresholds(score=0.375, per_class={"cell": 0.375, "speck": 0.5})
    # Classes without objects or without hits have that of all.
    assert choice.thresholds.of("unseen") == choice.thresholds.of("missed") == 0.375
    # Hits 1, 4 and 0 of 1, 4 and 1 objects, with 1, 5 and 0 detections.
    assert choice.in_sample == (pytest.approx(10 / 12), pytest.approx((1 + 8 / 9 + 0) / 3))
    assert choice.cross_validated is None
    assert "one image cannot be cross-validated" in str(choice)


def test_threshold_when_everything_found_is_right_reaches_halfway_to_what_was_measured():
    thresholds = chosen([sample([FULL], [0])], [detections([FULL], [0.75], [0])])
    assert thresholds == Thresholds(score=0.38, per_class={"cell": 0.38})


def test_no_threshold_without_a_hit():
    truth = [sample([FULL, FULL], [0, 1])]
    found = [detections([MISS], [0.9], [0])]
    assert chosen(truth, found) is None
    assert chosen([EMPTY], found) is None
    assert choose_thresholds([], match([], [], CLASSES), CLASSES) is None


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_best_threshold_is_best_among_all(seed):
    truth, found = random_case(seed)
    matches = match(truth, found, CLASSES)
    for labels in ([0], [1], [0, 1]):
        points = operating_points(*(matches[label] for label in labels))
        best = None if points is None else points.best_threshold()
        if best is None:
            continue
        others = np.linspace(0.0, 0.99, 34)
        assert f1_at(truth, found, labels, best) >= max(
            f1_at(truth, found, labels, each) - 1e-9 for each in others
        )


def f1_at(truth, found, labels: list[int], threshold: float) -> float:
    """F1 counted from scratch on the detections strictly above a threshold."""
    kept = [each.pick(each.scores > np.float32(threshold)) for each in found]
    matched = [match(truth, kept, CLASSES)[label] for label in labels]
    hits = sum(int(each.hits[0].sum()) for each in matched)
    total = sum(len(each.scores) + int(each.objects.sum()) for each in matched)
    return 2 * hits / max(1, total)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    base=st.floats(0.02, 0.9),
    steps=st.sampled_from([1, 2, 40, 100_000]),
)
def test_service_keeps_what_the_rule_says_at_the_thresholds_as_written(seed, base, steps):
    # Scores next to one another in float32 (1, 2), within four digits, and wide apart.
    truth, found = random_case(seed, images=6)
    generator = np.random.default_rng(seed)
    found = [packed(each, base, steps, generator) for each in found]
    matches = match(truth, found, CLASSES)
    thresholds = choose(matches, CLASSES)
    if thresholds is None:
        return
    together = operating_points(*matches)
    shared = together.best_threshold()
    assert kept(together.scores, shared) == kept_at_best(matches, together.scores)
    assert kept(together.scores, np.float32(thresholds.score)) == kept(together.scores, shared)
    metadata = model_file(thresholds=thresholds).metadata
    # As a file that was read again has them.
    metadata = type(metadata).model_validate_json(metadata.to_json())
    limits = resolve(metadata).scores
    for each, name, limit in zip(matches, CLASSES, limits, strict=True):
        points = operating_points(each)
        own = None if points is None else points.best_threshold()
        if own is None:
            assert name not in thresholds.per_class
            continue
        assert kept(each.scores, own) == kept_at_best([each], each.scores)
        count = int(each.objects.sum())
        shrunk = (count * Fraction(own) + 10 * Fraction(shared)) / (count + 10)
        assert kept(each.scores, limit) == kept(each.scores, shrunk)


def kept(scores, threshold) -> list[float]:
    """Compare one by one in exact numbers."""
    exact = threshold if isinstance(threshold, Fraction) else Fraction(float(threshold))
    return [each for each in scores.tolist() if Fraction(each) > exact]


def packed(found, base: float, steps: int, generator):
    """The same detections with scores of at most four times `steps` float32 values from `base`."""
    bits = np.array(base, np.float32).view(np.int32)
    scores = (bits + steps * generator.integers(0, 5, len(found))).astype(np.int32)
    scores = np.sort(scores.view(np.float32))[::-1]
    return detections(found.boxes, scores, found.labels)


def kept_at_best(matches, scores) -> list[float]:
    """Return what the cut of highest F1 keeps, the highest cut of equals; each cut is counted."""
    objects = sum(int(each.objects.sum()) for each in matches)
    every = np.concatenate([each.scores for each in matches])
    hits = np.concatenate([each.hits[0] for each in matches])
    cuts = sorted(set(every.tolist()), reverse=True)
    f1 = [2 * hits[every >= cut].sum() / ((every >= cut).sum() + objects) for cut in cuts]
    return [each for each in scores.tolist() if each >= cuts[int(np.argmax(f1))]]


# --- cross-validation ----------------------------------------------------------------------------


def test_images_are_judged_by_thresholds_chosen_on_the_others():
    truth = [sample([FULL], [0], Path("a.png")), sample([FULL], [0], Path("b.png"))]
    found = [
        detections([FULL, MISS], [0.875, 0.5], [0, 0]),
        detections([FULL, MISS], [0.375, 0.125], [0, 0]),
    ]
    choice = choose_thresholds(truth, match(truth, found, CLASSES), CLASSES)
    assert choice.thresholds == Thresholds(score=0.25, per_class={"cell": 0.25})
    # Both hits and one of two misses of both images.
    assert choice.in_sample == F1(2 * 2 / (3 + 2), 2 * 2 / (3 + 2))
    # The second, at the first one's 0.6875, is not found at all; the first, at the second one's
    # 0.25, with both its detections.
    assert choice.folds == 2
    assert choice.cross_validated == F1(2 * 1 / (2 + 2), 2 * 1 / (2 + 2))


def test_where_the_others_choose_nothing_the_default_judges():
    truth = [sample([FULL], [0], Path("a.png")), sample([], [], Path("b.png"))]
    found = [detections([FULL], [0.2], [0]), NOTHING]
    choice = choose_thresholds(truth, match(truth, found, CLASSES), CLASSES)
    assert choice.in_sample.micro == 1.0
    assert choice.cross_validated.micro == 0.0, "0.2 is not above 0.3"


@pytest.mark.parametrize("seed", range(6))
def test_noise_gives_less_by_cross_validation_than_in_sample(seed):
    """Scores that say nothing of hits: whatever is gained by choosing is chance."""
    generator = np.random.default_rng(seed)
    classes = tuple(f"class {index}" for index in range(10))
    truth, found = [], []
    for index in range(60):
        labels = generator.integers(0, len(classes), 2)
        truth.append(sample([FULL, MISS], labels, Path(f"{index}.png")))
        wrong = generator.random(2) < 0.5
        guesses = np.where(wrong, generator.integers(0, len(classes), 2), labels)
        scores = np.sort(generator.uniform(0.05, 1, 2))[::-1]
        found.append(detections([FULL, MISS], scores, guesses))
    matches = match(truth, found, classes)
    choice = choose_thresholds(truth, matches, classes)
    assert choice.cross_validated.micro < choice.in_sample.micro
    assert choice.cross_validated.macro < choice.in_sample.macro
    again = [dataclasses.replace(each) for each in truth]
    assert choose_thresholds(again, matches, classes) == choice

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_export.evaluation.reliability import BINS, MIN_SCORE, reliability

some_scores = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


def test_by_hand():
    # (0.2, 0.4]: 0.25 and 0.35, one hit; (0.8, 1]: 0.9, 0.9, 1.0 and 1.0, three hits.
    scores = np.array([1.0, 1.0, 0.9, 0.9, 0.35, 0.25])
    hits = np.array([True, True, True, False, False, True])
    result = reliability(scores, hits, bins=5)
    assert result.edges.tolist() == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert result.counts.tolist() == [0, 2, 0, 0, 4]
    assert result.confidence[[1, 4]] == pytest.approx([0.3, 0.95])
    assert result.precision[[1, 4]] == pytest.approx([0.5, 0.75])
    assert np.isnan(result.precision[[0, 2, 3]]).all()
    assert result.error == pytest.approx((2 * 0.2 + 4 * 0.2) / 6)
    assert result.bias == pytest.approx((2 * -0.2 + 4 * 0.2) / 6)


def test_scores_at_the_threshold_are_left_out():
    result = reliability(np.array([0.05, 0.051]), np.array([False, False]), min_score=0.05)
    assert result.total == 1
    assert result.error == pytest.approx(0.051)


def test_float32_scores_at_the_ends():
    result = reliability(np.array([0.0, 1.0], np.float32), np.array([False, True]), min_score=-1)
    assert result.counts[[0, -1]].tolist() == [1, 1]
    assert result.error == 0.0


def test_scores_that_mean_what_they_say():
    generator = np.random.default_rng(0)
    scores = generator.uniform(MIN_SCORE, 1, 200_000)
    hits = generator.random(len(scores)) < scores
    assert reliability(scores, hits).error < 0.01
    # Twice as sure as right: off by half the mean score.
    assert reliability(scores, hits & (generator.random(len(scores)) < 0.5)).bias == pytest.approx(
        scores.mean() / 2, abs=0.01
    )


def test_nothing_to_bin():
    result = reliability(np.zeros(0), np.zeros(0, bool))
    assert result.error is None
    assert result.bias is None
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["detections"] == 0
    assert written["bins"][2] == {
        "above": 0.2,
        "up_to": 0.3,
        "detections": 0,
        "mean_score": None,
        "precision": None,
    }


@given(some_scores)
def test_error_lies_between_bias_and_one_and_every_detection_is_counted(drawn):
    scores, hits = np.array([s for s, _ in drawn]), np.array([h for _, h in drawn])
    result = reliability(scores, hits, min_score=-1.0)
    assert (
        result.total == len(drawn) == sum(each["detections"] for each in result.to_dict()["bins"])
    )
    assert len(result.counts) == BINS
    assert abs(result.bias) - 1e-9 <= result.error <= 1
    assert result.bias == pytest.approx(scores.mean() - hits.mean(), abs=1e-9)


@given(some_scores, st.data())
def test_weights_equal_detections_taken_several_times(drawn, data):
    scores, hits = np.array([s for s, _ in drawn]), np.array([h for _, h in drawn])
    count = len(drawn)
    weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    weighed = reliability(scores, hits, weights=weights)
    repeated = reliability(np.repeat(scores, weights), np.repeat(hits, weights))
    np.testing.assert_array_equal(weighed.counts, repeated.counts)
    np.testing.assert_allclose(weighed.precision, repeated.precision)
    np.testing.assert_allclose(weighed.confidence, repeated.confidence)

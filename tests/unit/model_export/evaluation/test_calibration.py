"""Score maps: fitted on what is known, folded into a network, judged on images not fitted on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_export.data.datasets import Dataset
from model_export.evaluation.bootstrap import mean_precisions
from model_export.evaluation.calibration import (
    STRENGTHS,
    Array,
    Outcomes,
    ScoreMap,
    calibrate,
    check_enough,
    choose_strength,
    cross_validated,
    fit,
    log_loss,
    logits,
)
from model_export.evaluation.coco_metrics import match
from model_export.evaluation.inference import detect
from model_export.evaluation.reliability import reliability
from model_export.retinanet.model import RetinaNet
from service.errors import DataError
from service.runtime import devices
from service.runtime.artifact import read_artifact
from service.runtime.detector import Detections
from service.settings import bundled_models
from tests.unit.model_export import random_model
from tests.unit.model_export.voc_folder import load_voc


def sigmoid(z: Array) -> Array:
    answer: Array = 1 / (1 + np.exp(-z))
    return answer


def drawn(count: int, *, scale: float, offset: float, seed: int = 0, images: int = 40) -> Outcomes:
    """Detections that hit with probability sigmoid(scale * z + offset)."""
    generator = np.random.default_rng(seed)
    z = generator.uniform(-4, 3, count)
    hits = generator.random(count) < sigmoid(scale * z + offset)
    return Outcomes(z, hits.astype(np.float64), generator.integers(0, images, count))


NOTHING = Outcomes(np.zeros(0), np.zeros(0), np.zeros(0, np.int64))


# --- the fit -------------------------------------------------------------------------------------


def test_a_map_that_is_there_is_found() -> None:
    classes = [
        drawn(20_000, scale=2.0, offset=-1.0, seed=1),
        drawn(20_000, scale=0.5, offset=0.7, seed=2),
    ]
    found = fit(classes, 1.0)
    np.testing.assert_allclose(found.scales, [2.0, 0.5], atol=0.06)
    np.testing.assert_allclose(found.offsets, [-1.0, 0.7], atol=0.06)


def test_the_fit_is_a_minimum() -> None:
    classes = [drawn(300, scale=1.7, offset=-0.3)]
    found = fit(classes, 1e-9)
    best = log_loss([sigmoid(found.scales[0] * classes[0].logits + found.offsets[0])], classes)
    for scale, offset in ((1.02, 0.0), (0.98, 0.0), (1.0, 0.02), (1.0, -0.02)):
        near = found.scales[0] * scale * classes[0].logits + found.offsets[0] + offset
        assert log_loss([sigmoid(near)], classes) > best


def test_classes_without_evidence_have_the_shared_map() -> None:
    many = drawn(5_000, scale=2.0, offset=-1.0)
    few = Outcomes(np.array([0.5]), np.array([0.0]), np.array([0]))
    shared = fit([many, few, NOTHING], np.inf)
    assert len(set(shared.scales)) == 1
    own = fit([many, few, NOTHING], 10.0)
    assert own.scales[2] == shared.scales[2]
    assert own.offsets[2] == shared.offsets[2]
    # One miss moves a class, but not far: with only itself to go by, its offset would be -inf.
    assert shared.offsets[1] - 0.2 < own.offsets[1] < shared.offsets[1]


@pytest.mark.parametrize("hits", [0.0, 1.0])
def test_one_kind_of_outcome_stays_finite(hits: float) -> None:
    z = np.linspace(-3, 3, 50)
    found = fit([Outcomes(z, np.full(50, hits), np.zeros(50, np.int64))], 1.0)
    assert np.isfinite(found.scales).all()
    assert np.isfinite(found.offsets).all()


@given(
    st.lists(
        st.tuples(st.floats(-17, 17), st.booleans(), st.integers(0, 1)), min_size=1, max_size=40
    ),
    st.sampled_from(STRENGTHS),
)
def test_the_order_within_a_class_stays(
    rows: list[tuple[float, bool, int]], strength: float
) -> None:
    # Also where high scores miss and low ones hit, which asks for a falling map.
    classes = [
        Outcomes(
            np.array([z for z, _, label in rows if label == k]),
            np.array([float(hit) for _, hit, label in rows if label == k]),
            np.zeros(sum(label == k for _, _, label in rows), np.int64),
        )
        for k in (0, 1)
    ]
    found = fit(classes, strength)
    assert (found.scales > 0).all()
    for each, scale, offset in zip(classes, found.scales, found.offsets, strict=True):
        # Below the ceiling float32 still tells scores apart.
        assert scale * each.logits.max(initial=0.0) + offset <= 10 + 1e-6


def test_sure_detections_keep_apart_in_float32() -> None:
    # As the bundled model's white cells: a class that is told apart perfectly asks for any scale.
    sure = np.linspace(2.0, 7.6, 87)
    easy = Outcomes(
        np.concatenate([sure, np.linspace(-6, -1, 900)]),
        np.repeat([1.0, 0.0], [87, 900]),
        np.arange(987) % 40,
    )
    score_map = fit([drawn(9_000, scale=2.7, offset=-0.4), easy], 1.0)
    scores = sigmoid(score_map.scales[1] * sure + score_map.offsets[1]).astype(np.float32)
    assert (np.diff(scores) > 0).all()
    assert scores[-1] < 1


# --- the choice, and held-out images -----------------------------------------------------------


FIVE = np.arange(40) % 5
"""The fold of each image."""


def test_many_detections_choose_a_map_of_their_own_and_few_a_shared_one() -> None:
    unlike = [
        drawn(4_000, scale=2.5, offset=-2.0, seed=1),
        drawn(4_000, scale=0.7, offset=1.0, seed=2),
    ]
    assert choose_strength(unlike, FIVE) <= 10.0
    alike = [drawn(60, scale=2.0, offset=0.0, seed=seed) for seed in range(8)]
    assert choose_strength(alike, FIVE) >= 100.0


def test_cross_validated_scores_have_not_seen_their_image() -> None:
    classes = [drawn(400, scale=2.0, offset=-1.0, seed=seed, images=10) for seed in (1, 2)]
    before = cross_validated(classes, FIVE)
    turned = [
        Outcomes(c.logits, np.where(c.images == 3, 1 - c.hits, c.hits), c.images) for c in classes
    ]
    after = cross_validated(turned, FIVE)
    moved = 0.0
    for own, a, b in zip(classes, before, after, strict=True):
        np.testing.assert_array_equal(a[own.images == 3], b[own.images == 3])
        moved = max(moved, float(np.abs(a - b).max()))
    assert moved > 1e-3


def test_too_little_to_fit_on() -> None:
    check_enough([drawn(200, scale=1.0, offset=0.0)], images=10)
    with pytest.raises(DataError, match=r"4 images .* hit .* more labelled images"):
        check_enough([drawn(200, scale=1.0, offset=0.0)], images=4)
    only_misses = Outcomes(np.zeros(50), np.zeros(50), np.zeros(50, np.int64))
    with pytest.raises(DataError, match="0 detections hit an object and 50 miss"):
        check_enough([only_misses, NOTHING], images=10)


# --- applied -------------------------------------------------------------------------------------


def test_scores_at_both_ends_have_logits() -> None:
    ends = logits(np.array([0.0, 0.5, 1.0], np.float32))
    assert ends[1] == 0.0
    assert ends[2] == pytest.approx(17.3, abs=0.1)
    assert ends[0] == pytest.approx(-ends[2], abs=1e-6)
    # In between float32 loses little: this is what a score of 0.99 or 1e-4 costs.
    exact = np.array([-9.2, -3.0, 4.6, 9.2])
    np.testing.assert_allclose(logits(sigmoid(exact).astype(np.float32)), exact, atol=1e-3)


def test_detections_by_hand_and_in_order() -> None:
    score_map = ScoreMap(scales=np.array([1.0, 2.0]), offsets=np.array([0.0, -2.0]))
    boxes = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = Detections(boxes, np.array([0.9, 0.75, 0.6], np.float32), np.array([1, 0, 1]))
    answer = score_map.detections(found)
    # Odds of 9, 3 and 1.5: of class 1 squared and times e^-2.
    odds = np.array([81 * np.exp(-2), 3.0, 2.25 * np.exp(-2)])
    np.testing.assert_allclose(answer.scores, odds / (1 + odds), rtol=1e-6)
    np.testing.assert_array_equal(answer.boxes, boxes)
    turned = ScoreMap(scales=np.ones(2), offsets=np.array([0.0, -3.0])).detections(found)
    np.testing.assert_array_equal(turned.boxes, boxes[[1, 0, 2]])
    assert turned.labels.tolist() == [0, 1, 1]


def test_folded_weights_give_the_mapped_logits() -> None:
    torch.manual_seed(0)
    network = RetinaNet(random_model.MODEL, classes=3).eval()
    images = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)
    sizes = torch.tensor([[64, 96]])
    score_map = ScoreMap(np.array([2.0, 0.5, 1.3]), np.array([-1.0, 0.2, 0.0]))
    with torch.no_grad():
        before = network(images, sizes)
        folded = score_map.fold(network.state_dict())
        network.load_state_dict({**network.state_dict(), **folded})
        after = network(images, sizes)
    for a, b in zip(before, after, strict=True):
        wanted = a.logits.numpy() * score_map.scales + score_map.offsets
        np.testing.assert_allclose(b.logits.numpy(), wanted, atol=1e-4)
        torch.testing.assert_close(b.deltas, a.deltas)


# --- the bundled model on images that it was not fitted on -------------------------------------


@pytest.fixture(scope="module")
def val(bccd: Path) -> tuple[Dataset, list[Detections]]:
    """BCCD's val split, and what the bundled model finds there down to score 0."""
    (path,) = bundled_models().glob("blood-cells/1/model.onnx")
    detector = devices.open_detector(read_artifact(path), devices.Device("cpu"))
    data = load_voc(bccd, "val", classes=detector.metadata.classes)
    return data, detect(detector, data.samples, batch_size=1, score=0.0)


@pytest.mark.parametrize("side", [0, 1])
def test_the_error_halves_and_ap_stays(side: int, val: tuple[Dataset, list[Detections]]) -> None:
    data, found = val
    score_map = calibrate(data.samples[side::2], found[side::2], data.classes).score_map
    truth, before = data.samples[1 - side :: 2], found[1 - side :: 2]
    errors, aps = [], []
    for each in (before, [score_map.detections(one) for one in before]):
        matches = match(truth, each, data.classes)
        judged = [one.at_50() for one in matches]
        scores = np.concatenate([one.scores for one in judged])
        hits = np.concatenate([one.hits for one in judged])
        errors.append(reliability(scores, hits).error or 0.0)
        aps.append(mean_precisions(matches, np.ones((1, len(truth)), np.int64))[0, 0])
    assert 0.08 < errors[0] < 0.13
    assert errors[1] <= errors[0] / 2
    assert aps[0] > 0.55
    assert aps[1] == pytest.approx(aps[0], abs=1e-3)

"""What a network costs, before it is trained, and the canvas that this allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model_export.commands.options import DEFAULT_RECIPE
from model_export.config import TrainConfig, load_config
from model_export.data.datasets import Dataset, Sample
from model_export.retinanet.model import ModelConfig
from model_export.training.recommendation import choose_canvas, recommend
from model_export.training.speed import (
    ENOUGH_EPOCHS,
    GFLOPS,
    NO_LIMIT,
    StepTime,
    inference_ms,
    time_step,
    within,
)
from service.imaging.canvas import Size

LIGHT = load_config(DEFAULT_RECIPE, {})
TINY = TrainConfig.model_validate(
    {
        "model": {
            "backbone": "mobilenet_v2",
            "fpn_channels": 8,
            "head_width": 8,
            "head_depth": 0,
            "anchors": {"sizes": [[24], [36], [48], [96], [192]]},
        },
        "batch_size": 2,
    }
)


def test_the_paper_s_network_costs_what_is_published() -> None:
    """MMDetection counts 239.32 G multiply-adds of a RetinaNet R-50 at 800 x 1280."""
    ms = inference_ms(ModelConfig(), 80, 800 * 1280)
    assert ms * GFLOPS * 1e6 / 2 == pytest.approx(239.32e9, rel=0.02)


def test_cost_is_proportional_to_the_canvas() -> None:
    once = inference_ms(LIGHT.model, 3, 256 * 256)
    assert inference_ms(LIGHT.model, 3, 512 * 512) == pytest.approx(4 * once)
    # More classes, larger outputs.
    assert inference_ms(LIGHT.model, 90, 256 * 256) > once


def samples(size: Size, side: float) -> list[Sample]:
    """An image of 40 boxes of about that side, of other shapes, everywhere."""
    rng = np.random.default_rng(0)
    sides = side * np.exp(rng.uniform(-0.3, 0.3, (40, 2)))
    corners = rng.uniform(0, 1, (40, 2)) * (np.array([size.width, size.height]) - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    return [Sample(Path("a.jpg"), size, boxes, np.zeros(40, dtype=np.int64))]


@pytest.mark.parametrize(
    ("size", "side"),
    [
        # A drone's images, objects of 1 % of the width.
        (Size(1080, 1920), 20),
        (Size(1920, 1080), 20),
        (Size(3000, 4000), 30),
        (Size(1024, 768), 400),
    ],
)
@pytest.mark.parametrize("budget_ms", [20.0, 100.0, 400.0])
def test_the_canvas_keeps_the_budget(size: Size, side: float, budget_ms: float) -> None:
    dataset = Dataset(Path("data"), "train", ("drone",), tuple(samples(size, side)), ())
    limit = within(LIGHT.model, 1, budget_ms)
    advice = recommend(dataset, LIGHT, limit=limit)
    canvas = advice.after.canvas.largest()
    smallest = min(canvas) <= 256
    assert smallest or inference_ms(LIGHT.model, 1, canvas.area) <= budget_ms
    # Hardly any padding: the canvas has the images' aspect to 10 %.
    assert (canvas.width / canvas.height) / (size.width / size.height) == pytest.approx(1, abs=0.1)
    if advice.after.canvas != advice.smallest_canvas:
        assert limit.reason in str(advice)
    # Anchors reach the objects, or the advice says which ones they do not.
    assert (advice.after.overall.reached < 0.95) == ("are reached by no anchor" in str(advice))
    sides = side * (canvas.width / size.width)
    if sides > 20:
        assert advice.after.overall.reached >= 0.95
    if sides < 8:
        assert advice.after.missed_tiny > 0.9
    too_large = inference_ms(LIGHT.model, 1, canvas.area) > budget_ms
    assert (" is the smallest" in str(advice)) == too_large


def test_without_a_limit_the_objects_decide() -> None:
    assert choose_canvas(samples(Size(1080, 1920), 20)) == choose_canvas(
        samples(Size(1080, 1920), 20), NO_LIMIT.area
    )
    assert within(LIGHT.model, 1, None) == NO_LIMIT


def test_time_limits_the_canvas() -> None:
    step = StepTime(Size(512, 512), seconds=0.5)
    assert step.epoch_seconds(100, 512 * 512) == pytest.approx(50)
    assert step.epoch_seconds(100, 256 * 256) == pytest.approx(12.5)
    limit = step.limit(100, minutes=5)
    assert step.epoch_seconds(100, limit.area) * ENOUGH_EPOCHS == pytest.approx(300)
    assert "--max-minutes" in limit.reason


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_step_is_timed(precision: str) -> None:
    config = TINY.model_copy(update={"precision": precision})
    found = time_step(config, 2, Size(64, 96), "cpu")
    assert found.canvas == Size(64, 96)
    assert 0 < found.seconds < 60

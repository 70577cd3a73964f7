"""The closed form agrees with the anchors themselves; what is recommended improves what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model_export.config import TrainConfig, load_config
from model_export.data.anchor_fit import Boxes, best_ious, cluster, fit_of, reached, search
from model_export.data.datasets import Dataset, Sample, load
from model_export.retinanet.anchors import AnchorConfig, canvas_anchors
from model_export.retinanet.matching import AtssMatcher, IouMatcher, box_iou
from model_export.training.recommendation import choose_canvas, recommend
from service.errors import DataError
from service.imaging.canvas import Buckets, ShortSide, Size

CANVAS = Size(96, 160)


def boxes(*rows: tuple[float, float, float, float]) -> NDArray[np.float32]:
    return np.array(rows, dtype=np.float32).reshape(-1, 4)


def sample(size: Size, rows: NDArray[np.float32], label: int = 0) -> Sample:
    return Sample(Path("a.jpg"), size, rows, np.full(len(rows), label, dtype=np.int64))


def dataset(*samples: Sample) -> Dataset:
    return Dataset(Path("data"), "train", ("cell", "speck"), samples, ())


def square(side: float, x: float = 0.0, y: float = 0.0) -> tuple[float, float, float, float]:
    return (x, y, x + side, y + side)


# --- how well anchors fit ------------------------------------------------------------------------


@st.composite
def _inside(draw: st.DrawFn) -> tuple[float, float, float, float]:
    x1, x2 = sorted(draw(st.tuples(st.floats(0, 159, width=16), st.floats(0, 159, width=16))))
    y1, y2 = sorted(draw(st.tuples(st.floats(0, 95, width=16), st.floats(0, 95, width=16))))
    return x1, y1, x2 + 1, y2 + 1


@settings(max_examples=30)
@given(
    rows=st.lists(_inside(), min_size=1, max_size=12),
    offset=st.sampled_from([0.0, 0.5]),
    stride=st.sampled_from(["level", "canvas"]),
    rounded=st.booleans(),
)
def test_the_closed_form_is_the_best_of_all_anchors(
    rows: list[tuple[float, float, float, float]], offset: float, stride: str, rounded: bool
) -> None:
    import torch

    config = AnchorConfig.model_validate(
        {
            "sizes": [[9.5, 13], [19, 27], [38, 54], [76, 108], [152, 215]],
            "ratios": [0.4, 1.0, 1.7],
            "offset": offset,
            "stride": stride,
            "round_corners": rounded,
        }
    )
    there = boxes(*rows)
    anchors = canvas_anchors(config, CANVAS.height, CANVAS.width)
    slow = box_iou(torch.tensor(there).double(), anchors.double()).max(dim=1).values
    np.testing.assert_allclose(best_ious(there, CANVAS, config), slow.numpy(), atol=1e-5)


def test_a_hand_computed_fit() -> None:
    # P3's cell in the corner has its middle at (4, 4): a 16 px anchor there is -4..12. With the
    # box 0..8 it shares 64 of 256 pixels.
    config = AnchorConfig(sizes=((16,), (32,), (64,), (128,), (256,)), ratios=(1.0,))
    rows = boxes((0, 0, 8, 8), (44, 44, 60, 60))
    ious = best_ious(rows, CANVAS, config)
    assert ious.tolist() == [0.25, 1.0]
    fit = fit_of(ious, reached(rows, CANVAS, config, IouMatcher()), np.array([1.0, 3.0]))
    assert (fit.reached, fit.overlap) == (0.75, (0.25 + 3) / 4)


def test_an_overlap_of_exactly_the_threshold_reaches() -> None:
    # 16 x 8 in the middle of a 16 px anchor is an IoU of exactly 0.5.
    config = AnchorConfig(sizes=((16,), (32,), (64,), (128,), (256,)), ratios=(1.0,))
    rows = boxes((44, 48, 60, 56), (44, 48, 60, 55.9))
    assert reached(rows, CANVAS, config, IouMatcher()).tolist() == [True, False]


def test_atss_reaches_what_holds_the_centre_of_a_cell() -> None:
    # The centres of P3's cells are at 4, 12, 20, ..., of P4's at 8, 24, ..., of P6's at 32.
    config = AnchorConfig(sizes=((16,), (32,), (64,), (128,), (256,)), ratios=(1.0,))
    rows = boxes(
        (3, 3, 5, 5), (5, 3, 11, 5), (12.5, 0, 15.5, 99), (0, 19, 99, 21), (31, 31, 33, 33)
    )
    found = reached(rows, CANVAS, config, AtssMatcher())
    assert found.tolist() == [True, False, False, True, True]


def test_clusters_of_numbers() -> None:
    values = np.array([3.0, 1.0, 1.2, 3.2, 10.0])
    assert cluster(values, np.ones(5), 3) == pytest.approx([1.1, 3.1, 10.0])
    # More clusters than numbers, and one weight that counts for three.
    assert cluster(np.array([2.0, 2.0]), np.ones(2), 3) == [2.0]
    assert cluster(np.array([0.0, 4.0]), np.array([1.0, 3.0]), 1) == [3.0]


# --- search --------------------------------------------------------------------------------------


def grid_of(width: float, height: float) -> NDArray[np.float32]:
    """Boxes of one shape at many places between the cells."""
    places = [(x, y) for x in range(40, 400, 31) for y in range(40, 400, 29)]
    return boxes(*((x, y, x + width, y + height) for x, y in places))


@pytest.mark.parametrize(("width", "height", "ratio"), [(60, 60, 1.0), (25, 100, 4.0)])
def test_boxes_of_one_shape_need_one_anchor(width: float, height: float, ratio: float) -> None:
    there = grid_of(width, height)
    group = Boxes(Size(512, 512), there, np.ones(len(there)))
    found = search([group], AnchorConfig(), IouMatcher())
    assert found.per_cell <= 2
    assert found.ratios == (ratio,)
    nearest = min((abs(np.log(size / (width * height) ** 0.5))) for size in sum(found.sizes, ()))
    assert nearest < np.log(2) / 6
    fit = best_ious(there, group.canvas, found)
    before = best_ious(there, group.canvas, AnchorConfig())
    assert fit.min() >= 0.5
    assert fit.mean() > before.mean() - 0.015


def test_for_atss_one_square_is_enough() -> None:
    there = np.concatenate([grid_of(25, 100), grid_of(60, 60)])
    group = Boxes(Size(512, 512), there, np.ones(len(there)))
    found = search([group], AnchorConfig(), AtssMatcher())
    assert (found.per_cell, found.ratios) == (1, (1.0,))
    assert any(48 <= size <= 72 for size in sum(found.sizes, ()))


def test_only_shapes_change() -> None:
    like = AnchorConfig(offset=0.0, stride="canvas", round_corners=True)
    there = grid_of(50, 30)
    found = search([Boxes(Size(512, 512), there, np.ones(len(there)))], like, IouMatcher())
    assert (found.offset, found.stride, found.round_corners) == (0.0, "canvas", True)
    assert AnchorConfig.model_validate(found.model_dump()) == found


def test_classes_count_the_same_however_rare() -> None:
    # 400 boxes of one class, 4 specks of another, which weigh as much.
    common, rare = sample(Size(512, 512), grid_of(100, 100)), boxes(square(14, 37, 37))
    data = dataset(common, *[sample(Size(512, 512), rare, 1)] * 4)
    config = TrainConfig.model_validate({"canvas": {"rule": "buckets", "sizes": [[512, 512]]}})
    advice = recommend(data, config)
    assert advice.before.balanced.reached == pytest.approx(0.5)
    assert advice.before.overall.reached > 0.9
    assert advice.after.balanced.reached == 1.0
    assert advice.canvas_kept


# --- canvas --------------------------------------------------------------------------------------


def test_the_canvas_is_as_small_as_the_objects_allow() -> None:
    # At a scale of 1/2 objects of 64 px are 32 px: 480 x 640 of 960 x 1280.
    rule = choose_canvas([sample(Size(960, 1280), boxes(square(64.01)))])
    assert rule.sizes == (Size(480, 640),)
    # Large objects do not make it tiny, small ones not larger than the images.
    assert choose_canvas([sample(Size(960, 960), boxes(square(900)))]).sizes == (Size(256, 256),)
    assert choose_canvas([sample(Size(300, 300), boxes(square(5)))]).sizes == (Size(320, 320),)
    assert choose_canvas([sample(Size(90, 90), boxes(square(5)))]).sizes == (Size(96, 96),)
    assert choose_canvas([sample(Size(4000, 4000), boxes(square(5)))]).sizes == (Size(1024, 1024),)


def test_images_of_each_shape_get_a_canvas() -> None:
    lying = sample(Size(480, 640), boxes(square(10)))
    upright = sample(Size(640, 480), boxes(square(10)))
    rule = choose_canvas([lying, upright, upright, sample(Size(480, 500), boxes(square(10)))])
    assert rule.sizes == (Size(640, 480), Size(480, 640), Size(480, 480))


@pytest.mark.parametrize(
    ("size", "canvas"),
    [
        (Size(500, 2000), Size(256, 1024)),
        (Size(500, 10_000), Size(96, 1920)),
        (Size(10_000, 500), Size(1920, 96)),
        (Size(50, 50_000), Size(32, 8192)),
        (Size(250, 200_000), Size(32, 8192)),
        (Size(1, 60_000), Size(32, 2048)),
    ],
)
def test_a_panorama_s_canvas_is_no_larger_than_others(size: Size, canvas: Size) -> None:
    there = [sample(size, boxes((0, 0, size.width / 2, size.height)))]
    assert choose_canvas(there, area=1).sizes == (canvas,)
    # Small objects ask for more, within the images' own size.
    small = [sample(size, boxes((0, 0, 1, 1)))]
    (most,) = choose_canvas(small).sizes
    assert canvas.area <= most.area <= 1.2 * 4 * 1024**2
    assert min(most) < min(size) + 32


# --- advice --------------------------------------------------------------------------------------


@pytest.mark.parametrize("canvas", [None, {"rule": "short-side", "short": 320, "long": 512}])
def test_the_settings_are_a_config(canvas: dict[str, object] | None, tmp_path: Path) -> None:
    data = dataset(sample(Size(512, 512), grid_of(40, 40)), sample(Size(512, 512), boxes()))
    config = TrainConfig.model_validate({} if canvas is None else {"canvas": canvas})
    advice = recommend(data, config)
    applied = advice.apply(config)
    # Pasted as it is printed, it gives what --anchors auto takes.
    text = str(advice)
    pasted = tmp_path / "pasted.yaml"
    pasted.write_text(text[text.index("\ncanvas:") :])
    again = load_config(pasted, {})
    assert again.canvas == applied.canvas
    assert again.model == applied.model
    assert isinstance(applied.canvas, Buckets if canvas is None else ShortSide)
    assert advice.canvas_kept == (canvas is not None)
    assert ("is the one asked for" in text) == (canvas is not None)
    # And the same each time.
    assert recommend(data, config) == advice


def test_without_objects_there_is_nothing_to_recommend() -> None:
    with pytest.raises(DataError, match="no object to choose anchors for"):
        recommend(dataset(sample(Size(10, 10), boxes())), TrainConfig())


def test_named_anchors_are_judged_on_the_canvas() -> None:
    data = dataset(sample(Size(512, 512), grid_of(20, 20)))
    config = TrainConfig.model_validate({"model": {"anchors": {"ratios": [5.0]}}})
    kept = recommend(data, config, keep_anchors=True)
    assert kept.apply(config).model == config.model
    chosen = recommend(data, config)
    assert kept.after.canvas == chosen.after.canvas
    assert kept.after.overall.reached < chosen.after.overall.reached


@pytest.mark.parametrize("size", [Size(480, 640), Size(640, 480)])
def test_lines_get_anchors_of_their_shape(size: Size) -> None:
    height, width = size
    line = (0, 100, width, 101.5) if width > height else (100, 0, 101.5, height)
    config = TrainConfig.model_validate({"augmentation": {"transpose": 0.0}})
    advice = recommend(dataset(sample(size, boxes(line))), config)
    (ratio,) = advice.after.anchors.ratios
    assert max(ratio, 1 / ratio) == pytest.approx(640 / 1.5, rel=0.05)


def test_objects_that_no_canvas_shows_are_told() -> None:
    text = str(recommend(dataset(sample(Size(300, 300), boxes(square(9)))), TrainConfig()))
    assert "100% of the objects stay below 32 px" in text


def test_runway_objects_are_reached_more_often(fod_a_mini: Path) -> None:
    canvas = Buckets(sizes=(Size(320, 320),))
    data = load(fod_a_mini, "val")
    advice = recommend(data, TrainConfig(canvas=canvas))
    assert advice.after.overall.reached > advice.before.overall.reached + 0.02
    assert advice.after.balanced.reached > advice.before.balanced.reached + 0.02
    assert choose_canvas(data.samples) == canvas

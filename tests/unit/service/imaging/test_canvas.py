"""Which canvas an image goes onto, where on it, and how boxes come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from service.imaging.canvas import Buckets, CanvasRule, Letterbox, ShortSide, Size

THREE = Buckets(sizes=(Size(384, 512), Size(512, 384), Size(448, 448)))
TORCHVISION = ShortSide(short=800, long=1333)

sides = st.integers(1, 20_000)
images = st.builds(Size, sides, sides)
multiples = st.integers(1, 20).map(lambda number: 32 * number)
bucket_rules = st.lists(st.builds(Size, multiples, multiples), min_size=1, max_size=5).map(
    lambda sizes: Buckets(sizes=tuple(sizes))
)
short_side_rules = st.builds(
    ShortSide,
    short=st.integers(1, 1000),
    long=st.integers(1, 2000),
    multiple=st.sampled_from([32, 64, 128]),
)
rules = st.one_of(bucket_rules, short_side_rules)


@pytest.mark.parametrize(
    ("original", "resized", "canvas"),
    [
        # The images that the rule was made for fill their canvas.
        ((480, 640), (384, 512), (384, 512)),
        ((640, 480), (512, 384), (512, 384)),
        ((300, 300), (448, 448), (448, 448)),
        # 1080 x 1920 * 512 / 1920 = 288 x 512: 49152 pixels of padding, 87808 on 448 x 448.
        ((1080, 1920), (288, 512), (384, 512)),
        ((1920, 1080), (512, 288), (512, 384)),
        # 10 x 11: 384 / 10 = 38.4, so 422 wide on the first: 34560; 407 x 448 is 18368.
        ((10, 11), (407, 448), (448, 448)),
        ((1, 1), (448, 448), (448, 448)),
        # Never thinner than a pixel; 384 x 512 - 512 beats 448 x 448 - 448.
        ((1, 5000), (1, 512), (384, 512)),
        ((5000, 1), (512, 1), (512, 384)),
    ],
)
def test_buckets_choose_least_padding(
    original: tuple[int, int], resized: tuple[int, int], canvas: tuple[int, int]
) -> None:
    assert THREE.fit(Size(*original)) == Letterbox(Size(*original), Size(*resized), Size(*canvas))


def test_buckets_choose_the_earlier_on_ties() -> None:
    lying, upright = Size(64, 96), Size(96, 64)
    assert Buckets(sizes=(lying, upright)).fit(Size(50, 50)).canvas == lying
    assert Buckets(sizes=(upright, lying)).fit(Size(50, 50)).canvas == upright


@pytest.mark.parametrize(
    ("original", "resized", "canvas"),
    [
        # scale 800 / 480; 640 * 5 / 3 = 1066.67, floored.
        ((480, 640), (800, 1066), (800, 1088)),
        # 1333 / 1000 would exceed 800: the shorter side decides.
        ((600, 1000), (799, 1333), (800, 1344)),
        ((800, 800), (800, 800), (800, 800)),
        # The longer side decides: 1333 / 4000 * 1000 = 333.25.
        ((1000, 4000), (333, 1333), (352, 1344)),
        ((1, 5000), (1, 1333), (32, 1344)),
    ],
)
def test_short_side_equals_torchvision(
    original: tuple[int, int], resized: tuple[int, int], canvas: tuple[int, int]
) -> None:
    assert TORCHVISION.fit(Size(*original)) == Letterbox(
        Size(*original), Size(*resized), Size(*canvas)
    )


@given(rules, images)
def test_canvas_is_a_multiple_of_32_and_holds_the_image(rule: CanvasRule, size: Size) -> None:
    placed = rule.fit(size)
    assert placed.original == size
    assert all(side >= 32 and side % 32 == 0 for side in placed.canvas)
    assert 1 <= placed.resized.height <= placed.canvas.height
    assert 1 <= placed.resized.width <= placed.canvas.width
    assert placed.canvas.area <= rule.largest().area
    assert not rule.all_canvases() or placed.canvas in rule.all_canvases()


@given(rules, images)
def test_letterbox_keeps_the_aspect_ratio(rule: CanvasRule, size: Size) -> None:
    resized = rule.fit(size).resized
    x, y = resized.width / size.width, resized.height / size.height
    # Both sides are within a pixel of one common scale, but for those that would vanish.
    slack = 1 / min(size)
    assert abs(x - y) <= slack + 1e-9


@given(bucket_rules, images)
def test_letterbox_fills_one_side_of_a_bucket(rule: Buckets, size: Size) -> None:
    placed = rule.fit(size)
    assert (
        placed.resized.width == placed.canvas.width or placed.resized.height == placed.canvas.height
    )


@given(bucket_rules, images)
def test_buckets_choice_is_optimal(rule: Buckets, size: Size) -> None:
    def padding(placed: Letterbox) -> int:
        return placed.canvas.area - placed.resized.area

    chosen = rule.fit(size)
    each = [Buckets(sizes=(canvas,)).fit(size) for canvas in rule.sizes]
    least = min(map(padding, each))
    assert padding(chosen) == least
    assert chosen == next(placed for placed in each if padding(placed) == least)


@given(short_side_rules, images)
def test_short_side_is_bounded_by_the_long_side(rule: ShortSide, size: Size) -> None:
    resized = rule.fit(size).resized
    assert min(resized) <= rule.short
    assert max(resized) <= rule.long
    # Floored: up to a pixel is missing of the side that decides.
    assert min(resized) >= rule.short - 1 or max(resized) >= rule.long - 1


@given(rules, images, st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_boxes_round_trip(rule: CanvasRule, size: Size, shares: list[float]) -> None:
    x1, x2 = sorted(shares[:2])
    y1, y2 = sorted(shares[2:])
    box = np.array(
        [[x1 * size.width, y1 * size.height, x2 * size.width, y2 * size.height]], dtype=np.float32
    )
    placed = rule.fit(size)
    on_canvas = placed.to_canvas(box)
    assert on_canvas.dtype == np.float32
    limit = np.array([placed.resized.width, placed.resized.height] * 2)
    assert (on_canvas >= 0).all()
    assert (on_canvas <= limit * (1 + 1e-6)).all()
    back = placed.to_original(on_canvas)
    assert back.dtype == np.float32
    assert np.allclose(back, box, rtol=1e-5, atol=1e-3)


def test_boxes_use_a_ratio_per_axis_and_are_clipped() -> None:
    placed = Letterbox(original=Size(100, 300), resized=Size(43, 128), canvas=Size(64, 128))
    assert placed.ratios == (128 / 300, 43 / 100)
    boxes = np.array([[12.8, 4.3, 64.0, 43.0], [-5.0, -5.0, 500.0, 60.0]], dtype=np.float32)
    expected = [[30.0, 10.0, 150.0, 100.0], [0.0, 0.0, 300.0, 100.0]]
    assert np.allclose(placed.to_original(boxes), expected, atol=1e-4)
    assert np.allclose(placed.to_canvas(np.float32(expected)[:1]), boxes[:1], atol=1e-5)


def test_empty_boxes_stay_empty() -> None:
    none = np.zeros((0, 4), dtype=np.float32)
    placed = THREE.fit(Size(480, 640))
    assert placed.to_original(none).shape == (0, 4)
    assert placed.to_canvas(none).shape == (0, 4)


def test_largest_canvas_of_a_rule() -> None:
    assert THREE.largest() == Size(448, 448)
    assert TORCHVISION.largest() == Size(800, 1344)
    assert ShortSide(short=900, long=100).largest() == Size(128, 128)
    assert TORCHVISION.all_canvases() == ()
    assert THREE.all_canvases() == THREE.sizes


@pytest.mark.parametrize(
    "rule",
    [
        {
            "rule": "buckets",
            "sizes": [[384, 512], [512, 384], [448, 448]],
            "interpolation": "bilinear",
            "place": "top-left",
        },
        {"rule": "short-side", "short": 800, "long": 1333, "multiple": 32, "round": "floor"},
    ],
)
def test_canvas_json_round_trips(rule: dict[str, Any]) -> None:
    adapter: TypeAdapter[CanvasRule] = TypeAdapter(CanvasRule)
    read = adapter.validate_python(rule)
    assert read == (THREE if rule["rule"] == "buckets" else TORCHVISION)
    written = adapter.dump_python(read, mode="json")
    assert rule.items() <= written.items()
    assert adapter.validate_json(adapter.dump_json(read)) == read


@pytest.mark.parametrize(
    "rule",
    [
        {"rule": "buckets", "sizes": []},
        {"rule": "buckets", "sizes": [[384, 500]]},
        {"rule": "buckets", "sizes": [[0, 32]]},
        {"rule": "buckets", "sizes": [[-32, 32]]},
        {"rule": "buckets", "sizes": [[384]]},
        {"rule": "buckets", "sizes": [[32, 32]], "short": 3},
        {"rule": "buckets", "sizes": [[32, 32]], "interpolation": "bicubic"},
        {"rule": "short-side", "short": 0, "long": 5},
        {"rule": "short-side", "short": 5, "long": 5, "multiple": 48},
        {"rule": "short-side", "short": 5, "long": 5, "round": "nearest"},
        {"rule": "stretch"},
    ],
)
def test_invalid_canvas_rules_are_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(CanvasRule).validate_python(rule)


def test_invalid_canvas_error_names_the_canvas() -> None:
    with pytest.raises(ValidationError, match="canvas 384x500 is not a positive multiple of 32"):
        Buckets(sizes=(Size(384, 500),))


@given(rules)
def test_tile_sizes_fill_a_canvas(rule: Buckets | ShortSide) -> None:
    tiles = rule.tiles()
    assert tiles
    for tile in tiles:
        assert tile.resized == tile.original
        assert tile.canvas.height >= tile.original.height > tile.canvas.height - rule_step(rule)
        assert tile.canvas.width >= tile.original.width > tile.canvas.width - rule_step(rule)
        assert tile.canvas.area <= rule.largest().area
    if isinstance(rule, Buckets):
        assert tuple(tile.canvas for tile in tiles) == rule.all_canvases()


def rule_step(rule: Buckets | ShortSide) -> int:
    """How much of a canvas side may be padding beside a tile."""
    return rule.multiple if isinstance(rule, ShortSide) else 1

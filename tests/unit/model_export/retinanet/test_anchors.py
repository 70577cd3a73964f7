"""Anchors, against the paper's table and against counts and places worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from model_export.retinanet.anchors import (
    LEVELS,
    AnchorConfig,
    base_anchors,
    canvas_anchors,
    cell_strides,
    grid_anchors,
    level_base_anchors,
    level_shapes,
)


def sides(boxes: torch.Tensor) -> list[tuple[float, float]]:
    """(width, height) of each box."""
    return [(b[2] - b[0], b[3] - b[1]) for b in boxes.tolist()]


def test_the_paper_s_anchors() -> None:
    """Areas 32^2 .. 512^2 on P3 .. P7, times 1, 2^(1/3), 2^(2/3) in side; ratios 1:2, 1:1, 2:1."""
    config = AnchorConfig()
    assert config.per_cell == 9
    assert [sizes[0] for sizes in config.sizes] == [32, 64, 128, 256, 512]
    for level, sizes in zip(LEVELS, config.sizes, strict=True):
        base = base_anchors(sizes, config.ratios)
        assert base.shape == (9, 4)
        # Centred at the origin.
        assert torch.allclose(base[:, :2], -base[:, 2:])
        expected = [
            (side / math.sqrt(ratio), side * math.sqrt(ratio))
            for ratio in (0.5, 1.0, 2.0)
            for side in (4 * 2**level * 2 ** (octave / 3) for octave in range(3))
        ]
        for found, wanted in zip(sides(base), expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)


def test_p3_in_figures() -> None:
    """Half widths and half heights of the nine anchors of P3."""
    base = base_anchors(AnchorConfig().sizes[0], AnchorConfig().ratios)
    expected = [
        (22.6274, 11.3137), (28.5088, 14.2544), (35.9188, 17.9594),
        (16.0, 16.0), (20.1587, 20.1587), (25.3984, 25.3984),
        (11.3137, 22.6274), (14.2544, 28.5088), (17.9594, 35.9188),
    ]  # fmt: skip
    assert torch.allclose(base[:, 2:], torch.tensor(expected), atol=1e-3)


def test_the_number_of_anchors_of_a_canvas() -> None:
    # 48 x 64 + 24 x 32 + 12 x 16 + 6 x 8 + 3 x 4 = 4092 cells.
    assert canvas_anchors(AnchorConfig(), 384, 512).shape == (4092 * 9, 4)
    few = AnchorConfig(sizes=((20.0,), (40.0,), (80.0,), (160.0,), (320.0,)), ratios=(1.0,))
    assert canvas_anchors(few, 384, 512).shape == (4092, 4)


@pytest.mark.parametrize(
    ("canvas", "shapes"),
    [
        ((384, 512), [(48, 64), (24, 32), (12, 16), (6, 8), (3, 4)]),
        # 448 = 14 * 32: P7's 3.5 cells are 4, as a stride-2 convolution with padding 1 has them.
        ((448, 448), [(56, 56), (28, 28), (14, 14), (7, 7), (4, 4)]),
        ((32, 32), [(4, 4), (2, 2), (1, 1), (1, 1), (1, 1)]),
        ((800, 1344), [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]),
    ],
)
def test_level_shapes(canvas: tuple[int, int], shapes: list[tuple[int, int]]) -> None:
    assert level_shapes(*canvas) == shapes


def test_order_and_centres() -> None:
    """Row by row, cell by cell, then ratio-major, then size."""
    base = base_anchors([8.0, 16.0], [1.0, 4.0])
    assert sides(base) == [(8, 8), (16, 16), (4, 16), (8, 32)]
    grid = grid_anchors(base, height=2, width=3, stride=(8, 8), offset=0.5)
    assert grid.shape == (24, 4)
    centres = ((grid[:, :2] + grid[:, 2:]) / 2).tolist()
    assert centres[::4] == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]
    assert centres[:4] == [[4, 4]] * 4
    assert grid[0].tolist() == [0, 0, 8, 8]
    assert grid[7].tolist() == [8, -12, 16, 20]


def test_offset_0_centres_anchors_on_cell_corners() -> None:
    grid = grid_anchors(base_anchors([8.0], [1.0]), height=1, width=2, stride=(16, 16), offset=0.0)
    assert grid.tolist() == [[-4, -4, 4, 4], [12, -4, 20, 4]]


def test_corners_round_to_whole_pixels_halves_to_the_even_one() -> None:
    sizes = ((32.0, 40.0, 50.0), (64.0, 80.0, 101.0), (128.0, 161.0, 203.0),
             (256.0, 322.0, 406.0), (512.0, 645.0, 812.0))  # fmt: skip
    p3, p4, p5, _, p7 = level_base_anchors(AnchorConfig(sizes=sizes, round_corners=True))
    # 32 * sqrt(2) / 2 = 22.6, 32 / sqrt(2) / 2 = 11.3 and so on; the squares are exact halves.
    assert p3[:, 2:].tolist() == [
        [23, 11], [28, 14], [35, 18], [16, 16], [20, 20], [25, 25], [11, 23], [14, 28], [18, 35],
    ]  # fmt: skip
    assert torch.equal(p3[:, :2], -p3[:, 2:])
    assert [level[3:6, 2].tolist() for level in (p4, p5, p7)] == [
        [32, 40, 50],  # 50.5
        [64, 80, 102],  # 80.5, 101.5
        [256, 322, 406],  # 322.5
    ]
    exact = level_base_anchors(AnchorConfig(sizes=sizes))[0]
    assert exact[3:6, 2].tolist() == [16, 20, 25]
    assert exact[0, 2].item() == pytest.approx(22.627417)


def test_strides_of_the_canvas_are_whole_pixels_per_cell() -> None:
    shapes = level_shapes(800, 1344)
    found = [
        cell_strides("canvas", level=level, canvas=(800, 1344), grid=grid)
        for level, grid in zip(LEVELS, shapes, strict=True)
    ]
    # 800 / 13 = 61.5, 1344 / 21 = 64, 800 / 7 = 114.3, 1344 / 11 = 122.2.
    assert found == [(8, 8), (16, 16), (32, 32), (61, 64), (114, 122)]
    assert cell_strides("level", level=6, canvas=(800, 1344), grid=(13, 21)) == (64, 64)


def test_anchors_of_a_canvas_take_its_strides() -> None:
    few = {"sizes": ((10.0,), (20.0,), (40.0,), (80.0,), (160.0,)), "ratios": (1.0,), "offset": 0.0}
    anchors = canvas_anchors(AnchorConfig.model_validate(few | {"stride": "canvas"}), 160, 224)
    centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).tolist()
    # 160 = 5 * 32 has 3 and 2 cells of 53 and 80 pixels, 224 = 7 * 32 has 4 and 2 of 56 and 112.
    assert centres[-16:-4] == [[x, y] for y in (0, 53, 106) for x in (0, 56, 112, 168)]
    assert centres[-4:] == [[0, 0], [112, 0], [0, 80], [112, 80]]
    fixed = canvas_anchors(AnchorConfig.model_validate(few), 160, 224)
    assert torch.equal(anchors[:-16], fixed[:-16])
    assert fixed[-1].tolist() == [48, 48, 208, 208]


def test_anchors_of_a_canvas_are_the_levels_in_turn() -> None:
    config = AnchorConfig()
    anchors = canvas_anchors(config, 64, 96)
    assert anchors.shape == ((8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1 * 1) * 9, 4)
    p4 = anchors[8 * 12 * 9]
    assert ((p4[0] + p4[2]) / 2, (p4[1] + p4[3]) / 2) == (8, 8)
    p7 = anchors[-9:]
    assert sides(p7[3:4]) == [pytest.approx((512, 512))]
    assert ((p7[0, :2] + p7[0, 2:]) / 2).tolist() == [64, 64]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sizes": ((32.0,),) * 4}, "P3 to P7"),
        ({"sizes": ((32.0,),) * 4 + ((32.0, 40.0),)}, "of one length"),
        ({"sizes": ((),) * 5}, "of one length"),
        ({"sizes": ((0.0,),) * 5}, "must be positive"),
        ({"ratios": (1.0, -1.0)}, "must be positive"),
        ({"ratios": ()}, "at least 1 item"),
        ({"stride": "power"}, "'level' or 'canvas'"),
    ],
)
def test_anchors_that_make_no_sense_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AnchorConfig.model_validate(wrong)

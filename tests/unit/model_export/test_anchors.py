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
    grid_anchors,
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
    grid = grid_anchors(base, height=2, width=3, stride=8, offset=0.5)
    assert grid.shape == (24, 4)
    centres = ((grid[:, :2] + grid[:, 2:]) / 2).tolist()
    assert centres[::4] == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]
    assert centres[:4] == [[4, 4]] * 4
    assert grid[0].tolist() == [0, 0, 8, 8]
    assert grid[7].tolist() == [8, -12, 16, 20]


def test_offset_0_centres_anchors_on_cell_corners() -> None:
    grid = grid_anchors(base_anchors([8.0], [1.0]), height=1, width=2, stride=16, offset=0.0)
    assert grid.tolist() == [[-4, -4, 4, 4], [12, -4, 20, 4]]


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
    ],
)
def test_anchors_that_make_no_sense_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AnchorConfig.model_validate(wrong)

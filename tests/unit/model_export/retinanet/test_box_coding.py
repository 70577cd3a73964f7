"""Boxes as deltas and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_export.retinanet.box_coding import MAX_LOG_SCALE, decode, encode

ANCHOR = torch.tensor([[10.0, 20.0, 30.0, 60.0]])  # centre 20, 40; 20 wide, 40 high


@pytest.mark.parametrize(
    ("box", "deltas"),
    [
        ((10, 20, 30, 60), (0, 0, 0, 0)),
        # Half an anchor to the right, a quarter of one up.
        ((20, 10, 40, 50), (0.5, -0.25, 0, 0)),
        # Twice as wide, half as high, about the same centre.
        ((0, 30, 40, 50), (0, 0, math.log(2), math.log(0.5))),
        ((25, 45, 35, 65), (0.5, 0.375, math.log(0.5), math.log(0.5))),
    ],
)
def test_coding_by_hand(box: tuple[float, ...], deltas: tuple[float, ...]) -> None:
    boxes, expected = torch.tensor([box]).float(), torch.tensor([deltas]).float()
    assert torch.allclose(encode(boxes, ANCHOR), expected, atol=1e-6)
    assert torch.allclose(decode(expected, ANCHOR), boxes, atol=1e-4)


place = st.floats(-500, 1500, width=32)
size = st.floats(1, 1000, width=32)
box_tuples = st.tuples(place, place, size, size).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(box_tuples, st.tuples(place, place, st.floats(16, 1000), st.floats(16, 1000)))
def test_decoding_undoes_encoding(
    box: tuple[float, ...], anchor: tuple[float, float, float, float]
) -> None:
    x, y, width, height = anchor
    anchors = torch.tensor([[x, y, x + width, y + height]])
    boxes = torch.tensor([box])
    assert torch.allclose(decode(encode(boxes, anchors), anchors), boxes, atol=0.02)


def test_growth_is_clamped_and_shrinking_is_not() -> None:
    assert math.exp(MAX_LOG_SCALE) == pytest.approx(62.5)
    grown = decode(torch.tensor([[0.0, 0.0, 100.0, MAX_LOG_SCALE]]), ANCHOR)
    assert torch.allclose(grown, torch.tensor([[-605.0, -1210.0, 645.0, 1290.0]]))
    shrunk = decode(torch.tensor([[0.0, 0.0, -200.0, -1.0]]), ANCHOR)
    assert shrunk[0, 0] == shrunk[0, 2] == 20
    assert (shrunk[0, 3] - shrunk[0, 1]).item() == pytest.approx(40 / math.e)


@pytest.mark.parametrize("extreme", [1e4, -1e4, 3e38])
def test_wild_deltas_give_no_nan(extreme: float) -> None:
    boxes = decode(torch.full((1, 4), extreme), ANCHOR)
    assert not boxes.isnan().any()


def test_any_leading_shape_and_broadcast() -> None:
    deltas = torch.zeros(2, 3, 5, 4)
    anchors = torch.tensor([0.0, 0.0, 4.0, 8.0]).expand(5, 4)
    assert torch.equal(decode(deltas, anchors), anchors.expand(2, 3, 5, 4))
    assert encode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
    assert decode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)


def test_coding_does_not_depend_on_where_or_how_large() -> None:
    anchor, box = torch.tensor([[0.0, 0, 20, 20]]), torch.tensor([[5.0, 2, 35, 12]])
    there = encode(box * 8 + 64, anchor * 8 + 64)
    assert torch.allclose(there, encode(box, anchor), atol=1e-6)

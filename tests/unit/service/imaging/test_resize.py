"""Scaling: what Pillow's bilinear filter gives, whichever way it is computed."""

from __future__ import annotations

import platform
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from service.imaging import resize as resizing
from service.imaging.canvas import Size
from service.imaging.resize import resize
from service.imaging.samples import draw_smear

SIDES = st.integers(min_value=1, max_value=300)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    dice = np.random.default_rng(seed)
    return Image.fromarray(dice.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pillow(image: Image.Image, size: Size) -> NDArray[np.int64]:
    wanted = (size.width, size.height)
    return np.asarray(image.resize(wanted, Image.Resampling.BILINEAR)).astype(np.int64)


@pytest.mark.skipif(
    sys.platform == "linux" and platform.machine() != "x86_64",
    reason="cykooz-resizer has no build for Linux on this processor",
)
def test_vectorised_resizer_is_installed() -> None:
    """Or nothing here is compared. Where there is none the other tests hold as well."""
    assert resizing.vectorised is not None


@pytest.mark.parametrize(
    "size", [(384, 512), (448, 597), (120, 160), (33, 7), (1, 1), (900, 1300), (480, 200)]
)
def test_resize_agrees_with_pillow_on_drawn_cells(size: tuple[int, int]) -> None:
    image, _ = draw_smear(3)
    found = resize(image, Size(*size))
    difference = np.abs(found.astype(np.int64) - pillow(image, Size(*size)))
    assert found.shape == (*size, 3)
    assert found.dtype == np.uint8
    assert difference.max() <= 2
    assert difference.mean() < 0.1


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES)
def test_resize_agrees_with_pillow_on_noise(
    width: int, height: int, to_width: int, to_height: int
) -> None:
    """The hardest image there is: neighbours have nothing in common."""
    image, size = noise(width, height), Size(to_height, to_width)
    difference = np.abs(resize(image, size).astype(np.int64) - pillow(image, size))
    assert difference.max() <= 2


def test_resize_to_the_same_size_is_identity() -> None:
    image = noise(64, 48)
    assert np.array_equal(resize(image, Size(48, 64)), np.asarray(image))


@pytest.mark.parametrize("shade", [0, 1, 127, 254, 255])
def test_resize_keeps_a_uniform_image(shade: int) -> None:
    image = Image.new("RGB", (301, 203), (shade, 255 - shade, shade))
    found = resize(image, Size(96, 128))
    assert np.array_equal(found, np.broadcast_to([shade, 255 - shade, shade], (96, 128, 3)))


def test_resize_of_a_large_image_makes_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resizing, "LARGEST_COPIED", 100 * 100 - 1)
    image = noise(100, 100)
    assert np.array_equal(resize(image, Size(50, 40)), pillow(image, Size(50, 40)))


def test_resize_falls_back_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resizing, "vectorised", None)
    image = noise(120, 90)
    assert np.array_equal(resize(image, Size(50, 40)), pillow(image, Size(50, 40)))

"""Drawn smears: the same for a seed, as many cells as asked, boxes on the cells."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import service
from service.imaging.samples import PLATELET, RED, WHITE, draw_smear, sample_jpeg


def test_sample_depends_on_its_seed() -> None:
    first, cells = draw_smear(3)
    again, cells_again = draw_smear(3)
    other, other_cells = draw_smear(4)
    assert first.tobytes() == again.tobytes()
    assert cells == cells_again
    assert first.tobytes() != other.tobytes()
    assert cells != other_cells


def test_sample_ignores_global_random_state() -> None:
    np.random.seed(1)
    first, _ = draw_smear(3)
    np.random.seed(2)
    assert draw_smear(3)[0].tobytes() == first.tobytes()


@pytest.mark.parametrize(
    ("red", "white", "platelets"), [(12, 1, 2), (0, 0, 0), (0, 2, 0), (25, 1, 6), (1, 0, 0)]
)
def test_sample_has_the_requested_cells(red: int, white: int, platelets: int) -> None:
    image, cells = draw_smear(9, red=red, white=white, platelets=platelets)
    assert image.mode == "RGB"
    assert image.size == (640, 480)
    counts = Counter(name for name, _ in cells)
    assert counts == Counter({RED: red, WHITE: white, PLATELET: platelets})


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1280, 960), (333, 251), (64, 64)])
def test_sample_boxes_lie_inside_and_scale(size: tuple[int, int]) -> None:
    width, height = size
    image, cells = draw_smear(5, width=width, height=height)
    assert image.size == size
    scale = (width * height / (640 * 480)) ** 0.5
    widest = {RED: 140, WHITE: 270, PLATELET: 60}
    for name, (x1, y1, x2, y2) in cells:
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        assert max(x2 - x1, y2 - y1) <= widest[name] * scale + 2


def test_sample_cells_have_realistic_sizes() -> None:
    """Box widths of whole cells, against the middle half of a real data set's (640 x 480)."""
    widths: dict[str, list[float]] = {RED: [], WHITE: [], PLATELET: []}
    for seed in range(12):
        for name, (x1, y1, x2, y2) in draw_smear(seed)[1]:
            if min(x1, y1) > 0 and x2 < 640 and y2 < 480:
                widths[name].append(x2 - x1)
    medians = {name: float(np.median(values)) for name, values in widths.items()}
    assert 98 <= medians[RED] <= 114
    assert 157 <= medians[WHITE] <= 225
    assert 36 <= medians[PLATELET] <= 45


def test_sample_cells_fill_their_boxes() -> None:
    """Green light is what every stain absorbs: dark inside the boxes, bright between them."""
    image, cells = draw_smear(2)
    green = np.asarray(image)[..., 1].astype(float)
    between = np.ones(green.shape, dtype=bool)
    for _, (x1, y1, x2, y2) in cells:
        between[int(y1) : int(y2), int(x1) : int(x2)] = False
    background = np.median(green[between])
    assert np.percentile(green[between], 1) > background - 20
    for _, (x1, y1, x2, y2) in cells:
        assert np.percentile(green[int(y1) : int(y2), int(x1) : int(x2)], 20) < background - 12


def test_sample_colours_differ_by_class() -> None:
    image, cells = draw_smear(6, red=4, white=1, platelets=2)
    colour = np.asarray(image).astype(float)
    for name, (x1, y1, x2, y2) in cells:
        crop = colour[int(y1) : int(y2), int(x1) : int(x2)].reshape(-1, 3)
        darkest = crop[crop[:, 1] <= np.percentile(crop[:, 1], 25)].mean(axis=0)
        bluish = darkest[2] - darkest[0]
        assert bluish < 0 if name == RED else bluish > 30, name


@pytest.mark.parametrize("wrong", [{"red": -1}, {"white": -2}, {"platelets": -1}])
def test_sample_rejects_negative_count(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        draw_smear(0, **wrong)


@pytest.mark.parametrize("wrong", [{"width": 63}, {"height": 0}])
def test_sample_rejects_tiny_size(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 64"):
        draw_smear(0, **wrong)


def test_page_sample_is_reproducible() -> None:
    """Pixels within a few grey values: JPEG libraries round differently."""
    stored = Path(service.__file__).with_name("static") / "sample.jpg"
    assert stored.stat().st_size < 100_000
    drawn = sample_jpeg()
    if hashlib.sha256(drawn).digest() == hashlib.sha256(stored.read_bytes()).digest():
        return
    expected = np.asarray(Image.open(io.BytesIO(drawn))).astype(int)
    actual = np.asarray(Image.open(stored)).astype(int)
    assert actual.shape == expected.shape
    difference = np.abs(actual - expected)
    assert difference.mean() < 1.0
    assert np.percentile(difference, 99.9) <= 12


def test_samples_import_no_torch() -> None:
    code = "import sys, service.imaging.samples; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

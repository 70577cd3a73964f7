"""Drawn boxes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from service.engine.drawing import class_colour, draw, encode
from service.runtime.detector import Detections


def detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    return Detections(
        boxes=np.array([row[:4] for row in rows], dtype=np.float32).reshape(-1, 4),
        scores=np.array([row[4] for row in rows], dtype=np.float32),
        labels=np.array([row[5] for row in rows], dtype=np.int64),
    )


def test_drawing_outlines_the_box() -> None:
    image = Image.new("RGB", (400, 300), "white")
    draw(image, detections((100, 120, 200, 220, 0.9, 0)), ["cell"])
    pixels = np.asarray(image)
    for x, y in ((100, 170), (200, 170), (150, 220)):
        assert tuple(pixels[y, x]) == class_colour(0)
    assert tuple(pixels[170, 150]) == (255, 255, 255), "the inside stays free"
    assert (pixels[105:119, 101:150] != 255).any(), "the label stands above the box"


def test_drawing_puts_the_best_score_on_top() -> None:
    image = Image.new("RGB", (100, 100), "white")
    draw(image, detections((20, 20, 80, 80, 0.9, 0), (20, 20, 80, 80, 0.5, 1)), ["a", "b"])
    assert image.getpixel((80, 60)) == class_colour(0)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (3000, 20)])
def test_drawing_handles_any_size_and_edge_boxes(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    draw(image, detections((0, 0, *size, 1.0, 0), (0, 0, 0.4, 0.4, 0.1, 1)), ["ä", "b" * 50])
    assert image.size == size


def test_drawing_without_detections_changes_nothing() -> None:
    image = Image.new("RGB", (10, 10), "red")
    draw(image, detections(), ["a"])
    assert image.getcolors() == [(100, (255, 0, 0))]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_drawing_encodes_jpeg_and_png(kind: str) -> None:
    content = encode(Image.new("RGB", (20, 10)), kind)  # type: ignore[arg-type]
    opened = Image.open(io.BytesIO(content))
    assert (opened.format, opened.size) == (kind, (20, 10))


def test_drawing_colours_differ_and_contrast_with_white() -> None:
    colours = [class_colour(label) for label in range(20)]
    assert len(set(colours)) == 20
    assert all(sum(colour) < 480 for colour in colours)

"""Drawn boxes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image, features

from service.engine.drawing import LabelFont, class_colour, draw, encode
from service.errors import DataError
from service.runtime.detector import Detections

FONTS = Path(mpl.get_data_path(), "fonts", "ttf")
DEJAVU = FONTS / "DejaVuSans.ttf"
OWN = LabelFont()


def detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    return Detections(
        boxes=np.array([row[:4] for row in rows], dtype=np.float32).reshape(-1, 4),
        scores=np.array([row[4] for row in rows], dtype=np.float32),
        labels=np.array([row[5] for row in rows], dtype=np.int64),
    )


def test_drawing_outlines_the_box() -> None:
    image = Image.new("RGB", (400, 300), "white")
    draw(image, detections((100, 120, 200, 220, 0.9, 0)), ["cell"], OWN)
    pixels = np.asarray(image)
    for x, y in ((100, 170), (200, 170), (150, 220)):
        assert tuple(pixels[y, x]) == class_colour(0)
    assert tuple(pixels[170, 150]) == (255, 255, 255), "the inside stays free"
    assert (pixels[105:119, 101:150] != 255).any(), "the label stands above the box"


def test_drawing_puts_the_best_score_on_top() -> None:
    image = Image.new("RGB", (100, 100), "white")
    draw(image, detections((20, 20, 80, 80, 0.9, 0), (20, 20, 80, 80, 0.5, 1)), ["a", "b"], OWN)
    assert image.getpixel((80, 60)) == class_colour(0)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (3000, 20)])
def test_drawing_handles_any_size_and_edge_boxes(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    draw(image, detections((0, 0, *size, 1.0, 0), (0, 0, 0.4, 0.4, 0.1, 1)), ["ä", "b" * 50], OWN)
    assert image.size == size


def test_drawing_without_detections_changes_nothing() -> None:
    image = Image.new("RGB", (10, 10), "red")
    draw(image, detections(), ["a"], OWN)
    assert image.getcolors() == [(100, (255, 0, 0))]


# By name: whether Pillow's own font has it, and whether DejaVu Sans does.
NAMES = {
    "cell": (True, True),
    "cell, 0.5 µm": (False, True),
    "Café": (False, True),
    "Cafe\u0301": (False, True),
    "Größe": (False, True),
    "ΔΩ": (False, True),
    "Кран": (False, True),
    "叉车": (False, False),
    "cell 叉": (False, False),
    "🚗": (False, False),
    "क्रेन": (False, False),
    "line\nend": (False, False),
    "line\rend": (False, False),
    "line\u2029end": (False, False),
    "رافعة": (False, features.check("raqm")),
}


@pytest.mark.parametrize(("font", "column"), [(OWN, 0), (LabelFont(DEJAVU), 1)])
def test_drawing_writes_number_for_name_without_glyphs(font: LabelFont, column: int) -> None:
    names = list(NAMES)
    written = [name == font.name(names, i) for i, name in enumerate(names)]
    # The accent is drawn as part of its letter.
    expected = [has[column] and "\u0301" not in name for name, has in NAMES.items()]
    assert written == expected
    assert font.name(["Cafe\u0301"], 0) == ("class 0", "Café")[column]
    for label in range(len(names)):
        with_name, with_number = (Image.new("RGB", (300, 200)) for _ in range(2))
        draw(with_name, detections((50, 50, 90, 90, 0.87, label)), names, font)
        numbers = [f"class {i}" for i in range(len(names))]
        draw(with_number, detections((50, 50, 90, 90, 0.87, label)), numbers, font)
        same = with_name.tobytes() == with_number.tobytes()
        assert same != (NAMES[names[label]][column]), names[label]


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow has no Raqm to be without")
def test_drawing_needs_fribidi_for_right_to_left_names(tmp_path: Path) -> None:
    (tmp_path / "libfribidi.so.0").touch()
    script = (
        "from pathlib import Path; from service.engine.drawing import LabelFont;"
        f"print(ascii(LabelFont(Path({str(DEJAVU)!r})).name(['رافعة', 'Кран'], 0)))"
    )
    for path, name in (("", ascii("رافعة")), (str(tmp_path), "'class 0'")):
        environment = {**os.environ, "LD_LIBRARY_PATH": path}
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == name


def test_font_without_latin_is_refused() -> None:
    name = "STIXSizFiveSymReg.ttf"
    with pytest.raises(DataError, match=f"FONT_FILE=.*{name}: it lacks the digits or Latin"):
        LabelFont(FONTS / name)


def test_a_damaged_character_counts_as_absent(tmp_path: Path) -> None:
    font = TTFont(DEJAVU)
    start = font.reader.tables["glyf"].offset + font["loca"][font.getGlyphID("ae")]
    content = bytearray(DEJAVU.read_bytes())
    # Where the outline's contours end.
    content[start + 10 : start + 40] = bytes(30)
    (tmp_path / "damaged.ttf").write_bytes(content)
    names = ["Maelstrom", "Mælstrøm"]
    damaged = LabelFont(tmp_path / "damaged.ttf")
    assert [damaged.name(names, label) for label in (0, 1)] == ["Maelstrom", "class 1"]
    assert LabelFont(DEJAVU).name(names, 1) == "Mælstrøm"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_drawing_encodes_jpeg_and_png(kind: str) -> None:
    content = encode(Image.new("RGB", (20, 10)), kind)  # type: ignore[arg-type]
    opened = Image.open(io.BytesIO(content))
    assert (opened.format, opened.size) == (kind, (20, 10))


def test_drawing_colours_differ_and_contrast_with_white() -> None:
    colours = [class_colour(label) for label in range(20)]
    assert len(set(colours)) == 20
    assert all(sum(colour) < 480 for colour in colours)

"""`data pick` with the tiny model: which images, what is written, what is refused."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from model_export.data import datasets
from service.cli import retinaserve
from service.runtime.artifact import Thresholds
from tests import tiny_model
from tests.images import encoded


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "models"
    tiny_model.save(root)
    monkeypatch.setenv("RETINASERVE_MODELS_DIR", str(root))
    monkeypatch.setenv("RETINASERVE_DEVICE", "cpu")
    return root


def scene(background: tuple[int, int, int], *red: int, shift: int = 0) -> bytes:
    """Squares whose scores are red / 255, on a background that no class scores on."""
    image = Image.new("RGB", (128, 96), background)
    for place, level in enumerate(red):
        image.paste((level, 0, 0), (48 * place, 32, 48 * place + 32, 64))
    image.putpixel((127, shift), (90, 90, 90))
    return encoded(image)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A video in doubt, one of certainty, and single images. The thresholds are 0.5."""
    root = tmp_path / "pool"
    content = {
        f"doubt/clip_{n:02}.png": scene((0, 0, 60), 128, 130, 132, shift=n) for n in range(9)
    }
    content |= {f"sure/clip_{n:02}.png": scene((0, 60, 0), 255, shift=n) for n in range(9)}
    content["low.png"] = scene((40, 40, 40), 100)
    content["&<b>.png"] = scene((60, 0, 60), 140)
    content["none.png"] = scene((0, 0, 0))
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def run(*arguments: object) -> Result:
    return CliRunner().invoke(retinaserve, ["data", "pick", *map(str, arguments)])


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "why.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_doubtful_scenes_are_picked_once_each(models: Path, pool: Path, tmp_path: Path) -> None:
    output = tmp_path / "next"
    result = run(pool, "--count", 10, "--output", output)
    assert result.exit_code == 0, result.output
    table = rows(output)
    assert table[0]["file"] == "doubt_clip_00.png"
    assert table[0]["source"] == str(pool / "doubt" / "clip_00.png")
    assert re.match(
        r"\d+ scores near the threshold \(red 0\.50, red 0\.51, red 0\.52[,)]", table[0]["reasons"]
    )
    names = [row["file"].partition("_clip")[0] for row in table]
    assert sorted(names) == ["&<b>.png", "doubt", "low.png", "none.png", "sure"]
    assert names.index("&<b>.png") < names.index("none.png")
    assert "5 images with" in result.stdout
    assert "the other 16 images are near-duplicates" in result.stdout
    # The pre-labels are the model's detections above its thresholds.
    parts = [datasets.load(output, split, classes=tiny_model.CLASSES) for split in ("train", "val")]
    found = {sample.path.name: len(sample.boxes) for part in parts for sample in part.samples}
    assert found.keys() == {row["file"] for row in table}
    assert found["doubt_clip_00.png"] == 3
    assert found["low.png"] == found["none.png"] == 0


def test_sheet_is_one_page_without_script(models: Path, pool: Path, tmp_path: Path) -> None:
    run(pool, "--count", 3, "--output", tmp_path / "next")
    page = (tmp_path / "next" / "why.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 3
    assert "&amp;&lt;b&gt;.png" in page
    assert "<b>.png" not in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_labelled_images_and_those_like_them_are_left_out(
    models: Path, pool: Path, tmp_path: Path
) -> None:
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    (labelled / "other-name.png").write_bytes((pool / "doubt" / "clip_04.png").read_bytes())
    output = tmp_path / "next"
    result = run(pool, "--labelled", labelled, "--output", output)
    assert result.exit_code == 0, result.output
    names = {row["file"].partition("_clip")[0] for row in rows(output)}
    assert names == {"&<b>.png", "low.png", "none.png", "sure"}


def test_images_whose_names_cannot_be_written_take_no_place(
    models: Path, pool: Path, tmp_path: Path
) -> None:
    bad = pool / "two\nlines.png"
    bad.write_bytes(scene((0, 0, 60), 128, 130, 132, 127))
    output = tmp_path / "next"
    result = run(pool, "--count", 2, "--output", output)
    assert result.exit_code == 2
    assert "its name has characters that label files cannot hold" in result.stderr
    assert len(rows(output)) == 2


def test_nothing_is_written_where_nothing_is_left(models: Path, pool: Path, tmp_path: Path) -> None:
    result = run(pool, "--labelled", pool, "--output", tmp_path / "next")
    assert result.exit_code == 2
    assert "its 21 images are near-duplicates of labelled ones; add others" in result.stderr
    assert not (tmp_path / "next").exists()


def test_disagreement_of_two_models_counts(models: Path, pool: Path, tmp_path: Path) -> None:
    other = tiny_model.save(tmp_path / "other", thresholds=Thresholds(score=0.5), white=128.0)
    alone = run(pool, "--count", 1, "--output", tmp_path / "alone")
    both = run(pool, "--count", 9, "--output", tmp_path / "both", "--against", other)
    assert alone.exit_code == both.exit_code == 0
    reasons = {row["file"]: row for row in rows(tmp_path / "both")}
    # Its score is twice as high: it finds the object of 100 / 255.
    assert " objects of --against alone" in reasons["low.png"]["reasons"]
    assert "alone" not in reasons["none.png"]["reasons"]
    (first,) = rows(tmp_path / "alone")
    assert "alone" not in first["reasons"]


def test_same_pool_and_model_give_the_same_choice(models: Path, pool: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run(pool, "--output", tmp_path / name, "--link", "--format", "coco").exit_code == 0
    for name in ("why.csv", "why.html", "labels.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert all(path.is_symlink() for path in (tmp_path / "a" / "data").iterdir())


def test_bad_images_and_places_are_named(models: Path, pool: Path, tmp_path: Path) -> None:
    (pool / "broken.png").write_bytes(b"no image")
    result = run(pool, "--output", tmp_path / "next")
    assert result.exit_code == 2
    assert "broken.png: not an accepted image type" in result.stderr
    assert len(rows(tmp_path / "next")) == 5
    result = run(pool, "--output", tmp_path / "next")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is not empty; name a new folder" in result.stderr
    for options in ((pool / "next",), (tmp_path / "l" / "next", "--labelled", tmp_path / "l")):
        (tmp_path / "l").mkdir(exist_ok=True)
        result = run(pool, "--output", *options)
        assert result.exit_code == 2
        assert "name a folder outside of it" in result.stderr
    only = tmp_path / "only"
    only.mkdir()
    (only / "broken.png").write_bytes(b"no image")
    result = run(only, "--output", tmp_path / "none")
    assert result.exit_code == 2
    assert "no image in it could be read" in result.stderr

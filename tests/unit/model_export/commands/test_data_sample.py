"""`data sample`: drawn images with labels that the other commands read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from model_export.data.datasets import load
from service.cli import retinaserve
from tests.conftest import ROOT


def call(*arguments: object) -> Result:
    return CliRunner().invoke(retinaserve, ["data", "sample", *(str(each) for each in arguments)])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "new" / "cells"
    result = call(folder, "--pictures", 6, "--size", "160x120")
    assert result.exit_code == 0, result.output
    assert f"6 images with 91 objects in {folder}" in result.stdout
    assert f"retinaserve data check {folder}" in result.stdout
    return folder


def test_images_and_labels_lie_side_by_side(drawn: Path) -> None:
    stems = [f"smear-{number:03}" for number in range(1, 7)]
    names = sorted(path.name for path in drawn.iterdir())
    assert names == sorted(f"{stem}.{ending}" for stem in stems for ending in ("jpg", "xml"))
    with Image.open(drawn / "smear-001.jpg") as image:
        assert image.size == (160, 120)


def test_they_are_read_as_they_were_drawn(drawn: Path) -> None:
    parts = [load(drawn, split) for split in ("train", "val")]
    samples = [sample for part in parts for sample in part.samples]
    assert {part.classes for part in parts} <= {
        ("RBC", "WBC", "Platelets"),
        ("RBC", "Platelets", "WBC"),
    }
    assert len(samples) == 6
    assert sum(len(sample.labels) for sample in samples) == 91
    for sample in samples:
        assert (sample.boxes >= 0).all()
        assert (sample.boxes[:, 2:] <= [160, 120]).all()
        assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()


def test_the_first_images_stay_when_there_are_more(drawn: Path, tmp_path: Path) -> None:
    call(tmp_path / "more", "--pictures", 7, "--size", "160x120")
    call(tmp_path / "other", "--pictures", 1, "--size", "160x120", "--seed", 1)
    for name in ("smear-006.jpg", "smear-006.xml"):
        assert (tmp_path / "more" / name).read_bytes() == (drawn / name).read_bytes()
    one, other = (
        np.asarray(Image.open(at / "smear-001.jpg")) for at in (drawn, tmp_path / "other")
    )
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size", "640"], "expected WIDTHxHEIGHT in pixels, such as 640x480"),
        (["--size", "640x32"], "both sides must be within 64 and 4096 pixels"),
        (["--pictures", "0"], "0 is not in the range"),
        (["--seed", "-1"], "-1 is not in the range"),
    ],
)
def test_what_cannot_be_drawn(tmp_path: Path, arguments: list[str], says: str) -> None:
    result = call(tmp_path / "cells", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "cells").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.jpg").write_bytes(b"mine")
    result = call(tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"retinaserve: error: {tmp_path} is not empty; name a new folder\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jpg"]


def test_it_needs_no_training_packages(tmp_path: Path) -> None:
    # A None in sys.modules makes the import fail as it does where the package is absent.
    code = (
        "import sys\n"
        "for name in ('torch', 'lightning', 'yaml', 'matplotlib', 'pycocotools', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        f"sys.argv = ['retinaserve', 'data', 'sample', {str(tmp_path)!r}, '--images', '1']\n"
        "from service.cli import main\n"
        "main()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

"""Class counts, box sizes, and which boxes no anchor reaches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from model_export.data.datasets import Dataset, Sample
from model_export.data.problems import Kind, Problem, problem_listing
from model_export.data.report import DataReport, summarise
from model_export.retinanet.anchors import AnchorConfig
from model_export.retinanet.matching import IouMatcher
from service.imaging.canvas import Buckets, Size
from tests.unit.model_export.voc_folder import load_voc


def boxes(*rows: tuple[float, float, float, float]) -> NDArray[np.float32]:
    return np.array(rows, dtype=np.float32).reshape(-1, 4)


def report_of(dataset: Dataset, canvas: Size) -> DataReport:
    return summarise(dataset, Buckets(sizes=(canvas,)), AnchorConfig(), IouMatcher())


# --- summary -------------------------------------------------------------------------------------


def dataset_of(*samples: Sample, problems: tuple[Problem, ...] = ()) -> Dataset:
    return Dataset(Path("data"), "train", ("cell", "speck", "unseen"), samples, problems)


def sample(rows: NDArray[np.float32], *labels: int) -> Sample:
    return Sample(Path("a.jpg"), Size(512, 512), rows, np.array(labels, dtype=np.int64))


def test_counts_sizes_and_warnings() -> None:
    # On a canvas of half the size: cells of 50 x 40, and a speck of 2 x 2 that nothing reaches.
    cells = boxes((0, 0, 100, 80), (200, 100, 300, 180))
    report = report_of(
        dataset_of(sample(cells, 0, 0), sample(boxes((40, 40, 44, 44)), 1), sample(boxes())),
        Size(256, 256),
    )
    assert (report.images, report.negatives) == (3, 1)
    cell, speck, unseen = report.classes
    assert (cell.objects, cell.images, cell.median, cell.unreached) == (2, 1, (50, 40), 0)
    assert (speck.objects, speck.images, speck.median, speck.unreached) == (1, 1, (2, 2), 1)
    assert (unseen.objects, unseen.images, unseen.unreached_share) == (0, 0, 0)
    text = str(report)
    assert "train: 3 images, 1 of them without objects; 3 objects" in text
    assert "cell          2         1    50 x 40 px      0.0 %" in text
    assert "warning: no 'unseen' in the split 'train'" in text
    assert "warning: no anchor reaches 100.0 % of speck;" in text


@pytest.mark.parametrize(("missed", "warned"), [(1, False), (2, True)])
def test_the_warning_begins_above_two_percent(missed: int, warned: bool) -> None:
    rows = boxes(*[(0, 0, 90, 90)] * (50 - missed), *[(0, 0, 2, 2)] * missed)
    data = Dataset(Path("data"), "train", ("cell",), (sample(rows, *[0] * 50),), ())
    assert bool(report_of(data, Size(512, 512)).warnings()) is warned


def test_the_warning_names_the_worst_classes_only() -> None:
    names = tuple(f"c{number}" for number in range(8))
    rows = boxes(*[(0, 0, 2, 2)] * 8)
    data = Dataset(Path("data"), "train", names, (sample(rows, *range(8)),), ())
    (warning,) = report_of(data, Size(512, 512)).warnings()
    assert "c4" in warning
    assert "c5" not in warning
    assert "and too much of 3 classes more" in warning


def test_classes_with_few_objects_are_named() -> None:
    names = ("common", "rare", "rarer", "fair", "unseen")
    counts = (101, 10, 1, 11)
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    rows = boxes(*[(0, 0, 90, 90)] * len(labels))
    data = Dataset(Path("data"), "train", names, (sample(rows, *labels),), ())
    _, warning = report_of(data, Size(512, 512)).warnings()
    assert "few objects beside the 101 of common: rarer (1), rare (10); label more" in warning


def test_the_report_as_values_names_each_object_that_is_missed() -> None:
    speck = boxes((40, 40, 44, 44), (0, 0, 100, 100), (8, 8, 10, 10))
    report = report_of(dataset_of(sample(boxes()), sample(speck, 1, 0, 1)), Size(256, 256))
    # The canvas is half the image: 2 x 2 and 1 x 1 px.
    assert [str(each) for each in report.missed] == [
        "a.jpg: 'speck' at 8,8,10,10, 1 x 1 px on the canvas",
        "a.jpg: 'speck' at 40,40,44,44, 2 x 2 px on the canvas",
    ]
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["unreached"][1] == {"picture": "a.jpg", "class": "speck", "box": [40, 40, 44, 44]}
    assert values["classes"]["speck"]["unreached"] == 2
    assert values["root_of_area"]["0.5"] == pytest.approx(2.0)
    assert report_of(dataset_of(sample(boxes())), Size(256, 256)).to_dict()["root_of_area"] == {}


def test_an_empty_class_list_of_images_without_objects_is_no_error() -> None:
    report = report_of(dataset_of(sample(boxes())), Size(256, 256))
    assert [item.objects for item in report.classes] == [0, 0, 0]
    assert "0 objects" in str(report)


def test_problems_are_counted_by_kind_and_listed() -> None:
    problems = [
        Problem(Path("a.xml"), number, "is nothing", fatal=False, kind=Kind.NO_AREA)
        for number in range(1, 31)
    ]
    problems.append(Problem(Path("b.xml"), None, "out", fatal=False, kind=Kind.OUTSIDE))
    lines = problem_listing(problems).splitlines()
    assert lines[:3] == [
        "30 x box without area, dropped",
        "1 x box outside the image, dropped",
        "a.xml:1: is nothing",
    ]
    assert lines[-1] == "... and 11 more"
    report = report_of(dataset_of(sample(boxes()), problems=tuple(problems)), Size(256, 256))
    assert str(report).endswith("\n".join(lines))


@pytest.mark.parametrize(
    ("canvas", "share"),
    [(Size(256, 320), 0.83), (Size(320, 416), 0.22), (Size(384, 512), 0.014)],
)
def test_platelets_need_a_canvas_that_reaches_them(bccd: Path, canvas: Size, share: float) -> None:
    """The figures that chose the bundled model's canvas."""
    report = report_of(load_voc(bccd, "train"), canvas)
    platelets = report.classes[2]
    assert (platelets.name, platelets.objects) == ("Platelets", 209)
    assert platelets.unreached_share == pytest.approx(share, abs=0.006)
    assert ("Platelets" in "".join(report.warnings())) is (canvas.width < 512)

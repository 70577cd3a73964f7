"""Class counts, box sizes, and which boxes no anchor reaches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model_export.data_report import DataReport, summarise, unreached
from model_export.datasets import Dataset, Sample, load_voc
from model_export.problems import Kind, Problem, problem_listing
from model_export.retinanet.anchors import AnchorConfig, canvas_anchors
from service.canvas import Buckets, Size


def boxes(*rows: tuple[float, float, float, float]) -> NDArray[np.float32]:
    return np.array(rows, dtype=np.float32).reshape(-1, 4)


def default_anchors(canvas: Size) -> NDArray[np.float32]:
    return np.asarray(canvas_anchors(AnchorConfig(), canvas.height, canvas.width).numpy())


def report_of(dataset: Dataset, canvas: Size) -> DataReport:
    return summarise(dataset, Buckets(sizes=(canvas,)), default_anchors)


# --- overlap with anchors ------------------------------------------------------------------------


def test_an_overlap_of_exactly_the_threshold_reaches() -> None:
    # 10 x 10 in 10 x 20 is an IoU of exactly 0.5.
    anchors = boxes((0, 0, 10, 20))
    found = unreached(boxes((0, 0, 10, 10), (0, 0, 10, 9.9), (0, 10, 10, 20)), anchors)
    assert found.tolist() == [False, True, False]


def test_hand_computed_overlaps() -> None:
    # Overlap 5 x 10 = 50 of a union of 150: 1/3. Beside it: 0.
    anchors = boxes((0, 0, 10, 10))
    shifted = boxes((5, 0, 15, 10), (10, 0, 20, 10))
    assert unreached(shifted, anchors, 0.33).tolist() == [False, True]
    assert unreached(shifted, anchors, 0.34).tolist() == [True, True]


def test_without_anchors_nothing_is_reached_and_without_boxes_nothing_is_asked() -> None:
    assert unreached(boxes((0, 0, 1, 1)), boxes()).tolist() == [True]
    assert unreached(boxes(), boxes((0, 0, 1, 1))).shape == (0,)


@st.composite
def _box_arrays(draw: st.DrawFn, most: int) -> NDArray[np.float32]:
    edge = st.floats(0, 100, width=32)
    side = st.floats(0.5, 100, width=32)
    rows = draw(st.lists(st.tuples(edge, edge, side, side), max_size=most))
    return boxes(*((x, y, x + width, y + height) for x, y, width, height in rows))


def brute_force(box: NDArray[np.float32], anchors: NDArray[np.float32]) -> float:
    best = 0.0
    x1, y1, x2, y2 = box.astype(float)
    for ax1, ay1, ax2, ay2 in anchors.astype(float):
        overlap = max(0.0, min(x2, ax2) - max(x1, ax1)) * max(0.0, min(y2, ay2) - max(y1, ay1))
        union = (x2 - x1) * (y2 - y1) + (ax2 - ax1) * (ay2 - ay1) - overlap
        best = max(best, overlap / union)
    return best


@given(some=_box_arrays(most=90), anchors=_box_arrays(most=12), threshold=st.floats(0.05, 0.95))
def test_shortcuts_change_nothing(
    some: NDArray[np.float32], anchors: NDArray[np.float32], threshold: float
) -> None:
    found = unreached(some, anchors, threshold)
    for box, missed in zip(some, found, strict=True):
        best = brute_force(box, anchors)
        if abs(best - threshold) > 1e-6:
            assert missed == (best < threshold)


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
    assert (report.pictures, report.negatives) == (3, 1)
    cell, speck, unseen = report.classes
    assert (cell.objects, cell.pictures, cell.median, cell.unreached) == (2, 1, (50, 40), 0)
    assert (speck.objects, speck.pictures, speck.median, speck.unreached) == (1, 1, (2, 2), 1)
    assert (unseen.objects, unseen.pictures, unseen.unreached_share) == (0, 0, 0)
    text = str(report)
    assert "train: 3 pictures, 1 of them without objects; 3 objects" in text
    assert "cell          2         1    50 x 40 px      0.0 %" in text
    assert "warning: no 'unseen' in the split 'train'" in text
    assert "warning: no anchor reaches 100.0 % of speck (IoU 0.5)" in text


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


def test_an_empty_class_list_of_pictures_without_objects_is_no_error() -> None:
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
        "1 x box outside the picture, dropped",
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

import dataclasses
import io
import json
from operator import ne
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model_export.data.datasets import Dataset
from model_export.evaluation.bootstrap import (
    average_precisions,
    calibration_errors,
    compare,
    mean_precisions,
)
from model_export.evaluation.coco_metrics import coco_metrics, match, overlaps
from model_export.evaluation.inference import evaluate_file
from model_export.evaluation.plots import open_font, precision_recall, save_plots
from model_export.evaluation.thresholds import operating_points
from service.errors import ArtifactError, DataError
from tests.unit.model_export.cases import (
    CLASSES,
    EMPTY,
    NOTHING,
    detections,
    measurement,
    random_case,
    sample,
    with_areas,
    with_crowds,
    with_difficult,
)
from tests.unit.model_export.voc_folder import load_voc

FULL = [0, 0, 100, 100]

# --- hand-computed -------------------------------------------------------------------------------


def test_one_box_hit_at_iou_06():
    # 100 x 60 of 100 x 100 is IoU 0.6: a hit at 0.50, 0.55 and 0.60 of the ten thresholds.
    found = [detections([[0, 0, 100, 60]], [0.9], [0])]
    result = coco_metrics([sample([FULL], [0])], found, CLASSES)
    assert result.ap50 == pytest.approx(1.0)
    assert result.ap75 == 0.0
    assert result.ap == pytest.approx(0.3)
    assert result.ar100 == pytest.approx(0.3)
    assert (result.images, result.boxes) == (1, 1)


def test_false_positive_above_the_hit_halves_precision():
    boxes = [[300, 300, 400, 400], FULL]
    found = [detections(boxes, [0.9, 0.8], [0, 0])]
    result = coco_metrics([sample([FULL], [0])], found, CLASSES)
    assert result.ap == pytest.approx(0.5)


def test_false_positive_below_the_hit_costs_nothing():
    boxes = [FULL, [300, 300, 400, 400]]
    found = [detections(boxes, [0.9, 0.8], [0, 0])]
    assert coco_metrics([sample([FULL], [0])], found, CLASSES).ap == pytest.approx(1.0)


def test_one_of_two_objects_found():
    truth = [sample([FULL, [200, 200, 300, 300]], [0, 0])]
    found = [detections([FULL], [0.9], [0])]
    # Precision 1 at the 51 recalls 0, 0.01 .. 0.50, and 0 at the other 50.
    assert coco_metrics(truth, found, CLASSES).ap == pytest.approx(51 / 101)


def test_second_detection_of_an_object_is_a_false_positive():
    truth = [sample([FULL, [200, 200, 300, 300]], [0, 0])]
    boxes = [FULL, FULL, [200, 200, 300, 300]]
    found = [detections(boxes, [0.9, 0.8, 0.7], [0, 0, 0])]
    # Precision 1 up to recall 0.5, then 2/3 up to recall 1.
    assert coco_metrics(truth, found, CLASSES).ap == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_wrong_class_is_a_miss_and_a_false_positive():
    truth = [sample([FULL, FULL], [0, 1])]
    found = [detections([FULL], [0.9], [1])]
    result = coco_metrics(truth, found, CLASSES)
    assert result.per_class["cell"].ap == 0.0
    assert result.per_class["speck"].ap == pytest.approx(1.0)
    assert result.ap == pytest.approx(0.5)


def test_sizes_are_of_the_original_image():
    # Areas 31^2, 33^2 and 97^2: the borders are 32^2 and 96^2.
    boxes = [[0, 0, 31, 31], [100, 100, 133, 133], [300, 300, 397, 397]]
    found = [detections(boxes[:2], [0.9, 0.8], [0, 0])]
    result = coco_metrics([sample(boxes, [0, 0, 0])], found, CLASSES)
    assert result.ap_small == pytest.approx(1.0)
    assert result.ap_medium == pytest.approx(1.0)
    assert result.ap_large == 0.0


def test_sizes_are_those_of_the_outlines():
    # Boxes of 100^2, which are large, around outlines that are not.
    boxes = [[0, 0, 100, 100], [200, 0, 300, 100], [400, 0, 500, 100], [0, 200, 100, 300]]
    truth = dataclasses.replace(
        sample(boxes, [0] * 4), annotated_areas=np.array([1024, 1025, 9217, np.nan])
    )
    result = coco_metrics([truth], [detections(boxes[:3], [0.9, 0.8, 0.7], [0] * 3)], CLASSES)
    assert (result.ap_small, result.ap_medium) == pytest.approx((1, 1))
    assert result.ar_large == 0.5


# --- objects marked difficult, as the VOC devkit judges ----------------------------------------

HARD = [200, 200, 300, 300]


@pytest.mark.parametrize(
    ("boxes", "ap50"),
    [
        pytest.param([FULL], 1.0, id="no miss"),
        pytest.param([HARD, FULL], 1.0, id="no false positive"),
        pytest.param([HARD, HARD, [200, 200, 300, 290], FULL], 1.0, id="however often"),
        pytest.param([[200, 200, 300, 249], FULL], 0.5, id="from an IoU of 0.5"),
        pytest.param([[210, 210, 230, 230], FULL], 0.5, id="unlike a crowd, which has it inside"),
        pytest.param([HARD], 0.0, id="no hit"),
    ],
)
def test_difficult_objects_count_neither_way(boxes, ap50):
    truth = dataclasses.replace(sample([FULL, HARD], [0, 0]), difficult=np.array([1]))
    found = detections(boxes, np.linspace(0.9, 0.1, len(boxes)), [0] * len(boxes))
    result = coco_metrics([truth], [found], CLASSES)
    assert result.ap50 == pytest.approx(ap50)
    assert result.boxes == result.per_class["cell"].count == 1
    (cell, _) = match([truth], [found], CLASSES)
    assert cell.objects.tolist() == [1]
    assert mean_precisions([cell], once([truth]))[0][1] == pytest.approx(result.ap50)


def test_an_object_is_hit_before_a_difficult_one_is_ignored():
    truth = dataclasses.replace(sample([[0, 0, 100, 90], FULL], [0, 0]), difficult=np.array([1]))
    result = coco_metrics([truth], [detections([FULL], [0.9], [0])], CLASSES)
    assert result.ap50 == pytest.approx(1.0)


def test_difficult_objects_of_another_class_excuse_nothing():
    truth = dataclasses.replace(sample([FULL, HARD], [0, 1]), difficult=np.array([1]))
    found = detections([HARD, FULL], [0.9, 0.8], [0, 0])
    result = coco_metrics([truth], [found], CLASSES)
    assert result.per_class["cell"].ap50 == pytest.approx(0.5)
    assert (result.per_class["speck"].ap, result.per_class["speck"].count) == (None, 0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_difficult_objects_without_detections_might_as_well_not_be_there(seed):
    truth, found = random_case(seed)
    hard = with_difficult(truth, seed)
    without = [sample(each.boxes[each.counted], each.labels[each.counted]) for each in hard]
    kept = []
    for each, answers in zip(hard, found, strict=True):
        ious = overlaps(answers.boxes, each.boxes[each.difficult])
        kept.append(answers.pick((ious < 0.5).all(axis=1)))
    for detected in (kept, [NOTHING] * len(kept)):
        before = coco_metrics(hard, detected, CLASSES)
        assert before == coco_metrics(without, detected, CLASSES)


# --- empty and crowded ---------------------------------------------------------------------------


def test_no_detections_at_all():
    result = coco_metrics([sample([FULL], [0]), EMPTY], [NOTHING, NOTHING], CLASSES)
    assert (result.ap, result.ap50, result.ar100) == (0.0, 0.0, 0.0)


def test_no_objects_at_all_is_none_not_nan():
    found = [detections([FULL], [0.9], [0]), NOTHING]
    result = coco_metrics([EMPTY, EMPTY], found, CLASSES)
    assert result.ap is None
    assert result.ar100 is None
    assert result.boxes == 0
    text = json.dumps(result.to_dict(), allow_nan=False)
    none = dict.fromkeys(("ap", "ap50", "ap75", "ar100"))
    assert json.loads(text)["per_class"]["cell"] == {**none, "count": 0}


def test_class_without_objects_is_left_out_of_the_mean():
    found = [detections([FULL, FULL], [0.9, 0.8], [0, 1])]
    result = coco_metrics([sample([FULL], [0])], found, CLASSES)
    assert result.ap == pytest.approx(1.0)
    assert result.per_class["speck"].ap is None
    assert result.per_class["cell"].count == 1


def test_detections_on_a_image_without_objects_are_false_positives():
    truth = [sample([FULL], [0]), EMPTY]
    found = [detections([FULL], [0.5], [0]), detections([FULL], [0.9], [0])]
    assert coco_metrics(truth, found, CLASSES).ap == pytest.approx(0.5)


def test_no_images():
    result = coco_metrics([], [], CLASSES)
    assert (result.ap, result.images, result.boxes) == (None, 0, 0)


def test_crowded_image_counts_the_best_hundred_of_each_class():
    x = np.arange(150, dtype=np.float32) % 30 * 20
    y = np.arange(150, dtype=np.float32) // 30 * 20
    boxes = np.stack([x, y, x + 18, y + 18], axis=1)
    truth = [sample(boxes, [0] * 150)]
    found = [detections(boxes, np.linspace(0.9, 0.1, 150), [0] * 150)]
    result = coco_metrics(truth, found, CLASSES)
    assert result.ar100 == pytest.approx(100 / 150)
    assert coco_metrics(truth, found, CLASSES, max_detections=150).ap == pytest.approx(1.0)


def test_counts_must_agree():
    with pytest.raises(ValueError, match="1 images, but detections of 2"):
        coco_metrics([EMPTY], [NOTHING, NOTHING], CLASSES)


def test_nothing_is_printed(capsys):
    truth, found = random_case(0)
    coco_metrics(truth, found, CLASSES)
    match(truth, found, CLASSES)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


# --- against pycocotools as its manual has it ----------------------------------------------------


def reference(truth, found, folder: Path) -> np.ndarray:
    """The twelve COCO figures, by way of JSON files, loadRes and summarize."""
    annotations = [
        {
            "id": 1000 * i + j + 1,
            "image_id": i,
            "category_id": int(label),
            "bbox": [float(b[0]), float(b[1]), float(b[2] - b[0]), float(b[3] - b[1])],
            "area": float((b[2] - b[0]) * (b[3] - b[1])),
            "iscrowd": crowd,
        }
        for i, each in enumerate(truth)
        for j, (b, label, crowd) in enumerate(
            [(b, k, 0) for b, k in zip(each.boxes.astype(float), each.labels, strict=True)]
            + [(b, k, 1) for b, k in zip(each.crowds.astype(float), each.crowd_labels, strict=True)]
        )
    ]
    outlines = {
        1000 * i + j + 1: float(area)
        for i, each in enumerate(truth)
        if each.annotated_areas is not None
        for j, area in enumerate(each.annotated_areas)
    }
    for each in annotations:
        each["area"] = outlines.get(each["id"], each["area"])
    answers = [
        {
            "image_id": i,
            "category_id": int(label),
            "bbox": [float(b[0]), float(b[1]), float(b[2] - b[0]), float(b[3] - b[1])],
            "score": float(score),
        }
        for i, each in enumerate(found)
        for b, label, score in zip(each.boxes.astype(float), each.labels, each.scores, strict=True)
    ]
    images = [{"id": i, "width": 640, "height": 480} for i in range(len(truth))]
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASSES)]
    (folder / "truth.json").write_text(
        json.dumps(
            {"info": {}, "images": images, "categories": categories, "annotations": annotations}
        )
    )
    (folder / "found.json").write_text(json.dumps(answers))
    coco = COCO(folder / "truth.json")
    run = COCOeval(coco, coco.loadRes(str(folder / "found.json")), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    return run.stats


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_agrees_with_pycocotools_on_json_files(seed, tmp_path):
    truth, found = random_case(seed)
    result = coco_metrics(truth, found, CLASSES)
    expected = reference(truth, found, tmp_path)
    assert 0.05 < result.ap < 0.95
    # Not approximately: to the last digit.
    assert twelve(result) == expected.tolist()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_agrees_with_pycocotools_where_areas_are_those_of_outlines(seed, tmp_path):
    alone, found = random_case(seed, images=20)
    truth = with_crowds(with_areas(alone, seed), seed)
    result = coco_metrics(truth, found, CLASSES)
    assert twelve(result) == reference(truth, found, tmp_path).tolist()
    boxes = coco_metrics(with_crowds(alone, seed), found, CLASSES)
    assert result.ap == boxes.ap
    assert result.ap_small != boxes.ap_small
    assert result.ar_medium != boxes.ar_medium


@pytest.mark.parametrize("seed", [4, 5])
def test_agrees_with_pycocotools_where_objects_are_not_told_apart(seed, tmp_path):
    alone, found = random_case(seed, images=20)
    truth = with_crowds(alone, seed)
    result = coco_metrics(truth, found, CLASSES)
    assert twelve(result) == reference(truth, found, tmp_path).tolist()
    assert result.ap > coco_metrics(alone, found, CLASSES).ap, "fewer false positives"
    assert result.boxes == sum(len(each.labels) for each in truth)
    # What is derived from the matches leaves the same detections out.
    matches = match(truth, found, CLASSES)
    assert any(each.ignored.any() for each in matches)
    means = mean_precisions(matches, once(truth))[0]
    assert means == pytest.approx((result.ap, result.ap50), abs=1e-12)
    for name, each in zip(CLASSES, matches, strict=True):
        mean = operating_points(each).interpolated().mean()
        assert mean == pytest.approx(result.per_class[name].ap50, abs=1e-12)


def test_agrees_with_pycocotools_where_sizes_and_classes_are_missing(tmp_path):
    # No large object, no detection of a speck, and an image with neither.
    truth = [sample([[0, 0, 30, 30], [50, 50, 100, 100]], [0, 1]), EMPTY]
    found = [detections([[0, 0, 30, 28]], [0.9], [0]), NOTHING]
    expected = [None if value == -1 else value for value in reference(truth, found, tmp_path)]
    assert twelve(coco_metrics(truth, found, CLASSES)) == expected
    assert expected[5] is None


def twelve(result) -> list[float | None]:
    """In the order of pycocotools' summary."""
    names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
    names += ["ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"]
    return [getattr(result, name) for name in names]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(8)))
def test_order_of_images_and_of_detections_does_not_matter(seed, order):
    truth, found = random_case(seed, images=8)
    before = coco_metrics(truth, found, CLASSES)
    turned = [each.pick(slice(None, None, -1)) for each in found]
    after = coco_metrics([truth[i] for i in order], [turned[i] for i in order], CLASSES)
    for name in ("ap", "ap50", "ap75", "ar100"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), abs=1e-12)


# --- matches -------------------------------------------------------------------------------------


def test_matches_by_hand():
    truth = [sample([FULL], [0]), EMPTY]
    found = [
        detections([[0, 0, 100, 60]], [0.5], [0]),
        detections([FULL], [0.75], [0]),
    ]
    cell, speck = match(truth, found, CLASSES)
    assert cell.scores.tolist() == [0.75, 0.5]
    assert cell.images.tolist() == [1, 0]
    assert cell.hits[:, 0].sum() == 0
    assert cell.hits[:, 1].tolist() == [True] * 3 + [False] * 7
    assert cell.objects.tolist() == [1, 0]
    assert speck.scores.shape == (0,)
    assert speck.hits.shape == (10, 0)


def test_mean_of_the_interpolated_precision_is_ap50():
    truth, found = random_case(11)
    result = coco_metrics(truth, found, CLASSES)
    for name, each in zip(CLASSES, match(truth, found, CLASSES), strict=True):
        mean = operating_points(each).interpolated().mean()
        assert mean == pytest.approx(result.per_class[name].ap50, abs=1e-12)


# --- comparison ----------------------------------------------------------------------------------


def test_average_precision_of_every_image_once_is_cocos():
    truth, found = random_case(4)
    result = coco_metrics(truth, found, CLASSES)
    matches = match(truth, found, CLASSES)
    means = mean_precisions(matches, once(truth))[0]
    assert means == pytest.approx((result.ap, result.ap50), abs=1e-12)
    for each, name in zip(matches, CLASSES, strict=True):
        own = average_precisions(each, once(truth))[0].mean()
        assert own == pytest.approx(result.per_class[name].ap)


def once(truth) -> np.ndarray:
    return np.ones((1, len(truth)), dtype=np.int64)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), drawn=st.lists(st.integers(0, 5), min_size=6, max_size=6))
def test_weights_equal_images_taken_several_times(seed, drawn):
    truth, found = random_case(seed, images=6)
    result = coco_metrics([truth[i] for i in drawn], [found[i] for i in drawn], CLASSES)
    # Among other draws, one of them of nothing.
    weights = np.array([[0] * 6, [1] * 6, np.bincount(drawn, minlength=6), [3] * 6])
    means = mean_precisions(match(truth, found, CLASSES), weights)
    assert np.isnan(means[0]).all()
    assert means[1] == pytest.approx(means[3], nan_ok=True)
    if result.ap is None:
        assert np.isnan(means[2]).all()
    else:
        assert means[2] == pytest.approx((result.ap, result.ap50), abs=1e-9)


def test_a_model_against_itself_is_exactly_zero():
    truth, found = random_case(5)
    outcome = compare(truth, found, found, CLASSES, resamples=50)
    for each in (outcome.ap, outcome.ap50, outcome.d_ece):
        assert (each.value, each.low, each.high) == (0.0, 0.0, 0.0)
        assert not each.beyond_chance


def test_difference_is_signed_and_repeatable():
    truth, found = random_case(6, images=30)
    worse = [each.pick(slice(None, None, 2)) for each in found]
    outcome = compare(truth, found, worse, CLASSES, resamples=200)
    better, other = coco_metrics(truth, found, CLASSES), coco_metrics(truth, worse, CLASSES)
    assert outcome.ap.value == pytest.approx(better.ap - other.ap)
    assert outcome.ap50.value == pytest.approx(better.ap50 - other.ap50)
    assert 0 < outcome.ap.low <= outcome.ap.value <= outcome.ap.high
    assert outcome.ap.beyond_chance
    assert compare(truth, found, worse, CLASSES, resamples=200) == outcome
    swapped = compare(truth, worse, found, CLASSES, resamples=200)
    assert swapped.ap.low == pytest.approx(-outcome.ap.high)


def test_calibration_is_compared_too():
    truth, found = random_case(9, images=30)
    # All of these scores are between 0 and 1, so halves are as well, and most detections hit.
    unsure = [detections(each.boxes, each.scores / 2, each.labels) for each in found]
    outcome = compare(truth, found, unsure, CLASSES, resamples=100).d_ece
    errors = [
        calibration_errors(match(truth, each, CLASSES), once(truth))[0] for each in (found, unsure)
    ]
    assert outcome.value == pytest.approx(errors[0] - errors[1])
    assert outcome.low <= outcome.value <= outcome.high


def test_nothing_detected_leaves_calibration_open():
    truth, found = random_case(9, images=5)
    outcome = compare(truth, found, [NOTHING] * 5, CLASSES, resamples=5)
    assert outcome.d_ece is None
    assert outcome.ap.value > 0


def test_comparison_without_objects_is_refused():
    with pytest.raises(DataError, match="no object"):
        compare([EMPTY], [NOTHING], [NOTHING], CLASSES, resamples=5)


# --- a file through the service's pipeline -------------------------------------------------------


def test_rectangles_are_found_where_they_are(rectangles_model, rectangles_data):
    dataset = load_voc(rectangles_data, "val", classes=("red", "green"))
    assert len({each.size for each in dataset.samples}) > 1, "several canvases are needed"
    evaluation, found = evaluate_file(rectangles_model, dataset, device="cpu", batch_size=3)
    assert evaluation.ap50 == pytest.approx(1.0)
    assert evaluation.images == len(dataset.samples) == len(found)
    for truth, each in zip(dataset.samples, found, strict=True):
        assert each.labels.tolist() == truth.labels.tolist()
        # The canvas is a little coarser than the image.
        assert np.abs(each.boxes - truth.boxes).max(initial=0) < 3
    timing = evaluation.timing
    assert min(timing.session, timing.batch, timing.pipeline) > 0
    assert timing.session <= timing.session_p95
    assert (timing.batch_size, timing.device) == (3, "cpu")


def test_batch_size_does_not_matter(rectangles_model, rectangles_data):
    dataset = load_voc(rectangles_data, "val", classes=("red", "green"))
    _, alone = evaluate_file(rectangles_model, dataset, device="cpu", batch_size=1)
    _, together = evaluate_file(rectangles_model, dataset, device="cpu", batch_size=4)
    for first, second in zip(alone, together, strict=True):
        np.testing.assert_array_equal(first.boxes, second.boxes)


def test_other_class_list_is_refused(rectangles_model, rectangles_data):
    dataset = load_voc(rectangles_data, "val", classes=("green", "red"))
    with pytest.raises(DataError, match="its classes are red, green, but"):
        evaluate_file(rectangles_model, dataset, device="cpu")


def test_truncated_image_is_named(rectangles_model, rectangles_data):
    dataset = load_voc(rectangles_data, "val", classes=("red", "green"))
    broken = dataset.samples[0].path
    broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(DataError, match=f"{broken.name}: the image does not decode"):
        evaluate_file(rectangles_model, dataset, device="cpu")


def test_missing_model_file(tmp_path):
    dataset = Dataset(tmp_path, "val", CLASSES, (EMPTY,), ())
    with pytest.raises(ArtifactError, match=r"none\.onnx: cannot be read"):
        evaluate_file(tmp_path / "none.onnx", dataset, device="cpu")


# --- figures -------------------------------------------------------------------------------------


def test_plots_are_written_whatever_classes_are_called(tmp_path):
    truth, found = random_case(7)
    # Between two dollars matplotlib reads a formula, and this one is wrong.
    measured = measurement(truth, found, ("$x_$", "_hidden"))
    paths = save_plots(measured, tmp_path / "new" / "plots", open_font())
    assert [path.name for path in paths] == [
        "precision-recall.png",
        "scores.png",
        "f1-threshold.png",
        "reliability.png",
        "confusion.png",
    ]
    for path in paths:
        with Image.open(path) as image:
            image.load()
            assert image.width > 400
            assert len(np.unique(np.asarray(image))) > 20


def test_plots_write_numbers_for_names_without_glyphs(tmp_path, monkeypatch):
    def plots(*names):
        measured = measurement(*random_case(7), names)
        paths = save_plots(measured, tmp_path, open_font())
        # The curve of reliability is of all classes and has no names.
        return [path.read_bytes() for path in paths if path.name != "reliability.png"]

    monkeypatch.delenv("RETINASERVE_FONT_FILE", raising=False)
    with_glyphs = plots("class 0", "Größe")
    assert plots("叉车", "Größe") == with_glyphs
    assert all(map(ne, plots("class 0", "class 1"), with_glyphs))
    serif = Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSerif.ttf")
    monkeypatch.setenv("RETINASERVE_FONT_FILE", str(serif))
    assert all(map(ne, plots("class 0", "Größe"), with_glyphs))


def test_curves_of_many_classes():
    many = tuple(f"class {i}" for i in range(14))
    precision_recall(measurement(*random_case(8), many), many).savefig(io.BytesIO())


def test_plots_of_nothing(tmp_path):
    assert len(save_plots(measurement([EMPTY], [NOTHING]), tmp_path, open_font())) == 5

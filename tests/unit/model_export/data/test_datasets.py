"""Sound folders become samples; every kind of bad data is found by file and line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from model_export.data.datasets import Dataset
from model_export.data.problems import Kind, Problem
from service.errors import DataError
from service.imaging.canvas import Size
from tests.unit.model_export.voc_folder import VocFolder, annotation, image, load_voc

CELL = ("cell", (10, 10, 40, 40))


@pytest.fixture
def folder(tmp_path: Path) -> VocFolder:
    return VocFolder(tmp_path / "data")


def refusal(root: Path, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        load_voc(root, split)
    return str(caught.value)


def only_problem(dataset: Dataset) -> Problem:
    assert len(dataset.problems) == 1, [str(problem) for problem in dataset.problems]
    assert not dataset.problems[0].fatal
    return dataset.problems[0]


# --- what is read --------------------------------------------------------------------------------


def test_boxes_are_taken_as_they_are_written(folder: VocFolder) -> None:
    folder.add("a", [("cell", (10.25, 11.5, 40, 41)), ("speck", (0, 0, 80, 60))])
    folder.list("train", "a")
    dataset = load_voc(folder.root, "train")
    assert dataset.classes == ("cell", "speck")
    (sample,) = dataset.samples
    assert sample.path == folder.images / "a.jpg"
    assert sample.size == Size(height=60, width=80)
    assert sample.boxes.dtype == np.float32
    assert sample.boxes.tolist() == [[10.25, 11.5, 40, 41], [0, 0, 80, 60]]
    assert sample.labels.dtype == np.int64
    assert sample.labels.tolist() == [0, 1]
    assert dataset.problems == ()


def test_images_without_objects_are_kept(folder: VocFolder) -> None:
    folder.add("a", [CELL])
    folder.add("b")
    folder.list("train", "a", "b")
    dataset = load_voc(folder.root, "train")
    assert [sample.boxes.shape for sample in dataset.samples] == [(1, 4), (0, 4)]
    assert dataset.samples[1].labels.shape == (0,)
    assert dataset.problems == ()


def test_classes_come_from_train_by_falling_count_then_name(folder: VocFolder) -> None:
    b, a, c = (("b", (1, 1, 9, 9)), ("a", (1, 1, 9, 9)), ("c", (1, 1, 9, 9)))
    folder.add("one", [b, a, c, c])
    folder.add("two", [b, b, b])
    folder.list("train", "one")
    folder.list("val", "two")
    for split in ("train", "val"):
        assert load_voc(folder.root, split).classes == ("c", "a", "b")


def test_given_classes_set_the_labels(folder: VocFolder) -> None:
    folder.add("a", [CELL])
    folder.list("val", "a")
    dataset = load_voc(folder.root, "val", classes=["speck", "cell"])
    assert dataset.classes == ("speck", "cell")
    assert dataset.samples[0].labels.tolist() == [1]


def test_parts_of_an_object_are_not_objects(folder: VocFolder) -> None:
    folder.add("a")
    part = (
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax>"
        "<ymax>2</ymax></bndbox></part></object>"
    )
    folder.annotate("a", annotation([CELL]).replace("</object>", part))
    folder.list("train", "a")
    dataset = load_voc(folder.root, "train")
    assert dataset.classes == ("cell",)
    assert dataset.samples[0].boxes.tolist() == [[10, 10, 40, 40]]


@pytest.mark.parametrize("size", [None, (0, 0)])
def test_an_annotation_without_a_size_is_trusted(
    folder: VocFolder, size: tuple[int, int] | None
) -> None:
    folder.add("a")
    folder.annotate("a", annotation([CELL], size=size))
    folder.list("train", "a")
    dataset = load_voc(folder.root, "train")
    assert len(dataset.samples) == 1
    assert dataset.problems == ()


def test_split_lines_may_carry_the_suffix_and_a_byte_order_mark(folder: VocFolder) -> None:
    folder.add("a b.c", [CELL])
    folder.lists.mkdir(parents=True)
    (folder.lists / "train.txt").write_bytes(b"\xef\xbb\xbfa b.c.jpg\r\n\r\n")
    assert len(load_voc(folder.root, "train").samples) == 1


def test_the_named_image_is_found_where_the_stem_differs(folder: VocFolder) -> None:
    image(folder.images / "scan 7.png")
    folder.annotate("a", annotation([CELL], filename="C:\\images\\scan 7.png"))
    folder.list("train", "a")
    assert load_voc(folder.root, "train").samples[0].path.name == "scan 7.png"


def test_of_two_images_of_one_stem_the_named_one_is_taken(folder: VocFolder) -> None:
    image(folder.images / "a.jpg")
    image(folder.images / "a.png")
    folder.annotate("a", annotation([CELL], filename="a.png"))
    folder.list("train", "a")
    assert load_voc(folder.root, "train").samples[0].path.name == "a.png"


def test_a_size_behind_a_long_profile_is_found(folder: VocFolder) -> None:
    folder.annotate("a", annotation([CELL]))
    Image.new("RGB", (80, 60)).save(folder.images / "a.jpg", icc_profile=bytes(400_000))
    folder.list("train", "a")
    assert load_voc(folder.root, "train").samples[0].size == Size(60, 80)


@pytest.mark.parametrize(
    ("written", "difficult"),
    [
        ("1", True),
        (" True\n", True),
        ("0", False),
        ("false", False),
        ("", False),
        ("Unspecified", False),
    ],
)
def test_difficult_objects_are_kept_and_told(
    folder: VocFolder, written: str, difficult: bool
) -> None:
    folder.add("a", [CELL])
    text = annotation([CELL, ("cell", (50, 10, 70, 40)), CELL], difficult=written)
    folder.annotate("a", text.replace(f">{written}<", ">0<", 1))
    folder.list("train", "a")
    dataset = load_voc(folder.root, "train")
    (sample,) = dataset.samples
    assert len(sample.boxes) == 2, "the third is the first again"
    assert sample.difficult.tolist() == [1] * difficult
    assert sample.counted.tolist() == [True, not difficult]
    notes = [str(each) for each in dataset.problems if each.kind is Kind.DIFFICULT]
    told = f"{folder.root}: 1 objects are marked difficult, the first in a.jpg: trained on; in "
    assert notes == [f"{told}evaluation neither they nor their detections count"] * difficult


def test_a_rotated_object_may_be_difficult(folder: VocFolder) -> None:
    folder.add("a")
    box = "<cx>40</cx><cy>30</cy><w>20</w><h>10</h><angle>0.1</angle>"
    item = f"<object><name>cell</name><difficult>1</difficult><robndbox>{box}</robndbox></object>"
    folder.annotate("a", f"<annotation>{item}</annotation>")
    folder.list("train", "a")
    assert load_voc(folder.root, "train").samples[0].difficult.tolist() == [0]


# --- splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False])
def test_without_lists_a_fifth_is_held_out_for_good(tmp_path: Path, flat: bool) -> None:
    folder = VocFolder(tmp_path / "data")
    for number in range(60):
        folder.add(f"cell_{number}", [CELL])
    root = folder.root
    if flat:
        root = tmp_path / "flat"
        root.mkdir()
        for path in [*folder.annotations.iterdir(), *folder.images.iterdir()]:
            path.rename(root / path.name)

    def stems(split: str) -> set[str]:
        return {sample.path.stem for sample in load_voc(root, split).samples}

    train, val = stems("train"), stems("val")
    assert len(train) + len(val) == 60
    assert not train & val
    assert 6 <= len(val) <= 20
    where = root if flat else folder.images
    image(where / "another.jpg")
    ((root if flat else folder.annotations) / "another.xml").write_text(annotation([CELL]))
    assert stems("train") - {"another"} == train
    assert stems("val") - {"another"} == val


@pytest.mark.parametrize("count", [2, 3, 4])
def test_both_hashed_splits_have_a_image_however_few(folder: VocFolder, count: int) -> None:
    for number in range(count):
        folder.add(f"p{number}", [CELL])
    sizes = [len(load_voc(folder.root, split).samples) for split in ("train", "val")]
    assert min(sizes) >= 1
    assert sum(sizes) == count


def test_one_image_cannot_be_split(folder: VocFolder) -> None:
    folder.add("a", [CELL])
    assert len(load_voc(folder.root, "train").samples) == 1
    message = refusal(folder.root, "val")
    assert "at least 2 annotated images are needed, 1 found" in message


def test_hashed_splits_agree_on_a_class_that_only_one_has(folder: VocFolder) -> None:
    for number in range(12):
        folder.add(f"p{number}", [CELL, (f"rare{number}", (1, 1, 9, 9))])
    train, val = (load_voc(folder.root, split) for split in ("train", "val"))
    assert train.classes == val.classes
    assert len(train.classes) == 13


def test_images_without_an_annotation_are_left_out_and_listed(folder: VocFolder) -> None:
    folder.add("a", [CELL])
    folder.add("b", [CELL])
    image(folder.images / "c.jpg")
    problem = only_problem(load_voc(folder.root, "train"))
    assert problem.kind is Kind.UNLABELLED
    assert str(problem).startswith(f"{folder.images / 'c.jpg'}: no annotation c.xml")


def test_a_line_that_comes_twice_counts_once(folder: VocFolder) -> None:
    folder.add("a", [CELL])
    path = folder.list("train", "a", "", "a")
    dataset = load_voc(folder.root, "train")
    assert len(dataset.samples) == 1
    assert str(only_problem(dataset)) == f"{path}:3: a is listed twice"


def test_a_image_in_both_splits_is_listed(folder: VocFolder) -> None:
    folder.add("a", [CELL])
    folder.add("b", [CELL])
    folder.list("train", "a")
    path = folder.list("val", "b", "a")
    problem = only_problem(load_voc(folder.root, "val"))
    assert problem.kind is Kind.LEAKED
    assert str(problem).startswith(f"{path}:2: a is in train.txt too")


# --- what is dropped -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "kind", "what"),
    [
        ((20, 20, 20, 20), Kind.NO_AREA, "is 0 x 0 px"),
        ((20, 20, 10, 30), Kind.NO_AREA, "is -10 x 10 px"),
        ((0.1, 0.2, 0.5, 0.6), Kind.NO_AREA, "in pixels"),
        ((80, 10, 90, 20), Kind.OUTSIDE, "lies outside the image of 80 x 60"),
        ((-30, -30, -10, -10), Kind.OUTSIDE, "lies outside"),
        ((1e30, 0, 2e30, 10), Kind.OUTSIDE, "lies outside"),
    ],
)
def test_boxes_that_hold_nothing_are_dropped(
    folder: VocFolder, box: tuple[float, float, float, float], kind: Kind, what: str
) -> None:
    folder.add("a", [CELL, ("cell", box)])
    folder.list("train", "a")
    dataset = load_voc(folder.root, "train")
    assert dataset.samples[0].boxes.tolist() == [[10, 10, 40, 40]]
    problem = only_problem(dataset)
    assert problem.kind is kind
    assert problem.line == 13
    assert what in problem.what


@pytest.mark.parametrize(
    ("box", "clipped", "listed"),
    [
        ((-1, 0, 20, 61), (0, 0, 20, 60), False),
        ((0, 0, 82, 60), (0, 0, 80, 60), False),
        ((-3, 0, 20, 60), (0, 0, 20, 60), True),
        ((10, 20, 500, 90), (10, 20, 80, 60), True),
    ],
)
def test_boxes_that_reach_out_are_clipped(
    folder: VocFolder,
    box: tuple[float, float, float, float],
    clipped: tuple[float, float, float, float],
    listed: bool,
) -> None:
    folder.add("a", [("cell", box)])
    folder.list("train", "a")
    dataset = load_voc(folder.root, "train")
    assert dataset.samples[0].boxes.tolist() == [list(clipped)]
    assert [problem.kind for problem in dataset.problems] == ([Kind.CLIPPED] if listed else [])


def test_a_image_of_another_size_than_labelled_is_left_out(folder: VocFolder) -> None:
    folder.add("a", [CELL])
    folder.add("b", [CELL])
    path = folder.annotate("b", annotation([CELL], size=(640, 480)))
    folder.list("train", "a", "b")
    dataset = load_voc(folder.root, "train")
    assert [sample.path.stem for sample in dataset.samples] == ["a"]
    problem = only_problem(dataset)
    assert (problem.file, problem.line, problem.kind) == (path, 2, Kind.WRONG_SIZE)
    assert "labelled at 640 x 480, but the image b.jpg is 80 x 60" in problem.what


@pytest.mark.parametrize(("size", "kept"), [((60, 80), 2), ((80, 60), 1)])
def test_images_turned_by_exif_need_labels_of_the_upright_one(
    folder: VocFolder, size: tuple[int, int], kept: int
) -> None:
    folder.add("a", [CELL])
    image(folder.images / "b.jpg", orientation=6)
    folder.annotate("b", annotation([CELL], size=size))
    folder.list("train", "a", "b")
    dataset = load_voc(folder.root, "train")
    assert len(dataset.samples) == kept
    if kept == 2:
        assert dataset.samples[1].size == Size(height=80, width=60)
    else:
        assert "EXIF orientation" in only_problem(dataset).what


# --- what stops training -------------------------------------------------------------------------


def test_a_missing_image_stops(folder: VocFolder) -> None:
    folder.add("a", [CELL])
    path = folder.annotate("b", annotation([CELL]))
    folder.list("train", "a", "b")
    assert f"{path}:1: no image 'b.jpg' (or .png, .webp); " in refusal(folder.root)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"),
        (b"not an image", "not an accepted image type"),
        (b"GIF89a....", "not an accepted image type"),
        (b"\xff\xd8\xff\xe0 then nothing", "does not decode"),
    ],
)
def test_an_unreadable_image_stops(folder: VocFolder, content: bytes, what: str) -> None:
    folder.add("a", [CELL])
    (folder.images / "a.jpg").write_bytes(content)
    folder.list("train", "a")
    message = refusal(folder.root)
    assert f"{folder.images / 'a.jpg'}: " in message
    assert what in message


def test_folder_named_like_an_image_is_no_image(folder: VocFolder) -> None:
    folder.add("b", [CELL])
    folder.annotate("a", annotation([CELL]))
    (folder.images / "a.jpg").mkdir()
    folder.list("train", "a", "b")
    assert "a.xml:1: no image 'a.jpg'" in refusal(folder.root)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", 1, "not well-formed XML (no element found"),
        ("<annotation>\n<object>\n</annotation>", 3, "mismatched tag"),
        ("just text", 1, "not well-formed XML"),
        ("<html>\n</html>", 1, "the root element is <html>, not <annotation>"),
        (annotation([("", (1, 1, 9, 9))]), 3, "the object has no <name>"),
        ("<annotation>\n<object>\n<name>x</name>\n</object></annotation>", 2, "no <bndbox>"),
        (annotation([CELL]).replace("<ymax>40</ymax>", ""), 6, "<bndbox> has no <ymax>"),
        (annotation([("x", (1, 1, float("nan"), 9))]), 7, "<xmax> is 'nan'"),
        (annotation([("x", (1, 1, 9, 9))]).replace(">9<", ">nine<"), 7, "it must be a number"),
        (annotation([CELL], difficult="2"), 5, "<difficult> is '2'; it must be 0 or 1"),
        (annotation([CELL], difficult="maybe"), 5, "<difficult> is 'maybe'"),
        ("<?xml version='1.0' encoding='klingon'?>\n<annotation/>", 1, "unknown"),
    ],
)
def test_an_annotation_that_is_none_stops(
    folder: VocFolder, text: str, line: int, what: str
) -> None:
    folder.add("a", [CELL])
    folder.add("b")
    path = folder.annotate("b", text)
    folder.list("train", "a", "b")
    message = refusal(folder.root)
    assert f"{path}:{line}: " in message
    assert what in message


def test_folder_named_like_an_annotation_is_none(folder: VocFolder) -> None:
    folder.add("a", [CELL])
    (folder.annotations / "b.xml").mkdir()
    path = folder.list("train", "a", "b")
    assert f"{path}:2: no image and no annotation is named 'b'" in refusal(folder.root)


def test_entities_do_not_explode(folder: VocFolder) -> None:
    levels = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * 10}">' for n in range(9))
    bomb = f'<!DOCTYPE annotation [<!ENTITY e0 "lol">{levels}]><annotation><filename>&e9;'
    folder.add("a", [CELL])
    folder.annotate("a", f"{bomb}</filename></annotation>")
    folder.list("train", "a")
    assert "not well-formed XML" in refusal(folder.root)


def test_a_class_that_train_does_not_have_stops(folder: VocFolder) -> None:
    folder.add("a", [CELL, ("speck", (1, 1, 9, 9))])
    folder.add("b", [CELL, ("Cel", (1, 1, 9, 9)), ("zebra", (1, 1, 9, 9))])
    folder.list("train", "a")
    folder.list("val", "b")
    message = refusal(folder.root, "val")
    xml = folder.annotations / "b.xml"
    assert f"{xml}:11: unknown class 'Cel'; known: cell, speck; did you mean 'cell'?" in message
    assert f"{xml}:18: unknown class 'zebra'; known: cell, speck; rename it" in message


def test_a_line_that_names_nothing_stops(folder: VocFolder) -> None:
    folder.add("a", [CELL])
    image(folder.images / "unlabelled.jpg")
    path = folder.list("train", "a", "gone", "unlabelled", "x" * 5000)
    message = refusal(folder.root)
    assert f"{path}:2: no image and no annotation is named 'gone'" in message
    assert f"{path}:3: no annotation is named 'unlabelled'" in message
    assert f"{path}:4: " in message
    assert len(message) < 2000


def test_a_split_file_of_rubbish_stops(folder: VocFolder) -> None:
    folder.add("a", [CELL])
    folder.list("train", "a")
    (folder.lists / "train.txt").write_bytes(os.urandom(2000) + b"\0/../\xff")
    assert "no image and no annotation" in refusal(folder.root)


def test_every_problem_is_named_up_to_twenty(folder: VocFolder) -> None:
    for number in range(30):
        folder.annotate(f"p{number:02}", annotation([CELL]))
    image(folder.images / "other.jpg")
    folder.list("train", *(f"p{number:02}" for number in range(30)))
    message = refusal(folder.root)
    assert "30 problems stop training" in message
    assert message.count("no image 'p") == 20
    assert message.endswith("... and 10 more")


@pytest.mark.parametrize(
    ("split", "what"),
    [("val", "no such split file ImageSets/Main/val.txt (splits"), ("empty", "names no image")],
)
def test_a_split_without_entries_stops(folder: VocFolder, split: str, what: str) -> None:
    folder.add("a", [CELL])
    folder.list("train", "a")
    if split == "empty":
        folder.list("empty", "", "  ")
    assert what in refusal(folder.root, split)


def test_an_unknown_split_of_a_folder_without_lists_stops(folder: VocFolder) -> None:
    folder.add("a", [CELL])
    assert "no split 'test'; without ImageSets/Main" in refusal(folder.root, "test")


def test_a_split_of_which_nothing_is_left_stops(folder: VocFolder) -> None:
    folder.add("a", [CELL])
    folder.annotate("a", annotation([CELL], size=(1, 1)))
    folder.list("train", "a")
    message = refusal(folder.root)
    assert "every image of the split 'train' is left out" in message
    assert "labelled at 1 x 1" in message


def test_a_train_split_without_objects_stops(folder: VocFolder) -> None:
    folder.add("a")
    folder.list("train", "a")
    assert "no object is labelled in the train split" in refusal(folder.root)


def test_folders_that_are_no_data_set_stop(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "missing")
    file = tmp_path / "file"
    file.write_text("")
    assert "no such folder" in refusal(file)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no annotations here; expected Annotations/*.xml" in refusal(empty)
    half = tmp_path / "half"
    (half / "Annotations").mkdir(parents=True)
    assert "no annotations here; expected Annotations/*.xml" in refusal(half)
    (half / "Annotations" / "a.xml").write_text(annotation([CELL]))
    assert "no images here; it needs JPEG, PNG or WebP files" in refusal(half)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rubbish=st.binary(max_size=400),
    position=st.integers(0, 600),
    removed=st.integers(0, 300),
)
def test_a_spoilt_annotation_never_ends_in_a_traceback(
    tmp_path: Path, rubbish: bytes, position: int, removed: int
) -> None:
    root = tmp_path / "flat"
    root.mkdir(exist_ok=True)
    for stem in ("a", "b"):
        image(root / f"{stem}.jpg")
        (root / f"{stem}.xml").write_text(annotation([CELL]))
    sound = annotation([CELL, ("speck", (1, 2, 30, 40))]).encode()
    spoilt = sound[:position] + rubbish + sound[position + removed :]
    (root / "a.xml").write_bytes(spoilt)
    for split in ("train", "val"):
        try:
            dataset = load_voc(root, split)
        except DataError as error:
            assert "a.xml" in str(error)  # noqa: PT017 - which of the two is drawn, not fixed
        else:
            assert dataset.samples


# --- real data -----------------------------------------------------------------------------------


def test_bccd_is_read_whole(bccd: Path) -> None:
    train, val = (load_voc(bccd, split) for split in ("train", "val"))
    assert train.classes == val.classes == ("RBC", "WBC", "Platelets")
    assert [len(dataset.samples) for dataset in (train, val)] == [205, 87]
    assert np.bincount(np.concatenate([item.labels for item in train.samples])).tolist() == [
        2381,
        214,
        209,
    ]
    for dataset, name in ((train, "BloodImage_00343.xml:55"), (val, "BloodImage_00338.xml:163")):
        problem = only_problem(dataset)
        assert problem.kind is Kind.NO_AREA
        assert name in str(problem)


def test_fractional_coordinates_are_kept(fod_a_mini: Path) -> None:
    val = load_voc(fod_a_mini, "val")
    assert (len(val.samples), len(val.classes), val.problems) == (535, 31, ())
    edges = np.concatenate([sample.boxes for sample in val.samples])
    assert np.mean(edges % 1 > 0) > 0.5

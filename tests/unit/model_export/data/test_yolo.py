"""YOLO folders in their usual layouts, and every way in which labels and YAML can be broken."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_export.data.datasets import Dataset, load, split_names
from model_export.data.problems import Kind, Problem
from service.errors import DataError
from service.imaging.canvas import Size
from tests.unit.model_export.voc_folder import image

CAT = "0 0.5 0.5 0.25 0.5"  # 30..50 x 15..45 of 80 x 60


def add(root: Path, place: str, text: str | bytes | None = CAT, **options: Any) -> Path:
    """An image such as images/train/a and its labels; the path of the labels."""
    path = root / f"{place}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    image(path, **options)
    label = root / f"{place.replace('images', 'labels', 1)}.txt"
    if text is not None:
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_bytes(text.encode() if isinstance(text, str) else text)
    return label


def describe(root: Path, **values: Any) -> Path:
    """data.yaml; the value None leaves a key out."""
    usual = {"train": "images/train", "val": "images/val", "names": ["cat", "dog"]}
    kept = {key: value for key, value in (usual | values).items() if value is not None}
    path = root / "data.yaml"
    path.write_text(yaml.safe_dump(kept, sort_keys=False))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One image of a cat in each split."""
    describe(tmp_path)
    add(tmp_path, "images/train/a")
    add(tmp_path, "images/val/b")
    return tmp_path


def refusal(root: Path, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        load(root, split)
    return str(caught.value)


def of_kind(dataset: Dataset, kind: Kind) -> Problem:
    (problem,) = [each for each in dataset.problems if each.kind is kind]
    assert not problem.fatal
    return problem


# --- what is read --------------------------------------------------------------------------------


def test_fractions_become_pixels(root: Path) -> None:
    add(root, "images/train/a", f"{CAT}\n\n  1 0.5 .5 1 1e0  \n")
    dataset = load(root, "train")
    assert dataset.classes == ("cat", "dog")
    (sample,) = dataset.samples
    assert (sample.path, sample.size) == (root / "images" / "train" / "a.jpg", Size(60, 80))
    assert sample.boxes.tolist() == [[30, 15, 50, 45], [0, 0, 80, 60]]
    assert sample.labels.tolist() == [0, 1]


def test_fractions_are_of_the_upright_image(root: Path) -> None:
    add(root, "images/train/a", orientation=6)
    (sample,) = load(root, "train").samples
    assert sample.size == Size(80, 60)
    assert sample.boxes.tolist() == [[22.5, 20, 37.5, 60]]


@pytest.mark.parametrize(
    ("line", "box"),
    [
        ("0 0.25 0.5 0.75 0.25 0.5 1", [20, 15, 60, 60]),
        # Four corners of a turned box.
        ("0 0.5 0 1 0.5 0.5 1 0 0.5", [0, 0, 80, 60]),
    ],
)
def test_outlines_become_the_boxes_around_them(root: Path, line: str, box: list[float]) -> None:
    add(root, "images/train/a", line)
    assert load(root, "train").samples[0].boxes.tolist() == [box]


def test_keypoints_are_passed_over(root: Path) -> None:
    describe(root, kpt_shape=[2, 2])
    add(root, "images/train/a", f"{CAT} 0.1 0.2 0.3 0.4")
    assert load(root, "train").samples[0].boxes.tolist() == [[30, 15, 50, 45]]


def test_a_image_without_labels_is_a_negative(root: Path) -> None:
    add(root, "images/train/empty", "\n")
    add(root, "images/train/none", None)
    dataset = load(root, "train")
    assert [len(sample.boxes) for sample in dataset.samples] == [1, 0, 0]
    note = of_kind(dataset, Kind.NEGATIVE)
    assert str(note).startswith(f"{root / 'labels' / 'train'}: no label file for 1 images")
    assert "none.txt" in note.what


@pytest.mark.parametrize(
    "names", [["cat", "dog", "bird"], {0: "cat", 1: "dog", 2: "bird"}, {5: "dog", 0: "cat"}]
)
def test_names_are_a_list_or_a_mapping(root: Path, names: Any) -> None:
    describe(root, names=names, nc=len(names))
    dog = 5 if 5 in names else 1
    add(root, "images/train/a", f"{CAT}\n{dog} .5 .5 .1 .1\n{dog}.0 .2 .5 .1 .1")
    dataset = load(root, "train")
    assert dataset.classes == ("dog", "cat")
    unused = [each for each in dataset.problems if each.kind is Kind.UNUSED_CLASS]
    assert ["bird" in str(each) for each in unused] == [True] * ("bird" in str(names))


def test_names_that_are_numbers(root: Path) -> None:
    describe(root, names=[7, 8])
    assert load(root, "train").classes == ("7",)


# --- layouts -------------------------------------------------------------------------------------


def test_roboflow_writes_folders_that_are_one_too_high(tmp_path: Path) -> None:
    describe(tmp_path, train="../train/images", val="../valid/images", roboflow={"license": "MIT"})
    add(tmp_path, "train/images/a")
    add(tmp_path, "valid/images/b")
    for split, stem in (("train", "a"), ("val", "b")):
        dataset = load(tmp_path, split)
        assert [sample.path.stem for sample in dataset.samples] == [stem]
        assert len(dataset.samples[0].boxes) == 1


@pytest.mark.parametrize("path", [".", "inner", "../datasets/elsewhere", "/nowhere/at/all"])
def test_path_may_be_of_another_machine(tmp_path: Path, path: str) -> None:
    inner = tmp_path / "inner" if path == "inner" else tmp_path
    inner.mkdir(exist_ok=True)
    describe(tmp_path, path=path)
    add(inner, "images/train/a")
    add(inner, "images/val/b")
    assert len(load(tmp_path, "val").samples[0].boxes) == 1


def test_a_split_may_be_several_folders(root: Path) -> None:
    add(root, "images/more/deep/c")
    describe(root, train=["images/train", "images/more"])
    assert [sample.path.stem for sample in load(root, "train").samples] == ["a", "c"]


def test_a_split_may_be_a_list_of_images(root: Path) -> None:
    add(root, "images/train/c")
    add(root, "images/train/d")
    (root / "train.txt").write_text("./images/train/c.jpg\n\nimages/train/a.jpg\n")
    describe(root, train="train.txt")
    dataset = load(root, "train")
    assert [sample.path.stem for sample in dataset.samples] == ["c", "a"]
    assert [len(sample.boxes) for sample in dataset.samples] == [1, 1]


@pytest.mark.parametrize("place", ["classes.txt", "labels/classes.txt"])
@pytest.mark.parametrize("layout", ["images/{}/", "{}/images/"])
def test_without_a_yaml_the_usual_names_are_found(tmp_path: Path, place: str, layout: str) -> None:
    add(tmp_path, layout.format("train") + "a")
    add(tmp_path, layout.format("val") + "b")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("cat\ndog\n")
    assert set(split_names(tmp_path)) == {"train", "val"}
    assert [sample.path.stem for sample in load(tmp_path, "val").samples] == ["b"]


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("folder", ["images/", ""])
def test_one_folder_is_split_by_the_hash_of_the_stem(
    tmp_path: Path, declared: bool, folder: str
) -> None:
    for number in range(30):
        add(tmp_path, f"{folder}image{number}")
    if declared:
        describe(tmp_path, train=folder or ".", val=None)
    else:
        (tmp_path / "classes.txt").write_text("cat\ndog\n")
    train, val = (load(tmp_path, split) for split in ("train", "val"))
    assert len(train.samples) + len(val.samples) == 30
    assert 1 <= len(val.samples) <= 12
    assert all(len(sample.boxes) == 1 for sample in train.samples + val.samples)
    assert train.classes == val.classes == ("cat",)
    assert "no split 'test'; without a val folder" in refusal(tmp_path, "test")


def test_images_in_the_path_above_the_data_are_no_images_folder(tmp_path: Path) -> None:
    root = tmp_path / "images" / "cats"
    add(root, "a")
    (root / "a.txt").write_text(CAT)
    (root / "classes.txt").write_text("cat")
    assert len(load(root, "train").samples[0].boxes) == 1


def test_the_same_folder_for_train_and_val_leaks(root: Path) -> None:
    describe(root, val="images/train")
    leak = of_kind(load(root, "val"), Kind.LEAKED)
    assert str(leak).startswith(f"{root / 'images' / 'train' / 'a.jpg'}: a.jpg is in train too")


def test_a_copy_of_a_image_leaks_and_one_of_the_same_name_does_not(root: Path) -> None:
    add(root, "images/val/a", orientation=6)
    assert Kind.LEAKED not in [each.kind for each in load(root, "val").problems]
    add(root, "images/val/a")
    (root / "val.txt").write_text("images/val/b.jpg\nimages/val/a.jpg\n")
    describe(root, val="val.txt")
    leak = of_kind(load(root, "val"), Kind.LEAKED)
    assert str(leak).startswith(f"{root / 'val.txt'}:2: a.jpg is the same image as")


def test_a_image_that_is_listed_twice_counts_once(root: Path) -> None:
    (root / "train.txt").write_text("images/train/a.jpg\n./images/train/a.jpg\n")
    describe(root, train="train.txt")
    dataset = load(root, "train")
    assert len(dataset.samples) == 1
    assert of_kind(dataset, Kind.TWICE)


# --- what is broken: labels ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("2 .5 .5 .1 .1", "class 2 is not among the names in data.yaml (0 cat, 1 dog); correct it"),
        ("-1 .5 .5 .1 .1", "class -1 is not among the names"),
        ("cat .5 .5 .1 .1", "'cat' is not a class index"),
        ("0.5 .5 .5 .1 .1", "'0.5' is not a class index"),
        ("nan .5 .5 .1 .1", "'nan' is not a class index"),
        ("inf .5 .5 .1 .1", "'inf' is not a class index"),
        ("1e400 .5 .5 .1 .1", "'1e400' is not a class index"),
        ("9" * 400 + " .5 .5 .1 .1", "is not a class index"),
        ("0", "1 values; a line is class x y width height"),
        ("0 .5 .5 .1", "4 values; a line is"),
        ("0 .5 .5 .1 .1 .9", "six values; a line is class x y width height, the last four as"),
        ("0 .1 .1 .2 .2 .3 .3 .4", "8 values; a line is"),
        ("0,.5,.5,.1,.1", "is not a class index"),
        ("0 .5 .5 nan .1", "'nan' is not a number"),
        ("0 .5 .5 inf .1", "'inf' is not a number"),
        ("0 .5 .5 wide .1", "'wide' is not a number"),
        ("0 40 30 20 30", "40 is not a fraction of the image's side; divide pixels by its width"),
        ("0 .5 .5 20 .1", "20 is not a fraction"),
        ("0 -.2 .5 .1 .1", "-0.2 is not a fraction"),
        ("0 .5 .5 .7 2 .1 .1", "2 is not a fraction"),
        ("0 .5 .5 -.7 .2 .1 .1", "-0.7 is not a fraction"),
        ("0 .5 .5 .1 .1 # Küche".encode("cp1252"), "# Küche' in cp1252"),
        (os.urandom(400) + b"\xff", "not text"),
        ("<annotation>", "'<annotation>' is not a class index"),
    ],
)
def test_a_line_that_is_none_stops(root: Path, line: str | bytes, what: str) -> None:
    text = line if isinstance(line, bytes) else f"{CAT}\n{line}\n"
    path = add(root, "images/train/a", text)
    message = refusal(root)
    assert what in message
    assert f"{path}:{1 if isinstance(line, bytes) else 2}: " in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("line", "kind", "what"),
    [
        ("0 .5 .5 0 .5", Kind.NO_AREA, "is 0 x 30 px; draw it anew"),
        ("0 .5 .5 -.1 .5", Kind.NO_AREA, "is -8 x 30 px"),
        ("0 .2 .2 .2 .2 .2 .2", Kind.NO_AREA, "is 0 x 0 px"),
        ("0 1.01 .5 .02 .1", Kind.OUTSIDE, "lies outside the image of 80 x 60"),
        ("0 1 .5 .5 .1", Kind.CLIPPED, "reaches 20 px out of"),
    ],
)
def test_boxes_that_hold_nothing_are_dropped_and_listed(
    root: Path, line: str, kind: Kind, what: str
) -> None:
    path = add(root, "images/train/a", f"{CAT}\n{line}")
    problem = of_kind(load(root, "train"), kind)
    assert str(problem).startswith(f"{path}:2: box ")
    assert what in problem.what


def test_rounding_is_no_mistake(root: Path) -> None:
    add(root, "images/train/a", "0 0.500001 0.5 1.000001 1\n0 -0.000001 0 1.0000 0.5 0.3 1.000001")
    dataset = load(root, "train")
    for box in dataset.samples[0].boxes.tolist():
        assert box == pytest.approx([0, 0, 80, 60], abs=1e-4)
    assert Kind.CLIPPED not in [each.kind for each in dataset.problems]


def test_labels_without_a_image_stop(root: Path) -> None:
    (root / "labels" / "train" / "gone.txt").write_text(CAT)
    (root / "labels" / "train" / "classes.txt").write_text("7")
    (root / "labels" / "train" / "README.dataset.txt").write_text("Drawn by hand.")
    message = refusal(root)
    where = root / "labels" / "train" / "gone.txt"
    assert f"{where}:1: no image gone.jpg (or .png, .webp) in {root / 'images/train'}" in message
    assert "1 problem stops" in message


def test_labels_that_are_a_folder_stop(root: Path) -> None:
    add(root, "images/train/c", None)
    (root / "labels" / "train" / "c.txt").mkdir()
    assert "c.txt: cannot be read (Is a directory)" in refusal(root)


def test_a_list_that_names_what_is_not_there_stops(root: Path) -> None:
    path = root / "train.txt"
    path.write_bytes(
        b"images/train/a.jpg\nimages/train/gone.jpg\nimages\n\0\xff/../x\n" + b"x" * 5000
    )
    describe(root, train="train.txt")
    message = refusal(root)
    assert f"{path}:2: no image 'images/train/gone.jpg'; add it, or take the line out" in message
    for line in (3, 4, 5):
        assert f"{path}:{line}: no image" in message
    assert len(message) < 2000


def test_a_image_that_does_not_decode_stops(root: Path) -> None:
    path = root / "images" / "train" / "a.jpg"
    path.write_bytes(b"no image")
    assert f"{path}: " in refusal(root)


@pytest.mark.parametrize("text", [None, ""])
def test_no_labels_at_all_stop(root: Path, text: str | None) -> None:
    (root / "labels" / "train" / "a.txt").unlink()
    add(root, "images/train/a", text)
    message = refusal(root)
    assert "no object is labelled in the train split" in message
    assert (f"{root / 'labels' / 'train'}: no label file" in message) == (text is None)


def test_a_folder_without_images_stops(root: Path) -> None:
    (root / "images" / "train" / "a.jpg").unlink()
    message = refusal(root)
    assert f"data.yaml:1: no image in {root / 'images' / 'train'}; add some, or correct" in message


def test_a_class_that_train_does_not_have_stops(root: Path) -> None:
    path = add(root, "images/val/b", "1 .5 .5 .2 .2")
    assert f"{path}:1: unknown class 'dog'; known: cat; rename it" in refusal(root, "val")


# --- what is broken: the YAML --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "line", "what"),
    [
        ({"names": None}, None, "no 'names'; list the classes there, as names: [cat, dog]"),
        ({"names": "cat"}, 3, "'names' is 'cat'; it must be a list"),
        ({"names": []}, 3, "'names' is {}"),
        ({"names": ["cat", True]}, 3, "class 1 in 'names' is True; write its name in quotes"),
        ({"names": ["cat", ["dog"]]}, 3, "class 1 in 'names' is ['dog']"),
        ({"names": ["cat", " "]}, 3, "class 1 in 'names' is ' '"),
        ({"names": {"a": "cat"}}, 3, "'names' has the key 'a'; keys are class indices"),
        ({"names": {-1: "cat"}}, 3, "'names' has the key -1"),
        ({"nc": 3}, 6, "'nc' is 3, but there are 2 names; correct it"),
        ({"nc": "two"}, 6, "'nc' is 'two'"),
        ({"train": 7}, 1, "'train' is 7; it must be folders or .txt lists"),
        ({"val": ["images/val", {}]}, 2, "'val' is ['images/val', {}]"),
        ({"path": ["x"]}, 6, "'path' is ['x']; it must be a folder"),
        ({"train": "images/gone"}, 1, "'train' is 'images/gone', which is not below"),
        ({"train": "x" * 5000}, 1, "which is not below"),
    ],
)
def test_a_yaml_that_says_too_little_stops(
    root: Path, values: dict[str, Any], line: int | None, what: str
) -> None:
    path = describe(root, **values)
    message = refusal(root)
    assert message.startswith(f"{path}: " if line is None else f"{path}:{line}: ")
    assert what in message


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("names: [cat\ntrain: x", ":2", "not YAML (expected ',' or ']'"),
        ("names: *cat", ":1", "not YAML (found undefined alias"),
        ("names: !!python/object:os.system x", ":1", "not YAML (could not determine a constructor"),
        ("- cat\n- dog", "", "no mapping; it needs names, train and val"),
        ("", "", "no mapping"),
        (b"names: \xff\xfe", "", "not YAML"),
        (os.urandom(300) + b"\0\xff", "", "not YAML"),
        (b"names: [cat]\n#" + b"x" * (1 << 20), "", "bytes are too many"),
        ("names: " + "[" * 900, "", "not YAML"),
    ],
)
def test_a_yaml_that_is_none_stops(root: Path, text: str | bytes, place: str, what: str) -> None:
    path = root / "data.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    message = refusal(root)
    assert message.startswith(f"{path}{place}: ")
    assert what in message


def test_several_descriptions_are_refused(root: Path) -> None:
    (root / "data.yaml").rename(root / "one.yaml")
    assert load(root, "train").samples
    (root / "two.yml").write_text("names: [cat]")
    (root / "notes.yaml").write_text("author: me")
    assert "one.yaml, two.yml each describe data; name the right one data.yaml" in refusal(root)


def test_without_names_there_is_nothing_to_read(root: Path) -> None:
    (root / "data.yaml").unlink()
    assert f"{root}: no data.yaml here; write one with names: [cat, dog]" in refusal(root)
    (root / "classes.txt").write_text("\n")
    assert "names no class; write one on each line" in refusal(root)
    (root / "classes.txt").write_bytes(b"\xff\xfe\0")
    assert "not text; a class list has a name on each line" in refusal(root)


def test_a_split_that_is_not_named_stops(root: Path) -> None:
    message = refusal(root, "test")
    assert "no split 'test'; there are train, val; name its folder there, as test: images/test" in (
        message
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rubbish=st.binary(max_size=40), position=st.integers(0, 60), yaml_too=st.booleans())
def test_spoilt_files_never_end_in_a_traceback(
    tmp_path: Path, rubbish: bytes, position: int, yaml_too: bool
) -> None:
    described = describe(tmp_path)
    for split in ("train", "val"):
        add(tmp_path, f"images/{split}/{split}")
    spoilt = described if yaml_too else tmp_path / "labels" / "train" / "train.txt"
    sound = spoilt.read_bytes()
    spoilt.write_bytes(sound[:position] + rubbish + sound[position:])
    try:
        dataset = load(tmp_path, "train", format="yolo")
    except DataError as error:
        assert str(tmp_path) in str(error)  # noqa: PT017 - which of the two is drawn, not fixed
    else:
        assert dataset.samples

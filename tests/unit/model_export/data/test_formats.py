"""Formats are told apart by what is in a folder; classes are renamed and chosen in each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_export.data.datasets import Dataset, load, split_names
from model_export.data.problems import BadData, Kind
from model_export.data.splits import split_called
from service.errors import DataError
from tests.unit.model_export import copies
from tests.unit.model_export.voc_folder import VocFolder, annotation, image

NAMES = ("cat", "dog", "kitten")
FORMATS = ("voc", "coco", "yolo")


@pytest.fixture
def animals(tmp_path: Path) -> dict[str, Path]:
    """The same animals in each format: 3 kittens, 2 cats, 1 dog in train, one of each in val."""
    folder = VocFolder(tmp_path / "voc")
    box = (10, 10, 40, 40)
    folder.add("a", [("kitten", box), ("cat", (5, 5, 45, 45)), ("kitten", (20, 20, 50, 50))])
    folder.add("b", [("dog", box)])
    folder.add("c", [("kitten", box), ("cat", (20, 20, 50, 50))])
    folder.add("d", [("kitten", box), ("cat", (20, 20, 50, 50)), ("dog", box)])
    folder.list("train", "a", "b", "c")
    folder.list("val", "d")
    return {
        "voc": folder.root,
        "coco": copies.write_coco(folder.root, tmp_path / "coco", NAMES),
        "yolo": copies.write_yolo(folder.root, tmp_path / "yolo", NAMES),
    }


def labels(dataset: Dataset) -> list[list[str]]:
    return [[dataset.classes[label] for label in each.labels] for each in dataset.samples]


# --- which format --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_is_found(animals: dict[str, Path], name: str) -> None:
    root = animals[name]
    assert split_names(root) == split_names(root, format=name) == ("train", "val")
    assert labels(load(root, "train")) == labels(load(root, "train", format=name))


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_in_another_format_is_refused(animals: dict[str, Path], name: str) -> None:
    for other in set(FORMATS) - {name}:
        with pytest.raises(DataError, match=r"expected|no data\.yaml here"):
            load(animals[name], "train", format=other)


def test_a_folder_in_two_formats_is_refused(animals: dict[str, Path]) -> None:
    root = animals["voc"]
    copies.write_yolo(root, root, NAMES)
    with pytest.raises(DataError) as caught:
        load(root, "train")
    assert "more than one format (voc: 4 .xml in Annotations/; yolo: data.yaml)" in str(
        caught.value
    )
    assert "choose one by --format" in str(caught.value)
    assert load(root, "train", format="yolo").samples[0].path.parent.name == "train"
    assert load(root, "train", format="voc").samples[0].path.parent.name == "JPEGImages"


def test_a_folder_in_no_format_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    (tmp_path / "thumbnails").mkdir()
    for number in range(3):
        image(tmp_path / f"{number}.jpg")
    (tmp_path / "notes.json").write_text('{"images": 3}')
    with pytest.raises(DataError) as caught:
        load(tmp_path, "train")
    message = str(caught.value)
    for marker in (
        "Annotations/*.xml",
        "instances_train.json",
        "_annotations.coco.json",
        "data.yaml",
    ):
        assert marker in message
    assert "found thumbnails/, 3 files .jpg, 1 files .json" in message
    empty = tmp_path / "thumbnails"
    with pytest.raises(DataError, match="found nothing"):
        load(empty, "train")
    with pytest.raises(DataError, match="no such folder"):
        load(tmp_path / "gone", "train")


# --- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_classes_are_chosen_and_renamed_alike(animals: dict[str, Path], name: str) -> None:
    root = animals[name]
    assert load(root, "train").classes == ("kitten", "cat", "dog")
    renamed = load(root, "train", remap={"kitten": "cat"})
    assert renamed.classes == ("cat", "dog")
    assert labels(renamed) == [["cat", "cat", "cat"], ["dog"], ["cat", "cat"]]
    chosen = load(root, "train", keep=["dog", "cat"])
    assert chosen.classes == ("dog", "cat")
    assert labels(chosen) == [["cat"], ["dog"], ["cat"]]
    both = load(root, "val", keep=["cat"], remap={"kitten": "cat"})
    assert labels(both) == [["cat", "cat"]]
    # With a class list, as a model file brings it: the choice is of objects, not of labels.
    given = load(root, "val", classes=["kitten", "cat"], keep=["cat"])
    assert given.classes == ("kitten", "cat")
    assert given.samples[0].labels.tolist() == [1]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_left_out_is_told(animals: dict[str, Path], name: str) -> None:
    dataset = load(animals[name], "train", keep=["cat"])
    assert [len(sample.boxes) for sample in dataset.samples] == [1, 0, 1]
    (note,) = [each for each in dataset.problems if each.kind is Kind.UNUSED_CLASS]
    assert not note.fatal
    assert "4 objects of classes that are not used left out (3 kitten, 1 dog)" in note.what
    assert "1 images have no other and count as images without objects" in note.what


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("keep", "remap", "what"),
    [
        (["cta"], {}, "the class to keep, 'cta'; there are kitten, cat, dog; did you mean 'cat'?"),
        (["horse"], {}, "the class to keep, 'horse'; there are kitten, cat, dog"),
        (["kitten"], {"kitten": "cat"}, "the class to keep, 'kitten'; there are cat, dog"),
        (None, {"Kiten": "cat"}, "the class to rename, 'Kiten'; there are kitten, cat, dog; did"),
    ],
)
def test_a_choice_that_fits_nothing_is_refused(
    animals: dict[str, Path], name: str, keep: list[str] | None, remap: dict[str, str], what: str
) -> None:
    with pytest.raises(DataError) as caught:
        load(animals[name], "train", keep=keep, remap=remap)
    assert what in str(caught.value)


def test_a_choice_beside_the_class_list_is_refused(animals: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="'dog' is not among the classes cat, kitten"):
        load(animals["voc"], "val", classes=["cat", "kitten"], keep=["dog"])


def test_broken_labels_are_reported_before_a_choice_that_fits_nothing(tmp_path: Path) -> None:
    folder = VocFolder(tmp_path)
    folder.add("a", [("cat", (10, 10, 40, 40))])
    folder.add("b")
    folder.annotate("b", "<annotation>")
    folder.list("train", "a", "b")
    with pytest.raises(BadData) as caught:
        load(tmp_path, "train", keep=["dog"])
    assert [problem.line for problem in caught.value.problems] == [1]


# --- splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("Train2017", "train"),
        ("instances_val2014", "val"),
        ("instances-train", "train"),
        ("valid", "val"),
        ("validation", "val"),
        ("test_annotations", "test"),
        ("training", "train"),
        ("trainval", None),
        ("instances_default", None),
        ("labels", None),
        ("2017", None),
        ("", None),
    ],
)
def test_splits_by_name(name: str, split: str | None) -> None:
    assert split_called(name) == split


@pytest.mark.parametrize("names", ["image{0}{1}", "clip{0}-{1:03}", "video{0}/frame_{1:06}"])
def test_the_hashed_split_is_the_same_in_every_format(tmp_path: Path, names: str) -> None:
    folder = VocFolder(tmp_path / "voc")
    stems = [names.format(number // 5, number % 5) for number in range(25)]
    for stem in stems:
        for place in (folder.images, folder.annotations):
            (place / stem).parent.mkdir(exist_ok=True)
        folder.add(stem, [("cat", (10, 10, 40, 40))])

    def val(root: Path) -> set[str]:
        return {"/".join(each.path.parts[-2:]) for each in load(root, "val").samples}

    expected = {each.replace("JPEGImages", "images") for each in val(folder.root)}
    assert 0 < len(expected) <= len(stems) / 2
    yolo = tmp_path / "yolo"
    folder.images.rename(tmp_path / "images")
    yolo.mkdir()
    (tmp_path / "images").rename(yolo / "images")
    for stem in stems:
        path = yolo / "labels" / f"{stem}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("0 .5 .5 .5 .5")
    (yolo / "classes.txt").write_text("cat")
    assert val(yolo) == expected
    coco = tmp_path / "coco"
    coco.mkdir()
    (yolo / "images").rename(coco / "images")
    content = {
        "images": [{"id": n, "file_name": f"{stem}.jpg"} for n, stem in enumerate(stems)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [9, 9, 9, 9]}
            for n in range(len(stems))
        ],
    }
    (coco / "labels.json").write_text(json.dumps(content))
    assert val(coco) == expected


def test_voc_in_a_folder_for_each_split(tmp_path: Path) -> None:
    box = (10, 10, 40, 40)
    for split, stems in (("train", "ab"), ("valid", "cd"), ("test", "e")):
        (tmp_path / split).mkdir()
        for stem in stems:
            image(tmp_path / split / f"{stem}.jpg")
            (tmp_path / split / f"{stem}.xml").write_text(annotation([("cat", box)]))
    image(tmp_path / "valid" / "a.jpg")
    (tmp_path / "valid" / "a.xml").write_text(annotation([("cat", box)]))
    assert set(split_names(tmp_path)) == {"train", "val", "test"}
    assert [len(load(tmp_path, split).samples) for split in ("train", "val", "test")] == [2, 3, 1]
    (leak,) = load(tmp_path, "valid").problems
    assert (leak.kind, leak.file) == (Kind.LEAKED, tmp_path / "valid" / "a.jpg")
    with pytest.raises(DataError, match="no split 'extra'; there are folders for"):
        load(tmp_path, "extra")
    (tmp_path / "train").rename(tmp_path / "other")
    with pytest.raises(DataError, match="no folder train/, which names the classes"):
        load(tmp_path, "val")

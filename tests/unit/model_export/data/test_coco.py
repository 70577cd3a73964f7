"""COCO folders in their usual layouts, and every way in which their JSON can be broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_export.data.datasets import Dataset, load, split_names
from model_export.data.problems import Kind
from service.errors import DataError
from service.imaging.canvas import Size
from tests.unit.model_export.voc_folder import image

Content = dict[str, Any]


def content(*stems: str, box: Any = (10, 10, 30, 20), folder: str = "") -> Content:
    """One cat on each image; ids have gaps and categories without an object."""
    return {
        "info": {"description": "drawn"},
        "images": [
            {"id": 5 * n + 3, "file_name": f"{folder}{stem}.jpg", "height": 60, "width": 80}
            for n, stem in enumerate(stems)
        ],
        "annotations": [
            {"id": n, "image_id": 5 * n + 3, "category_id": 90, "bbox": list(box), "iscrowd": 0}
            for n, _ in enumerate(stems)
        ],
        "categories": [
            {"id": 0, "name": "animals", "supercategory": "none"},
            {"id": 90, "name": "cat"},
            {"id": 7, "name": "dog"},
        ],
    }


def draw(folder: Path, *stems: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem in stems:
        image(folder / f"{stem}.jpg")
    return folder


def write(path: Path, value: Content | str | bytes) -> Path:
    """An annotation file: a line for each image, annotation and category."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, dict):
        value = json.dumps(value).replace("}, {", "},\n{").replace("[{", "[\n{")
    path.write_bytes(value.encode() if isinstance(value, str) else value)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images beside train.json."""
    write(tmp_path / "train.json", content("a", "b"))
    draw(tmp_path / "images", "a", "b")
    return tmp_path


def refusal(root: Path, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        load(root, split)
    return str(caught.value)


def kinds(dataset: Dataset) -> list[Kind]:
    return [problem.kind for problem in dataset.problems]


# --- what is read --------------------------------------------------------------------------------


def test_boxes_and_classes(root: Path) -> None:
    value = content("a", "b", box=(10.25, 11.5, 20, 30.125))
    value["annotations"].append({"image_id": 8, "category_id": 7, "bbox": [0, 0, 80, 60]})
    write(root / "train.json", value)
    dataset = load(root, "train")
    assert dataset.classes == ("cat", "dog")
    a, b = dataset.samples
    assert (a.path, a.size) == (root / "images" / "a.jpg", Size(60, 80))
    assert a.boxes.tolist() == [[10.25, 11.5, 30.25, 41.625]]
    assert b.labels.tolist() == [0, 1]
    assert b.boxes[1].tolist() == [0, 0, 80, 60]
    (note,) = dataset.problems
    assert (note.kind, note.fatal) == (Kind.UNUSED_CLASS, False)
    assert "categories without an object are not used: animals" in note.what


@pytest.mark.parametrize("sides", [{}, {"height": 0, "width": 0}, {"height": None, "width": "x"}])
def test_sizes_may_be_missing(root: Path, sides: dict[str, Any]) -> None:
    value = content("a", "b")
    for entry in value["images"]:
        del entry["height"], entry["width"]
        entry.update(sides)
    write(root / "train.json", value)
    assert [sample.size for sample in load(root, "train").samples] == [Size(60, 80)] * 2


def test_images_without_annotations_are_negatives(root: Path) -> None:
    value = content("a", "b")
    del value["annotations"][1]
    write(root / "train.json", value)
    assert [len(sample.boxes) for sample in load(root, "train").samples] == [1, 0]


def test_crowds_are_left_out_and_told(root: Path) -> None:
    value = content("a", "b")
    value["annotations"][1]["iscrowd"] = 1
    value["annotations"][1]["segmentation"] = {"counts": [1], "size": [60, 80]}
    write(root / "train.json", value)
    dataset = load(root, "train")
    assert [len(sample.boxes) for sample in dataset.samples] == [1, 0]
    (note,) = [problem for problem in dataset.problems if problem.kind is Kind.CROWD]
    assert str(note).startswith(
        f"{root / 'train.json'}: 1 annotations with iscrowd 1, the first of them annotation 1 ("
    )


def test_areas_are_those_of_the_file_or_else_of_the_boxes(root: Path) -> None:
    value = content("a", "b", "c")
    areas = ({"area": 0.25}, {"area": None}, {})
    for entry, area in zip(value["annotations"], areas, strict=True):
        entry.pop("area", None)
        entry["bbox"] = [1, 2, 30, 4]
        entry.update(area)
    write(root / "train.json", value)
    draw(root / "train", "c")
    assert [each.areas.tolist() for each in load(root, "train").samples] == [[0.25], [120], [120]]


def test_two_categories_of_one_name_are_one_class(root: Path) -> None:
    value = content("a", "b")
    value["categories"][2]["name"] = " cat "
    value["annotations"][1]["category_id"] = 7
    write(root / "train.json", value)
    dataset = load(root, "train")
    assert dataset.classes == ("cat",)
    assert [sample.labels.tolist() for sample in dataset.samples] == [[0], [0]]


def test_ids_may_be_text(root: Path) -> None:
    value = json.loads(json.dumps(content("a", "b")).replace('_id": 3', '_id": "x"'))
    value["images"][0]["id"] = "x"
    write(root / "train.json", value)
    assert [len(sample.boxes) for sample in load(root, "train").samples] == [1, 1]


# --- layouts -------------------------------------------------------------------------------------


LAYOUTS: dict[str, tuple[dict[str, str], str, str]] = {
    # annotation files by split; folder of the images; prefix of file_name
    "coco": (
        {split: f"annotations/instances_{split}2017.json" for split in ("train", "val")},
        "{split}2017",
        "",
    ),
    "coco, images/": (
        {"train": "annotations/train.json", "val": "annotations/val.json"},
        "images/{split}",
        "",
    ),
    "roboflow": (
        {"train": "train/_annotations.coco.json", "val": "valid/_annotations.coco.json"},
        "{folder}",
        "",
    ),
    "one folder": ({"train": "train.json", "val": "val.json"}, "images", ""),
    "file names with folders": (
        {"train": "annotations/train.json", "val": "annotations/validation.json"},
        "images/{split}",
        "images/{split}/",
    ),
    "file names of Windows": (
        {"train": "train.json", "val": "val.json"},
        "images",
        "C:\\x\\{split}\\",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_layouts(tmp_path: Path, layout: tuple[dict[str, str], str, str]) -> None:
    paths, images, prefix = layout
    stems = {"train": ("a", "b"), "val": ("c", "d", "e")}
    for split, name in paths.items():
        path = tmp_path / name
        write(path, content(*stems[split], folder=prefix.format(split=split)))
        draw(tmp_path / images.format(split=split, folder=path.parent.name), *stems[split])
    assert set(split_names(tmp_path)) == {"train", "val"}
    for split, names in stems.items():
        dataset = load(tmp_path, split)
        assert tuple(sample.path.stem for sample in dataset.samples) == names
        assert dataset.classes == ("cat",)
        # As it is called elsewhere.
        assert load(tmp_path, {"train": "training", "val": "valid"}[split]).samples


def test_what_lies_beside_the_instances_is_not_read(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / "annotations" / f"captions_{split}2017.json", "not even JSON")
        write(tmp_path / "annotations" / f"instances_{split}2017.json", content(split))
        draw(tmp_path / f"{split}2017", split)
    assert len(load(tmp_path, "val").samples) == 1


@pytest.mark.parametrize("place", ["annotations/instances_default.json", "labels.json"])
def test_one_file_for_all_is_split_by_the_hash_of_the_stem(tmp_path: Path, place: str) -> None:
    stems = [f"image{number}" for number in range(40)]
    write(tmp_path / place, content(*stems))
    draw(tmp_path / "images", *stems)
    train, val = (load(tmp_path, split) for split in ("train", "val"))
    assert len(train.samples) + len(val.samples) == 40
    assert 3 <= len(val.samples) <= 15
    assert train.classes == val.classes
    assert not {s.path for s in train.samples} & {s.path for s in val.samples}
    assert "no split 'test'; without a .json for each split there are train and val" in refusal(
        tmp_path, "test"
    )


def test_the_same_image_in_train_and_val_is_listed(tmp_path: Path) -> None:
    write(tmp_path / "train.json", content("a", "b"))
    path = write(tmp_path / "val.json", content("c", "b"))
    draw(tmp_path / "images", "a", "b", "c")
    (leak,) = [each for each in load(tmp_path, "val").problems if each.kind is Kind.LEAKED]
    assert str(leak) == f"{path}: b.jpg is in train too; take it out of one of them"


def test_the_same_name_in_two_folders_leaks_only_if_the_bytes_do(tmp_path: Path) -> None:
    for folder in ("train", "valid"):
        write(tmp_path / folder / "_annotations.coco.json", content("a", "b"))
        draw(tmp_path / folder, "a")
    image(tmp_path / "train" / "b.jpg")
    image(tmp_path / "valid" / "b.jpg", orientation=3)
    (leak,) = [each for each in load(tmp_path, "val").problems if each.kind is Kind.LEAKED]
    assert "a.jpg is the same image as" in leak.what


def test_layouts_that_are_not_clear_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "images", "a", "b")
    first = write(tmp_path / "annotations" / "instances_val2014.json", content("a"))
    second = write(tmp_path / "annotations" / "instances_val2017.json", content("b"))
    assert f"two files for the split 'val', {first} and {second}" in refusal(tmp_path, "val")
    first.rename(tmp_path / "annotations" / "instances_one.json")
    second.rename(tmp_path / "annotations" / "instances_two.json")
    assert "several annotation files, none named after a split" in refusal(tmp_path)
    (tmp_path / "annotations" / "instances_one.json").rename(
        tmp_path / "annotations" / "instances_val.json"
    )
    assert "no annotations of the split 'train'; there are val" in refusal(tmp_path)
    assert "which name the classes" in refusal(tmp_path, "val")
    assert load(tmp_path, "val", classes=["cat"]).samples


# --- what is broken ------------------------------------------------------------------------------


def _set(table: str, number: int, **values: Any) -> Callable[[Content], None]:
    def change(value: Content) -> None:
        value[table][number].update(values)

    return change


def _drop(table: str, number: int, key: str) -> Callable[[Content], None]:
    def change(value: Content) -> None:
        del value[table][number][key]

    return change


def _replace(table: str, new: Any) -> Callable[[Content], None]:
    def change(value: Content) -> None:
        value[table] = new

    return change


def _remove(table: str) -> Callable[[Content], None]:
    def change(value: Content) -> None:
        del value[table]

    return change


BROKEN: list[tuple[Callable[[Content], None], str, str]] = [
    (_remove("images"), "", "no 'images' (there is info, annotations, categories)"),
    (_remove("annotations"), "", "no 'annotations'"),
    (_remove("categories"), "", "no 'categories'"),
    (_replace("annotations", {}), "", "'annotations' is not an array"),
    (_replace("images", None), "", "'images' is not an array"),
    (_set("images", 1, id=3), "image 1", "the id 3 is that of 'a.jpg' too; number"),
    (_set("images", 1, id=[1]), "image 1", "its 'id' is [1]; it must be a whole number or text"),
    (_set("images", 1, id=None), "image 1", "its 'id' is None"),
    (_set("images", 1, id=2.5), "image 1", "its 'id' is 2.5"),
    (_drop("images", 1, "id"), "image 1", "it has no 'id'; add it"),
    (_drop("images", 1, "file_name"), "image 1", "it has no 'file_name'; add it"),
    (_set("images", 1, file_name=""), "image 1", "its 'file_name' is empty"),
    (_set("images", 1, file_name=7), "image 1", "its 'file_name' is 7; it must be text"),
    (
        _set("images", 1, file_name="a.jpg"),
        "image 1",
        "'a.jpg' is that of image 0 (id 3) too; make them one",
    ),
    (
        _set("images", 1, file_name="gone.jpg"),
        "image 1",
        "no image 'gone.jpg', looked in ./, images/",
    ),
    (_set("images", 1, file_name="x" * 5000), "image 1", "no image"),
    (_set("images", 1, file_name="../../../etc/passwd"), "image 1", "no image"),
    (_set("images", 1, file_name="b\0.jpg"), "image 1", "no image"),
    (_replace("images", ["a.jpg"]), "", "image 0: it is 'a.jpg'; it must be an object"),
    (_set("annotations", 1, image_id=99), "annotation 1", "its image_id 99 is not in 'images'"),
    (_set("annotations", 1, image_id=True), "annotation 1", "its 'image_id' is True"),
    (
        _drop("annotations", 1, "image_id"),
        "annotation 1",
        "annotation 1 (id 1): it has no 'image_id'",
    ),
    (
        _set("annotations", 1, category_id=1),
        "annotation 1",
        "its category_id 1 is not in 'categories'; known",
    ),
    (_drop("annotations", 1, "category_id"), "annotation 1", "it has no 'category_id'"),
    (
        _drop("annotations", 1, "bbox"),
        "annotation 1",
        "it has no 'bbox'; boxes are needed, not outlines",
    ),
    (
        _set("annotations", 1, bbox=[1, 2, 3]),
        "annotation 1",
        "its 'bbox' is [1, 2, 3]; it must be four numbers",
    ),
    (
        _set("annotations", 1, bbox="1 2 3 4"),
        "annotation 1",
        "four numbers of pixels: [x, y, width, height]",
    ),
    (_set("annotations", 1, bbox=[1, 2, 3, "4"]), "annotation 1", "its 'bbox' is [1, 2, 3, '4']"),
    (_set("annotations", 1, bbox=[1, 2, 3, None]), "annotation 1", "its 'bbox' is [1, 2, 3, None]"),
    (
        _set("annotations", 1, bbox=[1, 2, float("nan"), 4]),
        "annotation 1",
        "its 'bbox' is [1, 2, nan, 4]",
    ),
    (
        _set("annotations", 1, bbox=[1, 2, float("inf"), 4]),
        "annotation 1",
        "its 'bbox' is [1, 2, inf, 4]",
    ),
    (_set("annotations", 1, bbox=[10**400, 2, 3, 4]), "annotation 1", "its 'bbox' is [1000"),
    (_set("annotations", 1, iscrowd=2), "annotation 1", "its 'iscrowd' is 2; it must be 0 or 1"),
    (_set("annotations", 1, iscrowd=[]), "annotation 1", "its 'iscrowd' is []"),
    *(
        (_set("annotations", 1, area=area), "annotation 1", f"its 'area' is {area!r}; it must be")
        for area in (-1, "9", True, float("nan"), float("inf"), [9])
    ),
    (_replace("annotations", [[1]]), "", "annotation 0: it is [1]; it must be an object"),
    (_set("categories", 2, id=90), "category 2", "the id 90 is that of 'cat' too"),
    (_drop("categories", 1, "name"), "category 1", "category 1 (id 90): it has no 'name'"),
    (_set("categories", 1, name=" "), "category 1", "its 'name' is empty; write the class there"),
    (_set("categories", 1, name=4), "category 1", "its 'name' is 4; it must be text"),
]


@pytest.mark.parametrize(("change", "entry", "what"), BROKEN, ids=[each[2] for each in BROKEN])
def test_broken_entry_is_named_by_its_id(
    root: Path, change: Callable[[Content], None], entry: str, what: str
) -> None:
    value = content("a", "b")
    change(value)
    path = write(root / "train.json", value)
    message = refusal(root)
    assert what.replace("; known", "") in message
    place = f"{path}: {entry}"
    assert any(place in text and what.split(";")[0] in text for text in message.splitlines())
    assert len(message) < 3000


SOUND = json.dumps(content("a", "b"), indent=1)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", 1, "Expecting value"),
        ("[]", 1, "[] is not an object"),
        ('[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]', 1, "is not an object"),
        ("nonsense", 1, "Expecting value"),
        (SOUND[: SOUND.index("bbox")], 24, "Unterminated string"),
        (SOUND[:-2], 59, "Expecting ',' delimiter"),
        (SOUND.replace('"id": 8,', '"id": 8'), 14, "Expecting ',' delimiter"),
        (SOUND + "}", 60, "Extra data"),
        ('{\n"images": ' + "[" * 100_000, None, "recursion"),
        ('{\n"images": [' + "9" * 9000 + "]}", None, "digits"),
        ('{"images": [\n"Küche"]}'.encode("cp1252"), None, "not UTF-8: a line of it is"),
        (b"\xff\xd8\xff\xe0\x01\x02 an image", None, "not text"),
    ],
)
def test_file_that_is_not_json_is_refused(
    root: Path, text: str | bytes, line: int | None, what: str
) -> None:
    path = write(root / "train.json", text)
    message = refusal(root)
    assert what in message
    assert "write the annotations anew" in message
    place = f"{path}" if line is None else f"{path}:{line}"
    assert f"{place}: not COCO's JSON: " in message


@pytest.mark.parametrize(
    ("box", "kind", "what"),
    [
        ([20, 20, 0, 10], Kind.NO_AREA, "is 0 x 10 px"),
        ([20, 20, 10, -5], Kind.NO_AREA, "is 10 x -5 px"),
        ([0.1, 0.1, 0.4, 0.4], Kind.NO_AREA, "in pixels"),
        ([90, 10, 20, 20], Kind.OUTSIDE, "lies outside the image of 80 x 60"),
        ([60, 10, 40, 20], Kind.CLIPPED, "reaches 20 px out of"),
    ],
)
def test_boxes_that_hold_nothing_are_dropped_and_listed(
    root: Path, box: list[float], kind: Kind, what: str
) -> None:
    value = content("a", "b")
    value["annotations"][1]["bbox"] = box
    path = write(root / "train.json", value)
    (problem,) = [each for each in load(root, "train").problems if each.kind is kind]
    assert str(problem).startswith(f"{path}: annotation 1 (id 1): box ")
    assert what in problem.what
    assert not problem.fatal


def test_a_image_of_another_size_is_left_out(root: Path) -> None:
    value = content("a", "b")
    value["images"][1]["width"] = 640
    path = write(root / "train.json", value)
    dataset = load(root, "train")
    assert [sample.path.stem for sample in dataset.samples] == ["a"]
    (problem,) = [each for each in dataset.problems if each.kind is Kind.WRONG_SIZE]
    assert str(problem).startswith(f"{path}: labelled at 640 x 60, but the image b.jpg is 80")
    assert "correct width and height" in problem.what


@pytest.mark.parametrize("name", ["train.json", "labels.json"])
def test_a_file_without_images(root: Path, name: str) -> None:
    (root / "train.json").unlink()
    path = write(root / name, content())
    assert f"{path}: no image in 'images'; list the images there" in refusal(root)


def test_a_broken_train_file_does_not_hide_behind_val(tmp_path: Path) -> None:
    write(tmp_path / "val.json", content("a"))
    path = write(tmp_path / "train.json", '{"images": [\n')
    draw(tmp_path / "images", "a")
    assert f"{path}:2: " in refusal(tmp_path, "val")
    # Whoever brings the class list need not have train at all.
    assert load(tmp_path, "val", classes=["cat"]).samples


def test_every_problem_is_found_in_one_go(root: Path) -> None:
    value = content("a", "b")
    value["annotations"] = [{"id": n, "bbox": [1, 2, 3, 4]} for n in range(30)]
    write(root / "train.json", value)
    message = refusal(root)
    assert "30 problems stop training" in message
    assert message.endswith("... and 10 more")


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rubbish=st.binary(max_size=60), position=st.integers(0, 900), removed=st.integers(0, 200))
def test_a_spoilt_file_never_ends_in_a_traceback(
    tmp_path: Path, rubbish: bytes, position: int, removed: int
) -> None:
    sound = json.dumps(content("a", "b")).encode()
    write(tmp_path / "train.json", sound[:position] + rubbish + sound[position + removed :])
    if not (tmp_path / "images").exists():
        draw(tmp_path / "images", "a", "b")
    try:
        dataset = load(tmp_path, "train", format="coco")
    except DataError as error:
        assert "train.json" in str(error) or "no object" in str(error)  # noqa: PT017 - drawn
    else:
        assert dataset.samples

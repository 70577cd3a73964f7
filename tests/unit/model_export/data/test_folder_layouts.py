"""Layouts that lead to the wrong image, label or split unless they are read with care."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from model_export.data.account import account
from model_export.data.datasets import Dataset, load, split_names
from model_export.data.folder import LabelledFolder
from model_export.data.problems import Kind
from service.errors import DataError
from tests.unit.model_export.voc_folder import annotation, image

BOX = ("cat", (10, 10, 40, 40))
LINE = "0 .5 .5 .25 .5\n"


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image(path)


def yolo(root: Path, *names: str, labels: str = "labels") -> None:
    """Images and labels, such as images/train/a.jpg and labels/train/a.txt."""
    for name in names:
        draw(root / f"images/{name}.jpg")
        write(root / f"{labels}/{name}.txt", LINE)


def voc(root: Path, *names: str, images: str = "JPEGImages", filename: str = "") -> None:
    for name in names:
        draw(root / images / f"{name}.jpg")
        write(root / f"Annotations/{name}.xml", annotation([BOX], filename=filename))


def coco(path: Path, *names: str, edit: Callable[..., None] | None = None) -> None:
    content = {
        "images": [{"id": key, "file_name": name} for key, name in enumerate(names, 1)],
        "annotations": [
            {"id": key, "image_id": key, "category_id": 1, "bbox": [10, 10, 30, 30]}
            for key in range(1, len(names) + 1)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    if edit is not None:
        edit(content)
    write(path, json.dumps(content))


def sizes(root: Path) -> dict[str, tuple[int, int]]:
    """Images and objects of each split."""
    folder = LabelledFolder(root)
    classes: tuple[str, ...] | None = None
    found = {}
    for split in split_names(folder):
        dataset = load(folder, split, classes=classes)
        classes = dataset.classes
        found[split] = len(dataset.samples), sum(len(each.boxes) for each in dataset.samples)
    return found


def both(root: Path) -> tuple[Dataset, Dataset]:
    train = load(root, "train")
    return train, load(root, "val", classes=train.classes)


def refusal(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        both(root)
    return str(caught.value)


# --- the image of another label ------------------------------------------------------------------


def test_voc_label_takes_no_image_of_another_folder(tmp_path: Path) -> None:
    voc(tmp_path, "gate/0", "gate/1", "dock/0", "dock/9")
    (tmp_path / "Annotations/dock/9.xml").rename(tmp_path / "Annotations/gate/9.xml")
    assert "Annotations/gate/9.xml:1: no image '9.jpg'" in refusal(tmp_path)


@pytest.mark.parametrize("form", ["voc", "coco"])
def test_label_takes_no_image_of_another_split(tmp_path: Path, form: str) -> None:
    for split in ("train", "val"):
        names = [f"{split}{n}.jpg" for n in range(2)]
        for name in names:
            draw(tmp_path / split / name)
            if form == "voc":
                path = tmp_path / split / name
                write(path.with_suffix(".xml"), annotation([BOX]))
        if form == "coco":
            coco(tmp_path / f"annotations/instances_{split}.json", *names)
    assert sizes(tmp_path) == {"train": (2, 2), "val": (2, 2)}
    (tmp_path / "train/train0.jpg").rename(tmp_path / "val/train0.jpg")
    assert "no image 'train0.jpg'" in refusal(tmp_path)


def test_coco_train_and_val_may_not_name_one_image_differently(tmp_path: Path) -> None:
    for name in ("f.jpg", "a.jpg", "b.jpg"):
        draw(tmp_path / "images" / name)
    coco(tmp_path / "train.json", "video_a/f.jpg", "a.jpg")
    coco(tmp_path / "val.json", "video_b/f.jpg", "b.jpg")
    assert "are one image here, images/f.jpg" in refusal(tmp_path)


def test_yolo_lists_may_not_share_a_label_file(tmp_path: Path) -> None:
    yolo(tmp_path, "a", "b")
    draw(tmp_path / "images/a.png")
    write(tmp_path / "train.txt", "images/a.jpg\n")
    write(tmp_path / "val.txt", "images/a.png\nimages/b.jpg\n")
    write(tmp_path / "data.yaml", "names: [cat]\ntrain: train.txt\nval: val.txt\n")
    assert "two images for one label file: a.jpg and a.png" in refusal(tmp_path)


def test_voc_label_of_an_image_with_two_suffixes(tmp_path: Path) -> None:
    voc(tmp_path, "a", "b", "scan", "scan.png")
    train, val = both(tmp_path)
    assert {each.path.name for each in (*train.samples, *val.samples)} == {
        *("a.jpg", "b.jpg", "scan.jpg", "scan.png.jpg")
    }


def test_missing_image_is_not_excused_by_another_format_elsewhere(tmp_path: Path) -> None:
    for name in ("cam1/a.jpg", "cam1/b.jpg", "cam2/x.tif"):
        draw(tmp_path / name.replace(".tif", ".jpg"))
    (tmp_path / "cam2/x.jpg").rename(tmp_path / "cam2/x.tif")
    coco(tmp_path / "labels.json", "cam1/a.jpg", "cam1/b.jpg", "cam1/x.jpg")
    assert "no image 'cam1/x.jpg'" in refusal(tmp_path)


# --- lost objects --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label", ["labels/A.txt", "labels/a.TXT", "Labels/a.txt", "labels/a.jpg.txt", "images/a.TXT"]
)
def test_yolo_labels_are_found_as_images_are(tmp_path: Path, label: str) -> None:
    yolo(tmp_path, "a", "b", "c")
    (tmp_path / "labels/a.txt").unlink()
    write(tmp_path / label, LINE)
    write(tmp_path / "data.yaml", "names: [cat]\ntrain: images\n")
    datasets = both(tmp_path)
    assert sum(len(each.boxes) for dataset in datasets for each in dataset.samples) == 3
    _, labels = account(LabelledFolder(tmp_path), datasets)
    assert labels.found == labels.used == 3


def test_yolo_label_without_an_image_in_its_split_is_refused(tmp_path: Path) -> None:
    yolo(tmp_path, "train/a", "train/b", "val/c")
    draw(tmp_path / "images/val/d.jpg")
    write(tmp_path / "labels/train/d.txt", LINE)
    write(tmp_path / "data.yaml", "names: [cat]\ntrain: images/train\nval: images/val\n")
    assert "labels/train/d.txt:1: no image d.jpg" in refusal(tmp_path)


def test_two_yolo_label_files_for_one_image_are_refused(tmp_path: Path) -> None:
    yolo(tmp_path, "a", "b")
    write(tmp_path / "images/a.txt", "0 .2 .2 .1 .1\n")
    write(tmp_path / "data.yaml", "names: [cat]\ntrain: images\n")
    assert "two label files for one image, this and labels/a.txt" in refusal(tmp_path)


def test_yolo_label_that_is_a_broken_link_is_refused(tmp_path: Path) -> None:
    yolo(tmp_path, "a", "b")
    (tmp_path / "labels/a.txt").unlink()
    (tmp_path / "labels/a.txt").symlink_to(tmp_path / "nowhere")
    write(tmp_path / "data.yaml", "names: [cat]\ntrain: images\n")
    assert "a.txt: cannot be read" in refusal(tmp_path)


def test_boxes_that_differ_by_rotation_are_no_duplicates(tmp_path: Path) -> None:
    def cross(content: dict[str, list[dict[str, object]]]) -> None:
        first = content["annotations"][0] | {"bbox": [20, 25, 40, 10]}
        turned = first | {"id": 9, "attributes": {"rotation": "90.0"}}
        content["annotations"] = [first, turned, content["annotations"][1]]

    for name in "ab":
        draw(tmp_path / f"{name}.jpg")
    coco(tmp_path / "labels.json", "a.jpg", "b.jpg", edit=cross)
    train, val = both(tmp_path)
    assert sum(len(each.boxes) for each in (*train.samples, *val.samples)) == 3


def test_rotation_that_is_no_number_is_refused(tmp_path: Path) -> None:
    def turn(content: dict[str, list[dict[str, object]]]) -> None:
        content["annotations"][0]["attributes"] = {"rotation": "a bit"}

    for name in "ab":
        draw(tmp_path / f"{name}.jpg")
    coco(tmp_path / "labels.json", "a.jpg", "b.jpg", edit=turn)
    assert "its 'rotation' is 'a bit'; it must be a number of degrees" in refusal(tmp_path)


def test_yolo_duplicates_differ_by_rounding_alone(tmp_path: Path) -> None:
    yolo(tmp_path, "a", "b")
    write(tmp_path / "labels/a.txt", "0 .333333 .5 .25 .5\n0 .3333333333 .5 .25 .5\n")
    write(tmp_path / "data.yaml", "names: [cat]\ntrain: images\n")
    kinds = [problem.kind for dataset in both(tmp_path) for problem in dataset.problems]
    assert kinds.count(Kind.DUPLICATE) == 1


# --- splits --------------------------------------------------------------------------------------


def test_yolo_folders_of_splits_with_labels_beside_images(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "val/c"):
        draw(tmp_path / f"{name}.jpg")
        write(tmp_path / f"{name}.txt", LINE)
    write(tmp_path / "classes.txt", "cat\n")
    assert sizes(tmp_path) == {"train": (2, 2), "val": (1, 1)}


def test_yaml_may_call_the_split_validation(tmp_path: Path) -> None:
    yolo(tmp_path, "train/a", "train/b", "val/c")
    write(
        tmp_path / "data.yaml", "names: {'0': cat}\ntrain: images/train\nvalidation: images/val\n"
    )
    assert sizes(tmp_path) == {"train": (2, 2), "val": (1, 1)}


def test_yaml_written_in_the_folder_above(tmp_path: Path) -> None:
    yolo(tmp_path, "train/a", "train/b", "val/c")
    text = "names: [cat]\ntrain: data/images/train\nval: ../../yard/images/val\n"
    write(tmp_path / "data.yaml", text)
    assert sizes(tmp_path) == {"train": (2, 2), "val": (1, 1)}


def test_two_splits_in_one_folder_of_this_machine_are_refused(tmp_path: Path) -> None:
    yolo(tmp_path, "a", "b")
    text = "names: [cat]\ntrain: /home/x/train/images\nval: /home/x/val/images\n"
    write(tmp_path / "data.yaml", text)
    assert "they are one folder here, images" in refusal(tmp_path)


def test_yaml_with_paths_outside_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yolo(tmp_path / "store", "train/a", "train/b", "val/c")
    project = tmp_path / "project"
    text = f"names: [cat]\ntrain: {tmp_path}/store/images/train\nval: ../store/images/val\n"
    write(project / "data.yaml", text)
    monkeypatch.chdir(tmp_path)
    for root in (project, Path("project"), Path("store/../project")):
        assert sizes(root) == {"train": (2, 2), "val": (1, 1)}


def test_voc_trees_of_several_years_are_read_together(tmp_path: Path) -> None:
    for year, names in (("VOC2007", "ab"), ("VOC2012", "ac")):
        root = tmp_path / year
        voc(root, *names)
        write(root / "ImageSets/Main/Train.txt", f"{names[0]}\n")
        write(root / "ImageSets/Main/Validation.txt", f"/home/x/JPEGImages/{names[1]}.jpg\n")
    assert sizes(tmp_path) == {"train": (2, 2), "val": (2, 2)}


@pytest.mark.parametrize("form", ["voc", "coco"])
def test_folders_of_images_may_say_the_split(tmp_path: Path, form: str) -> None:
    names = ["train/a.jpg", "train/b.jpg", "val/c.jpg"]
    for name in names:
        draw(tmp_path / "images" / name)
        if form == "voc":
            write(tmp_path / "annotations" / f"{name[-5]}.xml", annotation([BOX]))
    if form == "coco":
        coco(tmp_path / "labels.json", *names)
    assert sizes(tmp_path) == {"train": (2, 2), "val": (1, 1)}


def test_darknet_lists_have_the_names_that_obj_data_gives(tmp_path: Path) -> None:
    for name in "abc":
        draw(tmp_path / f"obj/{name}.jpg")
        write(tmp_path / f"obj/{name}.txt", LINE)
    write(tmp_path / "obj.names", "cat\n")
    write(tmp_path / "obj.data", "classes = 1\ntrain = data/fit.txt\nvalid = data/held.txt\n")
    write(tmp_path / "fit.txt", "data/obj/a.jpg\ndata/obj/b.jpg\n")
    write(tmp_path / "held.txt", "data/obj/c.jpg\n")
    assert sizes(tmp_path) == {"train": (2, 2), "val": (1, 1)}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_lists_of_images_whose_names_begin_with_digits(tmp_path: Path, encoding: str) -> None:
    yolo(tmp_path, "0 crates", "1 crates", "2 crates")
    write(tmp_path / "classes.txt", "cat\n")
    for split, lines in (("train", "01"), ("val", "2")):
        text = "".join(f"images/{n} crates.jpg\n" for n in lines)
        write(tmp_path / f"{split}.txt", text.encode(encoding))
    assert sizes(tmp_path) == {"train": (2, 2), "val": (1, 1)}


def test_class_lists_of_each_split_agree_or_are_refused(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "valid/c"):
        draw(tmp_path / f"{name}.jpg")
        write(tmp_path / f"{name}.txt", LINE)
    for split in ("train", "valid"):
        write(tmp_path / split / "_darknet.labels", "cat\n")
    assert sizes(tmp_path) == {"train": (2, 2), "val": (1, 1)}
    write(tmp_path / "valid/_darknet.labels", "dog\n")
    assert "the class lists train/_darknet.labels, valid/_darknet.labels differ" in refusal(
        tmp_path
    )


# --- other files ---------------------------------------------------------------------------------


def test_other_xml_and_json_files_are_no_labels(tmp_path: Path) -> None:
    voc(tmp_path / "voc", "a", "b")
    write(tmp_path / "voc/JPEGImages/a.jpg.aux.xml", "<PAMDataset><Metadata/></PAMDataset>")
    write(tmp_path / "voc/annotations/classes.json", '["cat"]')
    assert sum(images for images, _ in sizes(tmp_path / "voc").values()) == 2
    root = tmp_path / "yolo"
    yolo(root, "a", "b")
    write(root / "data.yaml", "names: [cat]\ntrain: images\n")
    write(root / "images/a.jpg.aux.xml", "<PAMDataset/>")
    assert sum(images for images, _ in sizes(root).values()) == 2


def test_links_and_pipes_among_the_files(tmp_path: Path) -> None:
    yolo(tmp_path, "train/a", "train/b", "val/c")
    (tmp_path / "current").symlink_to(tmp_path / "images")
    (tmp_path / "images/latest").symlink_to(tmp_path / "images/train")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "images/train/pipe.txt")
    write(tmp_path / "data.yaml", "names: [cat]\ntrain: images/latest\nval: images/val\n")
    assert sizes(tmp_path) == {"train": (2, 2), "val": (1, 1)}


def test_deep_folders_are_listed(tmp_path: Path) -> None:
    voc(tmp_path, "/".join(["d"] * 300) + "/a", "b")
    assert sum(images for images, _ in sizes(tmp_path).values()) == 2


@pytest.mark.parametrize("place", ["images", "categories"])
def test_coco_names_that_are_no_text_are_refused(tmp_path: Path, place: str) -> None:
    def spoil(content: dict[str, list[dict[str, object]]]) -> None:
        content[place][0]["file_name" if place == "images" else "name"] = "\ud800x"

    for name in "abc":
        draw(tmp_path / f"{name}.jpg")
    coco(tmp_path / "labels.json", "a.jpg", "b.jpg", "c.jpg", edit=spoil)
    assert r"'\ud800x', which is no text" in refusal(tmp_path)


def test_labels_one_folder_down_are_pointed_out(tmp_path: Path) -> None:
    yolo(tmp_path / "yard", "a", "b")
    write(tmp_path / "yard/data.yaml", "names: [cat]\ntrain: images\n")
    write(tmp_path / "notes.md", "")
    assert f"no annotations here, but in {tmp_path / 'yard'}; name one" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["classes.txt", "data.yaml", "labels/a.txt"])
def test_git_lfs_pointers_are_named(tmp_path: Path, name: str) -> None:
    yolo(tmp_path, "a", "b")
    if name != "classes.txt":
        write(tmp_path / "data.yaml", "names: [cat]\ntrain: images\n")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
    write(tmp_path / name, pointer)
    assert "a Git LFS pointer, not the file: run git lfs pull" in refusal(tmp_path)


def test_folder_of_unread_images_says_so(tmp_path: Path) -> None:
    yolo(tmp_path, "a", "b")
    for name in "ab":
        (tmp_path / f"images/{name}.jpg").rename(tmp_path / f"images/{name}.tif")
    write(tmp_path / "data.yaml", "names: [cat]\ntrain: images\nval: images\n")
    assert "a.tif is not read; save it as JPEG, PNG or WebP" in refusal(tmp_path)


def test_several_readers_of_one_file_keep_their_own_results(tmp_path: Path) -> None:
    folder, path = LabelledFolder(tmp_path), write(tmp_path / "a.xml", "<annotation/>")
    assert folder.once(Path.read_text, path) == "<annotation/>"
    assert folder.once(Path.read_bytes, path) == b"<annotation/>"
    write(path, "<other/>")
    assert folder.once(Path.read_text, path) == "<annotation/>"

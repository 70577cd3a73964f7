"""Ids of a COCO annotation file: which entry an image has, and files without certain ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.commands.coco_ids import read_ids
from service.errors import DataError
from service.runtime.detector import Detections

CATEGORIES = [{"id": 4, "name": "cat"}, {"id": 2, "name": "dog"}]


def write(path: Path, names: Sequence[str], **tables: Any) -> Path:
    """A file with image i + 1 for each name."""
    images = [{"id": number, "file_name": name} for number, name in enumerate(names, start=1)]
    path.write_text(json.dumps({"images": images, "categories": CATEGORIES} | tables))
    return path


@pytest.mark.parametrize(
    ("entries", "given", "found"),
    [
        (["a.jpg", "b.jpg"], ["b.jpg", "a.jpg"], {"b.jpg": 2, "a.jpg": 1}),
        (["val/a.jpg"], ["a.jpg"], {"a.jpg": 1}),
        (["C:\\data\\a.jpg"], ["x/a.jpg"], {"x/a.jpg": 1}),
        (["./a.jpg"], ["a.jpg"], {"a.jpg": 1}),
        (["x/a.jpg", "y/a.jpg"], ["y/a.jpg", "x/a.jpg"], {"x/a.jpg": 1, "y/a.jpg": 2}),
        (["a.jpg", "x/a.jpg"], ["x/a.jpg", "y/a.jpg"], {"x/a.jpg": 2, "y/a.jpg": 1}),
        (["x/a.jpg"], ["y/a.jpg", "x/a.jpg"], {"x/a.jpg": 1}),
        (["Ku\u0308che.jpg"], ["K\u00fcche.jpg"], {"K\u00fcche.jpg": 1}),
        (["a.jpg", "A.jpg"], ["A.jpg"], {"A.jpg": 2}),
        (["A.JPG", "b.png"], ["b.jpg", "a.jpg"], {"a.jpg": 1, "b.jpg": 2}),
        (["a.jpg"], ["a.png", "a.jpg", "A.jpg"], {"a.jpg": 1}),
        (["D:\\x\\a.jpg", "D:\\y\\a.jpg"], ["y/a.jpg", "x/a.jpg"], {"x/a.jpg": 1, "y/a.jpg": 2}),
        (["/old/x/A.jpg", "/old/y/A.jpg"], ["y/a.jpg"], {"y/a.jpg": 2}),
        (["/data/local-files/?d=x%2Fa%20b.jpg"], ["x/a b.jpg"], {"x/a b.jpg": 1}),
        (["https://host/x/a%23.jpg?width=9"], ["x/a#.jpg"], {"x/a#.jpg": 1}),
        (["a%23.jpg", "a#.jpg"], ["a#.jpg", "a%23.jpg"], {"a#.jpg": 2, "a%23.jpg": 1}),
    ],
)
def test_images_are_found_by_name(
    entries: list[str], given: list[str], found: dict[str, int], tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in given]
    ids = read_ids(write(tmp_path / "like.json", entries), ["cat", "dog"], paths)
    assert ids.images == {tmp_path / name: key for name, key in found.items()}
    assert ids.categories == [4, 2]
    assert ids.unlisted == [tmp_path / name for name in given if name not in found]
    assert ids.unmatched == [
        name for key, name in enumerate(entries, start=1) if key not in found.values()
    ]


@pytest.mark.parametrize(
    ("entries", "given", "words"),
    [
        (["x/a.jpg", "y/a.jpg"], ["z/a.jpg"], "2 entries of .*like.json may be this image"),
        (["a.jpg", "a.jpg"], ["a.jpg"], "2 entries of .*like.json may be this image"),
        (["a.jpg"], ["x/a.jpg", "y/a.jpg"], "the entry 'a.jpg' may be any of 2 images"),
        (["a.jpg"], ["a.png", "a.webp"], "the entry 'a.jpg' may be any of 2 images"),
        (["a.jpg"], ["b.jpg"], "lists none of the 1 images .*its own are 'a.jpg'"),
    ],
)
def test_uncertain_images_are_refused(
    entries: list[str], given: list[str], words: str, tmp_path: Path
) -> None:
    like = write(tmp_path / "like.json", entries)
    with pytest.raises(DataError, match=words):
        read_ids(like, ["cat"], [tmp_path / name for name in given])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not a COCO annotation file: not JSON"),
        ("<html>", "not a COCO annotation file: not JSON"),
        ("version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the file"),
        ("[1]", "an object with 'images' and 'categories' is expected, found a list"),
        ('{"shapes": []}', "it has no list 'categories', but 'shapes'"),
        ('{"categories": {}, "images": []}', "it has no list 'categories'"),
        ('{"categories": [], "images": [3]}', "has no category for the model's 'cat'"),
        ('{"categories": [{"id": 1, "name": "cat"}]}', "it has no list 'images'"),
        ('{"categories": [{"id": 1}]}', r"categories\[0\] has no 'name'"),
        ('{"categories": [{"id": 1.5, "name": "cat"}]}', r"categories\[0\] has the id 1.5"),
        ('{"categories": [{"id": true, "name": "cat"}]}', r"categories\[0\] has the id True"),
        (
            '{"categories": [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]}',
            "several entries of 'categories' have the id 1",
        ),
        (
            '{"categories": [{"id": 1, "name": "cat"}], "images": ["a.jpg"]}',
            r"images\[0\] has the id None",
        ),
    ],
)
def test_what_is_no_annotation_file_is_refused(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "like.json"
    path.write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        read_ids(path, ["cat"], [tmp_path / "a.jpg"])
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_an_unused_category_of_the_same_name_does_not_count(tmp_path: Path) -> None:
    like = write(
        tmp_path / "like.json",
        ["a.jpg"],
        categories=[{"id": 0, "name": "cat", "supercategory": "none"}, {"id": 1, "name": "cat"}],
        annotations=[{"id": 1, "category_id": 1, "image_id": 1}],
    )
    assert read_ids(like, ["cat"], [tmp_path / "a.jpg"]).categories == [1]


def test_placeholders_of_torchvision_need_no_category(tmp_path: Path) -> None:
    image = tmp_path / "a.jpg"
    like = write(tmp_path / "like.json", ["a.jpg"])
    ids = read_ids(like, ["__background__", "cat", "class_12"], [image])
    assert ids.categories == [None, 4, None]

    def one(label: int) -> Detections:
        return Detections(
            np.array([[1, 2, 4, 8.1]], np.float32), np.array([0.12345678], np.float32),
            np.array([label], np.int64),
        )  # fmt: skip

    (row,) = ids.rows(image, one(1))
    assert (row["image_id"], row["category_id"]) == (1, 4)
    assert row["bbox"] == [1.0, 2.0, 3.0, float(np.float32(8.1)) - 2]
    assert row["score"] == float(np.float32(0.12345678))
    with pytest.raises(DataError, match="a detection is of class 2, which"):
        ids.rows(image, one(2))

"""The split by hash: a fifth, for good, and frames of one video on one side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from model_export.data.datasets import load
from model_export.data.problems import Kind
from model_export.data.splits import FOLDS, folds_of, split_by_hash
from service.errors import DataError
from tests.unit.model_export.voc_folder import VocFolder

ROOT = Path("/data")


def split(names: Iterable[str], classes: Iterable[str] = ("cat",)) -> tuple[set[str], set[str]]:
    """(train, val) of the images with these names."""
    sides = []
    for side in ("train", "val"):
        images = [ROOT / f"{name}.jpg" for name in names]
        members, _ = split_by_hash(
            ROOT, images, side, problems=[], unsplit="lists", classes=classes
        )
        sides.append({path.relative_to(ROOT).with_suffix("").as_posix() for path in members})
    return sides[0], sides[1]


def notes(names: Iterable[str], classes: Iterable[str] = ("cat",)) -> list[str]:
    images = [ROOT / f"{name}.jpg" for name in names]
    _, found = split_by_hash(ROOT, images, "train", problems=[], unsplit="lists", classes=classes)
    assert all(not each.fatal and each.kind is Kind.SEQUENCE for each in found)
    return [each.what for each in found]


def numbered(pattern: str, count: int) -> list[str]:
    return [pattern.format(number) for number in range(1, count + 1)]


def videos(pattern: str, count: int = 12) -> list[list[str]]:
    """The names of videos' frames; `pattern` has the video and the frame."""
    return [[pattern.format(video, frame) for frame in range(40)] for video in range(count)]


@pytest.mark.parametrize("count", [3, 4, 7, 12, 40])
@pytest.mark.parametrize(
    "pattern",
    [
        "clip{}_{:04}",
        "clip{}-{}",
        "clip {} ({})",
        "street.{}.{}",
        "video{}/frame_{:06}",
        "video{}/{:06}",
        "images/video{}/frame{}",
        "video{}/images/{}",
    ],
)
def test_frames_of_a_video_stay_on_one_side(pattern: str, count: int) -> None:
    groups = videos(pattern, count)
    names = [name for group in groups for name in group]
    train, val = split(names)
    assert train | val == set(names)
    assert not train & val
    assert 0 < len(val) <= len(names) / 2
    for group in groups:
        assert val.isdisjoint(group) or train.isdisjoint(group)
    assert notes(names) == []


@pytest.mark.parametrize(
    ("pattern", "first", "last"),
    [
        ("IMG_{:04}", "IMG_0001", "IMG_0300"),
        ("image{:03}", "image001", "image300"),
        ("{:06}", "000001", "000300"),
        ("video/frame_{:04}", "frame_0001", "frame_0300"),
    ],
)
def test_one_sequence_of_all_images_is_split_image_by_image(
    pattern: str, first: str, last: str
) -> None:
    names = numbered(pattern, 300)
    train, val = split(names)
    assert train | val == set(names)
    assert 40 <= len(val) <= 80
    (note,) = notes(names)
    assert note.startswith(f"300 images, {first}.jpg to {last}.jpg, are numbered as one sequence")
    assert "which has more than half of all images: split image by image" in note
    assert "choose the sides yourself, with lists or with folders train/ and val/" in note
    # Others beside it do not change its sides.
    more = [*names, *(f"night_{number}" for number in range(50))]
    assert split(more)[1] & set(names) == val
    assert len(split(more)[1] - set(names)) in (0, 50)


@pytest.mark.parametrize("pattern", ["{}_{:03}", "{}.{}", "images/{}/{}", "{}/IMG_{}"])
@pytest.mark.parametrize("classes", [("apple", "banana"), ("Apple", "BANANA", "cherry", "dog")])
def test_sequences_called_as_a_class_are_split_image_by_image(
    pattern: str, classes: tuple[str, ...]
) -> None:
    names = [pattern.format(name.lower(), number) for name in classes for number in range(50)]
    train, val = split(names, classes)
    for name in classes:
        mine = {each for each in names if name.lower() in each}
        assert 3 <= len(val & mine) <= 20
    assert len(train) + len(val) == len(names)
    (note,) = notes(names, classes)
    assert note.startswith("50 images, ")
    assert f"(and {len(classes) - 1} more such sequences)" in note
    assert "which is named as a class: split image by image" in note


def test_adding_images_moves_none() -> None:
    groups = videos("clip{}_{}", 20)
    few = [name for group in groups for name in group[:7]] + [f"single{n}a" for n in range(50)]
    train, val = split(few)
    more = [name for group in groups for name in group] + [f"single{n}a" for n in range(90)]
    more += [name for group in videos("other{}_{}", 5) for name in group]
    grown_train, grown_val = split(more)
    assert train <= grown_train
    assert val <= grown_val
    assert split(more[::-1]) == (grown_train, grown_val)


def test_names_without_a_number_are_split_by_their_own_hash() -> None:
    names = [f"frame_{letter}{other}" for letter in "abcdefghijkl" for other in "mnopqrstuvwx"]
    _, val = split(names)
    assert 15 <= len(val) <= 45
    assert notes(names) == []


@pytest.mark.parametrize("names", [["a", "b"], ["a1", "a2"], ["a1", "b1", "c"], ["x/1", "y/1"]])
def test_both_sides_have_images_however_few(names: list[str]) -> None:
    train, val = split(names)
    assert train
    assert val
    assert len(train) + len(val) == len(names)


def test_what_cannot_be_split() -> None:
    with pytest.raises(DataError, match="at least 2 annotated images are needed, 1 found"):
        split(["a1"])
    with pytest.raises(DataError, match="no split 'test'; without lists there are train and val"):
        split_by_hash(ROOT, [], "test", problems=[], unsplit="lists", classes=[])


def test_the_note_is_among_the_problems_of_a_folder(tmp_path: Path) -> None:
    folder = VocFolder(tmp_path)
    for number in range(12):
        folder.add(f"frame_{number}", [("cell", (10, 10, 40, 40))])
    for side in ("train", "val"):
        (note,) = load(tmp_path, side).problems
        assert note.kind is Kind.SEQUENCE
        assert "with ImageSets/Main or with folders train/ and val/" in note.what


# --- folds ---------------------------------------------------------------------------------------

NAMES = [f"image-{index}.png" for index in range(12)]


def folds(names: Iterable[str], classes: Iterable[str] = ("cat",)) -> list[int]:
    return folds_of([Path(name) for name in names], classes).tolist()


def test_folds_follow_from_the_names() -> None:
    found = folds(NAMES)
    assert found == [2, 1, 4, 0, 3, 0, 3, 0, 1, 1, 2, 4]
    # In another order, in another folder.
    order = np.random.default_rng(0).permutation(len(NAMES))
    assert folds(f"/elsewhere/{NAMES[index]}" for index in order) == [found[i] for i in order]


@pytest.mark.parametrize("images", [0, 1, 2, 4, 5, 6, 12])
def test_every_image_has_one_of_at_most_five_folds(images: int) -> None:
    sizes = np.bincount(folds(NAMES[:images]))
    assert len(sizes) == min(FOLDS, images)
    assert sizes.sum() == images
    assert not images or sizes.max() - sizes.min() <= 1


def test_images_of_equal_names_are_told_apart() -> None:
    assert sorted(folds(["a/1.png", "b/1.png"])) == [0, 1]
    assert folds(["b/1.png", "a/1.png"]) == folds(["a/1.png", "b/1.png"])[::-1]


def test_frames_of_one_video_share_a_fold() -> None:
    frames = videos("clip{}_{:04}.jpg", 10)
    own = [
        set(folds([name for video in frames for name in video])[i : i + 40])
        for i in range(0, 400, 40)
    ]
    assert all(len(each) == 1 for each in own)
    # Videos of one length: two in each fold.
    assert np.bincount([each.pop() for each in own]).tolist() == [2] * FOLDS


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ([f"cat_{i}.jpg" for i in range(40)] + [f"street {i}.jpg" for i in range(60)], ["cat"]),
        ([f"one_{i}.jpg" for i in range(50)] + [f"two_{i}.jpg" for i in range(50)], []),
    ],
    ids=["as a class and most of all", "two videos"],
)
def test_too_few_sequences_are_parted(names: list[str], classes: list[str]) -> None:
    assert np.bincount(folds(names, classes)).tolist() == [20] * FOLDS

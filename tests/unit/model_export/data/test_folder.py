"""Folders as labelling tools and people leave them: the same trouble in each of the formats."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_export.data.account import account
from model_export.data.datasets import Dataset, load
from model_export.data.folder import IMAGES, LabelledFolder, NotText, decoded
from model_export.data.problems import Kind
from service.cli import retinaserve
from service.errors import DataError
from tests.unit.model_export.voc_folder import annotation, image

ROOT = Path(__file__).resolve().parents[4]
FORMATS = ("voc", "coco", "yolo")
BOX = (10, 10, 40, 40)

Row = tuple[str, str]
"""An image's path on the disk, below the folder for images, and as the labels name it."""


def place(root: Path, name: str, **options: Any) -> Path:
    path = root / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image(path, **options)
    return path


def write_voc(root: Path, rows: Sequence[Row], boxes: Sequence[Any] = (("cat", BOX),)) -> None:
    for number, (_, written) in enumerate(rows):
        name = f"{number}-{PurePosixPath(written).stem}.xml" if "\\" in written else written
        path = (root / "Annotations" / name.lstrip("/")).with_suffix(".xml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(annotation(boxes, filename=written), encoding="utf-8")


def write_coco(root: Path, rows: Sequence[Row], boxes: Sequence[Any] = (("cat", BOX),)) -> None:
    names = sorted({name for name, _ in boxes})
    content = {
        "images": [{"id": key, "file_name": written} for key, (_, written) in enumerate(rows)],
        "annotations": [
            {
                "image_id": key,
                "category_id": names.index(name),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
            }
            for key in range(len(rows))
            for name, (x1, y1, x2, y2) in boxes
        ],
        "categories": [{"id": key, "name": name} for key, name in enumerate(names)],
    }
    (root / "labels.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_yolo(root: Path, rows: Sequence[Row], boxes: Sequence[Any] = (("cat", BOX),)) -> None:
    names = sorted({name for name, _ in boxes})
    lines = "".join(
        f"{names.index(name)} {(x1 + x2) / 160} {(y1 + y2) / 120} "
        f"{(x2 - x1) / 80} {(y2 - y1) / 60}\n"
        for name, (x1, y1, x2, y2) in boxes
    )
    for disk, _ in rows:
        path = (root / "labels" / disk).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines)
    (root / "train.txt").write_text(
        "".join(
            f"{written if written[1:2] == ':' else f'images/{written}'}\n" for _, written in rows
        ),
        encoding="utf-8",
    )
    described = {"train": "train.txt", "names": names}
    (root / "data.yaml").write_text(yaml.safe_dump(described, allow_unicode=True))


WRITERS: dict[str, Callable[..., None]] = {
    "voc": write_voc,
    "coco": write_coco,
    "yolo": write_yolo,
}


def make(root: Path, form: str, rows: Sequence[Row], **options: Any) -> Path:
    """A folder in a format; each image once, however often it is named."""
    for disk in dict.fromkeys(disk for disk, _ in rows):
        place(root, disk)
    WRITERS[form](root, rows, **options)
    return root


def read_all(root: Path) -> list[Dataset]:
    folder = LabelledFolder(root)
    train = load(folder, "train")
    return [train, load(folder, "val", classes=train.classes)]


def total(datasets: Sequence[Dataset]) -> tuple[int, int]:
    samples = [sample for dataset in datasets for sample in dataset.samples]
    return len(samples), sum(len(sample.boxes) for sample in samples)


def kinds(datasets: Sequence[Dataset]) -> set[Kind]:
    return {problem.kind for dataset in datasets for problem in dataset.problems}


def refusal(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_all(root)
    return str(caught.value)


# --- names ---------------------------------------------------------------------------------------

COMPOSED = unicodedata.normalize("NFC", "Küche")
DECOMPOSED = unicodedata.normalize("NFD", "Küche")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("disk", "written", "noted"),
    [
        ("{}.jpg", "{}.jpg", False),
        ("{}.jfif", "{}.jfif", False),
        ("{}.jpe", "{}.jpe", False),
        (f"{DECOMPOSED}{{}}.jpg", f"{COMPOSED}{{}}.jpg", True),
        (f"{COMPOSED}{{}}.jpg", f"{DECOMPOSED}{{}}.jpg", True),
        ("IMG_{}.JPG", "IMG_{}.jpg", None),
        ("img_{}.jpg", "IMG_{}.jpg", True),
        (f"{DECOMPOSED}{{}}.PNG", f"{COMPOSED.upper()}{{}}.jpg", True),
        ("{}.png", "{}.jpg", None),
        ("gate/{}.jpg", "gate/{}.jpg", False),
        ("gate/{}.jpg", "/home/someone/data/gate/{}.jpg", None),
        ("gate/{}.jpg", "D:\\data\\gate\\{}.jpg", True),
        ("{}.jpg", "gate/{}.jpg", True),
        ("a b ü/{}.jpg", "a b ü/{}.jpg", False),
        ("100%25 {}.jpg", "100%25 {}.jpg", False),
        ("{} #1?.jpg", "{}%20%231%3f.jpg", True),
        ("ü {}.jpg", "https://host/x/%C3%BC%20{}.jpg?width=9#top", True),
        ("gate/{}.png", "https://[host/gate/{}.png?a=b/c", None),
        ("a b/{}.jpg", "/data/local-files/?d=a%20b%2F{}.jpg", None),
        ("{}.jpg", "/data/local-files/?d={}.jpg", True),
        ("{}.jpg", "/label-studio/data/media/upload/1/3f2a9c0{}-{}.jpg", True),
        ("3f2a9c01-{}.jpg", "/data/upload/1/3f2a9c01-{}.jpg", True),
    ],
)
def test_images_are_found_by_the_names_that_labels_give(
    tmp_path: Path, form: str, disk: str, written: str, noted: bool | None
) -> None:
    rows = [(disk.format(number), written.format(number, number)) for number in range(4)]
    datasets = read_all(make(tmp_path, form, rows))
    assert total(datasets) == (4, 4)
    if noted is not None:
        # A VOC file in Annotations/gate/ is beside no image, but has its stem.
        assert (Kind.FOUND in kinds(datasets)) == noted
    images, _ = account(LabelledFolder(tmp_path), datasets)
    assert (images.found, images.used) == (4, 4)


@pytest.mark.parametrize("form", FORMATS)
def test_folders_with_images_of_the_same_names_stay_apart(tmp_path: Path, form: str) -> None:
    rows = [(f"{camera}/{n}.jpg", f"{camera}/{n}.jpg") for camera in "ab" for n in range(3)]
    assert total(read_all(make(tmp_path, form, rows))) == (6, 6)


@pytest.mark.parametrize("form", FORMATS)
def test_name_that_two_images_fit_is_refused(tmp_path: Path, form: str) -> None:
    for camera in "ab":
        place(tmp_path, f"{camera}/0.jpg")
    make(tmp_path, form, [("1.jpg", "1.jpg"), ("2.jpg", "2.jpg")])
    rows = [("1.jpg", "1.jpg"), ("2.jpg", "2.jpg"), ("a/0.jpg", "c/0.jpg")]
    WRITERS[form](tmp_path, rows)
    assert "but 2 images fit it: 'images/a/0.jpg' and 'images/b/0.jpg'" in refusal(tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_missing_image_names_the_most_similar_one(tmp_path: Path, form: str) -> None:
    rows = [(f"frame_{n}.jpg", f"frame_{n}.jpg") for n in range(3)]
    make(tmp_path, form, rows)
    WRITERS[form](tmp_path, [*rows, ("frame_2.jpg", "frame_22.jpg")])
    message = refusal(tmp_path)
    assert "no image '" in message
    assert "frame_22.jpg'" in message
    assert "the most similar here is 'images/frame_2.jpg'" in message


@pytest.mark.parametrize("form", FORMATS)
def test_two_entries_for_one_image_are_refused(tmp_path: Path, form: str) -> None:
    rows = [("x.jpg", "a/x.jpg"), ("x.jpg", "b/x.jpg"), ("y.jpg", "y.jpg"), ("z.jpg", "z.jpg")]
    message = refusal(make(tmp_path, form, rows))
    assert "x.jpg" in message
    assert "one image" in message


def test_one_label_file_for_two_images_is_refused(tmp_path: Path) -> None:
    for form, root in (("voc", tmp_path / "voc"), ("yolo", tmp_path / "yolo")):
        rows = [("a.jpg", "a.jpg"), ("b.jpg", "b.jpg")]
        make(root, form, rows)
        place(root, "a.png")
        if form == "voc":
            (root / "Annotations" / "a.xml").write_text(annotation([("cat", BOX)]))
        else:
            (root / "data.yaml").write_text("train: images\nnames: [cat]\n")
        message = refusal(root)
        assert "two images for one label file: a.jpg and a.png" in message


def test_voc_label_named_with_the_suffix_of_its_image(tmp_path: Path) -> None:
    for name in ("a", "b"):
        place(tmp_path, f"{name}.jpg")
        (tmp_path / "images" / f"{name}.jpg.xml").write_text(annotation([("cat", BOX)]))
    assert total(read_all(tmp_path)) == (2, 2)


def test_voc_folders_inside_folders_of_splits(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        for n in range(2):
            (tmp_path / split / "Annotations").mkdir(parents=True, exist_ok=True)
            (tmp_path / split / "JPEGImages").mkdir(exist_ok=True)
            image(tmp_path / split / "JPEGImages" / f"{n}.jpg")
            path = tmp_path / split / "Annotations" / f"{n}.xml"
            path.write_text(annotation([("cat", BOX)]))
    assert [len(dataset.samples) for dataset in read_all(tmp_path)] == [2, 2]


def test_voc_with_one_list_of_everything_is_split_by_hash(tmp_path: Path) -> None:
    make(tmp_path, "voc", [(f"{n}.jpg", f"{n}.jpg") for n in range(6)])
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "default.txt").write_text("".join(f"{n}\n" for n in range(6)))
    assert total(read_all(tmp_path)) == (6, 6)


def test_yolo_label_beside_its_image_counts_where_labels_has_none(tmp_path: Path) -> None:
    make(tmp_path, "yolo", [(f"{n}.jpg", f"{n}.jpg") for n in range(4)])
    (tmp_path / "labels" / "0.txt").rename(tmp_path / "images" / "0.txt")
    assert total(read_all(tmp_path)) == (4, 4)


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    root = make(tmp_path / "data", "voc", [("a.jpg", "a.jpg"), ("b.jpg", "b.jpg")])
    elsewhere = make(tmp_path / "more", "voc", [("c.jpg", "c.jpg")])
    (root / "images" / "linked").symlink_to(elsewhere / "images")
    (root / "Annotations" / "linked").symlink_to(elsewhere / "Annotations")
    (root / "images" / "loop").symlink_to(root)
    assert total(read_all(root)) == (3, 3)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_duplicate_boxes_are_dropped_and_counted(tmp_path: Path, form: str) -> None:
    boxes = [("cat", BOX), ("cat", BOX), ("dog", BOX), ("cat", (10, 10, 40, 41))]
    rows = [("a.jpg", "a.jpg"), ("b.jpg", "b.jpg")]
    datasets = read_all(make(tmp_path, form, rows, boxes=boxes))
    assert total(datasets) == (2, 6)
    said = [str(each) for each in datasets[0].problems if each.kind is Kind.DUPLICATE]
    assert len(said) == 1
    assert "1 duplicates of boxes" in said[0]


@pytest.mark.parametrize("form", FORMATS)
def test_classes_that_differ_by_case_or_space_are_pointed_out(tmp_path: Path, form: str) -> None:
    boxes = [("fork lift", BOX), ("Forklift", (5, 5, 20, 20)), ("dog", BOX)]
    rows = [("a.jpg", "a.jpg"), ("b.jpg", "b.jpg")]
    train, _ = read_all(make(tmp_path, form, rows, boxes=boxes))
    (said,) = [each.what for each in train.problems if each.kind is Kind.SIMILAR]
    assert "'Forklift', 'fork lift' differ" in said
    assert "--remap 'fork lift=Forklift'" in said
    joined = load(tmp_path, "train", remap={"fork lift": "Forklift"})
    assert len(joined.classes) == 2
    assert Kind.SIMILAR not in {each.kind for each in joined.problems}


TURNED = {
    "rotation": "<attributes><attribute><name>rotation</name><value>90.0</value></attribute>"
    "</attributes>",
    "occluded": "<attributes><attribute><name>occluded</name><value>1</value></attribute>"
    "</attributes>",
}


@pytest.mark.parametrize("form", ["cvat-voc", "rolabelimg", "coco"])
def test_rotated_boxes_become_the_upright_boxes_around_them(tmp_path: Path, form: str) -> None:
    # 40 x 10 about (40, 30), turned by a quarter.
    rows = [("a.jpg", "a.jpg"), ("b.jpg", "b.jpg")]
    box = ("cat", (20, 25, 60, 35))
    make(tmp_path, "coco" if form == "coco" else "voc", rows, boxes=[box])
    if form == "coco":
        path = tmp_path / "labels.json"
        content = json.loads(path.read_text())
        for each in content["annotations"]:
            each["attributes"] = {"rotation": 90.0}
        path.write_text(json.dumps(content))
    for path in (tmp_path / "Annotations").glob("*.xml"):
        text = path.read_text().replace("</object>", f"{TURNED['rotation']}</object>")
        if form == "rolabelimg":
            turned = "<cx>40</cx><cy>30</cy><w>40</w><h>10</h><angle>1.5707963</angle>"
            begin, end = text.index("<bndbox>"), text.index("</bndbox>") + len("</bndbox>")
            text = f"{text[:begin]}<robndbox>{turned}</robndbox>{text[end:]}"
        path.write_text(text)
    datasets = read_all(tmp_path)
    for dataset in datasets:
        assert dataset.samples[0].boxes.tolist() == [pytest.approx([35, 10, 45, 50], abs=1e-3)]
        assert "rotation" in next(
            each.what for each in dataset.problems if each.kind is Kind.ROTATED
        )


def test_other_attributes_turn_nothing(tmp_path: Path) -> None:
    make(tmp_path, "voc", [("a.jpg", "a.jpg"), ("b.jpg", "b.jpg")])
    path = tmp_path / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("</object>", f"{TURNED['occluded']}</object>"))
    datasets = read_all(tmp_path)
    assert datasets[0].classes == ("cat",)
    assert Kind.ROTATED not in kinds(datasets)


@pytest.mark.parametrize(
    ("image_id", "category_id", "crowd"),
    [("0", "0", None), (0.0, 0.0, 0), (" 0 ", "0", "0"), (0, "0", False)],
)
def test_coco_ids_may_be_text_or_floats(
    tmp_path: Path, image_id: Any, category_id: Any, crowd: Any
) -> None:
    make(tmp_path, "coco", [("a.jpg", "a.jpg"), ("b.jpg", "b.jpg")])
    path = tmp_path / "labels.json"
    content = json.loads(path.read_text())
    content["annotations"][0] |= {
        "image_id": image_id,
        "category_id": category_id,
        "iscrowd": crowd,
    }
    path.write_text(json.dumps(content))
    assert total(read_all(tmp_path)) == (2, 2)


@pytest.mark.parametrize("exif", [True, False])
def test_swapped_sides_are_blamed_on_exif_only_with_exif(tmp_path: Path, exif: bool) -> None:
    make(tmp_path, "voc", [("a.jpg", "a.jpg"), ("b.jpg", "b.jpg"), ("c.jpg", "c.jpg")])
    for name in "abc":
        if exif:
            place(tmp_path, f"{name}.jpg", orientation=6)
    size = (80, 60) if exif else (60, 80)
    (tmp_path / "Annotations" / "a.xml").write_text(annotation([("cat", BOX)], size=size))
    for name in "bc" if exif else "":
        path = tmp_path / "Annotations" / f"{name}.xml"
        path.write_text(annotation([("cat", BOX)], size=(60, 80)))
    said = [
        each.what
        for dataset in read_all(tmp_path)
        for each in dataset.problems
        if each.kind is Kind.WRONG_SIZE
    ]
    assert len(said) == 1
    assert ("EXIF" in said[0]) == exif
    assert ("the other way round" in said[0]) != exif


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("Küche", "cp1252"), ("叉车", "gb18030"), ("箱", "shift_jis"), ("ящик", "cp1251")],
)
def test_other_encodings_are_refused_by_name(tmp_path: Path, text: str, encoding: str) -> None:
    with pytest.raises(NotText, match="not UTF-8") as caught:
        decoded(f"cat\n{text}\n".encode(encoding))
    assert f"{text!r} in {encoding}" in str(caught.value)
    make(tmp_path, "yolo", [("a.jpg", "a.jpg"), ("b.jpg", "b.jpg")])
    (tmp_path / "data.yaml").write_bytes(f"train: images\nnames: [{text}]".encode(encoding))
    assert encoding in refusal(tmp_path)
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_bytes(text.encode(encoding))
    assert encoding in refusal(tmp_path)
    voc = make(tmp_path / "voc", "voc", [("a.jpg", "a.jpg"), ("b.jpg", "b.jpg")])
    undeclared = annotation([(text, BOX)]).encode(encoding)
    (voc / "Annotations" / "a.xml").write_bytes(undeclared)
    assert encoding in refusal(voc)
    declared = f"<?xml version='1.0' encoding='{encoding}'?>".encode() + undeclared
    for name in "ab":
        (voc / "Annotations" / f"{name}.xml").write_bytes(declared)
    assert read_all(voc)[0].classes == (text,)


def test_utf_16_with_a_byte_order_mark_is_read() -> None:
    assert decoded("Küche".encode("utf-16")) == decoded("Küche".encode("utf-8-sig")) == "Küche"


@pytest.mark.parametrize(
    ("text", "what"),
    [("crate\n\nbarrel\n", "classes.txt:2: a blank line among the classes: is class 1 'barrel'")],
)
def test_blank_line_among_the_classes_is_refused(tmp_path: Path, text: str, what: str) -> None:
    make(tmp_path, "yolo", [("a.jpg", "a.jpg"), ("b.jpg", "b.jpg")])
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_text(text)
    assert what in refusal(tmp_path)
    (tmp_path / "classes.txt").write_text("crate\nbarrel\n\n \n")
    assert total(read_all(tmp_path)) == (2, 2)


# --- the account of every file -------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_images_that_are_not_used_are_named(tmp_path: Path, form: str) -> None:
    make(tmp_path, form, [(f"{n}.jpg", f"{n}.jpg") for n in range(3)])
    place(tmp_path, ".hidden.jpg")
    place(tmp_path, "scan.bmp")
    (tmp_path / "images" / "._0.jpg").write_bytes(b"\0\5\x16\7")
    (tmp_path / "__MACOSX").mkdir()
    image(tmp_path / "__MACOSX" / "0.jpg")
    image(tmp_path / "cover.jpg")
    WRITERS[form](tmp_path, [(f"{n}.jpg", f"{n}.jpg") for n in range(3)] + [("scan.bmp",) * 2])
    datasets = read_all(tmp_path)
    assert total(datasets) == (3, 3)
    images, labels = account(LabelledFolder(tmp_path), datasets)
    assert (images.found, images.used) == (6, 3)
    assert {reason: [path.name for path in paths] for reason, paths in images.not_used.items()} == {
        "hidden, a name begins with a dot": [".hidden.jpg"],
        "not read (.bmp)": ["scan.bmp"],
        (
            "image left out, it has no annotation"
            if form == "voc"
            else "not labelled, or in no split"
        ): ["cover.jpg"],
    }
    expected = {"voc": (4, 3), "coco": (1, 1), "yolo": (4, 3)}[form]
    assert (labels.found, labels.used) == expected


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    form=st.sampled_from(FORMATS),
    files=st.dictionaries(
        st.sampled_from(
            [
                *("a.jpg", "b.JPG", "c.jfif", "d.png", "gate/a.jpg", ".e.jpg", "f.bmp", "g.TIF"),
                *(f"{DECOMPOSED}.jpg", "gate/h.webp", ".git/i.jpg", "deep/er/j.jpeg", "a.png"),
            ]
        ),
        st.sampled_from(["labelled", "other", "no"]),
        max_size=9,
    ),
    strays=st.sets(
        st.sampled_from(["k.xml", "labels/l.txt", "m.json", ".n.xml", "notes.txt", "images/o.txt"])
    ),
)
def test_every_file_is_used_or_named(
    tmp_path_factory: pytest.TempPathFactory,
    form: str,
    files: dict[str, str],
    strays: set[str],
) -> None:
    root = tmp_path_factory.mktemp("data")
    rows = [("first.jpg", "first.jpg"), ("second.jpg", "second.jpg")]
    make(root, form, rows)
    for name, how in files.items():
        place(root, name)
        if how == "labelled":
            rows.append((name, name))
        elif how == "other":
            rows.append((name, str(PurePosixPath(name).with_suffix(".jpg"))))
    WRITERS[form](root, rows)
    for name in strays:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            {".json": '{"images": [], "annotations": []}', ".txt": "0 .5 .5 .1 .1"}.get(
                path.suffix, annotation([("cat", BOX)], filename="first.jpg")
            )
        )
    try:
        datasets = read_all(root)
    except DataError as error:
        # Named, each with its file.
        assert str(root) in str(error)  # noqa: PT017 - which of the two is drawn, not fixed
        return
    images, labels = account(LabelledFolder(root), datasets)
    there = [path for path in root.rglob("*") if path.is_file()]
    assert images.found == sum(path.suffix.lower() in IMAGES for path in there)
    for count in (images, labels):
        named = [path for paths in count.not_used.values() for path in paths]
        assert count.used + len(named) == count.found
        assert len(named) == len(set(named))
    used = {sample.path for dataset in datasets for sample in dataset.samples}
    assert used.isdisjoint(path for paths in images.not_used.values() for path in paths)


def test_account_of_real_data_adds_up(bccd: Path, fod_a_mini: Path) -> None:
    for root in (bccd, fod_a_mini):
        folder = LabelledFolder(root)
        images, labels = account(folder, read_all(root))
        for count, suffix in ((images, ".jpg"), (labels, ".xml")):
            assert count.found == len(folder.having(suffix)) > 100
            assert count.used == count.found - sum(map(len, count.not_used.values()))


# --- whole folders -------------------------------------------------------------------------------


def test_folders_of_tools_and_people_are_read_right(tmp_path: Path, bccd: Path) -> None:
    script = bccd.parent.parent / "cases" / "label_folders.py"
    if not script.is_file():
        pytest.skip(f"{script} is not there")
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    for name, right in json.loads((tmp_path / "expected.json").read_text()).items():
        answer = tmp_path / f"{name}.json"
        arguments = ["data", "check", str(tmp_path / name / "data"), "--json", str(answer)]
        result = CliRunner().invoke(retinaserve, arguments)
        for words in right.get("says", ()):
            assert words in result.output, name
        if right.get("refused"):
            assert result.exit_code == 2, name
            continue
        assert result.exit_code == 0, f"{name}: {result.output}"
        read = json.loads(answer.read_text())
        splits = read["splits"].values()
        assert sum(split["pictures"] for split in splits) == right["images"], name
        assert sum(split["objects"] for split in splits) == right["objects"], name
        for count in read["files"].values():
            named = sum(map(len, count["not_used"].values()))
            assert count["used"] + named == count["found"], name

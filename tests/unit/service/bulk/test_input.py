"""What a user names as input becomes a listing, and the listing's images can be read."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.bulk.files import files_of, full_name, read_image
from service.bulk.listing import Item, Lister, Listing, difference, write_listing
from service.bulk.reading import ImageReader, Numbered
from service.bulk.walk import walk
from service.errors import DataError, RetinaserveError, TooLarge, Unreadable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    for name in ("b/2.jpg", "b/10.JPEG", "a.png", "c/d/e.webp", "c/x.txt", ".hidden/h.jpg"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


@pytest.fixture
def bucket() -> Iterator[str]:
    system = fsspec.filesystem("memory")
    for name in ("b/2.jpg", "a.png", "c/d/e.webp", "c/x.txt"):
        system.pipe_file(f"/bucket/{name}", name.encode())
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def named(given: object, root: object, **options: str) -> list[str]:
    items = Lister([str(given)], **options).items()
    return [item.path.removeprefix(f"{root}/") for item in items]


def table(path: Path, rows: int | None = None, **columns: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def read(items: list[Item], column: str | None = None, most: int = 100) -> list[bytes | str]:
    """Contents, or the words of the errors."""
    found: list[bytes | str] = [""] * len(items)
    numbered = [Numbered(i, item) for i, item in enumerate(items)]
    with closing(ImageReader(column, most)) as reader:
        for source in chain.from_iterable(reader.sources(numbered)):
            try:
                found[source.number] = bytes(source.load())
            except RetinaserveError as error:
                found[source.number] = f"{error.slug}: {error}"
    return found


def test_a_folder_is_walked_in_order_and_only_images_count(folder: Path) -> None:
    wanted = [".hidden/h.jpg", "a.png", "b/10.JPEG", "b/2.jpg", "c/d/e.webp"]
    assert named(folder, folder) == wanted


def test_links_to_folders_are_not_followed(folder: Path) -> None:
    (folder / "b" / "round").symlink_to(folder)
    (folder / "b" / "link.jpg").symlink_to(folder / "b" / "2.jpg")
    assert "b/link.jpg" in named(folder, folder)
    assert len(named(folder, folder)) == 6


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*.png", ["a.png"]),
        ("b/*", ["b/10.JPEG", "b/2.jpg"]),
        ("*/*.jp*g", ["b/2.jpg"]),
        ("?/[!0-9]*", ["c/x.txt"]),
        ("**/*.jpg", ["b/2.jpg"]),
        ("**.png", ["a.png"]),
        ("**", ["a.png", "b/10.JPEG", "b/2.jpg", "c/d/e.webp", "c/x.txt"]),
        ("c/**/e.*", ["c/d/e.webp"]),
        ("**/c/**/*.webp", ["c/d/e.webp"]),
        ("**/d/**", ["c/d/e.webp"]),
        (".hidden/*", [".hidden/h.jpg"]),
    ],
)
def test_globs(folder: Path, pattern: str, wanted: list[str]) -> None:
    assert named(folder / pattern, folder) == wanted


def test_a_url_is_walked_alike(bucket: str) -> None:
    assert named(bucket, bucket) == ["a.png", "b/2.jpg", "c/d/e.webp"]
    assert named(f"{bucket}/**/*.jpg", bucket) == ["b/2.jpg"]
    assert read_image(f"{bucket}/b/2.jpg", 100) == b"b/2.jpg"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("nowhere", "no such file or folder"),
        ("in/c/d/*.jpg", "no image there"),
        ("in/empty", "for a folder of Parquet files give --column"),
        ("zzz://in", "cannot be reached"),
    ],
)
def test_input_that_is_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: str, says: str
) -> None:
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder.parent)
    with pytest.raises(DataError, match=says):
        list(Lister([given]).items())


def test_folders_may_be_nested_deeper_than_the_stack(tmp_path: Path) -> None:
    deep = tmp_path / Path(*["d"] * 300)
    deep.mkdir(parents=True)
    (deep / "a.png").write_bytes(b"")
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        found = list(walk(str(tmp_path), lambda name: True))
    finally:
        sys.setrecursionlimit(usual)
    assert found == [str(deep / "a.png")]


def test_a_file_url_is_a_path(folder: Path) -> None:
    assert full_name(f"file://{folder}/b/../a.png") == str(folder / "a.png")


def test_parquet_of_paths(folder: Path) -> None:
    listed = table(
        folder / "tables" / "listed.parquet",
        image=["../a.png", str(folder / "b" / "2.jpg"), None, "memory://bucket/a.png"],
        id=[7, 8, 9, 10],
    )
    items = list(Lister([str(listed)]).items())
    assert [item.path for item in items] == [
        str(folder / "a.png"),
        str(folder / "b" / "2.jpg"),
        f"{listed}#2",
        "memory://bucket/a.png",
    ]
    assert read(items[:3], "image") == [
        b"a.png", b"b/2.jpg", "unreadable: the Parquet row holds no image",
    ]  # fmt: skip
    assert named(listed, "", column="image", name_column="id") == ["7", "8", "9", "10"]


@pytest.mark.parametrize("shape", ["binary", "large", "struct"])
def test_parquet_of_bytes(tmp_path: Path, shape: str) -> None:
    values = [b"one", b"two" * 50, None, *(str(i).encode() for i in range(20))]
    if shape == "struct":
        values = [None if each is None else {"bytes": each, "path": "x"} for each in values]
    kind = {
        "binary": pa.binary(),
        "large": pa.large_binary(),
        "struct": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    }[shape]
    path = table(tmp_path / "p.parquet", rows=12, image=pa.array(values, kind))
    items = list(Lister([str(tmp_path)], column="image").items())
    assert [item.path for item in items] == [f"{path}#{i}" for i in range(23)]
    wanted = [
        b"one",
        "too-large: the file has more than 100 bytes; RETINASERVE_MAX_BODY_BYTES is the limit",
        "unreadable: the Parquet row holds no image",
        *(str(i).encode() for i in range(20)),
    ]
    assert read(items, "image") == wanted
    # As a part in the middle has them, and as failed images are read again.
    assert read(items[5:15], "image") == wanted[5:15]
    assert read([items[i] for i in (1, 9, 4, 22)], "image") == [wanted[i] for i in (1, 9, 4, 22)]


def test_parquet_that_does_not_say_where_the_images_are(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", a=["x"], b=["y"], n=[1])
    with pytest.raises(DataError, match=r"Give --column; there is a, b, n"):
        list(Lister([str(path)]).items())
    with pytest.raises(DataError, match="no column 'c'; there is a, b, n"):
        list(Lister([str(path)], column="c").items())
    with pytest.raises(DataError, match="'n' has int64, not paths or bytes"):
        list(Lister([str(path)], column="n").items())
    (tmp_path / "q.parquet").write_bytes(b"no Parquet")
    with pytest.raises(DataError, match=r"q\.parquet: not a readable Parquet file"):
        list(Lister([str(tmp_path / "q.parquet")]).items())


def test_a_row_group_that_cannot_be_read_fails_alone(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", rows=2, image=[b"first", b"other", b"last", b"end"])
    items = list(Lister([str(path)]).items())
    whole = path.read_bytes()
    position = whole.index(b"first")
    path.write_bytes(whole[: position - 20] + bytes(30) + whole[position + 10 :])
    first, second, *others = read(items, "image")
    assert "cannot be read" in str(first) or first != b"first"
    assert str(second)
    assert others == [b"last", b"end"]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(Unreadable, match="not a regular file"):
        read_image(str(tmp_path / "pipe.jpg"), 10)
    with pytest.raises(Unreadable, match="No such file"):
        read_image(str(tmp_path / "gone.jpg"), 10)
    with pytest.raises(Unreadable, match="cannot be read"):
        read_image("memory://bucket/gone.jpg", 10)
    (tmp_path / "big.jpg").write_bytes(bytes(11))
    with pytest.raises(TooLarge):
        read_image(str(tmp_path / "big.jpg"), 10)


def test_a_listing_comes_back_part_by_part_and_tells_differences(folder: Path) -> None:
    name = str(folder / "listing")
    items = list(Lister([str(folder)]).items())
    assert write_listing(name, iter(items), 2) == 5
    listing = Listing(name)
    assert (listing.count, listing.parts) == (5, 3)
    assert [listing.part(i) for i in range(3)] == [items[:2], items[2:4], items[4:]]
    assert difference(listing, items) is None
    gone = difference(listing, items[:4])
    assert gone is not None
    assert gone.startswith("5 images then, 4 now; image 5 was ")
    assert gone.endswith("e.webp, now it is nothing")
    other = difference(listing, [items[0], items[2], *items[2:]])
    assert other is not None
    assert f"image 2 was {items[1].path}, now it is {items[2].path}" in other
    listing.close()


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, bucket: str) -> None:
    for where in (str(tmp_path), bucket):
        files, name = files_of(where), f"{where}/new"
        with suppress(RuntimeError), files.write(name) as file:
            file.write(b"half")
            raise RuntimeError
        assert not any("new" in entry.name for entry in files.scan(where))
        with files.write(name) as file:
            file.write(b"whole")
        with files.open(name) as file:
            assert file.read() == b"whole"
        files.remove(name)
        files.remove(name)
        assert files.kind(name) is None


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be listed"):
        files_of(str(tmp_path)).scan(str(tmp_path / "gone"))
    with pytest.raises(DataError, match="cannot be listed"):
        files_of("memory://x").scan("memory://x/gone")
    assert list(walk(str(tmp_path / "gone" / "*"), lambda name: True)) == []

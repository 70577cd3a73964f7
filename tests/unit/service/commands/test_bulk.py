"""`retinaserve bulk`, as a user types it, in this process."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from service import cli
from service.bulk import installed
from service.bulk.parts import SCHEMA, read_counts
from service.bulk.progress import Progress
from service.runtime.artifact import Thresholds, read_artifact
from service.runtime.detector import Detections, Detector
from tests import tiny_model
from tests.images import GREEN, RED, encoded, huge_png, one_red, squares
from tests.required_inputs import without_defaults


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "models"
    tiny_model.save(root)
    monkeypatch.setenv("RETINASERVE_MODELS_DIR", str(root))
    monkeypatch.setenv("RETINASERVE_DEVICE", "cpu")
    monkeypatch.setenv("RETINASERVE_CPU_INFERENCES", "1")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images, three of them bad."""
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    for i in range(6):
        (root / f"{i}.png").write_bytes(encoded(squares(*[(32, 16, RED)] * (i % 2))))
    (root / "bad.jpg").write_bytes(b"no image")
    (root / "bomb.png").write_bytes(huge_png(9000))
    (root / "deep" / "cut.png").write_bytes(encoded(one_red())[:-40])
    (root / "deep" / "green.png").write_bytes(encoded(squares((0, 0, GREEN), (64, 64, RED))))
    return root


def bulk(*arguments: object) -> Result:
    return CliRunner().invoke(cli.retinaserve, ["bulk", *map(str, arguments)])


def summary(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def rows(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(output).to_pylist()
    return found


def test_bulk_writes_a_row_per_image(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    found = summary(bulk(folder, "--output", output, "--part-size", 4))
    assert found["pictures"] == 10
    assert found["failed"] == 3
    assert found["errors"] == {"malformed-image": 1, "too-large": 1, "unsupported-media-type": 1}
    assert found["detections"] == 5
    assert found["parts"] == 3
    assert json.loads((output / "_run" / "summary.json").read_bytes()) == found
    table = pq.read_table(output)
    assert table.schema.equals(SCHEMA)
    by_name = {Path(row["path"]).name: row for row in table.to_pylist()}
    assert [Path(row["path"]).name for row in table.to_pylist()] == [
        *("0.png", "1.png", "2.png", "3.png", "4.png", "5.png"),
        *("bad.jpg", "bomb.png", "cut.png", "green.png"),
    ]
    assert by_name["0.png"] == {
        "path": str(folder / "0.png"), "width": 128, "height": 96, "boxes": [], "scores": [],
        "labels": [], "class_ids": [], "error": None,
    }  # fmt: skip
    green = by_name["green.png"]
    assert green["labels"] == ["red", "green"] or green["labels"] == ["green", "red"]
    assert sorted(green["class_ids"]) == [0, 1]
    assert sorted(green["boxes"]) == [[0.0, 0.0, 32.0, 32.0], [64.0, 64.0, 96.0, 96.0]]
    bomb = by_name["bomb.png"]
    assert bomb["error"].startswith("too-large: the image has 9000 x 9000 = 81000000 pixels")
    assert bomb["width"] is bomb["boxes"] is bomb["labels"] is None


def test_bulk_takes_a_file_of_required_inputs(folder: Path, tmp_path: Path, models: Path) -> None:
    summary(bulk(folder, "--output", tmp_path / "optional"))
    path = models / "tiny" / "1" / "model.onnx"
    path.write_bytes(without_defaults(path.read_bytes()))
    summary(bulk(folder, "--output", tmp_path / "required"))
    assert rows(tmp_path / "required") == rows(tmp_path / "optional")


def test_bulk_parts_describe_their_run(folder: Path, tmp_path: Path, models: Path) -> None:
    output = tmp_path / "out"
    summary(bulk(folder, "--output", output, "--score-threshold", "0.9", "--classes", "red,blue"))
    manifest = json.loads((output / "_run" / "manifest.json").read_bytes())
    metadata = pq.read_schema(output / "part-0000000.parquet").metadata
    assert json.loads(metadata[b"retinaserve"]) == manifest
    artifact = read_artifact(models / "tiny" / "1" / "model.onnx")
    assert manifest["model"] == {"name": "tiny", "version": 1, "sha256": artifact.sha256}
    assert manifest["class_names"] == ["red", "green", "blue"]
    assert manifest["pictures"] == 10
    assert manifest["parameters"]["score_threshold"] == 0.9
    assert manifest["parameters"]["classes"] == ["red", "blue"]
    assert {label for row in rows(output) for label in row["labels"] or ()} == {"red"}


def test_bulk_redoes_only_missing_parts(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = (folder, "--output", output, "--part-size", 2)
    summary(bulk(*command))
    whole, parts = rows(output), sorted(output.glob("*.parquet"))
    times = {part: part.stat().st_mtime_ns for part in parts}
    parts[1].unlink()
    # As a power failure may leave it, and what another process was writing when it was killed.
    parts[3].write_bytes(parts[3].read_bytes()[:-100])
    (output / ".part-0000001.parquet.1234.unfinished").write_bytes(b"half")
    found = summary(bulk(*command))
    assert found["already_done"] == {"pictures": 6, "parts": 3}
    assert rows(output) == whole
    assert not list(output.glob(".*"))
    again = {part for part in parts if part.stat().st_mtime_ns != times[part]}
    assert again == {parts[1], parts[3]}


def test_bulk_refuses_a_run_of_other_arguments(
    folder: Path, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    summary(bulk(folder, "--output", output))
    before = rows(output)
    tiny_model.save(models, version=2, thresholds=Thresholds(score=0.25))
    monkeypatch.setenv("RETINASERVE_MAX_IMAGE_PIXELS", "1000")
    refused = bulk(
        *(folder, "--output", output, "--model", "tiny@2", "--iou-threshold", "0.25"),
        *("--classes", "red", "--part-size", 3),
    )
    assert refused.exit_code == 2
    for word in (
        "the model file's sha256 was", "--iou-threshold was left open, now it is 0.25",
        "--classes was left open, now it is red", "--part-size was 1000, now it is 3",
        "RETINASERVE_MAX_IMAGE_PIXELS was 50000000, now it is 1000", "another --output",
    ):  # fmt: skip
        assert word in refused.stderr
    monkeypatch.undo()
    other = bulk(folder / "deep", "--output", output, "--models", models, "--model", "tiny@1")
    assert f"INPUT was {folder}, now it is {folder / 'deep'}" in other.stderr
    assert rows(output) == before


def test_bulk_notices_changed_input(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = (folder, "--output", output, "--part-size", 4)
    summary(bulk(*command))
    (folder / "3a.png").write_bytes(encoded(one_red()))
    (output / "part-0000001.parquet").unlink()
    refused = bulk(*command)
    assert refused.exit_code == 2
    assert "10 images then, 11 now" in refused.stderr
    assert f"was {folder / '4.png'}, now it is {folder / '3a.png'}" in refused.stderr
    assert summary(bulk(*command, "--as-listed"))["pictures"] == 10
    assert len(rows(output)) == 10


def test_bulk_retries_failed_images(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = (folder, "--output", output, "--part-size", 4)
    summary(bulk(*command))
    before = rows(output)
    (folder / "bad.jpg").write_bytes(encoded(squares((0, 0, RED)), "JPEG"))
    (folder / "1.png").write_bytes(b"was good when it was looked at")
    assert summary(bulk(*command))["failed"] == 3
    found = summary(bulk(*command, "--retry-failed"))
    assert found["failed"] == 2
    assert found["detections"] == 6
    after = rows(output)
    (changed,) = [i for i, row in enumerate(after) if row != before[i]]
    assert after[changed]["path"] == str(folder / "bad.jpg")
    assert after[changed]["labels"] == ["red"]


def test_bulk_strict_fails_on_failed_images(folder: Path, tmp_path: Path) -> None:
    assert bulk(folder, "--output", tmp_path / "out", "--strict").exit_code == 1
    assert bulk(folder / "*.png", "--output", tmp_path / "o", "--strict").exit_code == 1
    assert bulk(folder / "[0-9].png", "--output", tmp_path / "p", "--strict").exit_code == 0


def test_bulk_reads_and_writes_urls(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    for i in range(5):
        system.pipe_file(f"/store/in/{i}.png", encoded(one_red()))
    command = ("memory://store/in", "--output", "memory://store/out", "--part-size", 2)
    try:
        assert summary(bulk(*command))["pictures"] == 5
        system.rm("/store/out/part-0000001.parquet")
        assert summary(bulk(*command))["already_done"]["parts"] == 2
        system.get("/store/out/", str(tmp_path / "copy"), recursive=True)
    finally:
        system.rm("/store", recursive=True)
    found = rows(tmp_path / "copy")
    assert [row["path"] for row in found] == [f"memory://store/in/{i}.png" for i in range(5)]
    assert all(row["labels"] == ["red"] for row in found)


def test_bulk_reads_images_from_parquet(tmp_path: Path) -> None:
    good = encoded(one_red())
    images = [good, b"", None, *[good] * 17]
    table = pa.table({"jpeg": pa.array(images, pa.binary()), "id": [f"id{i}" for i in range(20)]})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=7)
    command = (tmp_path / "in.parquet", "--column", "jpeg", "--name-column", "id")
    assert summary(bulk(*command, "--output", tmp_path / "out", "--part-size", 6))["failed"] == 2
    found = rows(tmp_path / "out")
    assert [row["path"] for row in found] == [f"id{i}" for i in range(20)]
    assert [row["error"] is None for row in found] == [i not in (1, 2) for i in range(20)]
    assert all(row["labels"] == ["red"] for row in found if row["error"] is None)


def test_bulk_locks_its_output(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    summary(bulk(folder, "--output", output))
    with (output / "_run" / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused = bulk(folder, "--output", output)
    assert refused.exit_code == 2
    assert "another process works on it" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere",), "no such file or folder"),
        (("images", "--classes", "cat"), "unknown class 'cat'"),
        (("images", "--tile", "7"), "neither off nor auto"),
        (("images", "--model", "other"), "no model 'other'"),
        (("images", "--concurrency", "2"), "--concurrency needs --engine ray"),
        (("images", "--max-detections", "0"), "is not in the range"),
        (("",), "it is empty"),
        (("images", "--output", ""), "it is empty"),
    ],
)
def test_bulk_rejects_bad_arguments(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(folder.parent)
    refused = bulk("--output", "out", *arguments)
    assert refused.exit_code == 2
    assert says in refused.stderr
    assert not list(Path("out").glob("part*"))


def test_bulk_refuses_output_without_manifest(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    summary(bulk(folder, "--output", output))
    (output / "_run" / "manifest.json").unlink()
    refused = bulk(folder, "--output", output)
    assert refused.exit_code == 2
    assert "give an empty --output" in refused.stderr
    assert read_counts(str(output / "part-0000000.parquet"), "another run") is None


def test_bulk_ends_on_unwritable_output(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = (folder, "--output", output, "--part-size", 4)
    summary(bulk(*command))
    (output / "part-0000001.parquet").unlink()
    (output / "part-0000001.parquet").mkdir()
    failed = bulk(*command)
    assert failed.exit_code == 1
    assert "The same command goes on where it ended" in failed.stderr
    (output / "part-0000001.parquet").rmdir()
    assert summary(bulk(*command))["pictures"] == 10


def test_bulk_ends_on_failing_device(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    command = (folder / "[0-9].png", "--output", output, "--part-size", 2)
    works, seen = Detector.__call__, []

    def breaks(self: Detector, canvases: Any, *given: Any, **options: Any) -> list[Detections]:
        # Canvases without anything may be the warm-up's.
        seen.extend(canvas for canvas in canvases if canvas.any())
        if len(seen) > 1:
            raise RuntimeError("CUDA failure 700: illegal access ;")
        return works(self, canvases, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "__call__", breaks)
        failed = bulk(*command)
    assert failed.exit_code == 1
    assert "the device does not answer any more: CUDA failure 700: illegal access" in failed.stderr
    assert "The same command goes on where it ended" in failed.stderr
    assert all(row["error"] is None for part in output.glob("part*") for row in rows(part))
    found = summary(bulk(*command))
    assert (found["pictures"], found["failed"]) == (6, 0)


@pytest.mark.parametrize("tile", ["off", "auto", "64"])
def test_bulk_decoder_failure_costs_one_row(folder: Path, tmp_path: Path, tile: str) -> None:
    # Of the palette kind, without a palette: Pillow asserts that there is one.
    whole = encoded(one_red().convert("P"))
    begin = whole.index(b"PLTE") - 4
    end = begin + 12 + int.from_bytes(whole[begin : begin + 4], "big")
    (folder / "broken.png").write_bytes(whole[:begin] + whole[end:])
    found = summary(bulk(folder, "--output", tmp_path / "out", "--tile", tile))
    assert (found["pictures"], found["failed"]) == (11, 4)
    (error,) = [row["error"] for row in rows(tmp_path / "out") if "broken" in row["path"]]
    assert error.partition(":")[0] in ("malformed-image", "inference-failed")


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ("images --output images", True),
        ("images --output linked", True),
        ("images/*.png --output linked", True),
        ("tables --column image --output tables", True),
        ("tables --column image --output tables/found", True),
        ("tables --column image --output tables/../tables/found", True),
        ("tables/**/*.parquet --output tables/found", True),
        ("tables/*.parquet --output tables/found", False),
        ("images/[0-9].png --output images/found", False),
        ("images --output images/found", False),
    ],
)
def test_bulk_refuses_output_inside_the_input(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, refused: bool
) -> None:
    monkeypatch.chdir(folder.parent)
    Path("linked").symlink_to("images")
    Path("tables").mkdir()
    pq.write_table(pa.table({"image": [encoded(one_red())]}), "tables/in.parquet")
    for _ in range(2):
        result = bulk(*arguments.split())
        assert result.exit_code == (2 if refused else 0), result.output
        assert ("lies in INPUT" in result.stderr) == refused
    assert refused == (not list(Path().rglob("part-*.parquet")))


def test_bulk_removes_only_its_unfinished_files(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "_run").mkdir(parents=True)
    (output / "thesis.unfinished").write_bytes(b"mine")
    (output / "_run" / "lock").write_bytes(b"mine")
    (output / ".12345678.unfinished").write_bytes(b"half")
    summary(bulk(folder, "--output", output))
    assert (output / "thesis.unfinished").read_bytes() == b"mine"
    assert (output / "_run" / "lock").read_bytes() == b"mine"
    assert not (output / ".12345678.unfinished").exists()


def test_bulk_refuses_a_glob_that_matches_nothing(folder: Path, tmp_path: Path) -> None:
    refused = bulk(folder / "[z-a].png", "--output", tmp_path / "out")
    assert refused.exit_code == 2
    assert "[z-a].png: no image there" in refused.stderr


@pytest.mark.parametrize(
    ("missing", "options", "remedy"),
    [
        ("pyarrow", (), "pip install 'retinaserve[bulk]'"),
        ("ray", ("--engine", "ray"), "pip install 'retinaserve[scale]'"),
        ("fsspec", ("s3://bucket/x",), "pip install 'retinaserve[bulk]'"),
    ],
)
def test_bulk_names_the_missing_extra(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    options: tuple[str, ...],
    remedy: str,
) -> None:
    there = installed.find_spec
    monkeypatch.setattr(installed, "find_spec", lambda n: None if n == missing else there(n))
    refused = bulk(folder, *options, "--output", tmp_path / "out")
    assert refused.exit_code == 2
    assert f"needs the package {missing!r}: {remedy}" in refused.stderr


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("service.bulk.progress.time.monotonic", lambda: now[0])
    return now


def test_bulk_progress_in_a_log_is_rare(
    told: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(100, done=20, failed=1)
    progress.start()
    told[0] = 10.0
    progress.add(10)
    assert capsys.readouterr().err == ""
    told[0] = 40.0
    progress.add(30, failed=2)
    progress.close()
    line = "retinaserve: 60 of 100 images, 1.0/s, 3 failed, 00:40 left\n"
    assert capsys.readouterr().err == line

"""The command line, as a user types it, in this process."""

from __future__ import annotations

import csv
import errno
import io
import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import matplotlib as mpl
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from service import cli
from service.commands.detect import BatchWriter, Reader
from service.http.schemas import BatchAnswer, DetectAnswer
from service.runtime.artifact import read_artifact, write_checksum, write_metadata
from tests import tiny_model
from tests.images import GREEN, RED, encoded, one_red, rotated, squares
from tests.required_inputs import without_defaults


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "models"
    tiny_model.save(root)
    monkeypatch.setenv("RETINASERVE_MODELS_DIR", str(root))
    monkeypatch.setenv("RETINASERVE_DEVICE", "cpu")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    (root / "a.png").write_bytes(encoded(one_red()))
    (root / "b.JPG").write_bytes(b"no image")
    (root / "deep" / "c.png").write_bytes(encoded(squares((0, 0, GREEN))))
    (root / "notes.txt").write_text("not looked at")
    return root


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.retinaserve, [str(argument) for argument in arguments])


def labels(result: dict[str, object]) -> list[str]:
    return [each["label"] for each in result["detections"]]  # type: ignore[attr-defined]


def test_help_on_every_level_is_quick_and_light() -> None:
    probe = (
        "import sys; from click.testing import CliRunner; from service import cli\n"
        "for line in ([], ['serve'], ['detect'], ['label'], ['doctor'], ['inspect']):\n"
        "    result = CliRunner().invoke(cli.retinaserve, [*line, '--help'])\n"
        "    assert result.exit_code == 0 and 'Usage: ' in result.output, result.output\n"
        "heavy = {'torch', 'onnxruntime', 'fastapi', 'PIL', 'model_export'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, cwd=Path(__file__).parents[4])


def entry(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = EntryPoint(name=name, value=value, group=cli.COMMAND_GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda *, group: [point])


def test_entry_point_commands_are_listed_without_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry(monkeypatch, "train", "no_such_package.cli:train")
    result = run("--help")
    assert result.exit_code == 0
    assert "train" in result.output
    assert "serve" in result.output
    result = run("train", "--data", "x")
    assert result.exit_code == 2
    assert "pip install 'retinaserve[train]'" in result.output


def test_entry_point_command_gets_arguments_and_exit_code(
    monkeypatch: pytest.MonkeyPatch, models: Path
) -> None:
    # Any command will do; this one is at hand.
    entry(monkeypatch, "look", "service.cli:inspect")
    model = models / "tiny" / "1" / "model.onnx"
    assert "classes          3: red, green, blue" in run("look", model).output
    result = run("look", model, "--set-threshold", "grey=1")
    assert result.exit_code == 2
    assert result.output.startswith("retinaserve: error: --set-threshold grey=1: no class 'grey'")
    result = run("look", "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.output
    assert run("look", "--nonsense").exit_code == 2


def test_detect_one_image_prints_the_detect_schema(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd name.bin"
    path.write_bytes(rotated(one_red(), 3))
    result = run("detect", path)
    assert result.exit_code == 0
    answer = DetectAnswer.model_validate_json(result.stdout, strict=True)
    assert (answer.model.name, answer.model.version) == ("tiny", 1)
    assert [each.box.model_dump() for each in answer.detections] == [
        {"x1": 32.0, "y1": 16.0, "x2": 64.0, "y2": 48.0}
    ]


def test_detect_folder_prints_the_batch_schema(models: Path, folder: Path) -> None:
    result = run("detect", folder)
    assert result.exit_code == 2
    answer = BatchAnswer.model_validate_json(result.stdout)
    assert [each.id for each in answer.results] == [
        str(folder / name) for name in ("a.png", "b.JPG", "deep/c.png")
    ]
    assert [each.status for each in answer.results] == [200, 415, 200]
    assert f"{folder}/b.JPG: not an accepted image type" in result.stderr


def test_detect_keeps_the_order_of_images(models: Path, tmp_path: Path) -> None:
    for number in range(30):
        colour = RED if number % 2 else GREEN
        (tmp_path / f"{number:02}.png").write_bytes(encoded(squares((0, 0, colour))))
    results = json.loads(run("detect", tmp_path).stdout)["results"]
    assert [labels(each)[0] for each in results] == ["green", "red"] * 15


def test_detect_prints_coco_and_csv(models: Path, folder: Path) -> None:
    rows = json.loads(run("detect", folder, "--output", "coco").stdout)
    assert [(row["image_id"], row["category_id"]) for row in rows] == [(0, 0), (2, 1)]
    assert rows[0]["bbox"] == [32.0, 16.0, 32.0, 32.0]
    assert rows[1]["file_name"].endswith("deep/c.png")
    table = list(csv.DictReader(io.StringIO(run("detect", folder, "--output", "csv").stdout)))
    assert [row["label"] for row in table] == ["red", "green"]
    assert (table[0]["x1"], table[0]["y2"]) == ("32.0", "48.0")


def test_detect_takes_ids_from_an_annotation_file(models: Path, folder: Path) -> None:
    like = folder / "like.json"
    images = [{"id": 70, "file_name": "c.png"}, {"id": 50, "file_name": "a.png"}]
    categories = [{"id": 9 - n, "name": name} for n, name in enumerate(tiny_model.CLASSES)]
    like.write_text(json.dumps({"images": images, "categories": categories}))
    result = run("detect", folder, "--output", "coco", "--like", like)
    assert result.exit_code == 2
    rows = json.loads(result.stdout)
    assert [(row["image_id"], row["category_id"]) for row in rows] == [(50, 9), (70, 8)]
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("retinaserve: "))
    assert line.endswith(f"1 images without an entry in {like} are left out: '{folder.name}/b.JPG'")
    result = run("detect", folder / "a.png", "--output", "coco", "--like", like)
    assert result.exit_code == 2
    assert [row["image_id"] for row in json.loads(result.stdout)] == [50]
    assert f"1 images of {like} are not given" in result.stderr
    assert "'c.png'" in result.stderr
    both = (folder / "a.png", folder / "deep")
    assert run("detect", *both, "--output", "coco", "--like", like).exit_code == 0
    for output in ("json", "csv"):
        result = run("detect", *both, "--output", output, "--like", like)
        assert result.exit_code == 2
        assert "--like goes with --output coco" in result.stderr


def test_detect_applies_max_detections(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "two.png"
    path.write_bytes(encoded(squares((0, 0, GREEN), (64, 32, RED))))
    assert len(json.loads(run("detect", path).stdout)["detections"]) == 2
    result = run("detect", path, "--max-detections", "1")
    assert len(json.loads(result.stdout)["detections"]) == 1
    assert run("detect", path, "--max-detections", "0").exit_code == 2


def test_detect_applies_score_threshold(models: Path, folder: Path) -> None:
    result = run("detect", folder / "a.png", "--score-threshold", "1")
    assert json.loads(result.stdout)["detections"] == []
    assert run("detect", folder, "--score-threshold", "1.5").exit_code == 2


def test_save_dir_keeps_names_and_types(models: Path, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.png").write_bytes(encoded(one_red()))
    target = tmp_path / "drawn"
    result = run("detect", folder, other, "--save-dir", target)
    assert result.exit_code == 2, "b.JPG is no image"
    names = sorted(str(path.relative_to(target)) for path in target.rglob("*.*"))
    assert names == ["a-2.png", "a.png", "deep/c.png"]
    with Image.open(target / "a.png") as drawn:
        assert drawn.size == (128, 96)
    assert (target / "a.png").read_bytes() != (folder / "a.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "target"),
    [
        ("a.png --save-dir .", "a.png"),
        ("deep/../a.png --save-dir deep/..", "deep/../a.png"),
        (". --save-dir ../images", "../images/a.png"),
        ("../link --save-dir .", "a.png"),
        ("a.png --save-dir ../hard", "../hard/a.png"),
        ("a.png --save-dir ../soft", "../soft/a.png"),
        ("deep/c.png a.png b.JPG --save-dir deep", "deep/c.png"),
        (". --save-dir deep/kept", "deep/kept/a.png"),
    ],
)
def test_save_dir_never_replaces_an_image_that_is_read(
    models: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, target: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "deep" / "kept").mkdir()
    (folder / "deep" / "kept" / "a.png").write_bytes(encoded(squares((0, 0, GREEN))))
    Path("../link").symlink_to("images")
    for name in ("hard", "soft"):
        Path("..", name).mkdir()
    Path("../hard/a.png").hardlink_to("a.png")
    Path("../soft/a.png").symlink_to("../images/a.png")
    before = {path: path.read_bytes() for path in folder.parent.rglob("*.*") if path.is_file()}
    # No model is looked for: the images are compared first.
    result = run("detect", *arguments.split(), "--model", "missing.onnx")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"retinaserve: error: {target}: writing it would replace ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert {path: path.read_bytes() for path in before} == before


def test_save_dir_replaces_copies_and_does_not_follow_links(
    models: Path, folder: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"mine")
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    (drawn / "a.png").symlink_to(mine)
    for _ in range(2):
        assert run("detect", folder / "a.png", "--save-dir", drawn).exit_code == 0
    assert mine.read_bytes() == b"mine"
    assert [path.name for path in drawn.iterdir()] == ["a.png"]
    assert not (drawn / "a.png").is_symlink()


def test_save_dir_rejects_colliding_names(models: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "c.png").write_bytes(encoded(one_red()))
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    (drawn / "deep").symlink_to(drawn)
    result = run("detect", folder, "--save-dir", drawn)
    assert result.exit_code == 2
    assert f"{drawn}/deep/c.png: not written: it is another image's" in result.stderr
    with Image.open(drawn / "c.png") as image:
        assert image.getpixel((60, 40)) == RED


def test_save_dir_handles_the_longest_name(models: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{'x' * 251}.png"
    path.write_bytes(encoded(one_red()))
    assert run("detect", path, "--save-dir", tmp_path / "drawn").exit_code == 0
    assert (tmp_path / "drawn" / path.name).is_file()


def test_save_dir_draws_names_in_the_font_file(
    models: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models / "tiny" / "1" / "model.onnx"
    metadata = read_artifact(model).metadata
    drawn = {}
    serif = Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSerif.ttf")
    for name, font in (("Größe", ""), ("class 0", ""), ("Größe", serif), ("class 0", serif)):
        classes = (name, *metadata.classes[1:])
        write_metadata(model, metadata.model_copy(update={"classes": classes}))
        monkeypatch.setenv("RETINASERVE_FONT_FILE", str(font))
        assert run("detect", folder / "a.png", "--save-dir", tmp_path / "drawn").exit_code == 0
        drawn[name, font] = (tmp_path / "drawn" / "a.png").read_bytes()
    assert drawn["Größe", ""] == drawn["class 0", ""]
    assert len(set(drawn.values())) == 3
    monkeypatch.setenv("RETINASERVE_FONT_FILE", str(folder / "a.png"))
    result = run("detect", folder / "a.png", "--save-dir", tmp_path / "other")
    assert result.exit_code == 2
    assert f"RETINASERVE_FONT_FILE={folder}/a.png: unknown file format" in result.stderr
    for arguments in (("--save-dir", ""), ("--device", " ")):
        result = run("detect", folder / "a.png", *arguments)
        assert result.exit_code == 2
        assert "is empty" in result.stderr


def test_detect_csv_holds_no_formulas(
    models: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models / "tiny" / "1" / "model.onnx"
    metadata = read_artifact(model).metadata
    classes, per_class = ("=cmd|' /C calc'!A0", "@green", "-blue"), {"-blue": 0.8}
    thresholds = metadata.thresholds.model_copy(update={"per_class": per_class})
    write_metadata(
        model, metadata.model_copy(update={"classes": classes, "thresholds": thresholds})
    )
    names = ("=1+1.png", "+.png", "@x.png", "\ty.png", "\rz\r=1.png", "'q.png", "plain.png")
    monkeypatch.chdir(folder)
    for name in names:
        Path(name).write_bytes(encoded(one_red()))
    result = run("detect", "--output", "csv", *names)
    assert result.exit_code == 0
    table = list(csv.DictReader(io.StringIO(result.stdout_bytes.decode(), newline="")))
    assert [row["file"] for row in table] == [*(f"'{name}" for name in names[:-1]), "plain.png"]
    assert {row["label"] for row in table} == {f"'{classes[0]}"}


def test_detect_failure_costs_one_image(
    models: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: Reader, path: Path) -> bytes:
        if path.name == "a.png":
            raise RecursionError("too deep")
        return works(self, path)

    works = Reader.read
    monkeypatch.setattr(Reader, "read", breaks)
    result = run("detect", folder)
    assert result.exit_code == 2
    results = json.loads(result.stdout)["results"]
    assert [each["status"] for each in results] == [500, 415, 200]
    assert "a.png: the image could not be processed" in result.stderr


def test_detect_error_leaves_json_incomplete(
    models: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*given: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(BatchWriter, "add", breaks)
    result = run("detect", folder)
    assert result.exit_code == 1
    assert result.stderr.endswith("retinaserve: error: [Errno 5] Input/output error\n")
    with pytest.raises(json.JSONDecodeError):
        json.loads(result.stdout)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--model", "tiny@2"), "no model 'tiny@2'"),
        (("--model", "other"), "there is tiny@1"),
        (("--model", "missing.onnx"), "missing.onnx: cannot be read"),
        (("--device", "gpu"), "--device=gpu"),
        (("--tile", "foo"), "tile='foo' is neither off nor auto nor"),
        (("--tile", "0"), "32 to 65535"),
    ],
)
def test_detect_start_errors_are_one_line(
    models: Path, folder: Path, arguments: tuple[str, ...], text: str
) -> None:
    result = run("detect", folder, *arguments)
    assert result.exit_code == 2
    assert text in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_detect_rejects_empty_folder(models: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("detect", tmp_path / "empty")
    assert result.exit_code == 2
    assert "no image in this folder" in result.stderr


def test_detect_selects_model_by_name_version_or_file(models: Path, folder: Path) -> None:
    tiny_model.save(models, version=2)
    image = folder / "a.png"

    def used(*arguments: object) -> object:
        return json.loads(run("detect", image, *arguments).stdout)["model"]

    assert used() == {"name": "tiny", "version": 2}
    assert used("--model", "tiny@1") == {"name": "tiny", "version": 1}
    alone = folder / "alone.onnx"
    alone.write_bytes((models / "tiny" / "1" / "model.onnx").read_bytes())
    assert used("--model", alone) == {"name": "tiny", "version": None}


def test_detect_requires_a_name_among_models(models: Path, folder: Path) -> None:
    tiny_model.save(models, name="other")
    result = run("detect", folder)
    assert result.exit_code == 2
    assert "other, tiny" in result.stderr
    assert run("detect", folder / "a.png", "--model", "other").exit_code == 0


def test_inspect_describes_the_model_file(models: Path) -> None:
    output = run("inspect", models / "tiny" / "1" / "model.onnx").output
    for text in (
        "inputs           optional\n",
        "images (uint8) ['batch', 'height', 'width', 3]\n",
        "max_detections (int64) [1] (has a default)",
        "labels (int64) ['detections']",
        "96x128, 128x96, 96x96",
        "of blue        0.8",
        "AP 0.500, AP50 0.900 on drawn squares val",
        '"model": "Apache-2.0"',
    ):
        assert text in output, text


def test_commands_take_a_file_of_required_inputs(models: Path, folder: Path) -> None:
    path = models / "tiny" / "1" / "model.onnx"
    expected = run("detect", folder / "a.png", "--output", "coco")
    assert "(has a default)" in run("inspect", path).output
    path.write_bytes(without_defaults(path.read_bytes()))
    output = run("inspect", path, "--set-threshold", "0.4").output
    assert "\ninputs           required\n" in output
    assert "(has a default)" not in output
    assert "score threshold  0.4" in output
    run("inspect", path, "--set-threshold", "0.5")
    found = run("detect", folder / "a.png", "--output", "coco")
    assert found.exit_code == expected.exit_code == 0
    assert found.stdout == expected.stdout
    assert re.search(r"tiny@1 +works on cpu", run("doctor").output)


def test_set_threshold_changes_the_file_and_its_checksum(models: Path) -> None:
    path = models / "tiny" / "1" / "model.onnx"
    write_checksum(path)
    metadata = read_artifact(path).metadata
    told = {**metadata.provenance, "thresholds": {"images": 10, "f1": {"micro": 0.9}}}
    write_metadata(path, metadata.model_copy(update={"provenance": told}))
    result = run("inspect", path, "--set-threshold", "0.25", "--set-threshold", "red=0.75")
    assert result.exit_code == 0
    # What it said of thresholds that it no longer has.
    assert read_artifact(path).metadata.provenance == metadata.provenance
    thresholds = read_artifact(path).metadata.thresholds
    assert thresholds.score == 0.25
    assert thresholds.per_class == {"blue": 0.8, "red": 0.75}


@pytest.mark.parametrize("change", ["2", "red=much", "grey=0.5", "red=", "nan"])
def test_set_threshold_refuses_and_leaves_the_file_alone(models: Path, change: str) -> None:
    path = models / "tiny" / "1" / "model.onnx"
    before = path.read_bytes()
    result = run("inspect", path, "--set-threshold", change)
    assert result.exit_code == 2
    assert change in result.stderr
    assert path.read_bytes() == before


def test_set_threshold_write_error_is_one_line(models: Path) -> None:
    path = next(models.glob("*/*/model.onnx"))
    # The place of the new file is taken: unlike a file's mode, that stops root too.
    path.with_name("model.onnx.part").mkdir()
    result = run("inspect", path, "--set-threshold", "0.25")
    assert result.exit_code == 2
    assert "cannot be changed: Is a directory" in result.output
    assert len(result.output.splitlines()) == 1


def test_inspect_rejects_other_files(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"PK\x03\x04 not a model")
    result = run("inspect", path)
    assert result.exit_code == 2
    assert "not an ONNX file" in result.stderr


def test_doctor_lists_hardware_and_models(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model.save(models, version=2).write_bytes(b"broken")
    result = run("doctor")
    assert result.exit_code == 0
    assert "cpu works" in result.output
    assert "tiny@1         works on cpu" in result.output
    assert "tiny@2         NOT usable" in result.output
    monkeypatch.setattr("service.runtime.devices.nvidia_driver", lambda: None)
    result = run("doctor", "--device", "cuda")
    assert result.exit_code == 1
    assert "NOT usable" in result.output
    assert "no NVIDIA driver was found" in result.stderr


def test_doctor_without_models(models: Path, tmp_path: Path) -> None:
    result = run("doctor", "--device", "cpu")
    assert result.exit_code == 0
    (models / "tiny" / "1" / "model.onnx").unlink()
    result = run("doctor", "--device", "cpu")
    assert "no model" in result.output

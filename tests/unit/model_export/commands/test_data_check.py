"""`data check`, and what the other commands take from a labelled folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from model_export.checkpoints import load_checkpoint
from model_export.commands.labelled_data import as_options
from model_export.config import DataConfig, TrainConfig
from model_export.data.datasets import load
from model_export.training.recommendation import recommend
from service.cli import retinaserve
from service.errors import DataError
from tests.unit.model_export import copies, rectangles
from tests.unit.model_export.voc_folder import VocFolder, annotation

TINY = {
    "model": {"backbone": "resnet18", "fpn_channels": 8, "head_width": 8, "head_depth": 0},
    "augmentation": {"mosaic": 0.0},
    "batch_size": 2,
    "epochs": 1,
    "validate_every": 1,
    "workers": 0,
    "precision": "32",
}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(retinaserve, [str(each) for each in arguments])


# --- data check ----------------------------------------------------------------------------------


def test_check_counts_and_recommends(rectangles_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "answer.json"
    result = call("data", "check", rectangles_data, "--json", file)
    assert result.exit_code == 0, result.output
    assert "train: 6 images, 1 of them without objects; 5 objects" in result.stdout
    assert "val: 10 images, 1 of them without objects; 9 objects" in result.stdout
    assert "objects on the canvas, root of the area in px: 5 % below" in result.stdout
    answer = json.loads(file.read_text())
    assert answer["splits"]["val"]["classes"]["red"]["objects"] == 5
    assert answer["stops_training"] == []
    recommended = answer["recommended"]
    # What is printed can be pasted, and is what the JSON says.
    text = result.stdout
    printed = yaml.safe_load(text[text.index("\ncanvas:") : text.index("wrote ")])
    assert printed == recommended["settings"]
    config = TrainConfig.model_validate(printed)
    assert config.canvas == recommend(load(rectangles_data, "train"), TrainConfig()).after.canvas
    assert recommended["after"]["reached"] >= recommended["before"]["reached"]


def test_check_judges_the_canvas_that_is_asked_for(rectangles_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "answer.json"
    result = call(
        "data", "check", rectangles_data, "--config", "paper", "--canvas", "32x32", "--json", file
    )
    assert result.exit_code == 0, result.output
    # Rectangles of about 60 px in 200 x 150: 10 px here, which the anchors of `paper` do not reach.
    assert "objects that no anchor reaches, the smallest of 5:" in result.stdout
    assert "px on the canvas" in result.stdout
    assert "the canvas is the one asked for; of itself it would be " in result.stdout
    train = json.loads(file.read_text())["splits"]["train"]
    assert len(train["unreached"]) == 5
    assert train["unreached"][0]["class"] in ("red", "green")
    assert train["warnings"][0].startswith("warning: no anchor reaches 100.0 % of")


def test_check_reads_a_config_and_one_split(rectangles_data: Path, tmp_path: Path) -> None:
    config = tmp_path / "own.yaml"
    config.write_text("canvas: {rule: buckets, sizes: [[96, 128]]}\ndata: {remap: {green: red}}\n")
    result = call("data", "check", rectangles_data, "--config", config, "--split", "train")
    assert result.exit_code == 0, result.output
    assert "red          5 " in result.stdout
    assert "val:" not in result.stdout
    assert "sizes:\n  - [96, 128]" in result.stdout
    only_val = call("data", "check", rectangles_data, "--split", "val")
    assert only_val.exit_code == 0
    assert "recommended" not in only_val.stdout


def test_check_finds_everything_that_is_wrong(tmp_path: Path) -> None:
    folder = VocFolder(tmp_path / "data")
    for number in range(30):
        folder.annotate(f"p{number:02}", annotation([("cat", (1, 1, 9, 9))]))
    folder.add("good", [("cat", (10, 10, 40, 40))])
    folder.add("bad")
    spoilt = folder.annotate("bad", "<annotation>")
    folder.list("train", "good", *(f"p{number:02}" for number in range(30)))
    folder.list("val", "bad")
    file = tmp_path / "answer.json"
    result = call("data", "check", folder.root, "--json", file)
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert sum("no image 'p" in line for line in lines) == 30
    assert any(line.startswith(f"{spoilt}:1: not well-formed XML") for line in lines)
    assert "31 problems to solve before training" in lines[-1]
    stopping = json.loads(file.read_text())["stops_training"]
    assert len(stopping) == 31
    assert {"file": str(spoilt), "line": 1} == {key: stopping[-1][key] for key in ("file", "line")}


def test_check_shows_the_splits_that_are_sound(tmp_path: Path) -> None:
    folder = VocFolder(tmp_path / "data")
    folder.add("a", [("cat", (10, 10, 40, 40))])
    folder.add("b", [("cat", (10, 10, 40, 40))])
    folder.annotate("b", annotation([("cat", (10, 10, 40, 40))], size=(1, 1)))
    folder.list("train", "a")
    folder.list("val", "b")
    result = call("data", "check", folder.root)
    assert result.exit_code == 2
    assert "train: 1 images" in result.stdout
    assert "recommended canvas:" in result.stdout
    lines = result.stderr.strip().splitlines()
    assert "b.xml:2: labelled at 1 x 1" in lines[0]
    assert lines[-1].endswith("every image of the split 'val' is left out")


def test_check_says_where_it_cannot_write(rectangles_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = call("data", "check", rectangles_data, "--json", tmp_path / "file" / "answer.json")
    assert result.exit_code == 2
    assert "answer.json: cannot be written: " in result.stderr


def test_check_without_the_train_extra(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from service.cli import main\n"
        f"sys.argv[1:] = ['data', 'check', {str(tmp_path)!r}]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "`retinaserve data` needs the package 'torch'" in done.stderr
    assert "pip install 'retinaserve[train]'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["data", "check", "missing"], "does not exist"),
        (["data", "check", "."], "no annotations here; looked for"),
        (["data", "check", ".", "--canvas", "big"], "expected HEIGHTxWIDTH"),
        (["data", "check", ".", "--format", "csv"], "Invalid value for '--format'"),
        (["data", "check", ".", "--remap", "cat"], "expected OLD=NEW"),
        (["data", "check", ".", "--remap", "cat="], "names that are not empty"),
        (["data", "check", ".", "--classes", "a,,b"], "names that are not empty"),
        (["data", "check", ".", "--classes", "a,b,a"], "classes names one twice: a, b, a"),
        (["data", "check", ".", "--config", "missing"], "neither a file nor one of"),
        (["train", "--data", ".", "--output", "run", "--anchors", "best"], "Invalid value"),
        (["train", "--data", ".", "--output", "r", "--max-minutes", "nan"], "not a finite number"),
        (["train", "--data", ".", "--output", "r", "--budget-ms", "inf"], "not a finite number"),
        (["data", "check", ".", "--budget-ms", "nan"], "not a finite number"),
        (["detect", ".", "--score-threshold", "nan"], "not a finite number"),
        (["label", ".", "--output", "o", "--score-threshold", "nan"], "not a finite number"),
        (["bulk", ".", "--output", "o", "--iou-threshold", "nan"], "not a finite number"),
    ],
)
def test_wrong_usage(
    arguments: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2
    assert reason in " ".join(result.stderr.split())


# --- the other commands --------------------------------------------------------------------------


def test_train_takes_what_check_recommends(rectangles_data: Path, tmp_path: Path) -> None:
    data = copies.write_coco(rectangles_data, tmp_path / "coco", rectangles.CLASSES, most=4)
    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(TINY))
    chosen = ("--classes", "shape", "--remap", "red=shape", "--remap", "green=shape")
    checked = call("data", "check", data, "--config", config, *chosen)
    assert checked.exit_code == 0, checked.output
    trained = call(
        *("train", "--data", data, "--config", config, "--output", run, "--anchors", "auto"),
        *(*chosen, "--device", "cpu"),
    )
    assert trained.exit_code == 0, trained.output
    written = yaml.safe_load((run / "config.yaml").read_text())
    recommended = yaml.safe_load(checked.stdout[checked.stdout.index("\ncanvas:") :])
    assert written["canvas"]["sizes"] == recommended["canvas"]["sizes"]
    for key, value in recommended["model"]["anchors"].items():
        assert written["model"]["anchors"][key] == value
    assert written["data"]["remap"] == {"red": "shape", "green": "shape"}
    # An export builds the network from this.
    description = load_checkpoint(run / "last.ckpt").description
    assert description.classes == ("shape",)
    assert description.model.anchors.model_dump(mode="json") == written["model"]["anchors"]
    assert "--classes shape --remap red=shape --remap green=shape --output" in trained.stdout
    # And going on needs none of the options.
    again = call("train", "--data", data, "--output", run, "--resume", "--anchors", "auto")
    assert again.exit_code == 2
    assert "--anchors goes with a new network only" in again.stderr
    again = call("train", "--data", data, "--output", run, "--resume", "--budget-ms", "50")
    assert again.exit_code == 2
    assert "--budget-ms goes with a new network only" in again.stderr


def test_evaluate_reads_other_formats_and_names(
    rectangles_model: Path, rectangles_data: Path, tmp_path: Path
) -> None:
    yolo = copies.write_yolo(rectangles_data, tmp_path / "yolo", rectangles.CLASSES)
    described = yolo / "data.yaml"
    described.write_text(described.read_text().replace("- red", "- crimson"))
    arguments = ("evaluate", rectangles_model, "--data", yolo, "--device", "cpu")
    refused = call(*arguments)
    assert refused.exit_code == 2
    assert "unknown class 'crimson'; known: red, green" in refused.stderr
    renamed = call(*arguments, "--remap", "crimson=red")
    assert renamed.exit_code == 0, renamed.output
    assert "10 images, 9 objects" in renamed.stdout
    subset = call(*arguments, "--classes", "green", "--format", "yolo")
    assert subset.exit_code == 0, subset.output
    assert "10 images, 4 objects" in subset.stdout


def test_options_that_can_be_copied() -> None:
    assert as_options(DataConfig()) == ""
    choice = DataConfig(format="coco", classes=("a b", "c"), remap={"x": "c"})
    assert as_options(choice) == "--format coco --classes 'a b,c' --remap x=c "


@pytest.mark.parametrize(
    "values", [{"classes": []}, {"classes": ["a", "a"]}, {"remap": {"": "a"}}, {"format": "csv"}]
)
def test_settings_that_make_no_sense(values: dict[str, object]) -> None:
    from model_export.config import apply_overrides

    with pytest.raises(DataError, match="data"):
        apply_overrides({}, {"data": values})

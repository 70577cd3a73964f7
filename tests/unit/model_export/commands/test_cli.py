import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import click
import matplotlib as mpl
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from fontTools.ttLib import TTFont

from model_export.checkpoints import Checkpoint, fetch_imagenet, load_checkpoint
from model_export.commands.export import default_name, parse_canvas
from model_export.commands.labelled_data import load
from model_export.commands.options import DEFAULT_RECIPE
from model_export.commands.train import adopt, parse_setting
from model_export.config import apply_overrides, load_config
from model_export.data.folder import LabelledFolder
from model_export.provenance import git_commit
from model_export.retinanet.matching import AtssMatcher
from model_export.training.recommendation import recommend
from service.cli import retinaserve
from service.errors import DataError
from service.imaging.canvas import Buckets, ShortSide, Size
from service.runtime.artifact import read_artifact
from tests.required_inputs import without_defaults
from tests.unit.model_export import copies, rectangles

TINY = {
    "model": {"backbone": "resnet18", "fpn_channels": 8, "head_width": 8, "head_depth": 0},
    "canvas": {"rule": "buckets", "sizes": [[96, 128], [128, 96]]},
    "augmentation": {"mosaic": 0.0},
    "batch_size": 2,
    "epochs": 1,
    "validate_every": 1,
    "workers": 0,
    "precision": "32",
}


def call(*arguments: object) -> Result:
    """The `retinaserve` command, as its entry point runs it."""
    return CliRunner().invoke(retinaserve, [str(each) for each in arguments])


def check_refused(result: Result, *words: str) -> None:
    """Exit 2, and the last line of stderr gives the reason."""
    assert result.exit_code == 2, result.output
    reason = result.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in reason


# --- help, and without the extra -----------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "evaluate", "export", "pull"])
def test_help_shows_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"Example:\n    retinaserve {command} " in result.stdout


@pytest.mark.parametrize("command", ["train", "evaluate", "export", "pull"])
def test_without_the_train_extra(command, tmp_path):
    file = tmp_path / "file"
    file.touch()
    arguments = {
        "train": ["--data", str(tmp_path), "--output", str(tmp_path / "run")],
        "evaluate": [str(file), "--data", str(tmp_path)],
        "export": [str(file), "--output", str(tmp_path / "m.onnx")],
        "pull": ["coco"],
    }[command]
    # An import of a name that is None in sys.modules fails as if it was not installed.
    script = (
        "import sys\n"
        "for name in ('torch', 'lightning', 'pycocotools', 'matplotlib', 'yaml', 'safetensors',"
        " 'onnxscript', 'jinja2'):\n"
        "    sys.modules[name] = None\n"
        "from service.cli import main\n"
        f"sys.argv[1:] = {[command, *arguments]!r}\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install 'retinaserve[train]'" in done.stderr
    assert "Traceback" not in done.stderr


# --- evaluate ------------------------------------------------------------------------------------


def test_evaluate_prints_and_writes_everything(rectangles_model, rectangles_data, tmp_path):
    figures, answer = tmp_path / "figures", tmp_path / "new" / "answer.json"
    report = tmp_path / "new" / "report.html"
    result = call(
        "evaluate",
        rectangles_model,
        *("--data", rectangles_data, "--device", "cpu"),
        *("--against", rectangles_model, "--plots", figures, "--json", answer),
        *("--report", report),
    )
    assert result.exit_code == 0, result.output
    assert "10 images, 9 objects" in result.stdout
    assert "session alone" in result.stdout
    assert "D-ECE 0.1000 of 9 detections above 0.05" in result.stdout
    assert "AP    +0.0000  [+0.0000, +0.0000]" in result.stdout
    values = json.loads(answer.read_text())
    assert values["metrics"]["ap50"] == pytest.approx(1.0)
    assert values["metrics"]["per_class"]["red"]["count"] == 5
    assert values["model"]["sha256"] == read_artifact(rectangles_model).sha256
    # Every rectangle is found, at 0.9: midway to the lowest score that is measured, 0.01.
    assert values["thresholds"] == {"red": 0.455, "green": 0.455}
    assert (
        "thresholds chosen on 10 images: F1 1.0000 micro, 1.0000 macro there; "
        "F1 1.0000 micro, 1.0000 macro by 5-fold cross-validation\n"
    ) in result.stdout
    assert values["against"]["difference"]["ap"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    for said in (result.stdout, values["against"]["note"], report.read_text()):
        assert "It leaves out the spread over training seeds" in said
    assert len(list(figures.glob("*.png"))) == 5
    assert "no difference to be seen" in report.read_text()
    assert "picture-0.png" not in report.read_text(), "every rectangle is found"


def test_evaluate_where_nothing_can_be_written(rectangles_model, rectangles_data, tmp_path):
    (tmp_path / "file").touch()
    result = call(
        "evaluate", rectangles_model, "--data", rectangles_data, "--device", "cpu",
        "--report", tmp_path / "file" / "report.html",
    )  # fmt: skip
    check_refused(result, "report.html: cannot be written", "name another file")


def test_evaluate_refuses_a_font_that_plots_cannot_use(
    rectangles_model, rectangles_data, tmp_path, monkeypatch
):
    compressed = tmp_path / "font.woff"
    font = TTFont(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    font.flavor = "woff"
    font.save(compressed)
    for file, reason in ((__file__, "unknown file format"), (compressed, "WOFF")):
        monkeypatch.setenv("RETINASERVE_FONT_FILE", str(file))
        result = call(
            "evaluate", rectangles_model, "--data", rectangles_data, "--device", "cpu",
            "--plots", tmp_path / "plots",
        )  # fmt: skip
        check_refused(result, f"RETINASERVE_FONT_FILE={file}: ", reason)
        assert result.stdout == "", "before anything is measured"


def test_evaluate_against_a_file_with_another_class_order(
    rectangles_model, rectangles_data, tmp_path
):
    turned = rectangles.write_model(tmp_path / "turned.onnx", classes=("green", "red"))
    result = call(
        "evaluate", rectangles_model, "--data", rectangles_data, "--against", turned,
        "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "AP50  +0.0000  [+0.0000, +0.0000]" in result.stdout


def test_evaluate_against_another_class_order_turns_crowds_and_difficult_objects(
    rectangles_model, rectangles_data, tmp_path
):
    coco = copies.write_coco(rectangles_data, tmp_path / "coco", ("red", "green"))
    truth = coco / "annotations" / "instances_val2017.json"
    content = json.loads(truth.read_text())
    content["annotations"][0]["iscrowd"] = 1
    truth.write_text(json.dumps(content))
    voc = copies.write_voc(rectangles_data, tmp_path / "voc")
    path = sorted((voc / "Annotations").glob("*.xml"))[0]
    hard = path.read_text().replace("<bndbox>", "<difficult>1</difficult><bndbox>")
    # A link to the file that other tests read.
    path.unlink()
    path.write_text(hard)
    turned = rectangles.write_model(tmp_path / "turned.onnx", classes=("green", "red"))
    for data in (coco, voc):
        answer = tmp_path / "answer.json"
        result = call(
            "evaluate", rectangles_model, "--data", data, "--against", turned, "--device", "cpu",
            "--json", answer,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        values = json.loads(answer.read_text())
        assert values["data"]["objects"] == 8
        assert values["metrics"]["ap50"] == pytest.approx(1.0)
        assert values["against"]["metrics"]["per_class"] == values["metrics"]["per_class"]


def test_evaluate_against_other_classes_is_refused(rectangles_model, rectangles_data, tmp_path):
    other = rectangles.write_model(tmp_path / "other.onnx", classes=("red", "green", "blue"))
    result = call(
        "evaluate", rectangles_model, "--data", rectangles_data, "--against", other,
        "--device", "cpu",
    )  # fmt: skip
    check_refused(result, "other.onnx", "red, green, blue", "same classes")
    assert result.stdout == "", "it measures for minutes before it refuses"


def test_evaluate_on_classes_that_the_file_does_not_know(rectangles_model, tmp_path):
    data = rectangles.draw_data(tmp_path / "animals", names=("cat", "dog"))
    result = call("evaluate", rectangles_model, "--data", data)
    check_refused(result, "the classes of", "rectangles.onnx are red, green")
    # By file and line, before the reason.
    assert "image-0.xml:1: unknown class 'cat'; known: red, green" in result.stderr


def test_evaluate_something_else_than_a_model(rectangles_data, tmp_path):
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    check_refused(call("evaluate", text, "--data", rectangles_data), "text.onnx", "not an ONNX")


def test_evaluate_a_split_that_is_not_there(rectangles_model, rectangles_data):
    result = call("evaluate", rectangles_model, "--data", rectangles_data, "--split", "test")
    check_refused(result, "test.txt", "train, val")


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "missing.onnx", "--data", "."],
        ["evaluate"],
        ["train", "--data", "missing", "--output", "run"],
        ["train", "--data", ".", "--output", "run", "--epochs", "0"],
        ["train", "--data", ".", "--output", "run", "--weights", "w.pth", "--init", "c.ckpt"],
        ["export", "missing.ckpt", "--output", "m.onnx"],
    ],
)
def test_wrong_usage(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


# --- train and export ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return rectangles.draw_data(tmp_path_factory.mktemp("data") / "rectangles")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[Path, Result]:
    """A run of one epoch with a tiny network, and what the command printed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    result = call(
        "train",
        *("--data", data, "--output", folder / "run", "--config", folder / "tiny.yaml"),
        *("--set", "optimiser.lr=0.005", "--seed", 3, "--device", "cpu"),
        *("--licence", "data: MIT", "--licence", "weights: Apache-2.0"),
    )
    assert result.exit_code == 0, result.output
    return folder / "run", result


@pytest.fixture(scope="module")
def exported(data, trained, untraced_exporter, tmp_path_factory) -> tuple[Path, Result]:
    """That run's last checkpoint as a model file, measured."""
    output = tmp_path_factory.mktemp("models") / "cells" / "2" / "model.onnx"
    result = call(
        *("export", trained[0] / "last.ckpt", "--output", output, "--data", data),
        *("--save-weights", output.parent / "checkpoint.safetensors"),
    )
    assert result.exit_code == 0, result.output
    return output, result


def test_train_writes_a_run(trained):
    run, result = trained
    for name in ("last.ckpt", "best.ckpt", "metrics.csv", "config.yaml", "curves.png"):
        assert (run / name).stat().st_size > 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["optimiser"]["lr"], config["seed"], config["epochs"]) == (0.005, 3, 1)
    assert config["model"]["backbone"] == "resnet18"
    assert "train: 6 images, 1 of them without objects; 5 objects" in result.stdout
    assert "no anchor" in result.stdout


def test_train_told_nothing_else_fits_network_canvas_and_anchors_to_the_data(data, tmp_path):
    result = call(
        *("train", "--data", data, "--output", tmp_path / "run", "--device", "cpu"),
        *("--epochs", 1, "--max-minutes", 60),
    )
    assert result.exit_code == 0, result.output
    config = load_config(tmp_path / "run" / "config.yaml", {})
    light = load_config(DEFAULT_RECIPE, {})
    assert config.model.backbone == light.model.backbone
    assert config.model.head_norm == light.model.head_norm == "batch"
    assert config.matching == light.matching == AtssMatcher()
    training = load(LabelledFolder(data), "train")
    # As large as the images, which are 200 x 150, 150 x 200 and 180 x 150.
    assert {min(size) for size in config.canvas.sizes} == {160}
    advice = recommend(training, light)
    assert (config.canvas, config.model.anchors) == (advice.after.canvas, advice.after.anchors)
    assert advice.after.overall.reached == 1
    assert "recommended canvas: " in result.stdout
    assert re.search(
        r"a training step takes .* s an image at .*, so that about 1 fit", result.stdout
    )


def test_train_keeps_what_is_named_and_fits_the_rest(data, tmp_path):
    sizes = [[24], [36], [48], [96], [192]]
    model = TINY["model"] | {"anchors": {"sizes": sizes}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"model": model}))
    for options, kept in (((), True), (("--anchors", "auto"), False)):
        run = tmp_path / f"run-{kept}"
        result = call(
            *("train", "--data", data, "--output", run, "--device", "cpu", *options),
            *("--config", tmp_path / "tiny.yaml", "--max-minutes", 0.0001),
        )
        assert result.exit_code == 0, result.output
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["canvas"]["sizes"] == TINY["canvas"]["sizes"]
        assert (config["model"]["anchors"]["sizes"] == sizes) == kept
        assert ("recommended canvas" in result.stdout) != kept
        assert "fewer than 20 epochs learn little" in result.stdout


def test_train_notes_where_the_model_comes_from(trained):
    noted = load_checkpoint(trained[0] / "last.ckpt").description.provenance
    assert noted["licences"] == ["data: MIT", "weights: Apache-2.0"]
    assert noted["data"] == {"name": "rectangles", "pictures": 6}
    assert noted["config"]["seed"] == 3
    assert noted["weights"] is None


@pytest.fixture(scope="module")
def unlabelled_val(tmp_path_factory) -> Path:
    """Data whose val split holds no object."""
    return rectangles.draw_data(tmp_path_factory.mktemp("data") / "unlabelled", val_objects=False)


def test_train_without_objects_in_val_keeps_the_last_epoch(unlabelled_val, tmp_path, caplog):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"epochs": 2}))
    result = call(
        "train",
        *("--data", unlabelled_val, "--output", tmp_path / "run", "--device", "cpu"),
        *("--config", tmp_path / "tiny.yaml"),
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.count("the val split holds no object, so there is no AP") == 1
    assert "\nbest.ckpt is of the last epoch; next:\n" in result.stdout
    assert " AP 0" not in result.output + caplog.text
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        assert [(row["ap"], row["ap50"]) for row in csv.DictReader(file)] == [("", ""), ("", "")]
    for name in ("best.ckpt", "last.ckpt"):
        saved = torch.load(tmp_path / "run" / name, weights_only=True)
        assert saved["epoch"] == 1, "counted from 0"
    assert saved["progress"]["best_ap"] < 0, "resumed on labelled val images, the first AP is best"


def test_int8_without_objects_is_refused(unlabelled_val, trained, tmp_path):
    result = call(
        *("export", trained[0] / "best.ckpt", "--output", tmp_path / "m.onnx"),
        *("--data", unlabelled_val, "--precision", "int8"),
    )
    check_refused(result, "no object is labelled in the split 'val'", "name a split with objects")


def test_train_does_not_overwrite_a_run(data, trained):
    run, _ = trained
    before = (run / "last.ckpt").read_bytes()
    check_refused(call("train", "--data", data, "--output", run), "holds a run already", "--resume")
    assert (run / "last.ckpt").read_bytes() == before


def test_resume_goes_on(data, trained, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("last.ckpt", "config.yaml", "metrics.csv"):
        (run / name).write_bytes((trained[0] / name).read_bytes())
    result = call(
        "train", "--data", data, "--output", run, "--resume", "--epochs", 2, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    with (run / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["epochs"], config["optimiser"]["lr"]) == (2, 0.005)


def test_train_with_mosaics_at_several_canvas_sizes(data, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    run = tmp_path / "run"
    arguments = [
        "train", "--data", data, "--output", run, "--config", tmp_path / "tiny.yaml",
        *("--set", "augmentation.mosaic=0.5", "--device", "cpu"),
    ]  # fmt: skip
    refused = call(*arguments, "--set", "augmentation.canvas_scales=[0.75,10]")
    check_refused(refused, "augmentation.canvas_scales", "[0.75, 10.0]", "within 0.25 and 4")
    assert not run.exists()
    result = call(*arguments, "--set", "augmentation.canvas_scales=[0.75,1.25]")
    assert result.exit_code == 0, result.output
    with (run / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["classification_loss"]) > 0
    used = yaml.safe_load((run / "config.yaml").read_text())["augmentation"]
    assert (used["mosaic"], used["mosaic_until"]) == (0.5, 0.8)
    assert used["canvas_scales"] == [0.75, 1.25]
    # The detector's own canvas is that of the config.
    canvas = load_checkpoint(run / "best.ckpt").description.canvas
    assert canvas.all_canvases() == (Size(96, 128), Size(128, 96))


def test_resume_without_a_run(data, tmp_path):
    result = call("train", "--data", data, "--output", tmp_path / "run", "--resume")
    check_refused(result, "last.ckpt", "nothing to resume")
    assert not (tmp_path / "run").exists()


def test_resume_keeps_what_the_run_began_with(data, trained):
    result = call("train", "--data", data, "--output", trained[0], "--resume", "--init", "bundled")
    check_refused(result, "--init does not go with --resume")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--backbone", "resnet34"), "`model`"),
        (("--set", "model.anchors.ratios=[1.0]"), "`model`"),
        (("--set", "canvas.sizes=[[64, 64]]"), "`canvas`"),
        (("--set", "optimiser.name=adamw"), "`optimiser.name`"),
    ],
)
def test_resume_keeps_what_cannot_change(options, name, data, trained):
    run = trained[0]
    before = (run / "config.yaml").read_bytes()
    result = call("train", "--data", data, "--output", run, "--resume", *options)
    check_refused(result, f"the run began with another {name}", "--init")
    # With another network written there, the run could not be resumed any more.
    assert (run / "config.yaml").read_bytes() == before


def test_resume_on_other_classes_is_refused(trained, tmp_path):
    other = rectangles.draw_data(tmp_path / "animals", names=("cat", "dog"))
    result = call("train", "--data", other, "--output", trained[0], "--resume")
    check_refused(result, "cat, dog", "the run began with red, green")


def test_init_takes_network_and_canvas_from_the_checkpoint(trained, tmp_path):
    other = rectangles.draw_data(tmp_path / "animals", names=("cat", "dog"))
    settings = ["epochs=1", "batch_size=2", "workers=0", 'precision="32"']
    result = call(
        "train",
        *("--data", other, "--output", tmp_path / "run", "--init", trained[0] / "last.ckpt"),
        *(part for each in settings for part in ("--set", each)),
        *("--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    description = load_checkpoint(tmp_path / "run" / "last.ckpt").description
    assert description.classes == ("cat", "dog")
    assert description.model.fpn_channels == 8
    assert description.canvas.sizes == (Size(96, 128), Size(128, 96))
    assert description.provenance["init"]["file"] == "last.ckpt"


def test_budget_for_a_canvas_that_is_named_is_refused(data, tmp_path):
    result = call(
        "train", "--data", data, "--output", tmp_path / "run", "--config", "blood-cells",
        "--budget-ms", "50",
    )  # fmt: skip
    check_refused(result, "--budget-ms limits the canvas", "leave one of the two out")


def test_init_keeps_anchors_that_the_config_leaves_to_the_data(trained):
    description = load_checkpoint(trained[0] / "last.ckpt").description
    fitted = description.model.anchors.model_copy(update={"ratios": (0.7,)})
    model = description.model.model_copy(update={"anchors": fitted})
    checkpoint = Checkpoint(Path("last.ckpt"), description.model_copy(update={"model": model}), {})
    # The config that the checkpoint was trained with.
    assert adopt(apply_overrides(TINY, {}), checkpoint, given_model=True).model == model
    named = {**TINY, "model": {**TINY["model"], "anchors": {"ratios": [2.0]}}}
    with pytest.raises(DataError, match="other anchors"):
        adopt(apply_overrides(named, {}), checkpoint, given_model=True)


def test_init_of_another_network_is_refused(data, trained, tmp_path):
    checkpoint = trained[0] / "last.ckpt"
    result = call(
        "train", "--data", data, "--output", tmp_path / "run", "--init", checkpoint,
        "--backbone", "resnet34",
    )  # fmt: skip
    check_refused(result, "its network is resnet18", "--backbone")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--backbone", "vgg", ["unknown backbone 'vgg'", "resnet18"]),
        ("--set", "optimiser.speed=3", ["optimiser.speed"]),
        ("--set", "epochs", ["expected KEY=VALUE"]),
        ("--set", "canvas=64x64", ["canvas: a group of settings is expected, found '64x64'"]),
        ("--set", "model=tiny", ["model: a group of settings is expected, found 'tiny'"]),
        ("--weights", "missing.pth", ["missing.pth", "no such file"]),
        ("--init", "missing.ckpt", ["missing.ckpt", "no such checkpoint"]),
    ],
)
def test_train_names_what_is_wrong(option, value, words, data, tmp_path):
    result = call("train", "--data", data, "--output", tmp_path / "run", option, value)
    check_refused(result, *words)
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_train_takes_imagenet_weights_from_the_installed_package(data, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    run = tmp_path / "run"
    arguments = [
        "train", "--data", data, "--output", run, "--config", tmp_path / "tiny.yaml",
        *("--backbone", "efficientnet_lite0", "--weights", "imagenet", "--device", "cpu"),
    ]  # fmt: skip
    refused = call(*arguments, "--set", "model.norm_eps=0.00001")
    check_refused(refused, "model.norm_eps 1e-05", "efficientnet_lite0 were trained with 0.001")
    assert not run.exists()
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    checkpoint = load_checkpoint(run / "best.ckpt")
    assert checkpoint.description.model.norm_eps == 1e-3
    weights = checkpoint.description.provenance["weights"]
    assert weights["file"] == "efficientnet-lite0-57934424.pth"
    assert weights["sha256"].startswith("57934424")
    # Frozen norms keep the statistics of the weights.
    state = torch.load(fetch_imagenet("efficientnet_lite0", tmp_path), weights_only=True)
    mean = checkpoint.weights["backbone.features.16.conv.3.running_mean"]
    assert torch.equal(mean, state["_blocks.15._bn2.running_mean"])


@pytest.mark.slow
def test_light_takes_imagenet_weights_from_the_package_index(data, tmp_path, monkeypatch):
    monkeypatch.setattr("model_export.commands.train.CACHE", tmp_path)
    run = tmp_path / "run"
    result = call(
        *("train", "--data", data, "--output", run, "--config", "light", "--weights", "imagenet"),
        *("--epochs", 1, "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    checkpoint = load_checkpoint(run / "best.ckpt")
    weights = checkpoint.description.provenance["weights"]
    assert weights["file"] == "mobilenetv2_bottleneck_wts-2f518e77.pt"
    # Frozen norms keep the statistics of the weights.
    state = torch.load(tmp_path / weights["file"], weights_only=True)
    mean = checkpoint.weights["backbone.features.0.1.running_mean"]
    assert torch.equal(mean, state["features.0.1.running_mean"])


def test_bad_data_stops_before_training(tmp_path):
    root = rectangles.draw_data(tmp_path / "data")
    (root / "JPEGImages" / "image-13.png").unlink()
    (root / "JPEGImages" / "image-15.png").write_bytes(b"")
    result = call("train", "--data", root, "--output", tmp_path / "run")
    check_refused(result, "2 problems stop training")
    assert "image-13.xml" in result.stderr
    assert "image-15.png" in result.stderr
    assert not (tmp_path / "run").exists()


def test_export_describes_and_verifies(exported):
    output, result = exported
    metadata = read_artifact(output).metadata
    assert metadata.name == "cells"
    assert metadata.classes == ("red", "green")
    assert (metadata.metrics.dataset, metadata.metrics.split) == ("rectangles", "val")
    assert metadata.provenance["licences"] == ["data: MIT", "weights: Apache-2.0"]
    assert "6 images, canvases 96x128" in result.stdout
    assert "thresholds chosen on 10 images: F1 " in result.stdout
    thresholds = metadata.thresholds
    own = "".join(f", {name} {value!r}" for name, value in thresholds.per_class.items())
    assert f"score thresholds: {thresholds.score!r}{own}\n" in result.stdout
    assert metadata.provenance["thresholds"]["images"] == 10
    written = sorted(path.name for path in output.parent.iterdir())
    assert written == ["checkpoint.safetensors", "model.onnx", "model.sha256"]


def test_exported_file_is_evaluated(exported, data, tmp_path):
    output, _ = exported
    required = tmp_path / "required.onnx"
    required.write_bytes(without_defaults(output.read_bytes()))
    found = []
    for file in (output, required):
        predictions = tmp_path / f"{file.stem}.json"
        result = call(
            *("evaluate", file, "--data", data, "--device", "cpu", "--predictions", predictions)
        )
        assert result.exit_code == 0, result.output
        assert "10 images, 9 objects" in result.stdout
        found.append(json.loads(predictions.read_bytes()))
    assert found[0] == found[1] != []


def test_export_without_data_and_with_other_canvas_and_inputs(exported, tmp_path):
    # A bare safetensors file, as the bundled model's.
    weights = exported[0].with_name("checkpoint.safetensors")
    output = tmp_path / "small.onnx"
    result = call(
        "export", weights, "--output", output, "--canvas", "64x96",
        "--score-threshold", "0.25", "--licence", "CC0", "--inputs", "required",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "\ninputs           required\n" in call("inspect", output).stdout
    assert "\ninputs           optional\n" in call("inspect", exported[0]).stdout
    assert "canvases 64x96" in result.stdout
    metadata = read_artifact(output).metadata
    assert metadata.name == "small"
    assert metadata.canvas == Buckets(sizes=(Size(64, 96),))
    assert metadata.thresholds.score == 0.25
    assert metadata.metrics is None
    assert metadata.provenance["licences"] == ["CC0"]
    # The checksum in the folder is of the exported file, and keeps no other from being read.
    assert read_artifact(rectangles.write_model(tmp_path / "other.onnx")).metadata.classes


def test_weights_are_saved_as_safetensors_only(trained, tmp_path):
    result = call(
        *("export", trained[0] / "last.ckpt", "--output", tmp_path / "m.onnx"),
        *("--save-weights", tmp_path / "m.ckpt"),
    )
    assert result.exit_code == 2
    assert "ends in .safetensors" in result.stderr
    assert not any(tmp_path.iterdir())


def test_export_of_something_else(tmp_path):
    text = tmp_path / "text.ckpt"
    text.write_text("not a checkpoint")
    result = call("export", text, "--output", tmp_path / "m.onnx")
    check_refused(result, "text.ckpt", "not a checkpoint")
    assert not (tmp_path / "m.onnx").exists()


def test_export_with_a_canvas_that_is_none(trained, tmp_path):
    checkpoint = trained[0] / "last.ckpt"
    result = call("export", checkpoint, "--output", tmp_path / "m.onnx", "--canvas", "100x100")
    check_refused(result, "100x100", "multiple of 32")


# --- what the options are made of ----------------------------------------------------------------


def test_parse_canvas():
    assert parse_canvas("384x512, 512x384") == Buckets(sizes=(Size(384, 512), Size(512, 384)))
    assert parse_canvas("short-side:800,1333") == ShortSide(short=800, long=1333)
    for wrong in ("", "384", "384x512,", "384x500", "short-side:0,10", "800"):
        with pytest.raises(click.BadParameter, match="multiples of 32"):
            parse_canvas(wrong)


def test_parse_setting():
    assert parse_setting("optimiser.lr=0.005") == ("optimiser.lr", 0.005)
    assert parse_setting("canvas.sizes=[[64, 96]]") == ("canvas.sizes", [[64, 96]])
    assert parse_setting("max_minutes=null") == ("max_minutes", None)
    for wrong in ("epochs", "=3", "key=[1"):
        with pytest.raises(click.BadParameter):
            parse_setting(wrong)


def test_default_name():
    assert default_name(Path("models/cells/3/model.onnx")) == "cells"
    assert default_name(Path("out/cells.onnx")) == "cells"


def test_commit_of_the_sources_and_of_nothing(tmp_path):
    commit = git_commit(Path(__file__))
    assert commit is None or len(commit.removesuffix("-dirty")) == 40
    assert git_commit(tmp_path / "file.py") is None

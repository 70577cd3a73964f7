"""The training configuration: defaults, YAML, overrides, and errors that name file and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from model_export.config import (
    DEFAULT_CANVAS,
    LossConfig,
    OptimiserConfig,
    TrainConfig,
    dump_config,
    load_config,
)
from model_export.retinanet.losses import Focal, SmoothL1
from model_export.retinanet.matching import IouMatcher
from model_export.retinanet.model import ModelConfig
from service.errors import DataError
from service.imaging.canvas import ShortSide, Size
from tests.images import LFS_POINTER


def test_the_defaults_are_the_paper_s_where_it_has_them() -> None:
    config = load_config(None, {})
    assert config == TrainConfig()
    assert config.loss.classification == Focal(alpha=0.25, gamma=2.0)
    assert config.loss.box == SmoothL1(beta=0.1)
    assert config.matching == IouMatcher(foreground=0.5, background=0.4, low_quality_matches=True)
    assert (config.optimiser.lr, config.optimiser.momentum) == (0.01, 0.9)
    assert config.optimiser.weight_decay == 1e-4
    assert (config.model.fpn_channels, config.model.head_depth) == (256, 4)
    assert config.canvas == DEFAULT_CANVAS


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    config = TrainConfig(
        model=ModelConfig(backbone="mobilenet_v2_tf", fpn_channels=64, head_width=48),
        canvas=ShortSide(short=400, long=600),
        optimiser=OptimiserConfig(name="adamw", lr=3e-4),
        max_minutes=12.5,
        workers=0,
    )
    path = tmp_path / "config.yaml"
    dump_config(config, path)
    assert load_config(path, {}) == config
    dump_config(TrainConfig(), path)
    assert load_config(path, {}) == TrainConfig()


def test_overrides_go_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("epochs: 7\noptimiser:\n  lr: 1e-3\n  momentum: 0.8\ncanvas:\n"
                    "  rule: buckets\n  sizes: [[64, 96]]\n")  # fmt: skip
    config = load_config(
        path, {"optimiser.lr": 0.5, "loss.classification.gamma": 1, "model.backbone": "resnet18"}
    )
    assert config.epochs == 7
    assert (config.optimiser.lr, config.optimiser.momentum) == (0.5, 0.8)
    assert config.loss == LossConfig(classification=Focal(gamma=1))
    assert config.model.backbone == "resnet18"
    assert config.canvas.all_canvases() == (Size(64, 96),)
    # YAML 1.1 takes 1e-3 for text.
    assert load_config(path, {}).optimiser.lr == 1e-3


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("epochs: 0", "epochs"),
        ("epochs: many", "epochs"),
        ("epoch: 3", "epoch"),
        ("optimiser: {lr: -1}", "optimiser.lr"),
        ("optimiser: {lr: .nan}", "optimiser.lr"),
        ("optimiser: {lr: .inf}", "optimiser.lr"),
        ("optimiser: {name: lion}", "optimiser.name"),
        ("loss: {classification: {alpha: 1.5}}", "loss.classification.focal.alpha"),
        ("loss: {classification: {gamma: -1}}", "loss.classification.focal.gamma"),
        ("loss: {classification: {gamma: .inf}}", "loss.classification.focal.gamma"),
        ("loss: {classification: {name: ce, gamma: 2}}", "loss.classification.ce.gamma"),
        ("loss: {classification: {name: dice}}", "loss.classification"),
        ("loss: {classification: focal}", "loss.classification"),
        ("loss: {box: {name: l1, beta: 1}}", "loss.box.l1.beta"),
        ("loss: {classification: {name: ohem, keep: 0}}", "loss.classification.ohem.keep"),
        ("model: {backbone: vgg16}", "model.backbone"),
        ("model: {head_depth: -1}", "model.head_depth"),
        ("model: {anchors: {ratios: []}}", "model.anchors.ratios"),
        ("model: {anchors: {sizes: [[32]]}}", "model.anchors"),
        ("matching: {foreground: 0.3, background: 0.4}", "matching"),
        ("matching: {name: simota}", "matching: expected a mapping whose `name` is iou, atss"),
        ("matching: {name: atss, foreground: 0.5}", "matching.atss.foreground"),
        ("matching: {name: atss, cells: 0}", "matching.atss.cells"),
        ("canvas: {rule: buckets, sizes: [[100, 100]]}", "canvas"),
        ("canvas: {rule: stretch}", "canvas"),
        ("augmentation: {scale: [2, 1]}", "augmentation.scale"),
        ("augmentation: {mosaic: 2}", "augmentation.mosaic"),
        ("augmentation: {mosaic_until: 80}", "augmentation.mosaic_until"),
        ("augmentation: {canvas_scales: []}", "augmentation.canvas_scales"),
        ("augmentation: {canvas_scales: [0.75, .inf]}", "augmentation.canvas_scales"),
        ("augmentation: {canvas_scales: 1.5}", "augmentation.canvas_scales"),
        ("precision: fp8", "precision"),
        ("model: 3", "model"),
    ],
)
def test_errors_name_file_and_field_in_one_line(tmp_path: Path, text: str, field: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        load_config(path, {})
    message = str(caught.value)
    assert message.startswith(f"{path}: {field}")
    assert "\n" not in message


def test_the_error_of_an_unknown_backbone_lists_the_known() -> None:
    with pytest.raises(DataError, match=r"unknown backbone 'vgg16'; one of resnet18, [^;]*$"):
        load_config(None, {"model.backbone": "vgg16"})


@pytest.mark.parametrize(
    ("text", "backbone", "eps"),
    [
        ("{}", None, 1e-5),
        ("{}", "efficientnet_lite0", 1e-3),
        ("model: {backbone: efficientnet_lite0}", None, 1e-3),
        ("model: {backbone: efficientnet_lite0}", "resnet18", 1e-5),
        ("model: {backbone: efficientnet_lite0, norm_eps: 0}", None, 0),
        ("model: {norm_eps: 1.0e-4}", "efficientnet_lite0", 1e-4),
    ],
)
def test_norm_eps_is_by_default_that_of_the_backbone_s_weights(
    tmp_path: Path, text: str, backbone: str | None, eps: float
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    config = load_config(path, {} if backbone is None else {"model.backbone": backbone})
    assert config.model.norm_eps == eps
    dump_config(config, path)
    assert yaml.safe_load(path.read_text())["model"]["norm_eps"] == eps


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1,\nb: }\n", "not YAML"),
        (b"\xff\xfe\x00rubbish\x80", "not YAML"),
        (b"- 1\n- 2\n", r"expected a mapping of settings, found text \('- 1"),
        (b"just text", r"expected a mapping of settings, found text \('just text'\)"),
        (LFS_POINTER, "expected a mapping of settings, found a Git LFS pointer"),
        (b"<!DOCTYPE html><p>404", "expected a mapping of settings, found an HTML page"),
        (b"? [1]\n: 2\n", "not YAML"),
        (b"!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_what_is_no_yaml_of_settings(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_config(path, {})
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\n")
    assert load_config(path, {"epochs": 3}) == TrainConfig(epochs=3)


def test_settings_by_number_are_unknown_fields(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("1: 2")
    with pytest.raises(DataError, match=r"mine\.yaml: 1"):
        load_config(path, {})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "gone.yaml", {})
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        load_config(tmp_path, {})


@pytest.mark.parametrize("overrides", [{"epochs.few": 1}, {"optimiser.lr.high": 1}])
def test_an_override_below_a_setting_that_is_no_group(
    tmp_path: Path, overrides: dict[str, Any]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 3\noptimiser:\n  lr: 0.1\n")
    with pytest.raises(DataError, match="is not a group of settings"):
        load_config(path, overrides)


def test_the_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 3\n")
    load_config(path, {"optimiser.lr": 0.5})
    assert yaml.safe_load(path.read_text()) == {"epochs": 3}


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        IouMatcher().foreground = 0.7  # type: ignore[misc]


def test_half_a_canvas_names_what_is_missing() -> None:
    with pytest.raises(DataError, match=r"^config: canvas: 'rule' must be given with it"):
        load_config(None, {"canvas.sizes": [[256, 352]]})

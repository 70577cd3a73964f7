"""Keys, architectures, norms and names of torchvision's checkpoints, and files that are none."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from model_export.checkpoints import load_backbone, load_checkpoint, read_state_dict
from model_export.cli import import_torchvision
from model_export.config import TrainConfig
from model_export.retinanet.backbones import BACKBONES
from model_export.retinanet.model import ModelConfig, RetinaNet
from model_export.torchvision_import import (
    ANCHORS,
    ARCHITECTURES,
    COCO_CLASSES,
    Imported,
    class_names,
    convert,
    norm_eps,
    read_labels,
    rename,
)
from model_export.training.lightning_module import RetinaNetModule
from service.cli import retinaserve
from service.errors import DataError
from service.imaging.canvas import ShortSide
from tests.images import LFS_POINTER
from tests.unit.model_export.golden import parity

V1, V2 = ARCHITECTURES
RULE = ShortSide(short=800, long=1333)
COUNT = ".num_batches_tracked"

State = dict[str, Tensor]


def state(name: str, *, classes: int | None = None) -> State:
    """A state dict of the right keys and shapes that takes no memory."""
    shapes = {key: tuple(shape) for key, shape in parity.load(name).about["state_dict"].items()}
    if classes is not None:
        classifier = "head.classification_head.cls_logits"
        shapes[f"{classifier}.weight"] = (9 * classes, 256, 3, 3)
        shapes[f"{classifier}.bias"] = (9 * classes,)
    return {
        key: torch.tensor(7) if key.endswith(COUNT) else torch.tensor(0.5).expand(shape)
        for key, shape in shapes.items()
    }


def old_keys(current: Mapping[str, Tensor]) -> State:
    """As releases wrote them that had no block around each convolution of pyramid and heads."""

    def older(key: str) -> str:
        key = re.sub(r"((?:inner|layer)_blocks\.\d)\.0\.", r"\1.", key)
        return re.sub(r"(_head\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", key)

    return {older(key): value for key, value in current.items()}


def converted(given: Mapping[str, Any], **options: Any) -> Imported:
    settings: dict[str, Any] = {"architecture": None, "labels": None, "eps": None} | options
    return convert(given, path=Path("some.pth"), canvas=RULE, provenance={"from": "me"}, **settings)


def network_keys(model: ModelConfig) -> set[str]:
    with torch.device("meta"):
        return {key for key in RetinaNet(model, classes=2).state_dict() if not key.endswith(COUNT)}


# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "architecture"), [("v1", V1), ("v1_unpublished", V1), ("v2", V2)])
def test_every_key_has_its_place(name: str, architecture: str) -> None:
    renamed = rename(state(name))
    assert len(renamed) == len(state(name))
    assert {key for key in renamed if not key.endswith(COUNT)} == network_keys(
        ARCHITECTURES[architecture]
    )


def test_where_some_keys_go() -> None:
    keys = {
        "backbone.body.layer1.0.bn3.running_var": "backbone.layer1.0.bn3.running_var",
        "backbone.fpn.inner_blocks.2.0.weight": "fpn.inner_blocks.2.weight",
        "backbone.fpn.extra_blocks.p6.bias": "fpn.p6.bias",
        "head.classification_head.conv.3.0.weight": "classification_head.conv.6.weight",
        "head.classification_head.cls_logits.bias": "classification_head.out.bias",
        "head.regression_head.bbox_reg.weight": "regression_head.out.weight",
    }
    assert list(rename(dict.fromkeys(keys, 0))) == list(keys.values())
    # With a norm in each block, blocks are three modules long.
    normed = {
        "head.regression_head.conv.2.0.weight": "regression_head.conv.6.weight",
        "head.regression_head.conv.2.1.bias": "regression_head.conv.7.bias",
    }
    assert list(rename(dict.fromkeys(normed, 0))) == list(normed.values())


def test_keys_of_old_releases() -> None:
    current = state("v1")
    old = old_keys(current)
    assert "head.regression_head.conv.6.bias" in old
    assert "backbone.fpn.layer_blocks.1.weight" in old
    assert not any(".conv.3.0." in key or "blocks.1.0." in key for key in old)
    assert len(old) == len(current)
    assert rename(old).keys() == rename(current).keys()
    assert all(value is rename(current)[key] for key, value in rename(old).items())


# --- conversion ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "eps", "architecture"),
    [("v1", 0.0, V1), ("v1_unpublished", 1e-5, V1), ("v2", 1e-5, V2)],
)
def test_a_checkpoint_of_ours(name: str, eps: float, architecture: str) -> None:
    given = {key: value.half() if value.ndim else value for key, value in state(name).items()}
    done = converted(given)
    description = done.checkpoint.description
    assert done.architecture == architecture
    assert description.model == ARCHITECTURES[architecture].model_copy(update={"norm_eps": eps})
    assert description.model.anchors == ANCHORS
    assert description.canvas == RULE
    assert description.provenance == {"from": "me", "architecture": f"torchvision {architecture}"}
    weights = done.checkpoint.weights
    with torch.device("meta"):
        network = RetinaNet(description.model, classes=len(description.classes))
    wanted = network.state_dict()
    assert weights.keys() == wanted.keys()
    for key, value in weights.items():
        assert (value.shape, value.dtype) == (wanted[key].shape, wanted[key].dtype), key
    assert bool(done.notes) == (name == "v1")
    if name == "v1":
        assert done.notes[0].startswith("frozen batch norms: eps 0")


def test_eps_may_be_given() -> None:
    done = converted(state("v1"), eps=1e-5)
    assert done.checkpoint.description.model.norm_eps == 1e-5
    assert not done.notes


def test_eps_by_what_the_norms_have() -> None:
    assert norm_eps(state("v1")) == 0
    assert norm_eps(state("v2")) == norm_eps(state("v1_unpublished")) == 1e-5
    # Files of before 2018 have no counts, and yet ordinary norms.
    assert norm_eps(["conv1.weight", "layer1.0.bn1.running_var"]) == 1e-5


@pytest.mark.parametrize("classes", [1, 2, 91])
def test_any_number_of_classes(classes: int) -> None:
    done = converted(state("v2", classes=classes))
    assert len(done.checkpoint.description.classes) == classes
    assert done.checkpoint.weights["classification_head.out.bias"].shape == (9 * classes,)


def test_names_of_classes() -> None:
    assert class_names(91, None) == COCO_CLASSES
    assert COCO_CLASSES[:2] == ("__background__", "person")
    assert COCO_CLASSES[11:14] == ("fire hydrant", "class_12", "stop sign")
    assert class_names(3, None) == ("class_0", "class_1", "class_2")
    assert class_names(2, ("cat", "dog")) == ("cat", "dog")
    labels = ("nothing", "cat", "dog")
    assert converted(state("v1", classes=3), labels=labels).checkpoint.description.classes == labels


# --- what does not fit ---------------------------------------------------------------------------


def broken(name: str, change: Callable[[State], object]) -> State:
    changed = state(name)
    change(changed)
    return changed


def other_anchors(changed: State) -> None:
    changed["head.regression_head.bbox_reg.weight"] = torch.zeros(12, 256, 3, 3)


REFUSED: dict[str, tuple[Callable[[], Mapping[Any, Any]], dict[str, Any], str]] = {
    "v2 as v1": (
        lambda: state("v2"),
        {"architecture": V1},
        f"not a state dict of {V1}: it is {V2}; give --arch {V2}",
    ),
    "v1 as v2": (
        lambda: old_keys(state("v1")),
        {"architecture": V2},
        f"not a state dict of {V2}: it is {V1}; give --arch {V1}",
    ),
    "something missing": (
        lambda: broken("v1", lambda s: s.pop("backbone.fpn.extra_blocks.p7.bias")),
        {},
        rf"not a state dict of {V1}: fpn\.p7\.bias is missing",
    ),
    "something more": (
        lambda: broken("v2", lambda s: s.update({"head.mask.weight": torch.zeros(1)})),
        {},
        rf"not a state dict of {V2}: head\.mask\.weight is unexpected",
    ),
    "another width": (
        lambda: broken("v1", lambda s: s.update({"backbone.body.conv1.weight": torch.zeros(1)})),
        {"architecture": V1},
        r"backbone\.conv1\.weight has shape \(1,\), not \(64, 3, 7, 7\)",
    ),
    "another backbone": (
        lambda: {
            f"backbone.body.{k}": v for k, v in BACKBONES["resnet18"].build().state_dict().items()
        },
        {"architecture": V1},
        rf"not a state dict of {V1}: backbone\.layer1",
    ),
    "other anchors": (
        lambda: broken("v1", other_anchors),
        {},
        "12 box and 819 class outputs are not those of 9 anchors per cell",
    ),
    "no outputs": (
        lambda: broken(
            "v1",
            lambda s: s.update({"head.classification_head.cls_logits.weight": torch.tensor(1.0)}),
        ),
        {},
        "36 box and 0 class outputs",
    ),
    "another detector": (
        lambda: {"roi_heads.box_predictor.cls_score.weight": torch.zeros(91, 1024)},
        {},
        r"no key begins with backbone\.body",
    ),
    "nothing": (dict, {}, r"no key begins with backbone\.body"),
    "too few labels": (
        lambda: state("v1"),
        {"labels": ("person", "bicycle")},
        "has 91 classes, but there are 2 labels; the first one names class 0",
    ),
    "no tensors": (lambda: {"epoch": 3}, {}, "'epoch' is int; save one by"),
    "no names": (lambda: {3: torch.zeros(1)}, {}, "3 is Tensor; save one by"),
    "a backbone, of which": (
        lambda: {k: v for k, v in state("v1").items() if k.startswith("backbone.body.")},
        {},
        f"fits {V1} and {V2}; choose by --arch",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(name: str) -> None:
    given, options, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as caught:
        converted(given(), **options)
    assert str(caught.value).startswith("some.pth: ")
    assert "\n" not in str(caught.value)


# --- backbones alone -----------------------------------------------------------------------------


def imagenet() -> State:
    """As torchvision publishes its classifier."""
    body = {
        key.removeprefix("backbone.body."): value
        for key, value in state("v2").items()
        if key.startswith("backbone.body.")
    }
    return body | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}


def test_an_imagenet_backbone_alone() -> None:
    done = converted(imagenet(), architecture=V1, labels=("cat", "dog"))
    (note,) = done.notes
    assert note.startswith("the file has backbone alone; the rest starts fresh")
    assert "retinaserve train --init" in note
    description, weights = done.checkpoint.description, done.checkpoint.weights
    assert description.model.norm_eps == 1e-5
    assert description.classes == ("cat", "dog")
    assert (weights["backbone.layer1.0.conv1.weight"] == 0.5).all()
    prior = weights["classification_head.out.bias"].sigmoid()
    assert torch.allclose(prior, torch.tensor(0.01))
    again = converted(imagenet(), architecture=V1, labels=("cat", "dog")).checkpoint.weights
    assert all(torch.equal(value, again[key]) for key, value in weights.items())


def test_a_detector_s_backbone_with_its_pyramid() -> None:
    given = {k: v for k, v in state("v1").items() if not k.startswith("head.")}
    done = converted(given)
    # The pyramid tells the architecture: P6 of v2 sees 2048 channels.
    assert done.architecture == V1
    assert done.notes[0].startswith("the file has backbone and fpn alone")
    assert done.checkpoint.description.classes == COCO_CLASSES


@pytest.mark.parametrize("kind", ["classifier", "frozen detector", "detector"])
def test_train_takes_either_for_its_backbone(kind: str, tmp_path: Path) -> None:
    given = {"classifier": imagenet(), "frozen detector": state("v1"), "detector": state("v2")}
    path = tmp_path / "some.pth"
    torch.save(given[kind], path)
    with torch.device("meta"):
        network = RetinaNet(ModelConfig(fpn_channels=8, head_width=8, head_depth=0), classes=1)
    network.backbone.to_empty(device="cpu")
    load_backbone(network, path)
    loaded = network.backbone.state_dict()
    assert (loaded["layer4.2.conv3.weight"] == 0.5).all()
    assert (loaded["bn1.running_var"] == 0.5).all()


# --- labels --------------------------------------------------------------------------------------


def test_labels_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufeff__background__\r\n traffic light \r\nzebra\r\n\r\n".encode())
    assert read_labels(path) == ("__background__", "traffic light", "zebra")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "labels.txt: holds no names"),
        (b"\n\n", "labels.txt: holds no names"),
        (b"cat\n\ndog\n", "labels.txt:2: empty; the line names class 1"),
        (b"cat\ndog\ncat\n", "labels.txt:3: 'cat' stands in line 1 already"),
        (b"\xff\xfe\x00", "labels.txt: cannot be read as text"),
        (LFS_POINTER, "labels.txt: a Git LFS pointer, not the names"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_labels(path)


# --- files ---------------------------------------------------------------------------------------


def test_what_training_scripts_save_around_a_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "model_25.pth"
    options = argparse.Namespace(lr=0.01, data_path="/data", amp=True)
    inner = {"backbone.body.conv1.weight": torch.ones(2)}
    for name in ("model", "state_dict", "model_state_dict"):
        torch.save({"epoch": 25, "args": options, name: inner, "optimizer": {"state": {}}}, path)
        found = read_state_dict(path)
        assert found.keys() == inner.keys()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_a_parallel_or_compiled_model_has_the_same_keys(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "wrapped.pth"
    torch.save({"state_dict": {f"{prefix}{k}": v for k, v in state("v2").items()}}, path)
    assert read_state_dict(path).keys() == state("v2").keys()


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(retinaserve, ["import-torchvision", *map(str, arguments)])


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "bomb.pth"
    torch.save({"model": state("v1"), "args": Bomb(marker)}, path)
    answer = command(path, "--arch", V1, "--output", tmp_path / "out.safetensors")
    assert answer.exit_code == 2
    assert "not a plain state dict of tensors" in answer.stderr
    assert [item.name for item in tmp_path.iterdir()] == ["bomb.pth"]


def test_the_command(tmp_path: Path) -> None:
    source, output = tmp_path / "cells.pth", tmp_path / "made" / "cells.ckpt"
    torch.save({"model": old_keys(state("v1", classes=2))}, source)
    labels = tmp_path / "labels.txt"
    labels.write_text("nothing\ncell\n")
    answer = command(
        source, "--arch", V1, "--labels", labels, "--min-size", 320, "--max-size", 480,
        "--licence", "BSD-3-Clause", "--output", output,
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    assert "note: frozen batch norms: eps 0" in answer.stdout
    assert f"{V1}, 2 classes (nothing, cell), norm eps 0\n" in answer.stdout
    assert f"retinaserve export {output}" in answer.stdout
    made = load_checkpoint(output)
    assert made.description.classes == ("nothing", "cell")
    assert made.description.canvas == ShortSide(short=320, long=480)
    told = made.description.provenance
    assert told["licences"] == ["BSD-3-Clause"]
    assert told["weights"]["file"] == "cells.pth"
    assert told["architecture"] == f"torchvision {V1}"
    network = made.build()
    assert all(
        module.eps == 0 for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)
    )
    assert (network.fpn.p6.weight == 0.5).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "x.safetensors", "--arch", "fasterrcnn"], f"expected one of {V1}, {V2}"),
        (
            ["--output", "x.safetensors", "--min-size", "900", "--max-size", "800"],
            "--max-size 800 must not be below --min-size 900",
        ),
        (["--output", "x.safetensors"], "not a plain state dict"),
        (["--output", "x.safetensors", "--norm-eps", "-1"], "--norm-eps -1.0: expected a small"),
        (["--output", "x.safetensors", "--norm-eps", "nan"], "such as 0 or 1e-5"),
    ],
)
def test_bad_usage_is_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    path = tmp_path / "text.pth"
    path.write_text("no state dict")
    answer = command(path, *options)
    assert answer.exit_code == 2
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_help_names_what_is_told_from_the_file() -> None:
    answer = CliRunner().invoke(import_torchvision, ["--help"])
    assert answer.exit_code == 0
    assert all(name in answer.output for name in ARCHITECTURES)


# --- training ------------------------------------------------------------------------------------


def test_norms_without_eps_do_not_train_unfrozen() -> None:
    model = ModelConfig(
        backbone="resnet18", fpn_channels=8, head_width=8, head_depth=0, norm_eps=0.0
    )
    description = converted(state("v1")).checkpoint.description
    with torch.device("meta"):
        network = RetinaNet(model, classes=1)
    for freeze, pretrained, allowed in (
        (True, True, True),
        (False, True, False),
        (True, False, False),
    ):
        config = TrainConfig(model=model, freeze_norms=freeze)
        made = RetinaNetModule(network, config, description, pretrained=pretrained)
        if allowed:
            made.on_fit_start()
        else:
            with pytest.raises(DataError, match=r"set model\.norm_eps to 1e-5"):
                made.on_fit_start()


def test_classes_that_torchvision_does_not_use_get_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("__background__\nperson\nN/A\nboat\nN/A\n")
    found = read_labels(path)
    assert found == ("__background__", "person", "class_2", "boat", "class_4")

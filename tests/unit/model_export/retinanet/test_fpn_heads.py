"""The pyramid's shapes and sums, and the heads' layout and start."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model_export.retinanet.fpn import FeaturePyramid
from model_export.retinanet.heads import PRIOR, Head, LevelNorms, prior_bias

# --- pyramid -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("canvas", "expected"),
    [
        ((384, 512), [(48, 64), (24, 32), (12, 16), (6, 8), (3, 4)]),
        ((448, 448), [(56, 56), (28, 28), (14, 14), (7, 7), (4, 4)]),
        ((32, 64), [(4, 8), (2, 4), (1, 2), (1, 1), (1, 1)]),
    ],
)
def test_pyramid_shapes(canvas: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    height, width = canvas
    with torch.device("meta"):
        pyramid = FeaturePyramid((6, 7, 8), 16)
        features = [
            torch.zeros(2, channels, height // stride, width // stride)
            for channels, stride in zip((6, 7, 8), (8, 16, 32), strict=True)
        ]
        outputs = pyramid(features)
    assert [tuple(level.shape) for level in outputs] == [(2, 16, *size) for size in expected]


def identity_pyramid() -> FeaturePyramid:
    """One channel; every convolution passes its input's centre through."""
    pyramid = FeaturePyramid((1, 1, 1), 1)
    for module in pyramid.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)
    return pyramid


@torch.no_grad()
def test_the_way_down_adds_the_nearest_cell_of_the_level_above() -> None:
    c3 = torch.arange(16.0).reshape(1, 1, 4, 4)
    c4 = torch.tensor([[[[100.0, 200], [300, 400]]]])
    c5 = torch.tensor([[[[5000.0]]]])
    p3, p4, p5, p6, p7 = identity_pyramid()([c3, c4, c5])
    assert p5.item() == 5000
    assert p4[0, 0].tolist() == [[5100, 5200], [5300, 5400]]
    assert p3[0, 0].tolist() == [
        [5100, 5101, 5202, 5203],
        [5104, 5105, 5206, 5207],
        [5308, 5309, 5410, 5411],
        [5312, 5313, 5414, 5415],
    ]
    # P6 comes from C5, not from P5.
    assert p6.item() == 5000
    assert p7.item() == 5000


@torch.no_grad()
def test_p7_sees_relu_of_p6_and_p6_sees_c5() -> None:
    pyramid = identity_pyramid()
    top = torch.tensor([[[[-3.0, 1.0, 2.0, 1.0]] * 4]])
    c4, c3 = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 16, 16)
    *_, p6, p7 = pyramid([c3, c4, top])
    assert p6[0, 0].tolist() == [[-3, 2], [-3, 2]]
    assert p7.item() == 0
    nn.init.zeros_(pyramid.inner_blocks[2].weight)
    *_, p6_again, _ = pyramid([c3, c4, top])
    assert torch.equal(p6, p6_again)


@torch.no_grad()
def test_p6_may_see_p5_instead() -> None:
    pyramid = FeaturePyramid((3, 4, 5), 2, p6_from="p5")
    assert pyramid.p6.in_channels == 2
    for module in (pyramid.inner_blocks[2], pyramid.layer_blocks[2], pyramid.p6):
        assert isinstance(module, nn.Conv2d)
        nn.init.dirac_(module.weight)
    nn.init.constant_(pyramid.layer_blocks[2].bias, 7.0)
    c3, c4 = torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 4, 4)
    *_, p5, p6, _ = pyramid([c3, c4, torch.full((1, 5, 2, 2), 3.0)])
    assert p5.flatten().tolist() == [10.0] * 8
    assert p6.flatten().tolist() == [10.0] * 2


def test_pyramid_start_is_kaiming_uniform_with_a_1() -> None:
    torch.manual_seed(0)
    pyramid = FeaturePyramid((32, 64, 96), 48)
    for name, module in pyramid.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            # gain of a leaky ReLU with a = 1 is 1: uniform within sqrt(3 / fan_in).
            bound = math.sqrt(3 / fan_in)
            assert module.weight.abs().max().item() <= bound, name
            assert module.weight.abs().max().item() > 0.98 * bound, name
            assert module.bias is not None
            assert not module.bias.any(), name


# --- heads ---------------------------------------------------------------------------------------


def head(
    channels: int = 16, *, width: int = 16, depth: int = 4, outputs: int = 3, anchors: int = 9
) -> Head:
    return Head(
        channels, width=width, depth=depth, anchors=anchors, outputs=outputs, bias=prior_bias()
    )


def test_sigmoid_of_the_prior_bias_is_the_prior() -> None:
    assert PRIOR == 0.01
    assert 1 / (1 + math.exp(-prior_bias())) == pytest.approx(0.01, rel=1e-12)
    assert prior_bias() == pytest.approx(-4.59511985)
    assert prior_bias(0.5) == 0
    bias = head().out.bias
    assert bias is not None
    assert torch.allclose(bias.sigmoid(), torch.tensor(0.01), rtol=1e-6)


@torch.no_grad()
def test_outputs_are_cell_major_then_anchor_then_class() -> None:
    """Each output channel a * K + k is given its own constant, each cell its own offset."""
    made = Head(1, width=8, depth=0, anchors=2, outputs=3, bias=0.0)
    nn.init.zeros_(made.out.weight)
    made.out.weight[:, 0, 1, 1] = 1.0
    assert made.out.bias is not None
    made.out.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    feature = torch.tensor([[[[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]]]])
    found = made(feature)
    assert found.shape == (1, 2 * 3 * 2, 3)
    expected = [
        [cell + anchor + k for k in (0.1, 0.2, 0.3)]
        for cell in (10, 20, 30, 40, 50, 60)
        for anchor in (0.0, 0.3)
    ]
    assert torch.allclose(found[0], torch.tensor(expected))


@pytest.mark.parametrize(("width", "depth", "convolutions"), [(16, 4, 5), (24, 2, 3), (8, 0, 1)])
def test_width_and_depth(width: int, depth: int, convolutions: int) -> None:
    made = head(width=width, depth=depth)
    found = [module for module in made.modules() if isinstance(module, nn.Conv2d)]
    assert len(found) == convolutions
    assert [module.out_channels for module in found] == [width] * depth + [27]
    assert sum(isinstance(module, nn.ReLU) for module in made.modules()) == depth
    assert made(torch.zeros(2, 16, 4, 5)).shape == (2, 4 * 5 * 9, 3)


def test_wide_heads_start_as_in_the_paper() -> None:
    torch.manual_seed(0)
    wide = head(256, width=256)
    for module in wide.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.03)
    hidden = [module for module in wide.conv if isinstance(module, nn.Conv2d)]
    assert all(module.bias is not None and not module.bias.any() for module in hidden)


@torch.no_grad()
@pytest.mark.parametrize("width", [16, 64, 128])
def test_narrow_heads_keep_the_signal(width: int) -> None:
    """N(0, 0.01) leaves a thousandth of it over four convolutions of 64 channels."""
    torch.manual_seed(0)
    narrow = head(width, width=width)
    signal = torch.randn(1, width, 24, 24)
    kept = (narrow.conv(signal).std() / F.relu(signal).std()).item()
    assert 0.2 < kept < 5
    assert narrow.out.weight.std().item() == pytest.approx(0.01, rel=0.1)
    for module in narrow.conv:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
    lost = (narrow.conv(signal).std() / F.relu(signal).std()).item()
    assert lost < 0.02


@torch.no_grad()
@pytest.mark.parametrize("width", [16, 64, 256])
def test_every_anchor_starts_near_the_prior(width: int) -> None:
    torch.manual_seed(0)
    p = head(width, width=width)(torch.randn(1, width, 16, 16)).sigmoid()
    assert p.mean().item() == pytest.approx(0.01, rel=0.05)
    assert p.min().item() > 0.002
    assert p.max().item() < 0.05


@torch.no_grad()
def test_group_norms_stand_before_each_relu_and_bring_the_bias() -> None:
    made = Head(16, width=64, depth=2, anchors=9, outputs=3, bias=prior_bias(), groups=8)
    kinds = [type(module) for module in made.conv]
    assert kinds == [nn.Conv2d, nn.GroupNorm, nn.ReLU] * 2
    for conv, norm in ((made.conv[0], made.conv[1]), (made.conv[3], made.conv[4])):
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is None
        assert isinstance(norm, nn.GroupNorm)
        assert (norm.num_groups, norm.num_channels, norm.eps) == (8, 64, 1e-5)
    assert made.out.bias is not None
    # However weak the convolutions, the signal stays.
    feature = torch.randn(1, 16, 6, 6)
    strong = made.conv(feature)
    for module in made.conv:
        if isinstance(module, nn.Conv2d):
            module.weight.mul_(0.25)
    assert strong.std() > 0.3
    assert torch.allclose(made.conv(feature), strong, atol=0.01)


# --- batch norms of levels -----------------------------------------------------------------------


def test_each_level_has_a_batch_norm_of_its_own() -> None:
    made = Head(16, width=24, depth=2, anchors=9, outputs=3, bias=prior_bias(), levels=3)
    assert [type(module) for module in made.conv] == [nn.Conv2d, LevelNorms, nn.ReLU] * 2
    norms = made.conv[1]
    assert isinstance(norms, LevelNorms)
    before = {name: value.clone() for name, value in norms.state_dict().items()}
    made(3 * torch.randn(2, 16, 6, 6), 1)
    changed = {
        name.split(".")[0]
        for name, value in norms.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"1"}
    # In training features of any scale come out at the same one.
    small, large = (made.conv[0:1](torch.randn(2, 16, 6, 6) * scale) for scale in (0.1, 10.0))
    deviations = [norms(each, 0).std().item() for each in (small, large)]
    assert deviations == pytest.approx([1, 1], abs=0.02)


def test_a_single_value_is_normed_by_the_statistics_so_far() -> None:
    """P7 of one image on a canvas of 128 px has one cell, of which no variance can be taken."""
    made = Head(16, width=8, depth=1, anchors=9, outputs=3, bias=prior_bias(), levels=5)
    feature = torch.randn(1, 16, 1, 1)
    trained = made(feature, 4)
    assert torch.equal(trained, made.eval()(feature, 4))
    assert trained.requires_grad


def test_the_pyramid_s_outputs_have_one_scale_with_norms() -> None:
    torch.manual_seed(0)
    made = FeaturePyramid((8, 16, 32), 24, norm=True)
    levels = made([torch.randn(2, c, 32 // s, 32 // s) * c for c, s in ((8, 1), (16, 2), (32, 4))])
    assert [each.std().item() for each in levels[:4]] == pytest.approx([1] * 4, abs=0.02)
    assert [each.shape[2] for each in levels] == [32, 16, 8, 4, 2]

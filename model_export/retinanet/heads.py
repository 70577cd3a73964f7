"""The two heads, shared over the pyramid's levels: class logits and box deltas for every anchor."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

PRIOR = 0.01
"""At the start every anchor says "object" with this probability (Focal Loss, section 3.3)."""

PAPER_WIDTH = 256
"""Channels of the heads in Focal Loss, section 4."""


def prior_bias(prior: float = PRIOR) -> float:
    """Return the bias b with sigmoid(b) = prior.

    >>> round(prior_bias(0.01), 4)
    -4.5951
    """
    return -math.log((1 - prior) / prior)


class LevelNorm(nn.BatchNorm2d):
    """A batch norm that a batch of a single value does not stop: it counts with the mean so far."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W)."""
        if self.training and x[:, 0].numel() == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x)


class LevelNorms(nn.ModuleList):
    """A batch norm for each pyramid level: the levels share weights, but not their scale."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__(LevelNorm(channels) for _ in range(levels))

    def forward(self, x: Tensor, level: int) -> Tensor:
        """(B, C, H, W) of one level."""
        normed: Tensor = self[level](x)
        return normed


class Head(nn.Module):
    """`depth` 3x3 convolutions with ReLU, then one 3x3 convolution to `anchors * outputs` maps.

    With `groups` a group norm (arXiv 1803.08494) of that many groups precedes each ReLU, with
    `levels` a batch norm for each of that many pyramid levels; its bias replaces the convolution's.
    """

    def __init__(
        self,
        channels: int,
        *,
        width: int,
        depth: int,
        anchors: int,
        outputs: int,
        bias: float,
        groups: int = 0,
        levels: int = 0,
    ) -> None:
        super().__init__()
        self.outputs = outputs
        layers: list[nn.Module] = []
        for index in range(depth):
            norms: list[nn.Module] = []
            if levels:
                norms.append(LevelNorms(width, levels))
            elif groups:
                norms.append(nn.GroupNorm(groups, width))
            inputs = channels if index == 0 else width
            conv = nn.Conv2d(inputs, width, 3, padding=1, bias=not norms)
            _initialise_hidden(conv)
            layers += [conv, *norms, nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)
        self.out = nn.Conv2d(width if depth else channels, anchors * outputs, 3, padding=1)
        nn.init.normal_(self.out.weight, std=0.01)
        assert self.out.bias is not None
        nn.init.constant_(self.out.bias, bias)

    def maps(self, feature: Tensor, level: int = 0) -> Tensor:
        """(B, C, H, W) of a level, the finest being 0, to (B, anchors * outputs, H, W)."""
        for layer in self.conv:
            feature = layer(feature, level) if isinstance(layer, LevelNorms) else layer(feature)
        maps: Tensor = self.out(feature)
        return maps

    def forward(self, feature: Tensor, level: int = 0) -> Tensor:
        """(B, C, H, W) to (B, H * W * anchors, outputs), row by row, cell by cell."""
        maps = self.maps(feature, level)
        # To channels-last, then the channels split into (anchors, outputs).
        return maps.permute(0, 2, 3, 1).reshape(maps.shape[0], -1, self.outputs)


def _initialise_hidden(conv: nn.Conv2d) -> None:
    if conv.out_channels >= PAPER_WIDTH:
        nn.init.normal_(conv.weight, std=0.01)
    else:
        # The paper's N(0, 0.01) is right for 256 channels; four narrower convolutions would
        # leave a thousandth of the signal.
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)

"""RetinaNet put together: pixels in, one set of logits and deltas per pyramid level out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from model_export.retinanet.anchors import LEVELS, AnchorConfig, base_anchors, grid_anchors
from model_export.retinanet.backbones import BACKBONES
from model_export.retinanet.fpn import FeaturePyramid
from model_export.retinanet.heads import PRIOR, Head, prior_bias


class ModelConfig(BaseModel):
    """What the network looks like. Stored in every checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str = "resnet50"
    """One of the names in `model_export.retinanet.backbones.BACKBONES`."""
    fpn_channels: int = Field(default=256, ge=8)
    head_width: int = Field(default=256, ge=8)
    head_depth: int = Field(default=4, ge=0)
    """3x3 convolutions before the output convolution of each head."""
    prior: float = Field(default=PRIOR, gt=0, lt=1)
    """Probability of "object" at the start of training; 0.5 is a bias of 0."""
    anchors: AnchorConfig = AnchorConfig()

    @field_validator("backbone")
    @classmethod
    def _check_backbone(cls, name: str) -> str:
        if name not in BACKBONES:
            raise ValueError(f"unknown backbone {name!r}; one of {', '.join(BACKBONES)}")
        return name


@dataclass(frozen=True, slots=True)
class Level:
    """One pyramid level's predictions for N anchors."""

    logits: Tensor
    """(B, N, K)"""
    deltas: Tensor
    """(B, N, 4)"""
    anchors: Tensor
    """(N, 4) canvas pixels"""


class RetinaNet(nn.Module):
    """The detector's network (Focal Loss, arXiv 1708.02002), with normalisation inside."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, *, classes: int) -> None:
        super().__init__()
        self.config = config
        spec = BACKBONES[config.backbone]
        self.backbone = spec.build()
        self.fpn = FeaturePyramid(self.backbone.channels, config.fpn_channels)
        per_cell = config.anchors.per_cell
        self.classification_head = Head(
            config.fpn_channels,
            width=config.head_width,
            depth=config.head_depth,
            anchors=per_cell,
            outputs=classes,
            bias=prior_bias(config.prior),
        )
        self.regression_head = Head(
            config.fpn_channels,
            width=config.head_width,
            depth=config.head_depth,
            anchors=per_cell,
            outputs=4,
            bias=0.0,
        )
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)
        for level, sizes in zip(LEVELS, config.anchors.sizes, strict=True):
            self.register_buffer(
                f"anchors_p{level}", base_anchors(sizes, config.anchors.ratios), persistent=False
            )

    def forward(self, images: Tensor, image_sizes: Tensor) -> list[Level]:
        """Predictions for P3 to P7.

        `images` is uint8 (B, H, W, 3) RGB with H and W multiples of 32; `image_sizes` is int64
        (B, 2), the height and width of each picture inside its canvas.
        """
        features = self.fpn(self.backbone(self._normalise(images, image_sizes)))
        return [
            Level(
                logits=self.classification_head(feature),
                deltas=self.regression_head(feature),
                anchors=grid_anchors(
                    self.get_buffer(f"anchors_p{level}"),
                    height=feature.shape[2],
                    width=feature.shape[3],
                    stride=2**level,
                    offset=self.config.anchors.offset,
                ),
            )
            for level, feature in zip(LEVELS, features, strict=True)
        ]

    def _normalise(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """(B, 3, H, W): (pixels - mean) / std, and 0 outside the picture."""
        pixels = images.permute(0, 3, 1, 2).to(self.mean.dtype)
        rows = torch.arange(images.shape[1], device=images.device)
        columns = torch.arange(images.shape[2], device=images.device)
        inside = (rows[None, :] < image_sizes[:, 0:1])[:, None, :, None] & (
            columns[None, :] < image_sizes[:, 1:2]
        )[:, None, None, :]
        return torch.where(inside, (pixels - self.mean) / self.std, 0.0)


def freeze_norms(modules: Iterable[nn.Module]) -> None:
    """Put batch norms into evaluation mode: their statistics stay, their weights still learn."""
    for module in modules:
        if isinstance(module, nn.BatchNorm2d):
            module.eval()

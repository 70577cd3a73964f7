"""RetinaNet: pixels in, one set of logits and deltas per pyramid level out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from model_export.retinanet.anchors import (
    LEVELS,
    AnchorConfig,
    cell_strides,
    grid_anchors,
    level_base_anchors,
)
from model_export.retinanet.backbones import BACKBONES
from model_export.retinanet.fpn import FeaturePyramid
from model_export.retinanet.heads import PRIOR, Head, prior_bias


def _published_eps(validated: dict[str, Any]) -> float:
    return BACKBONES[validated["backbone"]].norm_eps


class ModelConfig(BaseModel):
    """Architecture of the network. Stored in every checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str = "resnet50"
    """One of the names in `model_export.retinanet.backbones.BACKBONES`."""
    norm_eps: float = Field(default_factory=_published_eps, ge=0, lt=1)
    """Added to the variance in the backbone's batch norms; 0 suits frozen norms alone.

    By default that of the backbone's published weights.
    """
    fpn_channels: int = Field(default=256, ge=8)
    p6_from: Literal["c5", "p5"] = "c5"
    """What P6 is made of: the backbone's last stage (Focal Loss, section 4), or P5."""
    head_width: int = Field(default=256, ge=8)
    head_depth: int = Field(default=4, ge=0)
    """3x3 convolutions before the output convolution of each head."""
    head_norm: Literal["none", "group", "batch"] = "none"
    """Behind each of these convolutions: nothing, a group norm, or a batch norm for each level.

    batch also norms the pyramid's outputs. In serving it costs nothing: its scale and shift become
    part of the convolutions.
    """
    head_groups: int = Field(default=32, ge=1)
    """Its groups; the usual 32 are 8 channels each where the heads are 256 wide."""
    prior: float = Field(default=PRIOR, gt=0, lt=1)
    """Probability of "object" at the start of training; 0.5 is a bias of 0."""
    anchors: AnchorConfig = AnchorConfig()

    @field_validator("backbone")
    @classmethod
    def _check_backbone(cls, name: str) -> str:
        if name not in BACKBONES:
            raise ValueError(f"unknown backbone {name!r}; one of {', '.join(BACKBONES)}")
        return name

    @model_validator(mode="after")
    def _check_groups(self) -> ModelConfig:
        # Groups of one channel would make a level of a single cell all zero.
        width, groups = self.head_width, self.head_groups
        if self.head_norm == "group" and (width % groups or width < 2 * groups):
            raise ValueError(
                f"head_width {width} does not make {groups} equal groups of two channels or more; "
                f"set head_groups, to {width // 8} for example, or another head_width"
            )
        return self


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
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = config.norm_eps
        self.fpn = FeaturePyramid(
            self.backbone.channels,
            config.fpn_channels,
            p6_from=config.p6_from,
            norm=config.head_norm == "batch",
        )
        per_cell = config.anchors.per_cell
        groups = config.head_groups if config.head_norm == "group" else 0
        levels = len(LEVELS) if config.head_norm == "batch" else 0
        self.classification_head = Head(
            config.fpn_channels,
            width=config.head_width,
            depth=config.head_depth,
            anchors=per_cell,
            outputs=classes,
            bias=prior_bias(config.prior),
            groups=groups,
            levels=levels,
        )
        self.regression_head = Head(
            config.fpn_channels,
            width=config.head_width,
            depth=config.head_depth,
            anchors=per_cell,
            outputs=4,
            bias=0.0,
            groups=groups,
            levels=levels,
        )
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)
        for level, base in zip(LEVELS, level_base_anchors(config.anchors), strict=True):
            self.register_buffer(f"anchors_p{level}", base, persistent=False)

    def forward(self, images: Tensor, image_sizes: Tensor) -> list[Level]:
        """Predictions for P3 to P7.

        `images` is uint8 (B, H, W, 3) RGB with H and W multiples of 32; `image_sizes` is int64
        (B, 2), the height and width of each image inside its canvas.
        """
        features = self.fpn(self.backbone(self._normalise(images, image_sizes)))
        return [
            Level(
                logits=self.classification_head(feature, index),
                deltas=self.regression_head(feature, index),
                anchors=grid_anchors(
                    self.get_buffer(f"anchors_p{level}"),
                    height=feature.shape[2],
                    width=feature.shape[3],
                    stride=cell_strides(
                        self.config.anchors.stride,
                        level=level,
                        canvas=(images.shape[1], images.shape[2]),
                        grid=(feature.shape[2], feature.shape[3]),
                    ),
                    offset=self.config.anchors.offset,
                ),
            )
            for index, (level, feature) in enumerate(zip(LEVELS, features, strict=True))
        ]

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Return the heads' maps of normalised pixels (B, 3, H, W).

        For P3 to P7 (B, anchors * K, H, W) and (B, anchors * 4, H, W).
        """
        return [
            head.maps(feature, level)
            for level, feature in enumerate(self.fpn(self.backbone(pixels)))
            for head in (self.classification_head, self.regression_head)
        ]

    def _normalise(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """(B, 3, H, W): (pixels - mean) / std, and 0 outside the image."""
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
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            module.eval()

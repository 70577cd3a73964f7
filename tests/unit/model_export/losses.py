"""The loss of a batch from the network's answer and the objects, as a training step computes it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from model_export.config import LossConfig
from model_export.retinanet.matching import IouMatcher
from model_export.retinanet.model import Level
from model_export.training.detection_loss import Losses, assign, assigned_loss, normaliser


def detection_loss(
    levels: Sequence[Level],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    loss: LossConfig,
    matcher: IouMatcher | None = None,
) -> Losses:
    """Loss of a batch of B images with objects `boxes` [(n, 4)] and `labels` [(n,)]."""
    anchors = [level.anchors[:, None] for level in levels]
    assigned = assign(anchors, boxes, labels, matcher or IouMatcher())
    return assigned_loss(levels, assigned, boxes, labels, loss=loss, scale=normaliser(assigned))

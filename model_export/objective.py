"""What training minimises: a loss of classes over anchors plus box regression of the foreground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model_export.config import LossConfig, MatchingConfig
from model_export.retinanet.matching import IGNORED, box_iou, match
from model_export.retinanet.model import Level


@dataclass(frozen=True, slots=True)
class Losses:
    """The two parts of the loss, each a scalar."""

    classification: Tensor
    regression: Tensor


def detection_loss(
    levels: Sequence[Level],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    matching: MatchingConfig,
    loss: LossConfig,
) -> Losses:
    """Loss of a batch of B pictures with objects `boxes` [(n, 4)] and `labels` [(n,)].

    Both parts are sums over all anchors divided by the number of foreground anchors in the
    whole batch, over all processes, and at least 1 (Focal Loss, section 4).
    """
    logits = torch.cat([level.logits for level in levels], dim=1)
    deltas = torch.cat([level.deltas for level in levels], dim=1)
    anchors = torch.cat([level.anchors for level in levels])
    classification = logits.new_zeros((), dtype=torch.float32)
    regression = logits.new_zeros((), dtype=torch.float32)
    foreground_count = logits.new_zeros((), dtype=torch.float32)
    for index, (objects, classes) in enumerate(zip(boxes, labels, strict=True)):
        matched = match(
            box_iou(objects, anchors),
            foreground=matching.foreground,
            background=matching.background,
            low_quality_matches=matching.low_quality_matches,
        )
        used = matched != IGNORED
        foreground = matched >= 0
        targets = torch.zeros_like(logits[index], dtype=torch.float32)
        targets[foreground, classes[matched[foreground]]] = 1.0
        elements = loss.classification.elements(logits[index], targets)
        counted = loss.classification.counted(elements.detach(), targets, anchors, used)
        classification = classification + (elements * counted[:, None]).sum()
        if objects.numel():
            wanted = objects[matched[foreground]]
            boxes_loss = loss.box(deltas[index][foreground], anchors[foreground], wanted)
            regression = regression + boxes_loss.sum()
        foreground_count = foreground_count + foreground.sum()
    scale = _shared_scale(foreground_count)
    # Touching every delta keeps the regression head in the graph of a batch without objects.
    nothing = F.relu(deltas.float().sum() * 0.0)
    return Losses(classification * scale, (regression * loss.box_weight + nothing) * scale)


def _shared_scale(foreground_count: Tensor) -> Tensor:
    """1 / foreground anchors of all processes, times the processes: gradients are averaged."""
    processes = 1
    if dist.is_available() and dist.is_initialized():
        processes = dist.get_world_size()
        dist.all_reduce(foreground_count)
    return processes / foreground_count.clamp(min=1.0)

"""Targets and loss of a batch: classification over anchors, box regression of the foreground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from model_export.config import LossConfig
from model_export.data.samples import CROWD
from model_export.retinanet.matching import BACKGROUND, IGNORED, Matcher, share_inside
from model_export.retinanet.model import Level
from model_export.training.distributed import all_reduce_sum, processes

CROWD_SHARE: Final = 0.5
"""Share of an anchor's area in a crowd from which on it is not background."""


@dataclass(frozen=True, slots=True)
class Losses:
    """The two parts of the loss, each a scalar."""

    classification: Tensor
    regression: Tensor


def assign(
    anchors: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    matcher: Matcher,
) -> list[Tensor]:
    """Return the targets (A,) of each level's anchors (cells, A, 4) for images with `boxes`.

    `boxes` [(n, 4)] and `labels` [(n,)] are each image's. A target is the index of an object,
    BACKGROUND or IGNORED. A CROWD claims no anchor, and background anchors of which half lies in
    one are ignored.
    """
    return [
        _assign(anchors, objects, classes == CROWD, matcher)
        for objects, classes in zip(boxes, labels, strict=True)
    ]


def _assign(anchors: Sequence[Tensor], boxes: Tensor, crowd: Tensor, matcher: Matcher) -> Tensor:
    matched = matcher(anchors, boxes[~crowd])
    if not crowd.any():
        return matched
    places = torch.nonzero(~crowd)[:, 0]
    foreground = matched >= 0
    matched[foreground] = places[matched[foreground]]
    flat = torch.cat([level.flatten(0, 1) for level in anchors])
    inside = (share_inside(flat, boxes[crowd]) >= CROWD_SHARE).any(dim=1)
    return matched.masked_fill(inside & (matched == BACKGROUND), IGNORED)


def normaliser(assigned: Sequence[Tensor]) -> Tensor:
    """Return the factor of the sums over all anchors, a float32 scalar.

    1 / the number of foreground anchors in the whole batch, over all processes, and at least 1
    (Focal Loss, section 4), times the number of processes: their gradients are averaged.
    """
    counts = [(matched >= 0).sum(dtype=torch.float32) for matched in assigned]
    return processes() / all_reduce_sum(torch.stack(counts).sum()).clamp(min=1.0)


def assigned_loss(
    levels: Sequence[Level],
    assigned: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    loss: LossConfig,
    scale: Tensor,
) -> Losses:
    """Return the sums over all anchors, as `assign` gave them their objects, times `scale`."""
    logits = torch.cat([level.logits for level in levels], dim=1)
    deltas = torch.cat([level.deltas for level in levels], dim=1)
    anchors = torch.cat([level.anchors for level in levels])
    classification = logits.new_zeros((), dtype=torch.float32)
    regression = logits.new_zeros((), dtype=torch.float32)
    images = zip(assigned, boxes, labels, strict=True)
    for index, (matched, objects, classes) in enumerate(images):
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
    # Touching every delta keeps the regression head in the graph of a batch without objects.
    nothing = F.relu(deltas.float().sum() * 0.0)
    return Losses(classification * scale, (regression * loss.box_weight + nothing) * scale)

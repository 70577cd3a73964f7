"""Online hard example mining (arXiv 1604.03540): the hardest anchors of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from model_export.retinanet.matching import box_iou


def hard_examples(
    losses: Tensor,
    anchors: Tensor,
    used: Tensor,
    *,
    pool: int,
    nms_iou: float | None,
    always: Tensor | None = None,
) -> Tensor:
    """Return indices of one image's hardest anchors, by falling loss.

    Out of the `pool` anchors of highest loss (A,) among those `used` (A,), and of those that
    `always` (A,) names, an anchor (A, 4) goes when a harder one that stays overlaps it by an IoU
    of more than `nms_iou`.

    >>> anchors = torch.tensor([[0.0, 0, 10, 10], [1.0, 0, 11, 10], [50.0, 0, 60, 10]])
    >>> losses = torch.tensor([2.0, 3.0, 1.0])
    >>> hard_examples(losses, anchors, torch.ones(3).bool(), pool=3, nms_iou=0.7).tolist()
    [1, 2]
    """
    chosen = used.nonzero().flatten()
    hardest = losses[chosen].topk(min(pool, len(chosen))).indices
    chosen = chosen[hardest]
    if always is not None:
        joined = torch.zeros_like(used)
        joined[chosen] = True
        chosen = (joined | always).nonzero().flatten()
    chosen = chosen[losses[chosen].argsort(descending=True, stable=True)]
    if nms_iou is None:
        return chosen
    boxes = anchors[chosen]
    alive = torch.ones(len(chosen), dtype=torch.bool, device=losses.device)
    overlapping = box_iou(boxes, boxes) > nms_iou
    for index in range(len(chosen)):
        # What is behind it in the order falls, if it stays itself.
        alive[index + 1 :] &= ~(overlapping[index, index + 1 :] & alive[index])
    return chosen[alive]

"""Matching of anchors with objects."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BACKGROUND: Final = -1
IGNORED: Final = -2


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) intersection over union of boxes (N, 4) and (M, 4); 0 where both are empty.

    >>> box_iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2], [5.0, 5, 6, 6]]))
    tensor([[0.3333, 0.0000]])
    """
    area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    union = area_a[:, None] + area_b[None, :] - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(shared))


def share_inside(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) share of the area of each of (N, 4) boxes that lies inside each of (M, 4) others.

    >>> share_inside(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 9, 9], [5.0, 5, 6, 6]]))
    tensor([[0.5000, 0.0000]])
    """
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    return shared / (a[:, 2:] - a[:, :2]).prod(dim=-1)[:, None]


def match(
    iou: Tensor,
    *,
    foreground: float = 0.5,
    background: float = 0.4,
    low_quality_matches: bool = True,
) -> Tensor:
    """(A,) int64: the index of each anchor's object, or BACKGROUND, or IGNORED.

    `iou` is (objects, A). An anchor takes its best object at IoU >= `foreground`, is background
    below `background` and ignored between (Focal Loss, section 4). With `low_quality_matches`
    each object also claims every anchor that shares its best IoU, if that is above 0; such an
    anchor learns its own best object, which may be another one.

    >>> match(torch.tensor([[0.6, 0.45, 0.1]]), low_quality_matches=False).tolist()
    [0, -2, -1]
    """
    objects, count = iou.shape
    if objects == 0:
        return torch.full((count,), BACKGROUND, dtype=torch.int64, device=iou.device)
    best, matched = iou.max(dim=0)
    chosen = matched.clone()
    chosen[best < foreground] = IGNORED
    chosen[best < background] = BACKGROUND
    if low_quality_matches:
        best_of_object = iou.max(dim=1, keepdim=True).values
        claimed = ((iou == best_of_object) & (best_of_object > 0)).any(dim=0)
        # As in detectron2 and torchvision, a claimed anchor learns its own best object.
        chosen[claimed] = matched[claimed]
    return chosen

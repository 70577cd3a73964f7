"""Boxes as regression targets relative to anchors, and back (R-CNN, arXiv 1311.2524, appendix C).

(dx, dy) is the shift of the centre in anchor widths and heights, (dw, dh) the logarithm of the
scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000.0 / 16)
"""dw and dh are clamped here before exp, so that an untrained network cannot overflow: an anchor
of 16 px may grow to 1000 px, more than any canvas needs."""


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """(N, 4) deltas that turn anchors (N, 4) into boxes (N, 4), both x1, y1, x2, y2.

    >>> encode(torch.tensor([[5.0, 0, 25, 20]]), torch.tensor([[0.0, 0, 20, 20]]))
    tensor([[0.2500, 0.0000, 0.0000, 0.0000]])
    """
    anchor_centre, anchor_size = _centre_size(anchors)
    centre, size = _centre_size(boxes)
    return torch.cat([(centre - anchor_centre) / anchor_size, (size / anchor_size).log()], dim=-1)


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """(..., 4) boxes from deltas (..., 4) and anchors (..., 4); inverse of `encode`.

    >>> decode(torch.tensor([[0.25, 0, 0, 0]]), torch.tensor([[0.0, 0, 20, 20]]))
    tensor([[ 5.,  0., 25., 20.]])
    """
    anchor_centre, anchor_size = _centre_size(anchors)
    centre = deltas[..., :2] * anchor_size + anchor_centre
    half = deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() * anchor_size / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _centre_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, high - low

"""From predictions to candidate boxes, and the reference non-maximum suppression.

`candidates` is part of the exported graph; `suppress` is what the file's NonMaxSuppression has to
agree with, and serves validation during training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from model_export.retinanet.box_coding import decode
from model_export.retinanet.matching import box_iou
from model_export.retinanet.model import Level

TOP_K: Final = 1000
"""(anchor, class) pairs kept per level (Focal Loss, section 4)."""


def candidates(levels: Sequence[Level], image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (B, N, 4), scores (B, N) and labels (B, N) of each level's best pairs.

    Scores are sigmoid(logit); boxes are clipped to the picture's (B, 2) height and width.
    """
    boxes, scores, labels = [], [], []
    for level in levels:
        classes = level.logits.shape[2]
        flat = level.logits.flatten(1)
        best, index = flat.topk(_smaller(TOP_K, flat.shape[1]), dim=1)
        anchor = index // classes
        deltas = level.deltas.gather(1, anchor[..., None].expand(-1, -1, 4))
        boxes.append(decode(deltas, level.anchors[anchor]))
        scores.append(best.float().sigmoid())
        labels.append(index % classes)
    return _clip(torch.cat(boxes, dim=1), image_sizes), torch.cat(scores, 1), torch.cat(labels, 1)


def suppress(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
) -> Tensor:
    """Indices (D,) of one picture's detections, by falling score.

    Of boxes (N, 4) with score strictly above `score_threshold`, a box goes when a better one of
    its own class overlaps it by strictly more than `iou_threshold`.
    """
    above = torch.nonzero(scores > score_threshold).flatten()
    order = above[scores[above].argsort(descending=True, stable=True)]
    boxes, labels = boxes[order], labels[order]
    alive = torch.ones(len(order), dtype=torch.bool)
    kept: list[int] = []
    for index in range(len(order)):
        if len(kept) == max_detections:
            break
        if alive[index]:
            kept.append(index)
            overlap = box_iou(boxes[index : index + 1], boxes)[0]
            alive &= ~((overlap > iou_threshold) & (labels == labels[index]))
    return order[torch.tensor(kept, dtype=torch.int64)]


def _clip(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    limit = image_sizes.flip(1).to(boxes.dtype)[:, None, :]
    zero = torch.zeros((), dtype=boxes.dtype, device=boxes.device)
    low = torch.minimum(torch.maximum(boxes[..., :2], zero), limit)
    high = torch.minimum(torch.maximum(boxes[..., 2:], zero), limit)
    return torch.cat([low, high], dim=-1)


def _smaller(limit: int, count: int) -> int:
    """The minimum; `sym_min` because the built-in would bake a traced size into the file."""
    smaller: int = torch.sym_min(limit, count)  # type: ignore[no-untyped-call]
    return smaller
